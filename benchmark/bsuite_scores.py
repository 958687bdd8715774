"""Scores of a script on the BSuite tasks, several seeds each, beside random play and the data's own mean return.

    python -m benchmark.bsuite_scores                                  # three tasks, three seeds, 20,000 updates
    python -m benchmark.bsuite_scores --seeds 0 --updates 5000 --evaluations 5
    python -m benchmark.bsuite_scores --results DIR                    # with an empty DIR: makes every run anew

Writes benchmark/results/bsuite_scores.csv, one line per evaluation, and prints a table. A stopped benchmark goes on
where it was: runs that are whole in a table of --results or in runs/bsuite_scores/ are read, others made or resumed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmark import studies
from benchmark.studies import Run
from data.dataset import open_dataset, run_program
from data.record_bsuite import default_folder, make_environment, record_if_missing


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    script: Literal["rosmo_bsuite", "muzero_unplugged_bsuite"] = "rosmo_bsuite"  # the training script
    tasks: tuple[str, ...] = ("catch", "cartpole", "mountain_car")  # tasks to train on
    updates: int = 20_000  # of each run
    evaluations: int = 20  # of each run
    runs: Path = Path("runs/bsuite_scores")  # where the runs are kept


def random_return(task: str, episodes: int = 100) -> float:
    """The mean return of uniform actions."""
    environment, random, returns = make_environment(task, seed=0), np.random.default_rng(0), []
    for _ in range(episodes):
        timestep, total = environment.reset(), 0.0
        while not timestep.last():
            timestep = environment.step(int(random.integers(3)))
            total += timestep.reward
        returns.append(total)
    return float(np.mean(returns))


def summary(task: str, runs: list[list[dict]]) -> str:
    """A line of the printed table, from the rows of a task's runs."""
    solved = [[row["step"] for row in run if row["normalized_score"] >= 0.9] for run in runs]
    last = [run[-1] for run in runs]
    returns, seconds = [row["return_mean"] for row in last], [row["update_seconds"] for row in last]
    folder = default_folder(task, 0.0)
    cells = [
        task,
        f"{random_return(task):.2f}",
        f"{open_dataset(folder).meta['return_mean']:.2f}" if folder.exists() else "",
        f"{np.mean(returns):.2f} ± {np.std(returns):.2f}",
        ", ".join(f"{row['normalized_score']:.3f}" for row in last),
        ", ".join(str(steps[0]) if steps else "never" for steps in solved),
        "" if None in seconds else f"{np.median(seconds):.0f} s",  # older tables lack it
    ]
    return f"| {' | '.join(cells)} |"


def main(args: Args) -> None:
    runs = [
        Run({"script": args.script, "task": task, "seed": seed}, args.script, {"env-id": task, "seed": seed},
            args.updates, args.evaluations)
        for task in args.tasks
        for seed in args.seeds
    ]  # fmt: skip
    table = args.results / "bsuite_scores.csv"
    rows = studies.make_all(runs, args, table, record_if_missing)
    if args.part is None:
        print(f"{args.script}, {args.updates} updates, {len(args.seeds)} seeds, see {table}\n")
        print("| task | random play | mean of the data | return (mean ± std over seeds) | normalised score of each seed | "
              "updates to a score of 0.9 | time of all updates |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
        for task in args.tasks:
            print(summary(task, list(studies.runs_of([row for row in rows if row["task"] == task]).values())))


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
