"""rosmo_bsuite.py against the numbers that the authors' own code computed."""

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
MODEL = rosmo.make_model(ARGS, num_actions=3)
WINDOW = ARGS.unroll_steps + ARGS.bootstrap_steps + 1


def batch(i: int) -> rosmo.Steps:
    steps = (jnp.asarray(GOLDEN[field][i, :, :WINDOW]) for field in rosmo.Steps._fields)
    return rosmo.Steps(*steps)._replace(
        is_first=jnp.asarray(GOLDEN["is_first"][i, :, :WINDOW] == 1),
        is_last=jnp.asarray(GOLDEN["is_last"][i, :, :WINDOW] == 1),
    )


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
        np.testing.assert_allclose(rosmo.two_hot(rosmo.value_transform(x), num_bins), OPS[f"two_hot_{num_bins}"], atol=2e-5)
    assert relative(rosmo.to_scalar(jnp.asarray(OPS["logits"])), OPS["logits_to_scalar"]) < 1e-4


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
    advantage = rosmo.one_step_advantage(params, state, rosmo.to_scalar(prediction.value_logits), action, MODEL, ARGS)
    assert relative(advantage, GOLDEN["one_step_advantage"]) < 1e-4
    target = rosmo.improve_policy(params, jax.random.PRNGKey(0), state, prediction, MODEL, ARGS)
    np.testing.assert_allclose(target, GOLDEN["one_step_policy"], atol=1e-5)


def test_six_updates(same_random_actions, capsys):
    """Losses, gradient and update norms of every update, and the parameters after the sixth.

    Six updates cover the warm-up (three), the staircase's start, the decay mask and three copies to the target.
    """
    params, target = (jax.tree.map(jnp.asarray, golden_numbers.parameters(GOLDEN, name)) for name in ("params0", "target0"))
    state = rosmo.TrainState(jnp.int32(0), params, target, rosmo.make_optimizer(ARGS).init(params), jax.random.PRNGKey(0))
    step = jax.jit(rosmo.update, static_argnames=("model", "args"))
    names = {
        "total_loss": "total_loss_mean", "reward_loss": "reward_loss_mean", "value_loss": "value_loss_mean",
        "policy_loss": "policy_loss_mean", "behavior_loss": "behavior_loss_mean", "grad_norm": "grad_norm",
        "policy_entropy": "policy_entropy_mean",
    }  # fmt: skip
    worst = dict.fromkeys([*names, "param_norm", "update_norm"], 0.0)
    for i in range(6):
        before = state.params
        state, metrics = step(state, batch(i), jax.random.PRNGKey(0), model=MODEL, args=ARGS)
        for ours, theirs in names.items():
            difference = abs(float(metrics[ours]) / GOLDEN[f"log|{theirs}"][i] - 1)
            worst[ours] = max(worst[ours], difference)
        norms = {"param_norm": state.params, "update_norm": jax.tree.map(jnp.subtract, state.params, before)}
        for name, tree in norms.items():
            difference = abs(float(optax.global_norm(tree)) - GOLDEN[f"log|{name}"][i])
            worst[name] = max(worst[name], difference / np.max(GOLDEN[f"log|{name}"]))
    theirs = golden_numbers.parameters(GOLDEN, "params6")
    worst["params"] = max(jax.tree.leaves(jax.tree.map(relative, state.params, theirs)))
    with capsys.disabled():
        print("\nlargest relative differences:", {name: f"{value:.1e}" for name, value in worst.items()})
    assert max(worst.values()) < 1e-4
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, state.target_params))
