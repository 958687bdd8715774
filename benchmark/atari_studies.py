"""Scores on Atari at the size for CPUs: five methods on three games, and beside them the data that they learn from.

    python -m benchmark.atari_studies                       # every run on one core, as many at a time as there are cores

Writes benchmark/results/atari.csv, a row for each evaluation, and prints a table: the game's own score in the last three
evaluations, mean and range of the seeds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmark import studies
from benchmark.studies import CLONING, Run, cell, print_table
from data import record_atari
from data.dataset import InputError, open_dataset, run_program
from data.record_atari import NOISE_LEVELS, ScriptedPolicy, first_step, make_environments, next_step, record_if_missing

ROSMO, MZU = "rosmo_atari", "muzero_unplugged_atari"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # a script and its flags
    "ROSMO": (ROSMO, {}),
    "one-step, no regularisation": (ROSMO, {"behavior-coef": 0.0}),
    "filtered cloning": (ROSMO, CLONING),
    "MuZero Unplugged": (MZU, {"num-simulations": 10}),
    "MZU-Q": (MZU, {"num-simulations": 10, "policy-target": "mzu_q"}),
}
COMMON = {"cpu-size": True, "target-update-interval": 200, "eval-episodes": 32}  # flags of all runs


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    games: tuple[str, ...] = ("Breakout", "Pong", "Freeway")  # to train on; of those that have a scripted player
    methods: tuple[str, ...] = tuple(METHODS)  # rows of the table
    workers: int = len(studies.CORES)  # runs side by side on this machine, each on cores of its own
    runs: Path = Path("runs/atari_studies")  # where the runs are kept


def runs_of(args: Args) -> list[Run]:
    """All runs of the table."""
    return [
        Run(
            {"method": method, "task": game, "seed": seed},
            script,
            {"env-id": game, "seed": seed} | COMMON | flags,
            10_000,
            5,
        )
        for method, (script, flags) in METHODS.items()
        if method in args.methods
        for game in args.games
        for seed in args.seeds
    ]


def best_level(game: str, episodes: int = 16) -> float:
    """The mean score of the game's scripted player at the noise with which it plays best, of those in the data."""
    number = episodes * len(NOISE_LEVELS)  # side by side; the player takes the levels in turn
    print(f"{game}: the scripted player plays at each level of noise", flush=True)
    environments, policy = make_environments(game, number, seed=0), ScriptedPolicy(game, number, seed=0)
    step, scores, is_playing = first_step(environments), np.zeros(number), np.ones(number, bool)
    while is_playing.any():
        step = next_step(environments, policy(step))
        scores += np.where(is_playing, step.reward, 0)
        is_playing &= ~step.is_last
    return float(scores.reshape(episodes, -1).mean(axis=0).max())


def main(args: Args) -> None:
    if unknown := [game for game in args.games if game not in record_atari.SCRIPTS]:
        raise InputError(f"{unknown[0]} has no scripted player: --games are of {', '.join(record_atari.SCRIPTS)}")
    if unknown := [method for method in args.methods if method not in METHODS]:
        raise InputError(f"there is no method {unknown[0]}: --methods are of {', '.join(METHODS)}")
    data = {game: open_dataset(record_if_missing(game)).meta for game in args.games}
    if others := [game for game, meta in data.items() if meta.get("policy") != "scripted"]:
        raise InputError(f"datasets/atari has {', '.join(others)} not by its scripted player: run in another folder")
    rows = studies.make_all(runs_of(args), args, args.results / "atari.csv", lambda game, _: record_if_missing(game))
    lines = [["method", *args.games, "minutes of updates (median)"]]
    lines.append(["mean of the data", *(f"{meta['game_return']['mean']:.1f}" for meta in data.values()), ""])
    lines.append(["best level of the data", *(f"{best_level(game):.1f}" for game in args.games), ""])
    for method in args.methods:
        mine = [row for row in rows if row["method"] == method]
        scores = studies.scores_of(mine, args.games, lambda run: np.mean([row["return_mean"] for row in run[-3:]]))
        minutes = np.median([run[-1]["update_seconds"] / 60 for run in studies.runs_of(mine).values()])
        lines.append([method, *(cell(studies.spread(each[:, None]), digits=1) for each in scores.T), f"{minutes:.0f}"])
    print_table(lines)


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
