"""What the studies have in common: many runs of the training scripts, side by side and resumable, their table, estimates.

A program names its runs. A run that is whole in a table of --results is taken from there, so that a study goes on from its
table on any machine; a run that is whole in --runs is read from there; all others are made or resumed.
"""

import contextlib
import csv
import itertools
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from rliable import library, metrics
from tqdm import tqdm

from data.dataset import InputError, locked, open_dataset

ROOT = Path(__file__).resolve().parent.parent
BOOTSTRAPS = 2000  # resamplings of an interval estimate
FEWEST = 9  # runs of which a 95 % interval is shown; it covers 84 % then, see benchmark/README.md
STYLES = {  # of the methods, in all figures
    "ROSMO": ("C0", "-"), "ROSMO, authors' filter": ("C0", "--"), "ROSMO, recorded reward": ("C0", ":"),
    "one-step, no regularisation": ("C1", "-"), "filtered cloning": ("C2", "-"),
    "filtered cloning, authors' filter": ("C2", "--"), "filtered cloning, recorded reward": ("C2", ":"),
    "MuZero Unplugged": ("C3", "-"), "labels of every window": ("C3", "--"), "MZU-Q": ("C4", "-"),
    "Gumbel MuZero": ("C5", "-"),
}  # fmt: skip
CLONING = {"policy-coef": 0.0, "sampling": True}  # flags of ROSMO: cloning alone, which acts as its policy says
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True)
class Args:
    """The flags that all programs of studies have."""

    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the runs
    workers: int = 1  # runs side by side on this machine, each on cores of its own
    runs: Path = Path("runs")  # where the runs are kept
    results: Path = ROOT / "benchmark" / "results"  # where table and figure go; runs in the tables there are not made again


class Run(NamedTuple):
    """One call of a training script. Its flags make it what it is and name it."""

    columns: dict[str, Any]  # what its rows in the table begin with
    script: str  # a module
    flags: dict[str, Any]
    updates: int
    evaluations: int

    def all_flags(self) -> dict[str, Any]:
        return self.flags | {"total-steps": self.updates, "eval-interval": self.updates // self.evaluations}

    def name(self) -> str:
        flags = self.all_flags()
        return "__".join([self.script, *(f"{name}={flags[name]}" for name in sorted(flags))])

    def is_whole(self, evaluations: list[dict]) -> bool:
        """Whether these are all its evaluations, in order."""
        interval = self.updates // self.evaluations
        steps = sorted({*range(interval, self.updates + 1, interval), self.updates})
        return [line["step"] for line in evaluations] == steps


# ---------------------------------------------------------------------------------------------------------- Making runs


def evaluations_of(run_dir: Path) -> list[dict]:
    """The evaluations in a run's metrics.jsonl, each with the seconds that updates had taken by then (interpolated)."""
    path, steps, seconds = run_dir / "metrics.jsonl", [0], [0.0]
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(text) for text in texts if text.endswith("\n")]  # a killed run may leave half a line
    for line in lines:
        if "train/updates_per_second" in line:  # the speed since the line before it
            seconds.append(seconds[-1] + (line["step"] - steps[-1]) / line["train/updates_per_second"])
            steps.append(line["step"])
    return [
        {name.removeprefix("eval/"): value for name, value in line.items() if not name.startswith("train/")}
        | {"update_seconds": float(np.interp(line["step"], steps, seconds))}
        for line in lines
        if "eval/return_mean" in line
    ]


def make(run: Run, runs: Path) -> list[dict]:
    """Makes, resumes or only reads one run, and returns its evaluations. Raises InputError if the run fails."""
    run_dir = runs / run.name()
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):  # another program may make the same run
        if run.is_whole(evaluations := evaluations_of(run_dir)):
            return evaluations
        flags = run.all_flags() | {"run-dir": run_dir, "checkpoint-interval": run.updates // run.evaluations}
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value)) if part != "True"]
        if (run_dir / "args.json").exists():
            arguments = ["--resume", str(run_dir)]
        # What runs have in common, those that differ only in the seed for instance, is compiled once.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(runs.absolute() / "compiled")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = cache | os.environ | {"PYTHONPATH": path}
        command = [sys.executable, "-m", run.script, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode != 0 or not run.is_whole(evaluations := evaluations_of(run_dir)):
            raise InputError(f"{run_dir} stopped with exit code {result.returncode}: {result.stderr.strip()[-500:]}")
        return evaluations


def side_by_side(runs: Sequence[Run], args: Args, title: str) -> Iterator[tuple[Run, list[dict]]]:
    """Makes the runs and yields each with its evaluations, as soon as it is whole. Every worker, and with it the runs that
    it starts, is bound to cores of its own: two runs that both use both cores take twice as long. (On Linux only.)"""
    if args.workers < 1:
        raise InputError("--workers is 1 or more")
    free = queue.SimpleQueue[set[int]]()
    for worker in range(args.workers):
        free.put(set(CORES[worker :: args.workers] or [CORES[worker % len(CORES)]]))

    def bind() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, free.get())

    with ThreadPoolExecutor(args.workers, initializer=bind) as pool:
        futures = {pool.submit(make, run, args.runs): run for run in runs}
        try:
            for future in tqdm(as_completed(futures), total=len(runs), desc=title, unit="run", disable=not runs):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is running goes on to its end, or gets the interrupt too
            raise


