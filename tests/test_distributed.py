"""Two processes that train together (--distributed): the losses of one process at the same batch, and stopping together."""

import os
import signal
import socket

import pytest

import muzero_unplugged_bsuite
import rosmo_atari
import rosmo_bsuite
from tests.programs import SMALL, TINY_FLAGS, last_state, metrics, program, run, small_flags, wait_for

NAMES = ("step", "train/total_loss", "train/grad_norm", "train/param_norm", "eval/return_mean")


def start(script, *arguments):
    """The script as two processes of one device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    flags = (*arguments, "--distributed", "--cpu-devices", 1)
    return [program(script, *flags, env=common | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]


@pytest.mark.parametrize("script", [muzero_unplugged_bsuite, pytest.param(rosmo_atari, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(script, request, tmp_path):
    dataset = request.getfixturevalue("breakout_dataset" if script is rosmo_atari else "catch_dataset")
    flags = ["--data-dir", dataset, *small_flags(script), "--total-steps", 20, "--eval-episodes", 1]
    processes = start(script, *flags, "--run-dir", tmp_path / "two")
    outputs = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "updates, loss" in outputs[0][0] and "updates" not in outputs[1][0]
    assert run(script, [*flags, "--run-dir", tmp_path / "one"]) == 0
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert [two.get(name, 0) for name in NAMES] == pytest.approx([one.get(name, 0) for name in NAMES], rel=1e-5)


@pytest.mark.parametrize(
    ("script", "signum"), [(rosmo_bsuite, signal.SIGTERM), pytest.param(rosmo_atari, signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_stops_both(script, signum, request, tmp_path):
    """At the same update, whichever process gets it; another signal than SIGTERM is passed on as one."""
    atari = script is rosmo_atari
    dataset = request.getfixturevalue("breakout_dataset" if atari else "catch_dataset")
    flags = ["--data-dir", dataset, *(TINY_FLAGS if atari else SMALL), "--total-steps", 10**6, "--eval-interval", 10**6]
    processes = start(script, *flags, "--run-dir", tmp_path / "run")
    wait_for(lambda: len(metrics(tmp_path / "run")) >= 3, processes[0])
    processes[1].send_signal(signum)
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM, 128 + signum], outputs
    assert f"go on with --resume {tmp_path / 'run'}" in outputs[0][0]
    assert int(last_state(script, tmp_path / "run").step) >= 15


def test_processes_need_one_folder():
    with pytest.raises(rosmo_bsuite.InputError, match="--distributed needs --run-dir"):
        run(rosmo_bsuite, ["--distributed"])
