"""Scores on Atari at the size for CPUs: five methods on three games, and beside them the data that they learn from.

    python -m benchmark.atari_studies                       # every run on one core, as many at a time as there are cores
    python -m benchmark.atari_studies --games Pong --seeds 0

Writes benchmark/results/atari.csv, a row for each run, and prints a table: the game's own score in the last three
evaluations, mean and range of the seeds. A run that the table has is not made again; one in --runs is read or resumed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmark import studies
from benchmark.studies import CLONING, Run, cell, print_table
from data.dataset import open_dataset, run_program
from data.record_atari import NOISE_LEVELS, ScriptedPolicy, first_step, make_environments, next_step, record_if_missing

ROSMO, MZU = "rosmo_atari", "muzero_unplugged_atari"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # a script and its flags
    "ROSMO": (ROSMO, {}),
    "one-step, no regularisation": (ROSMO, {"behavior-coef": 0.0}),
    "filtered cloning": (ROSMO, CLONING),
    "MuZero Unplugged": (MZU, {"num-simulations": 10}),
    "MZU-Q": (MZU, {"num-simulations": 10, "policy-target": "mzu_q"}),
}
COMMON = {"cpu-size": True, "target-update-interval": 200}  # flags of all runs
LAST = 3  # evaluations that make a score


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    games: tuple[str, ...] = ("Breakout", "Pong", "Freeway")  # to train on; of those that have a scripted player
    updates: int = 10_000  # of each run
    evaluations: int = 5  # of each run
    eval_episodes: int = 32  # of each evaluation
    workers: int = len(studies.CORES)  # runs side by side on this machine, each on cores of its own
    runs: Path = Path("runs/atari_studies")  # where the runs are kept


def runs_of(args: Args) -> list[Run]:
    """All runs of the table."""
    return [
        Run(
            {"method": method, "task": game, "seed": seed},
            script,
            {"env-id": game, "seed": seed, "eval-episodes": args.eval_episodes} | COMMON | flags,
            args.updates,
            args.evaluations,
        )
        for method, (script, flags) in METHODS.items()
        for game in args.games
        for seed in args.seeds
    ]


def row_of(run: Run, evaluations: list[dict]) -> dict[str, Any]:
    """A run's row: the score of every evaluation, and the minutes that its updates took."""
    scores = {f"score_{line['step']}": line["return_mean"] for line in evaluations}
    return run.columns | scores | {"minutes": evaluations[-1]["update_seconds"] / 60, "run": run.name()}


def score_of(row: dict[str, Any]) -> float:
    """The mean of a run's last evaluations."""
    scores = [float(value) for name, value in row.items() if name.startswith("score_") and value]
    return float(np.mean(scores[-LAST:]))


def best_level(game: str, episodes: int = 16) -> float:
    """The mean score of the game's scripted player at the noise with which it plays best, of those in the data."""
    number = episodes * len(NOISE_LEVELS)  # side by side; the player takes the levels in turn
    environments, policy = make_environments(game, number, seed=0), ScriptedPolicy(game, number, seed=0)
    step, scores, is_playing = first_step(environments), np.zeros(number), np.ones(number, bool)
    while is_playing.any():
        step = next_step(environments, policy(step))
        scores += np.where(is_playing, step.reward, 0)
        is_playing &= ~step.is_last
    return float(scores.reshape(episodes, -1).mean(axis=0).max())


def main(args: Args) -> None:
    runs, table = runs_of(args), args.results / "atari.csv"
    rows: dict[str, dict[str, Any]] = {row["run"]: row for row in studies.read_table(table)}
    data = {game: open_dataset(record_if_missing(game)).meta["game_return"]["mean"] for game in args.games}
    missing = [run for run in runs if run.name() not in rows]
    for run, evaluations in studies.side_by_side(missing, args, table.stem):
        rows[run.name()] = row_of(run, evaluations)
        studies.write_table(table, [], sorted(rows.values(), key=lambda row: row["run"]))
    lines = [["method", *args.games, "minutes of updates (median)"]]
    lines.append(["mean of the data", *(f"{mean:.1f}" for mean in data.values()), ""])
    lines.append(["best level of the data", *(f"{best_level(game):.1f}" for game in args.games), ""])
    for method in METHODS:
        mine = [rows[run.name()] for run in runs if run.columns["method"] == method]
        scores = [np.array([[score_of(row)] for row in mine if row["task"] == game]) for game in args.games]
        minutes = np.median([float(row["minutes"]) for row in mine])
        lines.append([method, *(cell(studies.spread(each), digits=1) for each in scores), f"{minutes:.0f}"])
    print_table(lines)


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
