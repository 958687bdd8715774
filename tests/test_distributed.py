"""Two processes that train together (--distributed): the losses of one process at the same batch."""

import os
import socket

import pytest

import muzero_unplugged_bsuite
import rosmo_atari
from tests.programs import metrics, program, run, small_flags

NAMES = ("step", "train/total_loss", "train/grad_norm", "train/param_norm", "eval/return_mean")


@pytest.mark.parametrize("script", [muzero_unplugged_bsuite, pytest.param(rosmo_atari, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(script, request, tmp_path):
    """They find each other as on a cluster with Slurm, whose variables JAX reads; each has one device, the one has two."""
    dataset = request.getfixturevalue("breakout_dataset" if script is rosmo_atari else "catch_dataset")
    flags = ["--data-dir", dataset, *small_flags(script), "--total-steps", 20, "--eval-episodes", 1]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
        slurm["JAX_COORDINATOR_PORT"] = str(free.getsockname()[1])
    processes = []
    for i in range(2):
        environment = os.environ | slurm | {"SLURM_PROCID": str(i)}
        own = ("--distributed", "--cpu-devices", 1, "--run-dir", tmp_path / "two")
        processes.append(program(script, *flags, *own, env=environment))
    outputs = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 x cpu" in outputs[0][0] and "20 updates:" in outputs[0][0]
    assert not {"cpu", "updates"} & set(outputs[1][0].split())  # the second one is silent
    run(script, [*flags, "--run-dir", tmp_path / "one"])
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert [two.get(name, 0) for name in NAMES] == pytest.approx([one.get(name, 0) for name in NAMES], rel=1e-5)
