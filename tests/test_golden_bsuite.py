"""Both BSuite scripts against the numbers that the authors' own code computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muzero_unplugged_bsuite as mzu
import rosmo_bsuite as rosmo
from tests import golden_numbers
from tests.golden_numbers import relative

OPS, _ = golden_numbers.load("ops")
GOLDEN, CONFIG = golden_numbers.load("bsuite_rosmo")
ARGS = rosmo.Args(**golden_numbers.settings(CONFIG), behavior_coef=CONFIG["behavior_coef"])
MODEL = rosmo.Model(3, ARGS)
MZU_GOLDEN, MZU_CONFIG = golden_numbers.load("bsuite_mzu")
MZU_ARGS = mzu.Args(**golden_numbers.settings(MZU_CONFIG), num_simulations=MZU_CONFIG["num_simulations"])
MZU_MODEL = mzu.Model(3, MZU_ARGS)
ALGORITHMS = [pytest.param(rosmo, GOLDEN, MODEL, id="rosmo"), pytest.param(mzu, MZU_GOLDEN, MZU_MODEL, id="mzu")]
WINDOW = ARGS.unroll_steps + ARGS.bootstrap_steps + 1
KEY = jax.random.PRNGKey(0)


def golden_batch(script: Any, golden: dict[str, np.ndarray], i: int) -> Any:
    """Update i's windows; the authors' have one step more than T, which they do not use."""
    fields = {field: jnp.asarray(golden[field][i, :, :WINDOW]) for field in script.Steps._fields}
    return script.Steps(**fields | {"is_first": fields["is_first"] == 1, "is_last": fields["is_last"] == 1})


def same_randomness(script: Any, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what is random by what the golden files have: actions after an episode's end and, for MZU, the search."""
    actions = jnp.asarray(golden["absorbing_actions"])
    monkeypatch.setattr(script, "random_actions", lambda key, shape, num_actions: jnp.broadcast_to(actions, shape))
    if script is mzu:
        policy, value = (jnp.asarray(golden[name][:WINDOW]) for name in ("mcts_policy", "mcts_value"))

        def search(params, key, state, prediction, model):
            shape = state.shape[:-1]
            return mzu.Search(None, jnp.broadcast_to(policy, (*shape, 3)), jnp.broadcast_to(value, shape))

        monkeypatch.setattr(mzu, "search", search)


def test_value_transforms():
    x = jnp.asarray(OPS["x"])
    assert relative(rosmo.value_transform(x), OPS["value_transform"]) < 1e-6
    assert relative(rosmo.inverse_value_transform(x), OPS["inv_value_transform"]) < 1e-4
    for num_bins in (20, 601):
        ours = rosmo.two_hot(rosmo.value_transform(x), num_bins)
        np.testing.assert_allclose(ours, OPS[f"two_hot_{num_bins}"], atol=2e-5)
    # The golden numbers are the distribution's mean, before the inverse transform.
    logits = jnp.asarray(OPS["logits"])
    theirs = rosmo.inverse_value_transform(jnp.asarray(OPS["logits_to_scalar"]))
    assert relative(rosmo.to_scalar(logits), theirs) < 1e-5


def test_inverse_value_transform_loses_no_digits():
    """Against float64: the golden numbers, computed in float32 by the usual form, are off by 1e-4; ours by 1e-6 at most."""
    x = OPS["x"].astype(np.float64)
    exact = np.sign(x) * (np.square((np.sqrt(1 + 0.004 * (np.abs(x) + 1.001)) - 1) / 0.002) - 1)
    scale = np.maximum(np.abs(exact), 1)
    assert np.max(np.abs(rosmo.inverse_value_transform(jnp.asarray(OPS["x"])) - exact) / scale) < 1e-6
    assert np.max(np.abs(OPS["inv_value_transform"] - exact) / scale) > 5e-5


