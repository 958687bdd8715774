"""The paper's studies on BSuite: coverage of the data, search budget and depth, noise, model capacity.

    python benchmark/bsuite_studies.py coverage              # how much of the data there is
    python benchmark/bsuite_studies.py budget                # simulations per search
    python benchmark/bsuite_studies.py depth                 # depth of a search of 16 simulations
    python benchmark/bsuite_studies.py noise                 # stochastic tasks
    python benchmark/bsuite_studies.py capacity              # width of the dynamics network
    python benchmark/bsuite_studies.py coverage --workers 8  # eight runs side by side
    sbatch benchmark/studies.slurm bsuite_studies coverage    # on a cluster; afterwards call it once more as above

Each writes benchmark/results/bsuite_STUDY.csv, one line per evaluation, and draws bsuite_STUDY.png from it: the
interquartile mean over runs and tasks with 95 % stratified bootstrap intervals (Agarwal et al. 2021). A run's score is
the mean of the evaluations in its second half. A stopped study goes on where it was, and studies share the runs that they
have in common: runs/bsuite_studies/ keeps them; whole ones are read, others resumed.

SCALES is what a few hours of two cores allow. With little data and few updates a search has learnt nothing on cartpole
yet, and its episodes of 1,001 steps make ten times more labels than catch: only the study of coverage has that task.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import studies
import tyro
from studies import Run

from data.dataset import InputError
from data.record_bsuite import record_if_missing
from data.runs import run_program

FRACTION = 0.2  # of the episodes, in all studies but coverage


class Scale(NamedTuple):
    """How long the runs of a study are: updates by task, and how many evaluations they are parted by."""

    updates: dict[str, int]
    evaluations: int


SCALES = {
    "coverage": Scale({"catch": 10_000, "cartpole": 6_000, "mountain_car": 6_000}, 5),
    **dict.fromkeys(("budget", "depth", "noise", "capacity"), Scale({"catch": 30_000, "mountain_car": 10_000}, 10)),
}


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    study: tyro.conf.Positional[Literal["coverage", "budget", "depth", "noise", "capacity"]]  # which one
    tasks: tuple[str, ...] = ()  # tasks to train on; without it those of SCALES
    updates: tuple[int, ...] = ()  # of each run, task by task; without it as in SCALES
    batch_size: int = 128  # windows per update; the paper's is 512
    evaluations: int = 0  # of each run; 0 for as in SCALES
    workers: int = 2  # runs side by side on this machine, each on cores of its own
    runs: Path = Path("runs/bsuite_studies")  # where the runs are kept


class Point(NamedTuple):
    """One setting: a line of the figure and its place on the x axis (None: a level for the whole axis)."""

    method: str
    x: float | None
    script: str
    flags: dict[str, object]


METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "ROSMO": ("rosmo_bsuite", {}),
    "one-step, no regularisation": ("rosmo_bsuite", {"behavior-coef": 0.0}),
    "MuZero Unplugged": ("muzero_unplugged_bsuite", {}),
    "MZU-Q": ("muzero_unplugged_bsuite", {"policy-target": "mzu_q"}),
    "Gumbel MuZero": ("muzero_unplugged_bsuite", {"policy-target": "gumbel"}),
}
LABELS = {
    "coverage": "fraction of the episodes",
    "budget": "simulations per search",
    "depth": "depth of the search tree (16 simulations)",
    "noise": "probability of a random action",
    "capacity": "hidden units of the dynamics network",
}


def points_of(study: str) -> list[Point]:
    """The settings of a study."""

    def point(method: str, x: float | None, **flags: object) -> Point:
        script, own = METHODS[method]
        return Point(method, x, script, {name.replace("_", "-"): value for name, value in (own | flags).items()})

    compared = ("ROSMO", "MuZero Unplugged")
    if study == "coverage":
        methods, fractions = (
            ("ROSMO", "one-step, no regularisation", "MuZero Unplugged"),
            (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        )
        return [point(method, x, data_fraction=x) for x in fractions for method in methods]
    if study == "budget":
        searches = ("MuZero Unplugged", "MZU-Q", "Gumbel MuZero")
        budgets = (2, 4, 8, 16, 32)
        return [point("ROSMO", None)] + [point(method, x, num_simulations=x) for x in budgets for method in searches]
    if study == "depth":
        depths = {x: {"search_depth": x} if x < 16 else {} for x in (1, 2, 4, 8, 16)}
        runs = [point("MuZero Unplugged", x, num_simulations=16, **depth) for x, depth in depths.items()]
        return [point("ROSMO", None), *runs]
    if study == "noise":
        levels = {x: {"noise": x} if x else {} for x in (0.0, 0.1, 0.3, 0.5)}
        return [point(method, x, **noise) for x, noise in levels.items() for method in compared]
    widths = {x: {"dynamics_width": x} if x != 32 else {} for x in (8, 32, 128)}
    return [point(method, x, **width) for x, width in widths.items() for method in compared]


def scaled(args: Args) -> Args:
    """The same settings, with SCALES for what was left open. Raises InputError for settings that do not fit together."""
    scale = SCALES[args.study]
    tasks = args.tasks or tuple(scale.updates)
    if not args.updates and (unknown := [task for task in tasks if task not in scale.updates]):
        raise InputError(f"--updates is needed for {', '.join(unknown)}, which {args.study} does not have by default")
    updates = args.updates or tuple(scale.updates[task] for task in tasks)
    if len(updates) != len(tasks):
        raise InputError(f"--updates needs one number for each of the {len(tasks)} tasks")
    return dataclasses.replace(args, tasks=tasks, updates=updates, evaluations=args.evaluations or scale.evaluations)


def run_of(args: Args, point: Point, task: str, seed: int) -> Run:
    """The run of one setting on one task."""
    flags: dict[str, object] = {"env-id": task, "seed": seed, "batch-size": args.batch_size, "data-fraction": FRACTION}
    updates = dict(zip(args.tasks, args.updates, strict=True))[task]
    return Run(point.script, flags | point.flags, updates, args.evaluations)


def scores_of(rows: list[dict], method: str, x: float | None, tasks: tuple[str, ...]) -> np.ndarray:
    """Scores [runs, tasks] of one setting."""
    runs = studies.runs_of(rows, lambda row: row["method"] == method and row["x"] == x)
    seeds = sorted({seed for _, seed in runs})
    return np.array([[studies.final_score(runs[task, seed]) for task in tasks] for seed in seeds])


def draw(args: Args, rows: list[dict], path: Path, log: Callable[[str], None]) -> None:
    """Draws all tasks together and each task apart, and logs the numbers of the first panel."""
    panels = {"all tasks": args.tasks} | {task: (task,) for task in args.tasks}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    places = sorted({row["x"] for row in rows if row["x"] is not None})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True, layout="constrained")
    for axis, (title, tasks) in zip(axes, panels.items(), strict=True):
        for i, method in enumerate(methods):
            xs = sorted({row["x"] for row in rows if row["method"] == method and row["x"] is not None})
            scores = {str(x): scores_of(rows, method, x, tasks) for x in xs or [None]}
            estimates = np.array(list(studies.interval_estimates(scores).values()))  # [places, 3]
            if title == "all tasks":
                cells = (f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in estimates)
                log(f"| {method} | {' | '.join(cells)} |")
            if not xs:  # a level to compare with
                axis.axhline(estimates[0, 0], color=f"C{i}", linestyle="--", label=method)
                axis.axhspan(estimates[0, 1], estimates[0, 2], color=f"C{i}", alpha=0.15, linewidth=0)
                continue
            axis.plot(xs, estimates[:, 0], color=f"C{i}", marker="o", markersize=4, label=method)
            axis.fill_between(xs, estimates[:, 1], estimates[:, 2], color=f"C{i}", alpha=0.15, linewidth=0)
        if args.study != "noise":
            axis.set_xscale("log")
        axis.set_xticks(places, [f"{x:g}" for x in places], minor=False)
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel(LABELS[args.study])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("normalised score (IQM, 95 % interval)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> int:
    args = scaled(args)
    settings = [(point, task, seed) for point in points_of(args.study) for task in args.tasks for seed in args.seeds]
    settings = studies.part_of(settings, args)
    for task, noise in sorted({(task, float(str(point.flags.get("noise", 0.0)))) for point, task, _ in settings}):
        record_if_missing(task, noise)
    results = studies.make_all([run_of(args, *setting) for setting in settings], args.runs, args.workers, args.study)
    if args.part is not None:
        return 0
    rows = []
    for (point, task, seed), evaluations in zip(settings, results, strict=True):
        for line in evaluations:
            values = {name.removeprefix("eval/"): value for name, value in line.items()}
            rows.append({"study": args.study, "method": point.method, "x": point.x, "task": task, "seed": seed, **values})
    table = args.results / f"bsuite_{args.study}.csv"
    studies.write_table(table, rows)
    places = sorted({row["x"] for row in rows if row["x"] is not None})
    print(f"| {LABELS[args.study]} | {' | '.join(f'{x:g}' for x in places)} |\n| --- |{' --- |' * len(places)}")
    draw(args, rows, table.with_suffix(".png"), print)
    updates = dict(zip(args.tasks, args.updates, strict=True))
    print(f"\n{table} and its figure: {len(args.seeds)} seeds, {updates} updates, batch {args.batch_size}")
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    run_program(lambda: main(arguments))
