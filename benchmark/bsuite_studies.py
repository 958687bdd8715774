"""Studies on BSuite: coverage of the data, reward of the behaviour filter, search budget and depth, noise, model capacity.

    python -m benchmark.bsuite_studies coverage              # how much of the data there is
    python -m benchmark.bsuite_studies reward                # the behaviour filter's reward: the model's or the recorded one
    python -m benchmark.bsuite_studies budget                # simulations per search
    python -m benchmark.bsuite_studies depth                 # depth of a search of 16 simulations
    python -m benchmark.bsuite_studies noise                 # stochastic tasks
    python -m benchmark.bsuite_studies capacity              # width of the dynamics network
    python -m benchmark.bsuite_studies coverage --workers 8  # eight runs side by side
    python -m benchmark.bsuite_studies coverage --xs 0.2 1   # only these places of the x axis
    python -m benchmark.bsuite_studies budget --results DIR --runs DIR2    # both empty: makes every run anew
    sbatch benchmark/studies.slurm bsuite_studies coverage   # on a cluster; afterwards call it once more as above

Each writes benchmark/results/bsuite_STUDY.csv, one line per evaluation, and draws bsuite_STUDY.png from it: the
interquartile mean over runs and tasks with 95 % stratified bootstrap intervals (Agarwal et al. 2021). It prints the same
for all tasks and, with each seed's score, for each task. A run's score is the mean of the evaluations in its second half. A
stopped study goes on where it was, and studies share the runs that they have in common: those that are whole in a table of
--results or in runs/bsuite_studies/ are read, others made or resumed.

All studies but capacity make 50,000 updates with the paper's batch of 512 windows. Capacity has 128 windows, fewer updates,
and no cartpole, where an update of a search costs several times what it does on catch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from benchmark import studies
from benchmark.bsuite_scores import METHODS, Method
from benchmark.studies import Run, Setting
from data.dataset import InputError, run_program
from data.record_bsuite import record_if_missing

FRACTION = 0.2  # of the episodes, in all studies but coverage


class Study(NamedTuple):
    """Runs with several values of one flag. If ROSMO is not among the methods, it is a level to compare with."""

    label: str  # of the x axis
    flag: str
    own: float  # the value of runs without the flag: it is left out then, so that studies share the runs
    xs: tuple[float, ...]
    methods: tuple[Method, ...] = ("ROSMO", "MuZero Unplugged")
    fewer: tuple[tuple[Method, tuple[float, ...]], ...] = ()  # the xs of methods that do not have all
    common: tuple[tuple[str, Any], ...] = ()  # more flags of the methods
    updates: tuple[tuple[str, int], ...] = (("catch", 50_000), ("cartpole", 50_000), ("mountain_car", 50_000))  # by task
    evaluations: int = 20  # of a run
    batch_size: int = 512  # windows per update


STUDIES = {
    "coverage": Study(
        "fraction of the episodes", "data-fraction", FRACTION, (0.01, 0.05, 0.2, 0.5, 1.0),
        methods=("ROSMO", "one-step, no regularisation", "MuZero Unplugged"),
    ),
    "reward": Study(
        "fraction of the episodes", "data-fraction", FRACTION, (0.05, 0.2),
        methods=("ROSMO", "ROSMO, authors' filter", "ROSMO, recorded reward"),
    ),
    "budget": Study(
        "simulations per search", "num-simulations", 20, (2, 4, 8, 16, 32),
        methods=("MuZero Unplugged", "MZU-Q", "Gumbel MuZero"), fewer=(("MZU-Q", (2, 4, 8)), ("Gumbel MuZero", (2, 4, 8))),
    ),
    "depth": Study(
        "depth of the search tree (16 simulations)", "search-depth", 16, (1, 2, 4, 8, 16),
        methods=("MuZero Unplugged",), common=(("num-simulations", 16),),
    ),
    "noise": Study("probability of a random action", "noise", 0.0, (0.0, 0.1, 0.3, 0.5)),
    "capacity": Study(
        "hidden units of the dynamics network", "dynamics-width", 32, (8, 32, 128),
        updates=(("catch", 30_000), ("mountain_car", 10_000)), evaluations=10, batch_size=128,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    study: tyro.conf.Positional[Literal["coverage", "reward", "budget", "depth", "noise", "capacity"]]  # which one
    tasks: tuple[str, ...] = ()  # tasks to train on; without it the study's own
    xs: tuple[float, ...] = ()  # places on the x axis; without it the study's own
    updates: int = 0  # of each run; 0 for the study's own
    batch_size: int = 0  # windows per update; 0 for the study's own, the paper's is 512
    evaluations: int = 0  # of each run; 0 for the study's own
    workers: int = 2  # runs side by side on this machine, each on cores of its own
    runs: Path = Path("runs/bsuite_studies")  # where the runs are kept


def settings_of(study: Study) -> list[Setting]:
    """The settings of a study."""
    level = [] if "ROSMO" in study.methods else [Setting("ROSMO", None, *METHODS["ROSMO"])]
    flags = {x: dict(study.common) | ({study.flag: x} if x != study.own else {}) for x in study.xs}
    places = [(method, x) for x in study.xs for method in study.methods if x in dict(study.fewer).get(method, study.xs)]
    some = [(method, x, *METHODS[method]) for method, x in places]
    return level + [Setting(method, x, script, own | flags[x]) for method, x, script, own in some]


def run_of(args: Args, setting: Setting, task: str, seed: int) -> Run:
    """The run of one setting on one task. Raises InputError if nothing says how long it is."""
    study = STUDIES[args.study]
    columns = {"study": args.study, "method": setting.method, "x": setting.x, "task": task, "seed": seed}
    flags = {"env-id": task, "seed": seed, "batch-size": args.batch_size or study.batch_size}
    flags |= {"data-fraction": FRACTION} | setting.flags
    updates = args.updates or dict(study.updates).get(task)
    if updates is None:
        raise InputError(f"--updates is needed for {task}, which {args.study} does not have by default")
    return Run(columns, setting.script, flags, updates, args.evaluations or study.evaluations)


def main(args: Args) -> None:
    study = STUDIES[args.study]
    if unknown := set(args.xs) - set(study.xs):
        raise InputError(f"--xs of {args.study} are of {', '.join(map(str, study.xs))}, not {min(unknown):g}")
    study = study._replace(xs=tuple(x for x in study.xs if not args.xs or x in args.xs))
    tasks = args.tasks or tuple(dict(study.updates))
    runs = [run_of(args, setting, task, seed) for setting in settings_of(study) for task in tasks for seed in args.seeds]
    table = args.results / f"bsuite_{args.study}.csv"
    rows = studies.make_all(runs, args, table, record_if_missing)
    if args.part is None:
        drawn = studies.draw(rows, tasks, study.label, table.with_suffix(".png"))
        head = ["task", study.label, *(f"{x:g}" for x in study.xs)]
        print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        for (task, method), estimates in drawn.items():
            mine = [row for row in rows if row["method"] == method]
            cells = {}
            for x, (mean, low, high) in zip(sorted({row["x"] for row in mine}), estimates, strict=True):
                cells[x] = f"{mean:.2f} [{low:.2f}, {high:.2f}]"
                if task != "all":
                    seeds = studies.scores_of([row for row in mine if row["x"] == x], (task,))[:, 0]
                    cells[x] += f": {', '.join(f'{score:.2f}' for score in seeds)}"
            line = [cells.get(x, cells.get(None, "")) for x in study.xs]  # a level is the same at every x
            print(f"| {task} | {method} | {' | '.join(line)} |")
        hours = sum({row["run"]: row["update_seconds"] for row in rows}.values()) / 3600  # each run's last
        print(f"\n{table} and its figure: {len(args.seeds)} seeds, batch {args.batch_size or study.batch_size}")
        print(f"{len(runs)} runs, {hours:.1f} hours of training")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