def make_all(runs: Sequence[Run], args: Args, table: Path, find_dataset: Callable[[str, float], Path]) -> list[dict]:
    """The rows of all runs, in their order. They are in `table` too, a run's as soon as it is whole.

    find_dataset(env_id, noise): the folder of a run's dataset, recorded if it is missing. Raises InputError if it has no
    returns to normalise scores by, or if a run fails, after those beside it.
    """
    known, before = read_tables(args.results), read_table(table)
    done = {name: lines for run in runs if (name := run.name()) in known and run.is_whole(lines := known[name])}
    missing = [run for run in runs if run.name() not in done]
    print(f"{table.stem}: of {len(runs)} runs {len(done)} are in the tables of {args.results}", flush=True)
    for dataset in sorted({(run.flags["env-id"], run.flags.get("noise", 0.0)) for run in missing}):
        folder = find_dataset(*dataset)
        if "reference_returns" not in open_dataset(folder).meta:
            raise InputError(f"{folder} has no reference_returns in its meta.json to normalise scores by: record it again")

    def rows() -> list[dict]:
        """Of the runs that are whole, in the order of the runs."""
        made = ((run, line) for run in runs for line in done.get(run.name(), ()))
        return [run.columns | line | {"run": run.name()} for run, line in made]

    for run, evaluations in side_by_side(missing, args, table.stem):
        done[run.name()] = evaluations
        write_table(table, before, rows())
    write_table(table, before, rows())
    return rows()


# --------------------------------------------------------------------------------------------------------------- Tables


def read_tables(folder: Path) -> dict[str, list[dict]]:
    """The evaluations in all tables of a folder, in order, by the name of their run."""
    runs: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*.csv")):
        for row in (row for row in read_table(path) if "step" in row):  # others have a row a run
            evaluation = list(row)[list(row).index("step") : -1]  # what comes before tells of which run it is
            numbers = {name: json.loads(row[name] or "null") for name in evaluation}
            runs.setdefault(row["run"], {})[numbers["step"]] = numbers
    return {name: [evaluations[step] for step in sorted(evaluations)] for name, evaluations in runs.items()}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table that was written here; none of another one, or if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if "run" in row]


def write_table(path: Path, before: list[dict], rows: list[dict]) -> None:
    """Writes the rows and those of other runs that the table held before, each run in its place, new ones last."""
    named = {row["run"] for row in rows}
    place = {run: i for i, run in enumerate(dict.fromkeys(row["run"] for row in before + rows))}
    write_rows(path, sorted([row for row in before if row["run"] not in named] + rows, key=lambda row: place[row["run"]]))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a file of rows, with "run" last. It is whole at any moment."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".new").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted(names, key="run".__eq__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".new").rename(path)


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Prints rows as Markdown, each as soon as it is there; the first is the head."""
    for i, row in enumerate(rows):
        print(f"| {' | '.join(row)} |" + f"\n|{' --- |' * len(row)}" * (i == 0), flush=True)


# ------------------------------------------------------------------------------------------------------------ Estimates


def interval_estimates(scores: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Interquartile mean and the ends of its 95 % interval, of scores [runs, tasks] by name."""

    def interquartile_mean(x: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(x)])

    np.random.seed(0)  # rliable 1.2.0 draws from NumPy's global generator, whatever random_state it is given
    means, intervals = library.get_interval_estimates(scores, interquartile_mean, reps=BOOTSTRAPS)
    return {name: (float(means[name][0]), float(low), float(high)) for name, ((low,), (high,)) in intervals.items()}


def spread(scores: np.ndarray) -> tuple[float, float, float]:
    """The middle and the spread of scores [seeds, tasks].

    Of nine runs or more the interquartile mean and its 95 % interval; of fewer the mean, and the range of the seeds' means.
    """
    if scores.size >= FEWEST:
        return interval_estimates({"": scores})[""]
    seeds = scores.mean(axis=1)
    return float(seeds.mean()), float(seeds.min()), float(seeds.max())


