"""Scores on environments of Gymnasium, from Minari datasets that are recorded here, beside random play and the data's mean.

    python -m benchmark.gymnasium_scores --workers 2                   # three environments and seeds, both algorithms

It needs '.[benchmark,formats]'. A dataset is 200 episodes of a simple rule; in turn, none, 0.3, 0.6 or all of an episode's
actions are random. Writes benchmark/results/gymnasium_scores.csv, a row for each evaluation, and prints a table.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import minari
import numpy as np
import tyro

from benchmark import studies
from benchmark.studies import Run
from data.convert_bsuite import convert
from data.dataset import open_dataset, run_program

RULES: dict[str, Callable[[np.ndarray], int]] = {
    "CartPole-v1": lambda x: int(x[2] + x[3] > 0),  # push to the side to which the pole falls
    "Acrobot-v1": lambda x: 2 if x[5] > 0 else 0,  # turn the lower link on as it turns
    "MountainCar-v0": lambda x: 2 if x[1] > 0 else 0,  # drive on as it rolls
}
REFERENCES = {"CartPole-v1": (20.0, 500.0), "Acrobot-v1": (-500.0, -80.0), "MountainCar-v0": (-200.0, -110.0)}
EPISODES, SHARES = 200, (0.0, 0.3, 0.6, 1.0)


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    env_ids: tuple[str, ...] = tuple(RULES)  # environments to train on
    runs: Path = Path("runs/gymnasium_scores")  # where the runs are kept


def find_dataset(env_id: str, _: float = 0.0) -> Path:
    """The folder of the dataset; recorded as a Minari dataset and converted, if it is missing."""
    folder = Path("datasets", "bsuite", env_id)
    if not folder.exists():
        store, name = Path("datasets", "minari").absolute(), f"{env_id.split('-')[0].lower()}/mixed-v0"
        shutil.rmtree(store / name, ignore_errors=True)  # what a killed program left
        os.environ["MINARI_DATASETS_PATH"] = str(store)
        environment, random = minari.DataCollector(gymnasium.make(env_id)), np.random.default_rng(0)
        for episode in range(EPISODES):
            observation, _ = environment.reset(seed=episode)
            is_over = False
            while not is_over:
                is_random = random.random() < SHARES[episode % len(SHARES)]
                action = int(random.integers(environment.action_space.n)) if is_random else RULES[env_id](observation)
                observation, _, terminated, truncated, _ = environment.step(action)
                is_over = terminated or truncated
        low, high = REFERENCES[env_id]
        environment.create_dataset(name, ref_min_score=low, ref_max_score=high, description="a rule and random actions")
        convert(Path(name), env_id)
    return folder


def main(args: Args) -> None:
    scripts = ("rosmo_bsuite", "muzero_unplugged_bsuite")
    runs = [
        Run({"script": script, "task": env_id, "seed": seed}, script, {"env-id": env_id, "seed": seed}, 20_000, 10)
        for script in scripts
        for env_id in args.env_ids
        for seed in args.seeds
    ]
    rows = studies.make_all(runs, args, args.results / "gymnasium_scores.csv", find_dataset)
    lines = [["environment", "random play", "mean of the data", "ROSMO", "each seed", "MuZero Unplugged", "each seed"]]
    for env_id in args.env_ids:
        data = open_dataset(find_dataset(env_id))
        in_data = np.add.reduceat(data.reward, np.flatnonzero(data.is_first))
        lines.append([env_id, f"{in_data[SHARES.index(1) :: len(SHARES)].mean():.1f}", f"{in_data.mean():.1f}"])
        for script in scripts:
            of_it = [row for row in rows if row["task"] == env_id and row["script"] == script]
            returns = [run[-1]["return_mean"] for run in studies.runs_of(of_it).values()]
            lines[-1] += [f"{np.mean(returns):.1f} ± {np.std(returns, ddof=1):.1f}", ", ".join(f"{x:.1f}" for x in returns)]
    studies.print_table(lines)


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
