"""What the studies have in common: many runs of the training scripts, side by side and resumable, and their estimates.

A program that uses it names its runs; those that are whole are only read, others made or resumed.
"""

import csv
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rliable import library, metrics
from tqdm import tqdm

from data.dataset import InputError
from data.runs import has_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parent.parent
BOOTSTRAPS = 2000  # resamplings of an interval estimate
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Args:
    """The flags that all programs of studies have."""

    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the runs
    part: int | None = None  # with --parts: make only this part of the runs, 0 to parts - 1, and neither table nor figure
    parts: int = 1  # into how many parts the runs are split
    results: Path = ROOT / "benchmark" / "results"  # where table and figure go


class Run(NamedTuple):
    """One call of a training script. Its flags make it what it is and name its folder."""

    script: str  # without .py
    flags: dict[str, object]  # by name without the dashes; True for a flag without a value
    updates: int
    evaluations: int

    def all_flags(self) -> dict[str, object]:
        return self.flags | {"total-steps": self.updates, "eval-interval": self.updates // self.evaluations}

    def folder(self, runs: Path) -> Path:
        flags = self.all_flags()
        return runs / "__".join([self.script, *(f"{name}={flags[name]}" for name in sorted(flags))])


def evaluations_of(run_dir: Path) -> list[dict]:
    """The evaluations in a run's metrics.jsonl, each with the seconds that updates had taken by then (interpolated)."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    timed = [(line["step"], line["time/update"]) for line in lines if "time/update" in line]
    steps, seconds = np.array([(0, 0.0), *timed]).T
    scored = [line for line in lines if "eval/return_mean" in line]
    return [line | {"update_seconds": float(np.interp(line["step"], steps, seconds))} for line in scored]


def make(run: Run, runs: Path) -> list[dict]:
    """Makes, resumes or only reads one run, and returns its evaluations. Raises InputError if the run fails."""
    run_dir = run.folder(runs)
    if not any(line["step"] == run.updates for line in evaluations_of(run_dir)):
        flags = run.all_flags() | {"run-dir": run_dir, "checkpoint-interval": run.updates // run.evaluations}
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value)) if part != "True"]
        if has_checkpoint(run_dir):
            arguments = ["--resume", str(run_dir)]
        # What runs have in common, those that differ only in the seed for instance, is compiled once.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(runs.absolute() / "compiled")}
        environment = cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | dict(os.environ)
        command = [sys.executable, str(ROOT / f"{run.script}.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode != 0:
            raise InputError(f"{run_dir} stopped with exit code {result.returncode}: {result.stderr.strip()[-500:]}")
    return evaluations_of(run_dir)


def available_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def keep_to_cores(free: queue.SimpleQueue[set[int]]) -> None:
    """Binds a worker, and with it the runs that it starts, to a set of cores of its own: two runs that both use both
    cores take twice as long. (Linux; elsewhere they share all cores.)"""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, free.get())


def make_all(runs: Sequence[Run], folder: Path, workers: int, title: str) -> list[list[dict]]:
    """The evaluations of all runs, in their order. workers: runs side by side, each on cores of its own.

    Raises InputError if a run fails, after those beside it.
    """
    if workers < 1 or any(run.evaluations < 1 or run.updates < run.evaluations for run in runs):
        raise InputError(
            "--workers, --evaluations and --updates are at least 1, and no run has more evaluations than updates"
        )
    cores, free = available_cores(), queue.SimpleQueue[set[int]]()
    for worker in range(workers):
        free.put(set(cores[worker::workers] or [cores[worker % len(cores)]]))
    results: dict[int, list[dict]] = {}
    with ThreadPoolExecutor(workers, initializer=keep_to_cores, initargs=(free,)) as pool:
        futures = {pool.submit(make, run, folder): i for i, run in enumerate(runs)}
        try:
            for future in tqdm(as_completed(futures), total=len(runs), desc=title, unit="run"):
                results[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is running goes on to its end, or gets the interrupt too
            raise
    return [results[i] for i in range(len(runs))]


def part_of(items: list[Item], args: Args) -> list[Item]:
    """The part of the runs that --part and --parts name. Raises InputError if there is no such part, or no run at all."""
    if not items:
        raise InputError("there is nothing to run: name at least one seed, and a game or task")
    if args.part is None:
        return items
    if not 0 <= args.part < args.parts:
        raise InputError(f"--part is from 0 to --parts - 1, not {args.part}")
    return items[args.part :: args.parts]


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def interval_estimates(scores: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Interquartile mean and the ends of its 95 % interval, of scores [runs, tasks] by name."""

    def interquartile_mean(x: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(x)])

    np.random.seed(0)  # rliable 1.2.0 draws from NumPy's global generator, whatever random_state it is given
    means, intervals = library.get_interval_estimates(scores, interquartile_mean, reps=BOOTSTRAPS)
    return {name: (float(means[name][0]), float(low), float(high)) for name, ((low,), (high,)) in intervals.items()}


def final_score(evaluations: list[dict]) -> float:
    """A run's score: the mean of the normalised scores in its second half. evaluations: rows of its table."""
    in_order = sorted(evaluations, key=lambda row: row["step"])
    return float(np.mean([row["normalized_score"] for row in in_order[-(max(1, len(in_order) // 2)) :]]))


def runs_of(rows: list[dict], keep: Callable[[dict], bool]) -> dict[tuple[str, int], list[dict]]:
    """The rows of a table that are kept, by task and seed."""
    runs: dict[tuple[str, int], list[dict]] = {}
    for row in filter(keep, rows):
        runs.setdefault((row["task"], row["seed"]), []).append(row)
    return runs
