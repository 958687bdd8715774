"""That the agents learn, in the real environments and from nothing, as README says."""

import os
from pathlib import Path

import pytest

import rosmo_bsuite
from data.dataset import open_dataset
from tests.programs import metrics, program, scores


def learn(script, *flags):
    """The last scores of a program that runs at full speed."""
    process = program(script, *flags, "--run-dir", "run", env=os.environ | {"XLA_FLAGS": ""})
    out, err = process.communicate()
    assert process.returncode == 0, err
    return scores(metrics(Path("run")))[-1], out


def test_rosmo_learns_catch(tmp_path, monkeypatch):
    """It records the standard dataset, trains, and beats random play and the data."""
    monkeypatch.chdir(tmp_path)
    fast = ("--batch-size", 128, "--learning-rate", 2e-3, "--warmup-steps", 200, "--learning-rate-decay-steps", 6000)
    last, out = learn(rosmo_bsuite, *fast, "--total-steps", 8000, "--eval-interval", 8000)
    assert "There is no dataset datasets/bsuite/catch: recording" in out
    data_return = open_dataset(Path("datasets/bsuite/catch")).meta["return_mean"]
    assert -0.667 < data_return < 0.9 <= last["eval/return_mean"]  # -0.667: random play


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("env_id", ["cartpole", "mountain_car"])
def test_rosmo_learns_the_longer_tasks(tmp_path, monkeypatch, env_id):
    """A normalised score of 0.9 or more after 20,000 updates (five minutes with the recording of cartpole)."""
    monkeypatch.chdir(tmp_path)
    flags = ("--env-id", env_id, "--total-steps", 20000, "--eval-interval", 20000)
    assert learn(rosmo_bsuite, *flags)[0]["eval/normalized_score"] >= 0.9
