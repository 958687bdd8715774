"""Scores of a script on the BSuite tasks, several seeds each, beside random play and the data's own mean return.

    python benchmark/bsuite_scores.py                                  # three tasks, three seeds, 20,000 updates
    python benchmark/bsuite_scores.py --seeds 0 --total-steps 5000

Writes benchmark/results/bsuite_scores.csv, one line per evaluation, and prints a table. A stopped benchmark goes
on where it was: runs/bsuite_scores/ keeps the runs, of which whole ones are read and others resumed.
"""

import csv
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from data.dataset import open_dataset
from data.record_bsuite import default_folder, make_environment

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Args:
    script: str = "rosmo_bsuite"  # the training script, without .py
    tasks: tuple[str, ...] = ("catch", "cartpole", "mountain_car")  # tasks to train on
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the runs
    total_steps: int = 20_000  # updates of each run
    eval_interval: int = 1_000  # updates between evaluations
    runs: Path = Path("runs/bsuite_scores")  # where the runs are kept
    out: Path = ROOT / "benchmark" / "results" / "bsuite_scores.csv"  # the table to write


def train(args: Args, task: str, seed: int) -> list[dict]:
    """Makes, resumes or only reads one run, and returns its lines of metrics.jsonl."""
    run_dir = args.runs / f"{args.script}__{task}__{seed}__{args.total_steps}__{args.eval_interval}"
    metrics = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if not any(line["step"] == args.total_steps and "eval/return_mean" in line for line in lines):
        fresh = ["--env-id", task, "--seed", seed, "--total-steps", args.total_steps, "--run-dir", run_dir]
        fresh += ["--eval-interval", args.eval_interval, "--checkpoint-interval", args.eval_interval]
        if run_dir.exists():
            fresh = ["--resume", run_dir]
        command = [sys.executable, ROOT / f"{args.script}.py", *fresh]
        if subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL).returncode != 0:
            sys.exit(f"error: the run {run_dir} failed; call this program again to go on with it")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return lines


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


def main(args: Args) -> None:
    rows, summary = [], []
    for task in tqdm(args.tasks, desc="tasks"):
        reached, final, speed = [], [], []
        for seed in tqdm(args.seeds, desc=task, leave=False):
            lines = train(args, task, seed)
            scores = [line for line in lines if "eval/return_mean" in line]
            updates = [line for line in lines if "train/updates_per_second" in line]
            for line in scores:
                values = {name.removeprefix("eval/"): value for name, value in line.items()}
                rows.append({"script": args.script, "task": task, "seed": seed, **values})
            solved = [line["step"] for line in scores if line["eval/normalized_score"] >= 0.9]
            reached.append(str(solved[0]) if solved else "never")
            final.append(scores[-1])
            speed.append(float(np.median([line["train/updates_per_second"] for line in updates])))
        data = open_dataset(default_folder(task, 0.0)).meta
        normalised = [line["eval/normalized_score"] for line in final]
        returns = [line["eval/return_mean"] for line in final]
        summary.append(
            f"| {task} | {random_return(task):.2f} | {data['return_mean']:.2f} | "
            f"{np.mean(returns):.2f} ± {np.std(returns):.2f} | "
            f"{', '.join(f'{value:.3f}' for value in normalised)} | {', '.join(reached)} | {np.median(speed):.0f} |"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.script}, {args.total_steps} updates, {len(args.seeds)} seeds, {platform.machine()}, see {args.out}\n")
    print("| task | random play | mean of the data | return (mean ± std over seeds) | normalised score of each seed | "
          "updates to a score of 0.9 | updates/s |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    print("\n".join(summary))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
