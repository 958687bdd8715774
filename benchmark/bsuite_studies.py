"""The paper's studies on BSuite: coverage of the data, search budget and depth, noise, model capacity.

    python benchmark/bsuite_studies.py coverage              # how much of the data there is
    python benchmark/bsuite_studies.py budget                # simulations per search
    python benchmark/bsuite_studies.py depth                 # depth of a search of 16 simulations
    python benchmark/bsuite_studies.py noise                 # stochastic tasks
    python benchmark/bsuite_studies.py capacity              # width of the dynamics network
    python benchmark/bsuite_studies.py coverage --workers 8  # eight runs side by side
    sbatch benchmark/bsuite_studies.slurm coverage           # on a cluster; afterwards call it once more as above

Each writes benchmark/results/bsuite_STUDY.csv, one line per evaluation, and draws bsuite_STUDY.png from it: the
interquartile mean over runs and tasks with 95 % stratified bootstrap intervals (Agarwal et al. 2021). A run's score is
the mean of the evaluations in its second half. A stopped study goes on where it was, and studies share the runs that they
have in common: runs/bsuite_studies/ keeps them; whole ones are read, others resumed.

SCALES is what a few hours of two cores allow. With little data and few updates a search has learnt nothing on cartpole
yet, and its episodes of 1,001 steps make ten times more labels than catch: only the study of coverage has that task.
"""

import csv
import dataclasses
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from rliable import library, metrics
from tqdm import tqdm

from data.dataset import InputError
from data.record_bsuite import record_if_missing
from data.runs import run_program

ROOT = Path(__file__).resolve().parent.parent
FRACTION = 0.2  # of the episodes, in all studies but coverage


class Scale(NamedTuple):
    """How long the runs of a study are: updates by task, and how many evaluations they are parted by."""

    updates: dict[str, int]
    evaluations: int


SCALES = {
    "coverage": Scale({"catch": 10_000, "cartpole": 6_000, "mountain_car": 6_000}, 5),
    **dict.fromkeys(("budget", "depth", "noise", "capacity"), Scale({"catch": 30_000, "mountain_car": 10_000}, 10)),
}


@dataclass(frozen=True)
class Args:
    study: tyro.conf.Positional[Literal["coverage", "budget", "depth", "noise", "capacity"]]  # which one
    tasks: tuple[str, ...] = ()  # tasks to train on (default: the study's, see SCALES)
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the runs
    updates: tuple[int, ...] = ()  # of each run, task by task (default: SCALES)
    batch_size: int = 128  # windows per update; the paper's is 512
    evaluations: int = 0  # of each run (default: SCALES)
    workers: int = 2  # runs side by side on this machine, each on cores of its own
    part: int | None = None  # with --parts: make only this part of the runs, 0 to parts - 1, and neither table nor figure
    parts: int = 1  # into how many parts the runs are split
    runs: Path = Path("runs/bsuite_studies")  # where the runs are kept
    results: Path = ROOT / "benchmark" / "results"  # where table and figure go


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
    if args.part is not None and not 0 <= args.part < args.parts:
        raise InputError(f"--part is from 0 to --parts - 1, not {args.part}")
    return dataclasses.replace(args, tasks=tasks, updates=updates, evaluations=args.evaluations or scale.evaluations)


def available_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def keep_to_cores(free: queue.SimpleQueue[set[int]]) -> None:
    """Binds a worker, and with it the runs that it starts, to a set of cores of its own: two runs that both use both
    cores take twice as long. (Linux; elsewhere they share all cores.)"""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, free.get())


