"""Studies on BSuite: the methods' scores, and what the data, the filter, the search, noise and the model's size do to them.

    python -m benchmark.bsuite_studies scores                # a study; benchmark/README.md says what each is about
    python -m benchmark.bsuite_studies coverage --xs 0.2 1   # only these places of the x axis

Each writes benchmark/results/bsuite_STUDY.csv, a row for each evaluation, draws bsuite_STUDY.png from it and prints a table.
A run's score is the mean of the evaluations in its second half. Studies share the runs that they have in common.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import tyro

from benchmark import studies
from benchmark.studies import CLONING, Run, cell, print_table
from data.dataset import InputError, run_program
from data.record_bsuite import record_if_missing

ROSMO, MZU = "rosmo_bsuite", "muzero_unplugged_bsuite"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # a script and its flags
    "ROSMO": (ROSMO, {}),
    "ROSMO, authors' filter": ("benchmark.behavior_filter", {"filter": "authors"}),
    "ROSMO, recorded reward": ("benchmark.behavior_filter", {"filter": "recorded"}),
    "one-step, no regularisation": (ROSMO, {"behavior-coef": 0.0}),
    "filtered cloning": (ROSMO, CLONING),
    "filtered cloning, authors' filter": ("benchmark.behavior_filter", {"filter": "authors"} | CLONING),
    "filtered cloning, recorded reward": ("benchmark.behavior_filter", {"filter": "recorded"} | CLONING),
    "MuZero Unplugged": (MZU, {}),
    "MZU-Q": (MZU, {"policy-target": "mzu_q"}),
    "Gumbel MuZero": (MZU, {"policy-target": "gumbel"}),
    "labels of every window": ("benchmark.window_labels", {}),
}
StudyName = Literal["scores", "seeds", "coverage", "filter", "budget", "depth", "noise", "capacity", "labels"]
FOUR = ("ROSMO", "one-step, no regularisation", "filtered cloning", "MuZero Unplugged")


class Study(NamedTuple):
    """Runs of several methods with several values of one flag, or without one (flag None): learning curves are drawn then.

    If ROSMO is not among the methods, it is a level to compare with.
    """

    label: str = ""  # of the x axis
    flag: str | None = None
    own: float | None = None  # the value of runs without the flag: it is left out then, so that studies share the runs
    xs: tuple[float | None, ...] = (None,)
    methods: tuple[str, ...] = ("ROSMO", "MuZero Unplugged")
    fewer: Mapping[str, tuple[float, ...]] = MappingProxyType({})  # the xs of methods that do not have all
    common: Mapping[str, Any] = MappingProxyType({})  # more flags of all runs
    tasks: tuple[str, ...] = ("catch", "cartpole", "mountain_car")
    seeds: int = 3
    updates: int = 50_000
    evaluations: int = 20  # of a run


STUDIES = {  # "scores" is at the paper's settings
    "scores": Study(methods=FOUR, common={"data-fraction": 1.0}, updates=200_000),
    "seeds": Study(methods=FOUR, seeds=10),
    "coverage": Study(
        "fraction of the episodes", "data-fraction", 0.2, (0.01, 0.05, 0.2, 0.5, 1.0),
        methods=("ROSMO", "one-step, no regularisation", "MuZero Unplugged"),
    ),
    "filter": Study(
        "fraction of the episodes", "data-fraction", 0.2, (0.05, 0.2, 1.0),
        methods=tuple(name for name in METHODS if name.startswith(("ROSMO", "filtered"))),
        fewer={name: (1.0,) if "cloning" in name else (0.05, 0.2) for name in METHODS},
    ),
    "budget": Study(
        "simulations per search", "num-simulations", 20, (2, 4, 8, 16, 32),
        methods=("MuZero Unplugged", "MZU-Q", "Gumbel MuZero"), fewer={"MZU-Q": (2, 4, 8), "Gumbel MuZero": (2, 4, 8)},
    ),
    "depth": Study(
        "depth of the search tree (16 simulations)", "search-depth", 16, (1, 2, 4, 8, 16),
        methods=("MuZero Unplugged",), common={"num-simulations": 16},
    ),
    "noise": Study("probability of a random action", "noise", 0.0, (0.0, 0.1, 0.3, 0.5)),
    "capacity": Study("hidden units of the dynamics network", "dynamics-width", 32, (8, 32, 128)),
    "labels": Study(
        methods=("MuZero Unplugged", "labels of every window"), common={"data-fraction": 1.0, "batch-size": 128},
        tasks=("catch", "mountain_car"), updates=30_000, evaluations=30,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    study: tyro.conf.Positional[StudyName]  # which one
    tasks: tuple[str, ...] = ()  # tasks to train on; without it the study's own
    methods: tuple[str, ...] = ()  # without it the study's own
    xs: tuple[float, ...] = ()  # places on the x axis; without it the study's own
    seeds: tuple[int, ...] = ()  # seeds of the runs; without it the study's own
    workers: int = 2  # runs side by side on this machine, each on cores of its own
    runs: Path = Path("runs/bsuite_studies")  # where the runs are kept


def study_of(args: Args) -> Study:
    """The study with what the flags change in it. Raises InputError for a method or a place that it does not have."""
    study = STUDIES[args.study]
    for name, wanted, known in (("methods", args.methods, study.methods), ("xs", args.xs, study.xs)):
        if unknown := [each for each in wanted if each not in known]:
            raise InputError(f"--{name} of {args.study} are of {', '.join(map(str, known))}, not {unknown[0]}")
    return study._replace(
        methods=args.methods or study.methods,
        xs=tuple(x for x in study.xs if not args.xs or x in args.xs),
        tasks=args.tasks or study.tasks,
    )


def runs_of(args: Args) -> list[Run]:
    """All runs of a study. Raises InputError if there are none."""
    study, runs = study_of(args), list[Run]()
    places = [(method, x) for x in study.xs for method in study.methods if x in study.fewer.get(method, study.xs)]
    if not places:
        raise InputError(f"{args.study} has none of these --methods at these --xs")
    if study.flag and "ROSMO" not in STUDIES[args.study].methods:
        places.insert(0, ("ROSMO", None))
    for (method, x), task, seed in itertools.product(places, study.tasks, args.seeds or range(study.seeds)):
        columns = {"study": args.study, "method": method, "x": x, "task": task, "seed": seed}
        flags = {"env-id": task, "seed": seed, "batch-size": 512, "data-fraction": 0.2} | METHODS[method][1]
        if x is not None or study.flag is None:  # else it is a level to compare with
            flags |= study.common
        if study.flag and x not in (None, study.own):
            flags[study.flag] = x
        runs.append(Run(columns, METHODS[method][0], flags, study.updates, study.evaluations))
    return runs


def print_curves(rows: list[dict], study: Study) -> None:
    """A line for each task and method: scores, each seed's score, the best evaluation, and when the score was 0.9."""
    table = [["task", "method", "score", "each seed", "best evaluation", "updates to a score of 0.9"]]
    for task in ("all", *study.tasks):
        some = study.tasks if task == "all" else (task,)
        for method in study.methods:
            mine = [row for row in rows if row["method"] == method and row["task"] in some]
            scores = studies.scores_of(mine, some)
            line = [task, method, cell(studies.spread(scores))]
            if task != "all":
                curves = sorted(studies.runs_of(mine).items())  # by seed, as the scores
                solved = [[row["step"] for row in run if row["normalized_score"] >= 0.9] for _, run in curves]
                line += [", ".join(f"{score:.2f}" for score in scores[:, 0])]
                line += [f"{max(row['normalized_score'] for row in mine):.2f}"]
                line += [", ".join(f"{steps[0]:,}" if steps else "never" for steps in solved)]
            table.append(line + [""] * (len(table[0]) - len(line)))
    print_table(table)


