"""Running the scripts from tests, in this process or as programs of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.runs import Checkpoints, parse_args

SMALL = ["--batch-size", "16", "--eval-episodes", "4", "--eval-envs", "3", "--log-interval", "10"]

# Atari: the smallest networks, for runs on a small dataset.
TINY = {
    "batch_size": 4, "channels": 4, "representation_blocks": 1, "dynamics_blocks": 1, "prediction_blocks": 1,
    "head_channels": 4, "head_width": 8, "num_bins": 21, "unroll_steps": 2, "bootstrap_steps": 2,
}  # fmt: skip
TINY_FLAGS = [str(part) for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", value)]
TINY_FLAGS += ["--eval-episodes", "3", "--eval-envs", "2", "--log-interval", "5"]


def run(script: Any, arguments: list[str]) -> int:
    """The script's main() in this process."""
    return script.main(parse_args(script.Args, Path(script.__file__), None, arguments))


def program(script: Any, *arguments: object, **options: Any) -> subprocess.Popen:
    """The script as a program, with its output in pipes."""
    command = [sys.executable, script.__file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last_state(script: Any, run_dir: Path) -> Any:
    """The last checkpoint of a run on catch."""
    args = parse_args(script.Args, Path(script.__file__), None, ["--resume", str(run_dir)])
    return Checkpoints(run_dir).restore(script.init_state((10, 5), script.Model(3, args)))


def last_atari_state(script: Any, run_dir: Path) -> Any:
    """The last checkpoint of a run on Breakout."""
    args = parse_args(script.Args, Path(script.__file__), None, ["--resume", str(run_dir)])
    return Checkpoints(run_dir).restore(script.init_state((84, 84, 4), script.Model(4, args)))


def rewound(run_dir: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was, had it been killed after its checkpoint of `step`."""
    shutil.copytree(run_dir, copy)
    for checkpoint in (copy / "checkpoints").glob("[0-9]*"):
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    assert (copy / "checkpoints" / str(step)).exists()
    return copy


def assert_same_state(first: Any, second: Any) -> None:
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
