"""Scores of the methods on BSuite's tasks at the paper's settings: learning curves and a table.

    python -m benchmark.bsuite_scores                            # four methods, three tasks, three seeds, 200,000 updates
    python -m benchmark.bsuite_scores --methods ROSMO --tasks catch --seeds 0 --updates 5000 --evaluations 5 --name short
    python -m benchmark.bsuite_scores --name bsuite_labels --methods "MuZero Unplugged" "labels of every window" \
        --tasks catch mountain_car --batch-size 128 --updates 30000 --evaluations 30 --last 30
    python -m benchmark.bsuite_scores --results DIR --runs DIR2  # both empty: makes every run anew

Writes benchmark/results/NAME.csv, one line per evaluation, and prints a table. NAME.png has the curves against updates,
NAME_hours.png against the time of training; the interquartile mean over tasks and seeds has 95 % stratified bootstrap
intervals. A run that is whole in a table of --results or in --runs is read, others are made or resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmark import studies
from benchmark.studies import Run
from data.dataset import run_program
from data.record_bsuite import record_if_missing

Method = Literal[
    "ROSMO", "one-step, no regularisation", "filtered cloning",
    "MuZero Unplugged", "MZU-Q", "Gumbel MuZero", "labels of every window",
    "ROSMO, authors' filter", "ROSMO, recorded reward", "filtered cloning, authors' filter",
    "filtered cloning, recorded reward",
]  # fmt: skip
CLONING = {"policy-coef": 0.0, "sampling": True}  # it acts as its policy says
METHODS: dict[Method, tuple[str, dict[str, Any]]] = {  # a script and its flags
    "ROSMO": ("rosmo_bsuite", {}),
    "one-step, no regularisation": ("rosmo_bsuite", {"behavior-coef": 0.0}),
    "filtered cloning": ("rosmo_bsuite", CLONING),
    "MuZero Unplugged": ("muzero_unplugged_bsuite", {}),
    "MZU-Q": ("muzero_unplugged_bsuite", {"policy-target": "mzu_q"}),
    "Gumbel MuZero": ("muzero_unplugged_bsuite", {"policy-target": "gumbel"}),
    "labels of every window": ("benchmark.window_labels", {}),
    "ROSMO, authors' filter": ("benchmark.behavior_filter", {"filter": "authors"}),
    "ROSMO, recorded reward": ("benchmark.behavior_filter", {"filter": "recorded"}),
    "filtered cloning, authors' filter": ("benchmark.behavior_filter", {"filter": "authors"} | CLONING),
    "filtered cloning, recorded reward": ("benchmark.behavior_filter", {"filter": "recorded"} | CLONING),
}
BATCH_SIZE = 512  # the paper's, and the scripts' own


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    methods: tuple[Method, ...] = ("ROSMO", "one-step, no regularisation", "filtered cloning", "MuZero Unplugged")
    tasks: tuple[str, ...] = ("catch", "cartpole", "mountain_car")  # tasks to train on
    updates: int = 200_000  # of each run
    evaluations: int = 20  # of each run
    batch_size: int = BATCH_SIZE  # windows per update
    last: int = 10  # evaluations that the table sums up
    name: str = "bsuite_scores"  # of the table and the figures
    runs: Path = Path("runs/bsuite")  # where the runs are kept


def runs_of(args: Args) -> list[Run]:
    """The runs of all methods, tasks and seeds."""
    batch_size = {"batch-size": args.batch_size} if args.batch_size != BATCH_SIZE else {}
    return [
        Run(
            {"method": method, "task": task, "seed": seed},
            METHODS[method][0],
            {"env-id": task, "seed": seed} | batch_size | METHODS[method][1],
            args.updates,
            args.evaluations,
        )
        for seed in args.seeds
        for task in args.tasks
        for method in args.methods
    ]


def summary(runs: Sequence[list[dict]], last: int) -> list[str]:
    """Cells of the table from the rows of some runs: the last evaluations, the best one, when the score was 0.9."""
    ends = np.array([[row["normalized_score"] for row in run[-last:]] for run in runs])
    low, high = np.quantile(ends, (0.25, 0.75))
    solved = [[row for row in run if row["normalized_score"] >= 0.9] for run in runs]
    return [
        f"{ends.mean():.2f} [{low:.2f}, {high:.2f}]",
        ", ".join(f"{end.mean():.2f}" for end in ends),
        f"{max(row['normalized_score'] for run in runs for row in run):.2f}",
        ", ".join(f"{found[0]['step']:,}" if found else "never" for found in solved),
        ", ".join(f"{found[0]['update_seconds'] / 60:.1f}" if found else "never" for found in solved),
        f"{np.median([run[-1]['update_seconds'] for run in runs]) / 3600:.2f} h",
    ]


def draw(rows: list[dict], tasks: Sequence[str], path: Path, hours: bool) -> None:
    """Draws the scores against updates or hours of training: a panel for each task, its seeds thin and their mean thick,
    and one for the interquartile mean of all; against hours, a run that has ended keeps its last score there."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks) + 1, figsize=(4 * (len(tasks) + 1), 3.6), sharey=True, layout="constrained")
    for i, method in enumerate(methods):
        runs = studies.runs_of([row for row in rows if row["method"] == method])
        seeds = sorted({seed for _, seed in runs})
        xs = {key: np.array([row["update_seconds"] / 3600 if hours else row["step"] for row in runs[key]]) for key in runs}
        scores = {key: np.array([row["normalized_score"] for row in runs[key]]) for key in runs}
        for axis, task in zip(axes[1:], tasks, strict=True):
            x = np.mean([xs[task, seed] for seed in seeds], axis=0)
            for seed in seeds:
                axis.plot(x, scores[task, seed], color=f"C{i}", linewidth=0.6, alpha=0.6)
            axis.plot(x, np.mean([scores[task, seed] for seed in seeds], axis=0), color=f"C{i}", linewidth=2)
        places = xs[tasks[0], seeds[0]]
        if hours:
            places = np.geomspace(max(x[0] for x in xs.values()), max(x[-1] for x in xs.values()), 30)
        last = {key: scores[key][np.searchsorted(xs[key], places, "right") - 1] for key in runs}
        at = np.array([[last[task, seed] for task in tasks] for seed in seeds])  # [seeds, tasks, places]
        estimates = studies.interval_estimates({str(j): at[:, :, j] for j in range(len(places))})
        middle, low, high = np.array(list(estimates.values())).T
        axes[0].plot(places, middle, color=f"C{i}", linewidth=2, label=method)
        axes[0].fill_between(places, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("all (IQM, 95 % interval)", *tasks), strict=True):
        axis.set_title(title)
        axis.set_xlabel("hours of training" if hours else "updates")
        axis.set_xscale("log" if hours else "linear")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("normalised score")
    axes[0].set_ylim(-0.25, 1.1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> None:
    def score(run: list[dict]) -> float:
        return float(np.mean([row["normalized_score"] for row in run[-args.last :]]))

    runs, table = runs_of(args), args.results / f"{args.name}.csv"
    rows = studies.make_all(runs, args, table, record_if_missing)
    if args.part is not None:
        return
    print(f"{args.updates:,} updates, batch {args.batch_size}, seeds {', '.join(map(str, args.seeds))}\n")
    head = [
        "task",
        "method",
        f"last {min(args.last, args.evaluations)} evaluations: mean [quartiles]",
        "mean of each seed",
        "best evaluation",
    ]
    head += ["updates to a score of 0.9", "minutes to it", "all updates"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for task in args.tasks:
        for method in args.methods:
            of_it = studies.runs_of([row for row in rows if row["task"] == task and row["method"] == method])
            print(f"| {task} | {method} | {' | '.join(summary(list(of_it.values()), args.last))} |")
    print("\n| method | IQM over tasks and seeds [95 % interval] |\n| --- | --- |")
    for method in args.methods:
        scores = studies.scores_of([row for row in rows if row["method"] == method], args.tasks, score)
        middle, low, high = studies.interval_estimates({method: scores})[method]
        print(f"| {method} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
    draw(rows, args.tasks, table.with_suffix(".png"), hours=False)
    draw(rows, args.tasks, table.with_name(f"{args.name}_hours.png"), hours=True)


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
