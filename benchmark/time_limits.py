"""What it costs to take time limits for terminal states: ROSMO on gymnasium_scores' data of CartPole-v1, both ways.

    python -m benchmark.time_limits

It needs '.[benchmark,formats]'. Prints a table: the last return (32 episodes), and the mean value of the last observations
before time limits and before real ends. A stopped run is resumed from --runs.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import tyro

import rosmo_bsuite as rosmo
from benchmark.gymnasium_scores import find_dataset
from benchmark.studies import ROOT, evaluations_of, load_run
from data.dataset import InputError, open_dataset, run_program

ENV_ID = "CartPole-v1"


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the runs
    updates: int = 20_000  # of each run
    runs: Path = Path("runs/time_limits")  # where the runs and the changed dataset are kept


def last_values(run_dir: Path, folder: Path) -> tuple[float, float]:
    """The mean value of the last observations of episodes that were cut off, and of those that ended in a terminal state."""
    model, state, _ = load_run(rosmo, run_dir)
    data, net = open_dataset(folder), model.bind(state.params)
    value = rosmo.to_scalar(net.prediction(net.representation(jnp.asarray(data.observation))).value_logits)
    return float(value[data.is_last & ~data.is_terminal].mean()), float(value[data.is_terminal].mean())


def main(args: Args) -> None:
    folder, changed = find_dataset(ENV_ID), args.runs / "data"
    if not changed.exists():
        shutil.copytree(folder, changed)
        shutil.copy(changed / "is_last.npy", changed / "is_terminal.npy")
    print("| ends of episodes | seed | last return | value before time limits | before real ends |")
    print("| --- | --- | --- | --- | --- |")
    for name, data in (("as recorded", folder), ("all terminal", changed)):
        for seed in args.seeds:
            run_dir = args.runs / f"{name.replace(' ', '_')}_{seed}"
            if [line["step"] for line in evaluations_of(run_dir)] != [args.updates]:
                flags = ["--env-id", ENV_ID, "--seed", str(seed), "--data-dir", str(data), "--run-dir", str(run_dir)]
                flags += ["--total-steps", str(args.updates), "--eval-interval", str(args.updates)]
                flags = ["--resume", str(run_dir)] if (run_dir / "args.json").exists() else flags
                if subprocess.run([sys.executable, str(ROOT / "rosmo_bsuite.py"), *flags], stdout=sys.stderr).returncode:
                    raise InputError(f"{run_dir} was not finished")
            score = evaluations_of(run_dir)[-1]["return_mean"]
            limit, end = last_values(run_dir, folder)
            print(f"| {name} | {seed} | {score:.1f} | {limit:.1f} | {end:.1f} |", flush=True)


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
