"""The scripts against the numbers that the authors' own code computed."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muzero_unplugged_atari
import muzero_unplugged_bsuite
import rosmo_atari
import rosmo_bsuite as rosmo
from tests import golden_numbers
from tests.golden_numbers import relative

OPS, _ = golden_numbers.load("ops")
KEY = jax.random.PRNGKey(0)


class Case(NamedTuple):
    """A script with the authors' settings and numbers."""

    script: Any
    golden: dict[str, np.ndarray]
    config: dict[str, Any]
    model: Any

    def parameters(self, which: str) -> Any:
        return jax.tree.map(jnp.asarray, golden_numbers.parameters(self.golden, which, self.config))

    def observation(self, *which: Any) -> jax.Array:
        observation = jnp.asarray(self.golden["observation"][which])
        return observation if "channels" in self.config else observation.reshape(*observation.shape[:-2], -1)

    def batch(self, i: int) -> Any:
        """Update i's windows; the authors' have one step more than T on BSuite, which they do not use."""
        window = slice(self.model.args.unroll_steps + self.model.args.bootstrap_steps + 1)
        fields = ("action", "reward", "is_first", "is_last")
        action, reward, *flags = (jnp.asarray(self.golden[field][i, :, window]) for field in fields)
        is_first, is_last = (flag == 1 for flag in flags)
        observation = self.observation(i, slice(None), window)
        return self.script.Steps(observation, action, reward, is_first, is_last, is_terminal=is_last)

    def with_same_randomness(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces what is random by what the golden files have: actions after an episode's end, and searches."""
        actions = jnp.asarray(self.golden["absorbing_actions"])
        monkeypatch.setattr(jax.random, "randint", lambda key, shape, *_: jnp.broadcast_to(actions, shape))
        if self.config["mcts"]:
            policy, value = (jnp.asarray(self.golden[name]) for name in ("mcts_policy", "mcts_value"))
            window = self.model.args.unroll_steps + self.model.args.bootstrap_steps + 1

            def search(params, key, state, prediction, model):
                lead = prediction.policy_logits.shape[:-1]
                t = jnp.arange(np.prod(lead)).reshape(lead) % window  # roots [B, T], or [B T] in this order
                return None, policy[t], value[t]

            monkeypatch.setattr(self.script, "search", search)

    def with_their_filter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces the advantage in the behaviour filter by the authors', at the encoding of the observed next state."""
        make_labels, model = self.script.make_labels, self.model

        def labels_with_their_filter(target_params, key, batch, _):
            labels, net = make_labels(target_params, key, batch, model), model.bind(target_params)
            prediction = net.prediction(net.representation(batch.observation))
            reward, value = (self.script.to_scalar(x) for x in (prediction.reward_logits, prediction.value_logits))
            return labels._replace(advantage=reward[:, 1:] + model.args.discount * value[:, 1:] - value[:, :-1])

        if not self.config["mcts"]:
            monkeypatch.setattr(self.script, "make_labels", labels_with_their_filter)


def case(name: str, script: Any, num_actions: int) -> Any:
    golden, config = golden_numbers.load(name)
    model = script.Model(num_actions, script.Args(**golden_numbers.settings(config)))
    return pytest.param(Case(script, golden, config, model), id=name)


ROSMO = [case("bsuite_rosmo", rosmo, 3), case("atari_rosmo", rosmo_atari, 4)]
MZU = [case("bsuite_mzu", muzero_unplugged_bsuite, 3), case("atari_mzu", muzero_unplugged_atari, 4)]


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
    """Against float64. The usual form, also the golden numbers', is off by 1e-4 in float32."""
    x = OPS["x"].astype(np.float64)
    exact = np.sign(x) * (np.square((np.sqrt(1 + 0.004 * (np.abs(x) + 1.001)) - 1) / 0.002) - 1)
    scale = np.maximum(np.abs(exact), 1)
    assert np.max(np.abs(rosmo.inverse_value_transform(jnp.asarray(OPS["x"])) - exact) / scale) < 1e-6


def test_sampled_target():
    actions, advantage = jnp.asarray(OPS["sample_actions"]), jnp.asarray(OPS["sample_advantage"])
    ours = rosmo.sampled_one_step_target(actions, advantage, OPS["sample_prior_logits"].shape[-1])
    np.testing.assert_allclose(ours, OPS["sample_policy_target"], rtol=1e-5, atol=1e-7)


def test_sampled_target_loses_no_digits():
    """Against float64. The golden numbers' form divides by 0 from advantages of 17 on; an addend is at most e^30."""
    advantage = np.array([[20.0, 0.0, -3.0], [25.0, 24.0, 0.0], [90.0, 89.0, 88.0], [-95.0, -96.0, 0.0], [90.0, 0.0, 0.0]])
    weight = np.exp(advantage)
    exact = weight / (1 + weight[:, [1, 2, 0]] + weight[:, [2, 0, 1]])
    assert exact[-1, 0] > np.exp(80)
    ours = rosmo.sampled_one_step_target(jnp.broadcast_to(jnp.arange(3), advantage.shape), jnp.asarray(advantage), 3)
    np.testing.assert_allclose(ours, np.minimum(exact, np.exp(30.0)), rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("case", ROSMO + MZU)
def test_networks(case):
    num_actions = case.model.num_actions
    net = case.model.bind(case.parameters("params0"))
    state = net.representation(case.observation(0, 0))
    prediction = net.prediction(state)
    assert relative(state, case.golden["net_state"]) < 1e-5
    for name in prediction._fields:
        assert relative(getattr(prediction, name), case.golden[f"net_{name}"]) < 1e-5
    after = net.dynamics(jnp.broadcast_to(state[0], (num_actions, *state.shape[1:])), jnp.arange(num_actions))
    assert relative(after, case.golden["net_next_state"]) < 1e-5


@pytest.mark.parametrize(("num_simulations", "search_depth"), [(8, 8), (20, 20), (20, 2)])
@pytest.mark.parametrize("case", MZU)
def test_search(case, num_simulations, search_depth):
    """Same key, same roots in one batch: the same visit counts and actions, and the root's values.

    What these differ by, up to 2.3e-5 for other roots, is the digits that the authors' inverse value transform loses.
    """
    which = f"search_{num_simulations}_{search_depth}"
    expected = {name: case.golden[f"{which}_{name}"] for name in ("policy", "action", "root_value")}
    args = dataclasses.replace(case.model.args, num_simulations=num_simulations, search_depth=search_depth)
    model = case.script.Model(case.model.num_actions, args)
    params, state = case.parameters("params0"), jnp.asarray(case.golden["net_state"])
    prediction = model.bind(params).prediction(state)
    action, policy, value = case.script.search(params, jax.random.PRNGKey(3), state, prediction, model)
    counts, theirs = (np.asarray(policy) * num_simulations for policy in (policy, expected["policy"]))
    np.testing.assert_allclose(theirs, np.round(theirs), atol=1e-5)
    assert np.array_equal(np.round(counts), np.round(theirs))
    assert np.array_equal(action, expected["action"])
    assert relative(value, expected["root_value"]) < 1e-4


@pytest.mark.parametrize("case", ROSMO + MZU)
def test_six_updates(case, monkeypatch, capsys):
    """The losses and norms that their learner logged at every update, and the parameters after the sixth.

    Six updates cover the warm-up (three), the decay mask and three copies to the target parameters.
    """
    case.with_same_randomness(monkeypatch)
    case.with_their_filter(monkeypatch)
    script, args, golden = case.script, case.model.args, case.golden
    params, target_params = case.parameters("params0"), case.parameters("target0")
    state = script.TrainState(jnp.int32(0), params, target_params, script.make_optimizer(args).init(params), KEY)

    @jax.jit
    def step(state, batch):
        labels = script.make_labels(state.target_params, KEY, batch, case.model)
        after, metrics = script.update(state, KEY, batch, labels, case.model)
        return after, metrics | {"update_norm": optax.tree.norm(jax.tree.map(jnp.subtract, after.params, state.params))}

    # Their value and behaviour losses are logged after multiplication by the coefficients.
    factors = {"value_loss": args.value_coef, "behavior_loss": case.config["behavior_coef"]}
    worst: dict[str, float] = {}
    for i in range(6):
        state, metrics = step(state, case.batch(i))
        for name in metrics.keys() - {"behavior_fraction"}:  # which they did not log
            theirs = golden[f"log|{name}" if "norm" in name else f"log|{name}_mean"]
            difference = abs(float(metrics[name]) * factors.get(name, 1.0) - theirs[i]) / np.max(np.abs(theirs))
            worst[name] = max(worst.get(name, 0.0), difference)
    differences = jax.tree.map(relative, state.params, case.parameters("params6"))
    worst["parameters after 6 updates"] = max(jax.tree.leaves(differences))
    with capsys.disabled():
        print("\nlargest relative differences:", {name: f"{value:.1e}" for name, value in worst.items()})
    assert max(worst.values()) < 1e-4 and len(worst) == (9 if case.config["mcts"] else 10)
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, state.target_params))