def cell(estimate: tuple[float, float, float], digits: int = 2) -> str:
    return "{1:.{0}f} [{2:.{0}f}, {3:.{0}f}]".format(digits, *estimate)


def name_of_spread(num_runs: int) -> str:
    return "95 % interval" if num_runs >= FEWEST else "range of the seeds"


def final_score(evaluations: list[dict]) -> float:
    """A run's score: the mean of the normalised scores in its second half. evaluations: rows of its table."""
    in_order = sorted(evaluations, key=lambda row: row["step"])
    return float(np.mean([row["normalized_score"] for row in in_order[-(max(1, len(in_order) // 2)) :]]))


def runs_of(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """The rows of one setting by task and seed."""
    runs: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        runs.setdefault((row["task"], row["seed"]), []).append(row)
    return runs


def scores_of(rows: list[dict], tasks: Sequence[str], value: Callable[[list[dict]], Any] = final_score) -> np.ndarray:
    """One value a run, [seeds, tasks], from the rows of one setting."""
    runs = runs_of(rows)
    return np.array([[value(runs[task, seed]) for task in tasks] for seed in sorted({seed for _, seed in runs})])


@contextlib.contextmanager
def panels_of(rows: list[dict], tasks: Sequence[str], label: str, path: Path) -> Iterator[list[tuple[Any, str, tuple]]]:
    """A figure with a panel for each task, and one for "all" of several: (axes, name, its tasks). It is saved at the end."""
    panels = ({"all": tuple(tasks)} if len(tasks) > 1 else {}) | {task: (task,) for task in tasks}
    seeds, size = len({row["seed"] for row in rows}), (4 * len(panels), 3.6)
    figure, (axes,) = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, some) in zip(axes, panels.items(), strict=True):
        axis.set_title(f"{name} ({name_of_spread(seeds * len(some))})")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("normalised score")
    yield [(axis, name, some) for axis, (name, some) in zip(axes, panels.items(), strict=True)]
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(rows: list[dict], tasks: Sequence[str], label: str, path: Path) -> dict[tuple[str, str], dict[Any, tuple]]:
    """Draws the runs' scores with their spread against x.

    Returns middle, low and high by panel ("all" or a task) and method, then by x.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    places = sorted({row["x"] for row in rows if row["x"] is not None})
    drawn: dict[tuple[str, str], dict[Any, tuple]] = {}
    with panels_of(rows, tasks, label, path) as panels:
        for (axis, name, some), (i, method) in itertools.product(panels, enumerate(methods)):
            mine, (color, style) = [row for row in rows if row["method"] == method], STYLES[method]
            xs = sorted({row["x"] for row in mine}) if mine[0]["x"] is not None else [None]
            drawn[name, method] = {x: spread(scores_of([row for row in mine if row["x"] == x], some)) for x in xs}
            middle, low, high = np.array(list(drawn[name, method].values())).T
            if xs != [None]:
                beside = np.array(xs) * 1.03 ** (i - (len(methods) - 1) / 2)  # so that intervals do not cover each other
                error = np.maximum(0, (middle - low, high - middle))  # the mean of equal scores may be rounded
                axis.errorbar(beside, middle, error, color=color, linestyle=style, marker="o", capsize=3, label=method)
            else:  # a level to compare with
                axis.axhline(middle[0], color=color, linestyle="--", label=method)
                axis.axhspan(low[0], high[0], color=color, alpha=0.15, linewidth=0)
        for axis, *_ in panels:
            axis.set_xscale("log" if places[0] > 0 else "linear")
            axis.set_xticks(places, [f"{x:g}" for x in places])
            axis.minorticks_off()
    return drawn


def draw_curves(rows: list[dict], tasks: Sequence[str], path: Path) -> None:
    """Draws the scores against updates: of each task its seeds thin and their mean thick, of all tasks with their spread."""
    with panels_of(rows, tasks, "updates", path) as panels:
        for (axis, name, some), method in itertools.product(panels, dict.fromkeys(row["method"] for row in rows)):
            mine, (color, style) = [row for row in rows if row["method"] == method], STYLES[method]
            steps = sorted({row["step"] for row in mine})
            scores = scores_of(mine, some, lambda run: [row["normalized_score"] for row in run])  # [seeds, tasks, steps]
            middle = scores[:, 0].mean(axis=0)
            if name == "all":
                middle, low, high = np.array([spread(scores[:, :, i]) for i in range(len(steps))]).T
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            else:
                axis.plot(steps, scores[:, 0].T, color=color, linestyle=style, linewidth=0.6, alpha=0.6)
                axis.set_title(f"{name} (seeds and their mean)")
            axis.plot(steps, middle, color=color, linestyle=style, linewidth=2, label=method)
            axis.set_ylim(-0.25, 1.1)
