"""Running the scripts from tests, in this process or as programs of their own."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import muzero_unplugged_atari
import muzero_unplugged_bsuite
import rosmo_atari
import rosmo_bsuite

SCRIPTS = (rosmo_bsuite, muzero_unplugged_bsuite, rosmo_atari, muzero_unplugged_atari)
SMALL = ["--cpu-devices", "2", "--batch-size", "16", "--eval-episodes", "4", "--log-interval", "10"]

# Atari: the smallest networks, for runs on a small dataset.
TINY: dict[str, Any] = {
    "batch_size": 4, "encoder": "cnn", "channels": 4, "representation_blocks": 0, "dynamics_blocks": 0,
    "prediction_blocks": 0, "head_channels": 4, "head_width": 8, "num_bins": 21, "unroll_steps": 2, "bootstrap_steps": 2,
}  # fmt: skip
TINY_FLAGS = [str(part) for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", value)]
TINY_FLAGS += ["--cpu-devices", "2", "--eval-episodes", "3", "--log-interval", "5"]


def is_atari(script: Any) -> bool:
    return hasattr(script, "stack_frames")


def small_flags(script: Any) -> list[str]:
    """Flags of a run that takes seconds, without its dataset."""
    flags = TINY_FLAGS if is_atari(script) else SMALL
    return flags if "rosmo" in script.__name__ else [*flags, "--num-simulations", "3"]


def run(script: Any, arguments: list[Any], stopped_by: Any = ()) -> None:
    """The script's main() in this process."""
    script.main(script.parse_args(list(map(str, arguments))), stopped_by)


def program(script: Any, *arguments: object, **options: Any) -> subprocess.Popen:
    """The script (a module, or a path) as a program, with its output in pipes."""
    command = [sys.executable, getattr(script, "__file__", script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 200) -> None:
    """Waits until condition() holds; the process must live till then, and ends with an assertion that fails."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.02)


def metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl, without what was timed."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def scores(lines: list[dict]) -> list[dict]:
    """Lines with an evaluation, and of them its part."""
    lines = [{name: value for name, value in line.items() if not name.startswith("train/")} for line in lines]
    return [line for line in lines if "eval/return_mean" in line]


def checkpoint_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())


def last_state(script: Any, run_dir: Path) -> Any:
    """The last checkpoint of a run on catch or Breakout."""
    shape, num_actions = ((84, 84, 4), 4) if is_atari(script) else ((50,), 3)
    state = script.init_state(shape, script.Model(num_actions, script.parse_args(["--resume", str(run_dir)])))
    checkpoints = ocp.CheckpointManager((run_dir / "checkpoints").absolute())
    return checkpoints.restore(checkpoint_steps(run_dir)[-1], args=ocp.args.StandardRestore(state))


def assert_same_state(first: Any, second: Any) -> None:
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
