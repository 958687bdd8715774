"""muzero_unplugged_atari.py where it is neither rosmo_atari.py nor muzero_unplugged_bsuite.py: searches from windows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muzero_unplugged_atari as mzu
from tests import programs
from tests.programs import TINY, TINY_FLAGS, assert_same_state, metrics

ARGS = mzu.Args(**TINY, num_simulations=3)
run = functools.partial(programs.run, mzu)


def test_labels_are_of_their_own_steps():
    """Every step of every window gets the search from its own state."""
    model = mzu.Model(4, dataclasses.replace(ARGS, dirichlet_fraction=0.0))
    params = mzu.init_state((84, 84, 4), model).params
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.PRNGKey(x.size), x.shape), params)
    observation = jax.random.randint(jax.random.PRNGKey(1), (2, 5, 84, 84, 4), 0, 256).astype(jnp.uint8)
    labels = mzu.make_labels(params, jax.random.PRNGKey(2), observation, model)
    assert labels.policy.shape == (2, 5, 4) and labels.value.shape == (2, 5)
    for b, t in ((0, 0), (0, 4), (1, 2)):
        one = mzu.make_labels(params, jax.random.PRNGKey(2), observation[b : b + 1, t : t + 1], model)
        np.testing.assert_allclose(labels.value[b, t], one.value[0, 0], rtol=1e-3)
        np.testing.assert_allclose(labels.policy[b, t], one.policy[0, 0], atol=1e-4)


@pytest.fixture(scope="module")
def flags(breakout_dataset):
    return ["--data-dir", str(breakout_dataset), *TINY_FLAGS, "--num-simulations", "3", "--eval-episodes", "1"]


def test_a_run_and_a_resumed_one(flags, tmp_path):
    whole = tmp_path / "whole"
    assert run([*flags, "--total-steps", "10", "--checkpoint-interval", "6", "--run-dir", str(whole)]) == 0
    training = [line for line in metrics(whole) if "train/total_loss" in line]
    assert [line["step"] for line in training] == [5, 10] and "train/behavior_loss" not in training[0]
    assert metrics(whole)[-1]["eval/episodes"] == 1
    resumed = programs.rewound(whole, tmp_path / "resumed", step=6)
    assert run(["--resume", str(resumed)]) == 0
    assert_same_state(*(programs.last_atari_state(mzu, run_dir) for run_dir in (whole, resumed)))


def test_gumbel_muzero_runs(flags, tmp_path):
    assert run([*flags, "--policy-target", "gumbel", "--total-steps", "5", "--run-dir", str(tmp_path / "run")]) == 0
    assert all(np.isfinite(value) for value in metrics(tmp_path / "run")[0].values())
