"""That the agents learn, in the real environments and from nothing, as README says."""

import os
from pathlib import Path

import pytest

import muzero_unplugged_bsuite
import rosmo_atari
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
    last, out = learn(rosmo_bsuite, "--batch-size", 256, "--total-steps", 15000, "--eval-interval", 15000)
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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_muzero_unplugged_learns_catch(tmp_path, monkeypatch):
    """It swings, so the mean of the last ten of twenty evaluations counts (50,000 updates, three minutes)."""
    monkeypatch.chdir(tmp_path)
    learn(muzero_unplugged_bsuite, "--total-steps", 50000, "--eval-interval", 2500)
    returns = [line["eval/return_mean"] for line in scores(metrics(Path("run")))]
    assert len(returns) == 20 and sum(returns[10:]) / 10 >= 0.5  # random play has -0.667


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rosmo_learns_freeway(tmp_path, monkeypatch):
    """At the CPU size, after 2,000 updates (ten minutes), it plays better than its data's mean of about 14."""
    monkeypatch.chdir(tmp_path)
    flags = ("--env-id", "Freeway", "--cpu-size", "--total-steps", 2000, "--eval-episodes", 8)
    assert learn(rosmo_atari, *flags)[0]["eval/return_mean"] > 16