def print_places(drawn: dict[tuple[str, str], dict], rows: list[dict], study: Study) -> None:
    """A line for each task and method: scores at every place of the x axis, and, of one task, each seed's."""
    table = [["task", study.label, *(f"{x:g}" for x in study.xs)]]
    for (task, method), estimates in drawn.items():
        cells = {}
        for x, estimate in estimates.items():
            mine = [row for row in rows if row["method"] == method and row["x"] == x]
            seeds = "" if task == "all" else ": " + ", ".join(f"{s:.2f}" for s in studies.scores_of(mine, (task,))[:, 0])
            cells[x] = cell(estimate) + seeds
        table.append([task, method, *(cells.get(x, cells.get(None, "")) for x in study.xs)])  # a level has all places
    print_table(table)


def main(args: Args) -> None:
    study, runs, table = study_of(args), runs_of(args), args.results / f"bsuite_{args.study}.csv"
    rows = studies.make_all(runs, args, table, record_if_missing)
    if study.flag is None:
        studies.draw_curves(rows, study.tasks, table.with_suffix(".png"))
        print_curves(rows, study)
    else:
        print_places(studies.draw(rows, study.tasks, study.label, table.with_suffix(".png")), rows, study)
    print(f"\nIn brackets the {studies.name_of_spread(len({row['seed'] for row in rows}))} of one task")
    print(f"{len(runs)} runs of {study.updates:,} updates: {table} and its figure")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