def train(args: Args, point: Point, task: str, seed: int) -> list[dict]:
    """Makes, resumes or only reads one run, and returns its evaluations. Raises InputError if the run fails."""
    updates = dict(zip(args.tasks, args.updates, strict=True))[task]
    flags: dict[str, object] = {"env-id": task, "seed": seed, "total-steps": updates, "batch-size": args.batch_size}
    flags |= {"data-fraction": FRACTION} | point.flags
    flags |= {"eval-interval": updates // args.evaluations}
    run_dir = args.runs / "__".join([point.script, *(f"{name}={flags[name]}" for name in sorted(flags))])
    path = run_dir / "metrics.jsonl"

    def evaluations() -> list[dict]:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        seconds = {line["step"]: line["time/update"] for line in lines if "time/update" in line}
        return [line | {"update_seconds": seconds[line["step"]]} for line in lines if "eval/return_mean" in line]

    if not any(line["step"] == updates for line in evaluations()):
        flags |= {"run-dir": run_dir, "checkpoint-interval": updates // args.evaluations}
        arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        if path.exists():
            arguments = ["--resume", str(run_dir)]
        # What runs have in common, those that differ only in the seed for instance, is compiled once.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(args.runs.absolute() / "compiled")}
        environment = cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | dict(os.environ)
        command = [sys.executable, str(ROOT / f"{point.script}.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode != 0:
            raise InputError(f"{run_dir} stopped with exit code {result.returncode}: {result.stderr.strip()[-500:]}")
    return evaluations()


def interval_estimates(scores: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Interquartile mean and the ends of its 95 % interval, of scores [runs, tasks] by name."""

    def interquartile_mean(x: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(x)])

    means, intervals = library.get_interval_estimates(
        scores, interquartile_mean, reps=2000, random_state=np.random.RandomState(0)
    )
    return {name: (float(means[name][0]), float(low), float(high)) for name, ((low,), (high,)) in intervals.items()}


def scores_of(rows: list[dict], method: str, x: float | None, tasks: tuple[str, ...]) -> np.ndarray:
    """Scores [runs, tasks] of one setting."""
    runs: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        if row["method"] == method and row["x"] == x:
            runs.setdefault((row["task"], row["seed"]), []).append(row)
    seeds = sorted({seed for _, seed in runs})

    def score(task: str, seed: int) -> float:
        in_order = sorted(runs[task, seed], key=lambda row: row["step"])
        return float(np.mean([row["normalized_score"] for row in in_order[-(len(in_order) // 2) :]]))

    return np.array([[score(task, seed) for task in tasks] for seed in seeds])


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
            estimates = np.array(list(interval_estimates(scores).values()))  # [places, 3]
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
    jobs = [(point, task, seed) for point in points_of(args.study) for task in args.tasks for seed in args.seeds]
    if args.part is not None:
        jobs = jobs[args.part :: args.parts]
    for task, noise in sorted({(task, float(str(point.flags.get("noise", 0.0)))) for point, task, _ in jobs}):
        record_if_missing(task, noise)
    results: dict[int, list[dict]] = {}
    cores, free = available_cores(), queue.SimpleQueue[set[int]]()
    for worker in range(args.workers):
        free.put(set(cores[worker :: args.workers] or cores[worker % len(cores) :][:1]))
    with ThreadPoolExecutor(args.workers, initializer=keep_to_cores, initargs=(free,)) as pool:
        futures = {pool.submit(train, args, *job): i for i, job in enumerate(jobs)}
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), desc=args.study, unit="run"):
                results[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is running goes on to its end, or gets the interrupt too
            raise
    if args.part is not None:
        return 0
    rows = []
    for i, (point, task, seed) in enumerate(jobs):
        for line in results[i]:
            values = {name.removeprefix("eval/"): value for name, value in line.items()}
            rows.append({"study": args.study, "method": point.method, "x": point.x, "task": task, "seed": seed, **values})
    args.results.mkdir(parents=True, exist_ok=True)
    table = args.results / f"bsuite_{args.study}.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    places = sorted({row["x"] for row in rows if row["x"] is not None})
    print(f"| {LABELS[args.study]} | {' | '.join(f'{x:g}' for x in places)} |\n| --- |{' --- |' * len(places)}")
    draw(args, rows, table.with_suffix(".png"), print)
    updates = dict(zip(args.tasks, args.updates, strict=True))
    print(f"\n{table} and its figure: {len(args.seeds)} seeds, {updates} updates, batch {args.batch_size}")
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    run_program(lambda: main(arguments))
