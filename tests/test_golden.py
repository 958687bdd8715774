"""The scripts against the numbers that the authors' own code computed."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muzero_unplugged_atari
import muzero_unplugged_bsuite as mzu
import rosmo_atari
import rosmo_bsuite as rosmo
from tests import golden_numbers
from tests.golden_numbers import relative

OPS, _ = golden_numbers.load("ops")
KEY = jax.random.PRNGKey(0)


class Case(NamedTuple):
    """A script with the authors' settings, their numbers, and the names of its layers."""

    script: Any
    golden: dict[str, np.ndarray]
    config: dict[str, Any]
    model: Any
    layers: dict

    def parameters(self, which: str) -> Any:
        return jax.tree.map(jnp.asarray, golden_numbers.parameters(self.golden, which, self.layers))

    def batch(self, i: int) -> Any:
        """Update i's windows; the authors' have one step more than T on BSuite, which they do not use."""
        window = self.model.args.unroll_steps + self.model.args.bootstrap_steps + 1
        fields = ("observation", "action", "reward", "is_first", "is_last")
        arrays = [jnp.asarray(self.golden[field][i, :, :window]) for field in fields]
        is_first, is_last = (array == 1 for array in arrays[3:])
        return self.script.Steps(*arrays[:3], is_first, is_last, is_terminal=is_last)

    def with_same_randomness(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces what is random by what the golden files have: actions after an episode's end, and searches."""
        actions = jnp.asarray(self.golden["absorbing_actions"])
        monkeypatch.setattr(self.script, "random_actions", lambda key, shape, num_actions: jnp.broadcast_to(actions, shape))
        if "mcts_policy" in self.golden:
            policy, value = (jnp.asarray(self.golden[name]) for name in ("mcts_policy", "mcts_value"))
            window = self.model.args.unroll_steps + self.model.args.bootstrap_steps + 1

            def search(params, key, state, prediction, model):
                lead = prediction.policy_logits.shape[:-1]
                t = jnp.arange(np.prod(lead)).reshape(lead) % window  # roots [B, T], or [B T] in this order
                return self.script.Search(None, policy[t], value[t])

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


def bsuite_case(name: str, script: Any) -> Case:
    golden, config = golden_numbers.load(name)
    extra = {"num_simulations": config["num_simulations"]} if config["mcts"] else {"behavior_coef": config["behavior_coef"]}
    args = script.Args(**golden_numbers.settings(config), **extra)
    return Case(script, golden, config, script.Model(3, args), golden_numbers.BSUITE_LAYERS)


def atari_case(name: str, script: Any) -> Case:
    golden, config = golden_numbers.load(name)
    extra = {"num_simulations": config["num_simulations"]} if config["mcts"] else {"behavior_coef": config["behavior_coef"]}
    blocks = [config[f"blocks_{network}"] for network in ("representation", "transition", "prediction")]
    sizes = dict(zip(("representation_blocks", "dynamics_blocks", "prediction_blocks"), blocks, strict=True))
    sizes |= {"channels": config["channels"], "head_channels": config["reduced_channels_head"]}
    sizes |= {"head_width": config["fc_layers_value"][0]}
    args = script.Args(**golden_numbers.settings(config), **extra, **sizes)
    return Case(script, golden, config, script.Model(4, args), golden_numbers.atari_layers(*blocks))


ROSMO = bsuite_case("bsuite_rosmo", rosmo)
MZU = bsuite_case("bsuite_mzu", mzu)
ROSMO_ATARI = atari_case("atari_rosmo", rosmo_atari)
MZU_ATARI = atari_case("atari_mzu", muzero_unplugged_atari)
CASES = [
    pytest.param(ROSMO, id="rosmo_bsuite"),
    pytest.param(MZU, id="mzu_bsuite"),
    pytest.param(ROSMO_ATARI, id="rosmo_atari"),
    pytest.param(MZU_ATARI, id="mzu_atari"),
]
GOLDEN, ARGS, MODEL = ROSMO.golden, ROSMO.model.args, ROSMO.model


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
    ours = rosmo.sampled_one_step_target(
        jnp.asarray(OPS["sample_actions"]), jnp.asarray(OPS["sample_advantage"]), OPS["sample_prior_logits"].shape[-1]
    )
    np.testing.assert_allclose(ours, OPS["sample_policy_target"], rtol=1e-5, atol=1e-7)


def test_sampled_target_loses_no_digits():
    """Against float64. The golden numbers' form divides by 0 from advantages of 17 on; an addend is at most e^30."""
    advantage = np.array([[20.0, 0.0, -3.0], [25.0, 24.0, 0.0], [90.0, 89.0, 88.0], [-95.0, -96.0, 0.0], [90.0, 0.0, 0.0]])
    weight = np.exp(advantage)
    exact = weight / (1 + weight[:, [1, 2, 0]] + weight[:, [2, 0, 1]])
    assert exact[-1, 0] > np.exp(80)
    ours = rosmo.sampled_one_step_target(jnp.broadcast_to(jnp.arange(3), advantage.shape), jnp.asarray(advantage), 3)
    np.testing.assert_allclose(ours, np.minimum(exact, np.exp(30.0)), rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("case", CASES)
def test_networks(case):
    num_actions = case.model.num_actions
    net = case.model.bind(case.parameters("params0"))
    state = net.representation(jnp.asarray(case.golden["observation"][0, 0]))
    prediction = net.prediction(state)
    assert relative(state, case.golden["net_state"]) < 1e-5
    for name in prediction._fields:
        assert relative(getattr(prediction, name), case.golden[f"net_{name}"]) < 1e-5
    after = net.dynamics(jnp.broadcast_to(state[0], (num_actions, *state.shape[1:])), jnp.arange(num_actions))
    assert relative(after, case.golden["net_next_state"]) < 1e-5


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_one_step_target(case):
    params, script = case.parameters("params0"), case.script
    net = case.model.bind(params)
    state = net.representation(jnp.asarray(case.golden["observation"][0, 0]))
    prediction = net.prediction(state)
    action = jnp.broadcast_to(jnp.arange(case.model.num_actions), (len(state), case.model.num_actions))
    advantage = script.one_step_advantage(params, state, script.to_scalar(prediction.value_logits), action, case.model)
    assert relative(advantage, case.golden["one_step_advantage"]) < 1e-4
    # The authors' inverse transform loses 4 of float32's 7 digits to cancellation, ours none.
    target, of_data = script.improve_policy(params, KEY, state, prediction, action[:, 1], case.model)
    assert np.array_equal(of_data, advantage[:, 1])
    np.testing.assert_allclose(target, case.golden["one_step_policy"], atol=2e-4)


SEARCHES = [
    pytest.param(case, *map(int, name.split("_")[1:3]), id=f"{label}-{name}")
    for case, label in ((MZU, "bsuite"), (MZU_ATARI, "atari"))
    for name in sorted({name.rsplit("_", 1)[0] for name in case.golden if re.fullmatch(r"search_\d+_\d+_policy", name)})
]


@pytest.mark.parametrize(("case", "num_simulations", "search_depth"), SEARCHES)
def test_search(case, num_simulations, search_depth, capsys):
    """Same key, same roots in one batch: the same visit counts and actions, and the root's values.

    What these differ by, up to 2.3e-5 for other roots, is the digits that the authors' inverse value transform loses.
    """
    which = f"search_{num_simulations}_{search_depth}"
    expected = {name: case.golden[f"{which}_{name}"] for name in ("policy", "action", "root_value")}
    args = dataclasses.replace(case.model.args, num_simulations=num_simulations, search_depth=search_depth)
    model = case.script.Model(case.model.num_actions, args)
    params, state = case.parameters("params0"), jnp.asarray(case.golden["net_state"])
    prediction = model.bind(params).prediction(state)
    result = case.script.search(params, jax.random.PRNGKey(3), state, prediction, model)
    counts, theirs = (np.asarray(policy) * num_simulations for policy in (result.policy, expected["policy"]))
    np.testing.assert_allclose(theirs, np.round(theirs), atol=1e-5)
    assert np.array_equal(np.round(counts), np.round(theirs))
    assert np.array_equal(result.action, expected["action"])
    with capsys.disabled():
        print(f"\nroot values: {relative(result.value, expected['root_value']):.1e}")
    assert relative(result.value, expected["root_value"]) < 1e-4


def statistics_of(case: Case, params: Any, target_params: Any, batch: Any) -> dict[str, jax.Array]:
    """What the authors' learner logged beside its losses, computed from the script's functions."""
    script, args, model = case.script, case.model.args, case.model
    labels = script.make_labels(target_params, KEY, batch, model)
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
    if not case.config["mcts"]:
        state = model.bind(target_params).representation(batch.observation[:, : args.unroll_steps + 1])
        lead = batch.action[:, : args.unroll_steps + 1].shape
        action = jnp.broadcast_to(jnp.arange(model.num_actions), (*lead, model.num_actions))
        value = labels.value[:, : args.unroll_steps + 1]
        pairs["improve_advantage"] = script.one_step_advantage(target_params, state, value, action, model)
    logged = {f"{name}_mean": jnp.mean(x) for name, x in pairs.items()}
    logged |= {f"{name}_std": jnp.std(x) for name, x in pairs.items()}
    return logged | {"policy_target_entropy_mean": jnp.mean(entropy)}


@pytest.mark.parametrize("case", CASES)
def test_six_updates(case, monkeypatch, capsys):
    """All that their learner logged at every update, and the parameters after the sixth.

    Six updates cover the warm-up (three), the decay mask and three copies to the target parameters.
    """
    case.with_same_randomness(monkeypatch)
    case.with_their_filter(monkeypatch)
    script, args, golden = case.script, case.model.args, case.golden
    params = case.parameters("params0")
    state = script.TrainState(
        jnp.int32(0), params, case.parameters("target0"), script.make_optimizer(args).init(params), KEY
    )

    @jax.jit
    def step(state, batch):
        statistics = statistics_of(case, state.params, state.target_params, batch)
        labels = script.make_labels(state.target_params, KEY, batch, case.model)
        after, metrics = script.update(state, KEY, batch, labels, case.model)
        statistics["update_norm"] = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, state.params))
        return after, statistics | {name if "norm" in name else f"{name}_mean": value for name, value in metrics.items()}

    # Their value and behaviour losses are logged after multiplication by the coefficients.
    factors = {"value_loss_mean": args.value_coef, "behavior_loss_mean": case.config["behavior_coef"]}
    worst: dict[str, float] = {}
    for i in range(6):
        state, statistics = step(state, case.batch(i))
        for name in statistics.keys() & {name.removeprefix("log|") for name in golden}:
            theirs, ours = golden[f"log|{name}"], float(statistics[name]) * factors.get(name, 1.0)
            worst[name] = max(worst.get(name, 0.0), abs(ours - theirs[i]) / np.max(np.abs(theirs)))
    logged = {name for name in golden if name.startswith("log|")}
    absent = logged - {f"log|{name}" for name in worst}
    assert all(np.all(golden[name] == 0) for name in absent) and len(absent) == (3 if case.config["mcts"] else 0)
    worst["parameters after 6 updates"] = max(
        jax.tree.leaves(jax.tree.map(relative, state.params, case.parameters("params6")))
    )
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