def test_sampled_target():
    ours = rosmo.sampled_one_step_target(
        jnp.asarray(OPS["sample_actions"]), jnp.asarray(OPS["sample_advantage"]), OPS["sample_prior_logits"].shape[-1]
    )
    np.testing.assert_allclose(ours, OPS["sample_policy_target"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("script", "golden", "model"), ALGORITHMS)
def test_networks(script, golden, model):
    params = golden_numbers.parameters(golden, "params0")
    net = model.bind(params)
    state = net.representation(jnp.asarray(golden["observation"][0, 0]))
    prediction = net.prediction(state)
    assert relative(state, golden["net_state"]) < 1e-5
    for name in prediction._fields:
        assert relative(getattr(prediction, name), golden[f"net_{name}"]) < 1e-5
    after = net.dynamics(jnp.broadcast_to(state[0], (3, 32)), jnp.arange(3))
    assert relative(after, golden["net_next_state"]) < 1e-5


def test_one_step_target():
    params = golden_numbers.parameters(GOLDEN, "params0")
    net = MODEL.bind(params)
    state = net.representation(jnp.asarray(GOLDEN["observation"][0, 0]))
    prediction = net.prediction(state)
    action = jnp.broadcast_to(jnp.arange(3), (len(state), 3))
    advantage = rosmo.one_step_advantage(params, state, rosmo.to_scalar(prediction.value_logits), action, MODEL)
    assert relative(advantage, GOLDEN["one_step_advantage"]) < 1e-4
    # The authors' inverse transform loses 4 of float32's 7 digits to cancellation, ours none.
    target = rosmo.improve_policy(params, KEY, state, prediction, MODEL)
    np.testing.assert_allclose(target, GOLDEN["one_step_policy"], atol=2e-4)


@pytest.mark.parametrize(("num_simulations", "search_depth"), [(8, 8), (20, 20), (20, 2)])
def test_search(num_simulations, search_depth):
    """Same key, same roots in one batch: the same visit counts and actions, and the root's values."""
    which = f"search_{num_simulations}_{search_depth}"
    expected = {name: MZU_GOLDEN[f"{which}_{name}"] for name in ("policy", "action", "root_value")}
    model = mzu.Model(3, dataclasses.replace(MZU_ARGS, num_simulations=num_simulations, search_depth=search_depth))
    params = golden_numbers.parameters(MZU_GOLDEN, "params0")
    state = jnp.asarray(MZU_GOLDEN["net_state"])
    prediction = model.bind(params).prediction(state)
    result = mzu.search(params, jax.random.PRNGKey(3), state, prediction, model)
    counts, theirs = (np.asarray(policy) * num_simulations for policy in (result.policy, expected["policy"]))
    np.testing.assert_allclose(theirs, np.round(theirs), atol=1e-5)
    assert np.array_equal(np.round(counts), np.round(theirs))
    assert np.array_equal(result.action, expected["action"])
    assert relative(result.value, expected["root_value"]) < 1e-5


def statistics_of(script, model, params, target_params, batch) -> dict[str, float]:
    """What the authors' learner logged beside its losses, computed from the script's functions."""
    args = model.args
    labels = script.make_labels(target_params, KEY, batch.observation, model)
    targets = script.make_targets(KEY, batch, labels, args)
    net = model.bind(params)
    states = [net.representation(batch.observation[:, 0])]
    for k in range(args.unroll_steps):
        states.append(net.dynamics(states[-1], targets.action[:, k]))
    prediction = net.prediction(jnp.stack(states, axis=1))
    reward = script.to_scalar(prediction.reward_logits[:, 1:])
    value = script.to_scalar(prediction.value_logits[:, 1:])
    entropy = -jnp.sum(targets.policy * jnp.log(jnp.maximum(targets.policy, 1e-30)), axis=-1)
    pairs = {
        "reward_prediction": reward, "reward_target": targets.reward, "value_prediction": value,
        "value_target": targets.value,
    }  # fmt: skip
    if script is rosmo:
        net = model.bind(target_params)
        state = net.representation(batch.observation[:, : args.unroll_steps + 1])
        action = jnp.broadcast_to(jnp.arange(3), (*state.shape[:2], 3))
        value = labels.value[:, : args.unroll_steps + 1]
        pairs["improve_advantage"] = rosmo.one_step_advantage(target_params, state, value, action, model)
    logged = {f"{name}_mean": float(jnp.mean(x)) for name, x in pairs.items()}
    logged |= {f"{name}_std": float(jnp.std(x)) for name, x in pairs.items()}
    return logged | {"policy_target_entropy_mean": float(jnp.mean(entropy)), "param_norm": float(optax.tree.norm(params))}


@pytest.mark.parametrize(("script", "golden", "model"), ALGORITHMS)
def test_six_updates(script, golden, model, monkeypatch, capsys):
    """All that their learner logged at every update, and the parameters after the sixth.

    Six updates cover the warm-up (three), the decay mask and three copies to the target parameters.
    """
    same_randomness(script, golden, monkeypatch)
    args = model.args
    params, target = (jax.tree.map(jnp.asarray, golden_numbers.parameters(golden, name)) for name in ("params0", "target0"))
    state = script.TrainState(jnp.int32(0), params, target, script.make_optimizer(args).init(params), KEY)

    @jax.jit
    def step(state, batch):
        labels = script.make_labels(state.target_params, KEY, batch.observation, model)
        return script.update(state, KEY, batch, labels, model)

    # Their value and behaviour losses are logged after multiplication by the coefficients.
    factors = {"value_loss": args.value_coef, "behavior_loss": ARGS.behavior_coef}
    losses = ["total_loss", "reward_loss", "value_loss", "policy_loss", "policy_entropy"]
    losses += ["behavior_loss"] if script is rosmo else []
    worst: dict[str, float] = {}
    for i in range(6):
        batch = golden_batch(script, golden, i)
        before, statistics = state.params, statistics_of(script, model, state.params, state.target_params, batch)
        state, metrics = step(state, batch)
        for name in losses:
            statistics[f"{name}_mean"] = float(metrics[name]) * factors.get(name, 1.0)
        statistics["grad_norm"] = float(metrics["grad_norm"])
        statistics["update_norm"] = float(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before)))
        statistics["param_norm"] = float(optax.tree.norm(state.params))
        for name, ours in statistics.items():
            theirs = golden[f"log|{name}"]
            worst[name] = max(worst.get(name, 0.0), abs(ours - theirs[i]) / np.max(np.abs(theirs)))
    logged = {name for name in golden if name.startswith("log|")}
    absent = logged - {f"log|{name}" for name in worst}
    assert all(np.all(golden[name] == 0) for name in absent) and len(absent) == (0 if script is rosmo else 3)
    after = golden_numbers.parameters(golden, "params6")
    worst["parameters after 6 updates"] = max(jax.tree.leaves(jax.tree.map(relative, state.params, after)))
    with capsys.disabled():
        print("\nlargest relative differences:", {name: f"{value:.1e}" for name, value in worst.items()})
    assert max(worst.values()) < 1e-4
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, state.target_params))


def test_learning_rate_and_decay_mask():
    """Warm-up from 0, staircase after it, and weight decay that touches kernels only."""
    args = dataclasses.replace(ARGS, learning_rate_decay_steps=5, warmup_steps=2)
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    optimizer = rosmo.make_optimizer(args)
    state = optimizer.init(params)
    decays = []
    for _ in range(13):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        assert np.all(updates["layer"]["bias"] == 0)
        decays.append(-float(updates["layer"]["kernel"][0, 0]) / args.weight_decay)
    expected = np.array([0, 0.5] + [1] * 5 + [0.1] * 5 + [0.01]) * args.learning_rate
    np.testing.assert_allclose(decays, expected, rtol=1e-5, atol=1e-12)
