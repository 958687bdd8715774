"""rosmo_bsuite.py against the numbers that the authors' own code computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rosmo_bsuite as rosmo
from tests import golden_numbers

GOLDEN, CONFIG = golden_numbers.load("bsuite_rosmo")
OPS, _ = golden_numbers.load("ops")
ARGS = rosmo.Args(
    batch_size=CONFIG["batch_size"],
    unroll_steps=CONFIG["unroll_steps"],
    bootstrap_steps=CONFIG["td_steps"],
    discount=CONFIG["discount_factor"],
    num_bins=CONFIG["num_bins"],
    value_coef=CONFIG["value_coef"],
    policy_coef=CONFIG["policy_coef"],
    behavior_coef=CONFIG["behavior_coef"],
    learning_rate=CONFIG["learning_rate"],
    warmup_steps=CONFIG["warmup_steps"],
    learning_rate_decay=CONFIG["learning_rate_decay"],
    weight_decay=CONFIG["weight_decay"],
    max_grad_norm=CONFIG["max_grad_norm"],
    target_update_interval=CONFIG["target_update_interval"],
)
MODEL = rosmo.Model(3, ARGS)
WINDOW = ARGS.unroll_steps + ARGS.bootstrap_steps + 1
KEY = jax.random.PRNGKey(0)


def golden_batch(i: int) -> rosmo.Steps:
    """Update i's windows; the authors' have one step more than T, which they do not use."""
    fields = {field: jnp.asarray(GOLDEN[field][i, :, :WINDOW]) for field in rosmo.Steps._fields}
    return rosmo.Steps(**fields | {"is_first": fields["is_first"] == 1, "is_last": fields["is_last"] == 1})


@pytest.fixture
def same_random_actions(monkeypatch):
    """Replaces the random actions after an episode's end by the ones in the golden files."""
    actions = jnp.asarray(GOLDEN["absorbing_actions"])
    monkeypatch.setattr(rosmo, "random_actions", lambda key, shape, num_actions: jnp.broadcast_to(actions, shape))


def relative(ours, theirs) -> float:
    """The largest difference, relative to the largest of their numbers."""
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


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


def test_networks():
    params = golden_numbers.parameters(GOLDEN, "params0")
    net = MODEL.bind(params)
    state = net.representation(jnp.asarray(GOLDEN["observation"][0, 0]))
    prediction = net.prediction(state)
    assert relative(state, GOLDEN["net_state"]) < 1e-5
    for name in prediction._fields:
        assert relative(getattr(prediction, name), GOLDEN[f"net_{name}"]) < 1e-5
    after = net.dynamics(jnp.broadcast_to(state[0], (3, 32)), jnp.arange(3))
    assert relative(after, GOLDEN["net_next_state"]) < 1e-5


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


def statistics_of(params, target_params, batch) -> dict[str, float]:
    """What the authors' learner logged beside its losses, computed from this script's functions."""
    labels = rosmo.make_labels(target_params, KEY, batch.observation, MODEL)
    targets = rosmo.make_targets(KEY, batch, labels, ARGS)
    net = MODEL.bind(target_params)
    state = net.representation(batch.observation[:, : ARGS.unroll_steps + 1])
    action = jnp.broadcast_to(jnp.arange(3), (*state.shape[:2], 3))
    advantage = rosmo.one_step_advantage(target_params, state, labels.value[:, : ARGS.unroll_steps + 1], action, MODEL)
    net = MODEL.bind(params)
    states = [net.representation(batch.observation[:, 0])]
    for k in range(ARGS.unroll_steps):
        states.append(net.dynamics(states[-1], targets.action[:, k]))
    prediction = net.prediction(jnp.stack(states, axis=1))
    reward = rosmo.to_scalar(prediction.reward_logits[:, 1:])
    value = rosmo.to_scalar(prediction.value_logits[:, 1:])
    entropy = -jnp.sum(targets.policy * jnp.log(jnp.maximum(targets.policy, 1e-30)), axis=-1)
    pairs = {
        "improve_advantage": advantage, "reward_prediction": reward, "reward_target": targets.reward,
        "value_prediction": value, "value_target": targets.value,
    }  # fmt: skip
    logged = {f"{name}_mean": float(jnp.mean(x)) for name, x in pairs.items()}
    logged |= {f"{name}_std": float(jnp.std(x)) for name, x in pairs.items()}
    return logged | {"policy_target_entropy_mean": float(jnp.mean(entropy)), "param_norm": float(optax.tree.norm(params))}


def test_six_updates(same_random_actions, capsys):
    """All that their learner logged at every update, and the parameters after the sixth.

    Six updates cover the warm-up (three), the decay mask and three copies to the target parameters.
    """
    params, target = (jax.tree.map(jnp.asarray, golden_numbers.parameters(GOLDEN, name)) for name in ("params0", "target0"))
    state = rosmo.TrainState(jnp.int32(0), params, target, rosmo.make_optimizer(ARGS).init(params), KEY)

    @jax.jit
    def step(state, batch):
        labels = rosmo.make_labels(state.target_params, KEY, batch.observation, MODEL)
        return rosmo.update(state, KEY, batch, labels, MODEL)

    # Their value and behaviour losses are logged after multiplication by the coefficients.
    factors = {"value_loss": ARGS.value_coef, "behavior_loss": ARGS.behavior_coef}
    worst: dict[str, float] = {}
    for i in range(6):
        before, statistics = state.params, statistics_of(state.params, state.target_params, golden_batch(i))
        state, metrics = step(state, golden_batch(i))
        for name in ("total_loss", "reward_loss", "value_loss", "policy_loss", "behavior_loss", "policy_entropy"):
            statistics[f"{name}_mean"] = float(metrics[name]) * factors.get(name, 1.0)
        statistics["grad_norm"] = float(metrics["grad_norm"])
        statistics["update_norm"] = float(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before)))
        statistics["param_norm"] = float(optax.tree.norm(state.params))
        for name, ours in statistics.items():
            theirs = GOLDEN[f"log|{name}"]
            worst[name] = max(worst.get(name, 0.0), abs(ours - theirs[i]) / np.max(np.abs(theirs)))
    assert {name for name in GOLDEN if name.startswith("log|")} == {f"log|{name}" for name in worst}
    after = golden_numbers.parameters(GOLDEN, "params6")
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
