"""MuZero Unplugged's last checkpoints of the study "seeds", scored as trained (root noise 0.25, temperature 1) and greedily.

    python -m benchmark.greedy_search    # of the whole runs of `bsuite_studies seeds` whose checkpoints are here

Writes benchmark/results/bsuite_greedy.csv, a row for each run, and prints a table.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from benchmark import bsuite_studies, studies
from data.dataset import InputError, run_program

SCORES: dict[str, list[str]] = {  # columns of the table, and flags
    "as_trained": [],
    "greedy": ["--temperature", "0", "--dirichlet-fraction", "0"],
}


@dataclass(frozen=True)
class Args:
    episodes: int = 160  # of each score
    runs: Path = Path("runs/bsuite_studies")  # where the runs are kept
    results: Path = studies.ROOT / "benchmark" / "results"  # where the table goes


def score(run_dir: Path, episodes: int, flags: list[str]) -> float:
    """The normalised score of a run's last checkpoint, with other flags."""
    command = [sys.executable, str(studies.ROOT / "muzero_unplugged_bsuite.py"), "--resume", str(run_dir), "--eval-only"]
    command += ["--eval-episodes", str(episodes), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise InputError(f"{run_dir} cannot be scored: {result.stderr.strip()[-500:]}")
    return json.loads(result.stdout.splitlines()[-1])["eval/normalized_score"]


def main(args: Args) -> None:
    table = args.results / "bsuite_greedy.csv"
    rows = {(row["run"], row["episodes"]): row for row in studies.read_table(table)}
    episodes = str(args.episodes)
    runs = bsuite_studies.runs_of(bsuite_studies.Args(study="seeds", methods=("MuZero Unplugged",)))
    whole = [run for run in runs if run.is_whole(studies.evaluations_of(args.runs / run.name()))]
    for run in tqdm([run for run in whole if (run.name(), episodes) not in rows], unit="run"):
        columns = {name: str(run.columns[name]) for name in ("task", "seed")} | {"episodes": episodes}
        scores = {name: score(args.runs / run.name(), args.episodes, flags) for name, flags in SCORES.items()}
        rows[run.name(), episodes] = columns | {name: str(value) for name, value in scores.items()} | {"run": run.name()}
        studies.write_table(table, [], list(rows.values()))
    lines = [["task", "seeds", "as trained", "each", "greedy", "each"]]
    for task in bsuite_studies.STUDIES["seeds"].tasks:
        mine = [row for row in rows.values() if (row["task"], row["episodes"]) == (task, episodes)]
        mine.sort(key=lambda row: int(row["seed"]))
        lines += [[task, ", ".join(row["seed"] for row in mine)]] if mine else []
        for x in (np.array([[float(row[name])] for row in mine]) for name in SCORES if mine):
            lines[-1] += [studies.cell(studies.spread(x)), ", ".join(f"{v:.2f}" for v in x[:, 0])]
    studies.print_table(lines)


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
