"""muzero_unplugged_bsuite.py where it is not rosmo_bsuite.py: the search, its flags, and the whole program with it."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muzero_unplugged_bsuite as mzu
from data.dataset import InputError, open_dataset
from tests import programs
from tests.programs import SMALL, assert_same_state, last_state, metrics

ARGS = mzu.Args()
run = functools.partial(programs.run, mzu)


def random_model(args: mzu.Args):
    """A model whose heads are not zero, and its states at 64 random observations."""
    model = mzu.Model(3, args)
    params = mzu.init_state((10, 5), model).params
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.PRNGKey(x.size), x.shape), params)
    net = model.bind(params)
    state = net.representation(jax.random.normal(jax.random.PRNGKey(1), (64, 10, 5)))
    return model, params, state, net.prediction(state)


def search(**flags) -> tuple[mzu.Search, mzu.Prediction]:
    model, params, state, prediction = random_model(dataclasses.replace(ARGS, **flags))
    return mzu.search(params, jax.random.PRNGKey(2), state, prediction, model), prediction


def test_visit_counts_sum_to_the_budget():
    result, _ = search(num_simulations=7)
    counts = np.asarray(result.policy) * 7
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-5)
    np.testing.assert_allclose(result.policy.sum(axis=-1), 1, rtol=1e-6)
    assert (np.take_along_axis(counts, np.asarray(result.action)[:, None], axis=1) > 0).all()


def test_depth_one_search_of_one_step_values():
    """At depth 1 every edge's Q is r_g(s, a) + gamma v(g(s, a)), so MZU-Q with tau 1 is ROSMO's one-step target."""
    args = dataclasses.replace(ARGS, num_simulations=64, search_depth=1, policy_target="mzu_q")
    model, params, state, prediction = random_model(args)
    result = mzu.search(params, jax.random.PRNGKey(2), state, prediction, model)
    visits, _ = search(num_simulations=64, search_depth=1)
    q = []
    for action in range(3):
        step, _ = mzu.expand(params, jax.random.PRNGKey(0), jnp.full(64, action), state, model)
        q.append(step.reward + step.discount * step.value)
    expected = jax.nn.softmax(prediction.policy_logits + jnp.stack(q, axis=-1))
    everywhere = np.asarray(visits.policy).min(axis=-1) > 0  # no action without a visit
    assert everywhere.sum() > 10
    np.testing.assert_allclose(result.policy[everywhere], expected[everywhere], atol=1e-4)


def test_mzu_q_with_a_large_tau_is_the_prior():
    result, prediction = search(policy_target="mzu_q", tau=1e9)
    np.testing.assert_allclose(result.policy, jax.nn.softmax(prediction.policy_logits), atol=1e-4)


def test_no_noise_makes_the_search_repeatable():
    """Without Dirichlet noise the visit counts hardly depend on the key (it breaks ties only); with it they do."""

    def policies(fraction: float) -> list[np.ndarray]:
        model, params, state, prediction = random_model(dataclasses.replace(ARGS, dirichlet_fraction=fraction))
        keys = (jax.random.PRNGKey(3), jax.random.PRNGKey(4))
        return [np.asarray(mzu.search(params, key, state, prediction, model).policy) for key in keys]

    assert np.mean(np.any(np.diff(policies(0.0), axis=0) != 0, axis=-1)) < 0.1
    assert np.mean(np.any(np.diff(policies(0.25), axis=0) != 0, axis=-1)) > 0.3


def test_temperature_of_acting():
    """At temperature 0 the most visited action, the target being what it was."""
    greedy, _ = search(temperature=0.0)
    sampled, _ = search()
    assert np.array_equal(greedy.policy, sampled.policy)
    most = np.asarray(greedy.policy).max(axis=-1)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(greedy.policy), np.asarray(greedy.action)[:, None], 1)[:, 0], most
    )
    assert not np.array_equal(greedy.action, sampled.action)


def test_gumbel_policy_is_its_own():
    gumbel, _ = search(policy_target="gumbel", num_simulations=4)
    np.testing.assert_allclose(gumbel.policy.sum(axis=-1), 1, rtol=1e-5)
    counts = np.asarray(gumbel.policy) * 4
    assert not np.allclose(counts, np.round(counts), atol=1e-3)


def test_bootstrap_value_is_the_roots(catch_dataset):
    model, params, state, prediction = random_model(ARGS)
    key, observation = jax.random.PRNGKey(5), jnp.asarray(open_dataset(catch_dataset).observation[:64])
    labels = mzu.make_labels(params, key, observation, model)
    state = model.bind(params).representation(observation)
    prediction = model.bind(params).prediction(state)
    result = mzu.search(params, key, state, prediction, model)
    np.testing.assert_allclose(labels.value, result.value, rtol=1e-6)
    np.testing.assert_allclose(labels.policy, result.policy, rtol=1e-6)
    assert not np.allclose(labels.value, mzu.to_scalar(prediction.value_logits), rtol=1e-3)


def test_only_what_windows_read_is_labelled(catch_dataset):
    """Two updates of 4 windows: the labels of their steps, zeros for the others, whatever the step in the interval."""
    model = mzu.Model(3, dataclasses.replace(ARGS, batch_size=4, target_update_interval=2, num_simulations=2))
    state = mzu.init_state((10, 5), model)._replace(step=jnp.int32(6))
    observation = jnp.asarray(open_dataset(catch_dataset).observation)
    labels = mzu.label_dataset(state, observation, model)
    key = jax.random.split(state.key, 3)[0]
    windows = [mzu.sample_windows(jax.random.fold_in(key, t), len(observation), model.args) for t in (6, 7)]
    read = np.isin(np.arange(len(observation)), np.array(windows))
    assert 20 < read.sum() < 60
    np.testing.assert_allclose(np.asarray(labels.policy).sum(axis=-1), read, atol=1e-5)
    again = mzu.label_dataset(state._replace(step=jnp.int32(7)), observation, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, labels, again))


# --------------------------------------------------------------------------------------------------------------- Runs


@pytest.fixture(scope="module")
def flags(catch_dataset):
    return ["--data-dir", str(catch_dataset), *SMALL, "--num-simulations", "4"]


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run([*flags, "--total-steps", "230", "--eval-interval", "100", "--run-dir", str(run_dir)]) == 0
    return run_dir


def test_resumed_run_is_the_same_bit_for_bit(whole_run, flags, tmp_path):
    run_dir = tmp_path / "resumed"
    assert run([*flags, "--total-steps", "117", "--eval-interval", "100", "--run-dir", str(run_dir)]) == 0
    assert run(["--resume", str(run_dir), "--total-steps", "230"]) == 0
    assert_same_state(last_state(mzu, run_dir), last_state(mzu, whole_run))
    settings = json.loads((run_dir / "args.json").read_text())
    assert settings["script"] == "muzero_unplugged_bsuite" and "mctx" in settings["versions"]


@pytest.mark.parametrize(
    "extra",
    [
        ["--policy-target", "mzu_q", "--tau", "0.5"],
        ["--policy-target", "gumbel"],
        ["--search-depth", "2", "--dirichlet-fraction", "0", "--temperature", "0.5"],
        ["--compute-dtype", "bfloat16"],
    ],
)
def test_variants_run_and_differ(whole_run, flags, tmp_path, extra):
    assert run([*flags, *extra, "--total-steps", "210", "--run-dir", str(tmp_path / "run")]) == 0
    ours, default = (
        next(line for line in metrics(folder) if line["step"] == 210) for folder in (tmp_path / "run", whole_run)
    )
    assert np.isfinite(ours["train/total_loss"])
    assert ours["train/policy_loss"] != default["train/policy_loss"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--search-depth", "5"], "4 simulations cannot grow a tree of depth 5"),
        (["--search-depth", "0"], "--search-depth must be above 0"),
        (["--num-simulations", "0"], "--num-simulations must be above 0"),
        (["--dirichlet-fraction", "1.1"], "--dirichlet-fraction must be at most 1"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--tau", "0.5"], "--tau has no part in --policy-target visit_counts"),
        (["--policy-target", "mzu_q", "--tau", "0"], "--tau must be above 0"),
        (["--policy-target", "mzu_q", "--temperature", "2"], "--temperature has no part in --policy-target mzu_q"),
        (
            ["--policy-target", "gumbel", "--dirichlet-fraction", "0"],
            "--dirichlet-fraction has no part in --policy-target gumbel",
        ),
        (["--policy-target", "gumbel", "--tau", "0.5"], "--tau has no part in --policy-target gumbel"),
    ],
)
def test_flags_that_do_not_go_together(flags, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        run([*flags, "--run-dir", str(tmp_path / "run"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_the_other_algorithm_is_refused(whole_run):
    import rosmo_bsuite

    with pytest.raises(InputError, match=r"is a run of muzero_unplugged_bsuite\.py, not of rosmo_bsuite\.py"):
        programs.run(rosmo_bsuite, ["--resume", str(whole_run)])


def test_errors_are_one_sentence_and_exit_code_2(tmp_path):
    process = programs.program(mzu, "--policy-target", "gumbel", "--temperature", "0.5", "--run-dir", tmp_path / "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and err == "error: --temperature has no part in --policy-target gumbel\n"


# ----------------------------------------------------------------------------------------------------------- Learning


@pytest.mark.slow
def test_learns_catch(tmp_path, monkeypatch):
    """The game solved after 50,000 updates (three minutes); it takes longer than ROSMO."""
    monkeypatch.chdir(tmp_path)
    assert run(["--total-steps", "50000", "--eval-interval", "50000", "--run-dir", "run"]) == 0
    assert metrics(tmp_path / "run")[-1]["eval/return_mean"] >= 0.9
