"""Two processes that train together (--distributed): the losses of one process at the same batch, and stopping together."""

import os
import signal
import socket
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

import muzero_unplugged_bsuite
import rosmo_atari
import rosmo_bsuite
from data.dataset import InputError
from data.runs import Signals
from tests import programs
from tests.programs import SMALL, TINY_FLAGS, metrics


def start(script, *arguments):
    """The script as two processes of one device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    flags = (*arguments, "--distributed", "--cpu-devices", 1)
    return [programs.program(script, *flags, env=common | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]


@pytest.mark.parametrize("script", [muzero_unplugged_bsuite, pytest.param(rosmo_atari, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(script, request, tmp_path):
    if script is rosmo_atari:
        flags = ["--data-dir", str(request.getfixturevalue("breakout_dataset")), *TINY_FLAGS, "--total-steps", "10"]
    else:
        flags = ["--data-dir", str(request.getfixturevalue("catch_dataset")), *SMALL, "--total-steps", "20"]
    flags += ["--eval-episodes", "1"]
    processes = start(script, *flags, "--run-dir", tmp_path / "two")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "updates, loss" in outputs[0][0] and "updates, loss" not in outputs[1][0]
    assert programs.run(script, [*flags, "--run-dir", str(tmp_path / "one")]) == 0
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("step", "train/total_loss", "train/grad_norm", "train/param_norm", "eval/return_mean"):
            assert two.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-5), name


def test_a_signal_to_one_stops_both(catch_dataset, tmp_path):
    flags = ["--data-dir", catch_dataset, *SMALL, "--total-steps", 10**6, "--eval-interval", 10**6]
    processes = start(rosmo_bsuite, *flags, "--run-dir", tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 3:
        time.sleep(0.05)
        assert all(process.poll() is None for process in processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, outputs
    assert f"go on with --resume {tmp_path / 'run'}" in outputs[0][0]
    assert int(programs.last_state(rosmo_bsuite, tmp_path / "run").step) >= 30


def test_a_signal_that_comes_while_the_processes_ask(monkeypatch):
    """The others have not heard of it: a process that stopped at once would leave them waiting for it."""
    caught = Signals()

    def ask(mine):
        if not caught:
            caught.append(signal.SIGTERM)
        return np.array([0, mine])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", ask)
    assert not caught.anywhere()
    assert caught.anywhere()


def test_processes_need_one_folder():
    with pytest.raises(InputError, match="--distributed needs --run-dir"):
        programs.run(rosmo_bsuite, ["--distributed"])
