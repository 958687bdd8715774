"""The algorithms against their formulas, at other settings than the golden ones, and the randomness of every draw.

Networks have random weights everywhere, heads too, and target parameters of their own: at the start of a run all
predictions are alike, and a mistake in what is predicted from which parameters changes nothing.
What all scripts have in the same words is tested in one of them (test_in_step.py).
"""

import functools
import inspect
import itertools
import json
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest

import muzero_unplugged_atari as mzu_atari
import muzero_unplugged_bsuite as mzu
import rosmo_atari
import rosmo_bsuite as rosmo
from tests.programs import is_atari

KEY = jax.random.PRNGKey(7)
BSUITE = {
    "batch_size": 8, "unroll_steps": 2, "bootstrap_steps": 4, "discount": 0.6, "num_bins": 12, "dynamics_width": 7,
}  # fmt: skip
ATARI = {
    "batch_size": 4, "unroll_steps": 2, "bootstrap_steps": 1, "discount": 0.6, "num_bins": 11, "encoder": "cnn",
    "channels": 3, "representation_blocks": 0, "dynamics_blocks": 0, "prediction_blocks": 0, "head_channels": 3,
    "head_width": 8,
}  # fmt: skip
ALL = [pytest.param(script, id=script.__name__) for script in (rosmo, rosmo_atari, mzu, mzu_atari)]
ROSMO, MZU = ALL[:2], ALL[2:]


def small_model(script: Any, **flags: Any) -> Any:
    """The smallest networks: of 3 actions on BSuite, 4 on Atari."""
    small = ATARI if is_atari(script) else BSUITE
    return script.Model(4 if is_atari(script) else 3, script.Args(**small | flags))


@functools.cache
def parameter_shapes(model: Any) -> Any:
    shape = (84, 84, 4) if hasattr(model.args, "encoder") else (4,)
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32))


def random_parameters(model: Any, seed: int = 0) -> Any:
    """Parameters none of which is 0 or 1, and whose predictions differ much between observations."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        kind = path[-1].key
        factor = 1.2 / np.sqrt(np.prod(leaf.shape[:-1])) if kind == "kernel" else 0.3
        return jnp.asarray(factor * random.normal(size=leaf.shape) + (kind == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(model))


def observations(script: Any, *lead: int, seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    if is_atari(script):
        return jnp.asarray(random.integers(256, size=(*lead, 84, 84, 4)), jnp.uint8)
    return jnp.asarray(random.normal(size=(*lead, 4)), jnp.float32)


def dataset(script: Any, lengths: list[int], **fields: Any) -> Any:
    """Steps [N] of episodes with these numbers of steps, which all end by themselves; rewards from -60 to 60, so that
    some lie outside the bins."""
    random, total = np.random.default_rng(1), sum(lengths)
    is_last = np.isin(np.arange(total), np.cumsum(lengths) - 1)
    played = {
        "observation": observations(script, total),
        "action": np.where(is_last, 0, random.integers(3, size=total)).astype(np.int32),
        "reward": np.where(is_last, 0, random.uniform(-60, 60, size=total)).astype(np.float32),
        "is_first": np.roll(is_last, 1),
        "is_last": is_last,
        "is_terminal": is_last,
    }
    return jax.tree.map(jnp.asarray, script.Steps(**played | fields))


def random_labels(*lead: int) -> Any:
    """Of which many have an advantage of 0."""
    random = np.random.default_rng(2)
    value, advantage = (jnp.asarray(scale * random.normal(size=lead), jnp.float32) for scale in (10, 1))
    policy = jnp.asarray(random.dirichlet(np.ones(3), size=lead), jnp.float32)
    return rosmo.Labels(value, policy, jnp.round(advantage))


def train_state(script: Any, model: Any, step: int = 0) -> Any:
    """A state whose target parameters are not its parameters."""
    params, target_params = random_parameters(model, 0), random_parameters(model, 1)
    optimizer_state = script.make_optimizer(model.args).init(params)
    state = script.TrainState(jnp.int32(step), params, target_params, optimizer_state, KEY)
    return jax.tree.map(jnp.copy, state)  # an update takes the memory of its state


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), ours, theirs)


def same(first: Any, second: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), first, second))


# ------------------------------------------------------------------------------------------------------------ Settings

PAPER = {
    "total_steps": 200_000, "batch_size": 512, "discount": 0.997**4, "dynamics_gradient_scale": 0.5, "value_coef": 0.25,
    "policy_coef": 1.0, "learning_rate": 7e-4, "warmup_steps": 1_000, "learning_rate_decay": 0.1,
    "learning_rate_decay_steps": 100_000, "weight_decay": 1e-4, "max_grad_norm": 5.0, "target_update_interval": 200,
    "compute_dtype": "float32", "data_fraction": 1.0, "seed": 0, "eval_episodes": 32,
}  # fmt: skip
CPU_SIZE = {
    "batch_size": 32, "total_steps": 20_000, "encoder": "cnn", "channels": 16, "representation_blocks": 0,
    "dynamics_blocks": 1, "prediction_blocks": 0, "head_channels": 8, "num_bins": 81, "unroll_steps": 3,
    "bootstrap_steps": 3, "learning_rate": 2e-3, "warmup_steps": 200, "learning_rate_decay_steps": 15_000,
    "eval_interval": 2_500,
}  # fmt: skip
PAPER_BSUITE = {"unroll_steps": 3, "bootstrap_steps": 3, "num_bins": 20, "dynamics_width": 32, "noise": 0.0}
PAPER_ATARI = {
    "unroll_steps": 5, "bootstrap_steps": 5, "num_bins": 601, "encoder": "resnet", "channels": 64,
    "representation_blocks": 6, "dynamics_blocks": 2, "prediction_blocks": 2, "head_channels": 128, "head_width": 128,
}  # fmt: skip
PAPER_ROSMO = {"behavior_coef": 0.2, "sampling": False, "num_simulations": 4}
PAPER_MZU = {
    "num_simulations": 20, "search_depth": None, "dirichlet_fraction": 0.25, "temperature": 1.0,
    "policy_target": "visit_counts", "tau": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("script", ALL)
def test_defaults_are_the_papers(script):
    """Every constant of the algorithm that a flag sets; and --cpu-size's, with which the tables of results were made."""
    paper = PAPER | (PAPER_ATARI if is_atari(script) else PAPER_BSUITE)
    paper |= PAPER_ROSMO if script in (rosmo, rosmo_atari) else PAPER_MZU
    args = script.Args()
    assert {name: getattr(args, name) for name in paper} == paper
    if is_atari(script):
        assert script.CPU_SIZE == CPU_SIZE


# ------------------------------------------------------------------------------------------------------------- Networks


def kernels_of(model: Any) -> list[tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(model))
    return sorted(leaf.shape for path, leaf in leaves if path[-1].key == "kernel")


def test_sizes_of_the_networks_follow_the_flags():
    """The kernels that the specification counts, at sizes that all differ."""
    inputs, width, bins, actions = 4, 7, 12, 3
    expected = [(inputs, 64), (64, 64), (64, 32), (32 + actions, width), (width, 32), (32, 32), (32, actions + 2 * bins)]
    assert kernels_of(small_model(rosmo)) == sorted(expected)
    flags = {"channels": 6, "representation_blocks": 3, "dynamics_blocks": 1, "prediction_blocks": 2, "num_bins": 11}
    flags |= {"head_channels": 5, "head_width": 9}
    heads = [(1, 1, 6, 5)] * 3 + [(9, 9)] * 3 + [(9, 4), (9, 11), (9, 11)]
    blocks = [(3, 3, 6, 6)] * 2 * (3 + 1 + 2) + [(3, 3, 6 + 4, 6)]
    paper = [(3, 3, 4, 3), (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 6), (3, 3, 3, 6)] + [(3, 3, 6, 6)] * 5
    expected = [*paper, *blocks, *heads, *[(6 * 6 * 5, 9)] * 3]
    assert kernels_of(small_model(rosmo_atari, encoder="resnet", **flags)) == sorted(expected)
    expected = [(4, 4, 4, 16), (4, 4, 16, 6), *blocks, *heads, *[(11 * 11 * 5, 9)] * 3]
    assert kernels_of(small_model(rosmo_atari, encoder="cnn", **flags)) == sorted(expected)


@pytest.mark.parametrize("script", [rosmo, rosmo_atari])
def test_a_new_state(script):
    """Predictions of 0 at first, the other weights of the usual size, and the same target parameters."""
    state = script.init_state((84, 84, 4) if is_atari(script) else (4,), small_model(script, seed=3))
    assert int(state.step) == 0 and same(state.params, state.target_params)
    kernels, heads = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if path[-1].key != "kernel":
            assert np.all(leaf == (path[-1].key == "scale")) and leaf.ndim == 1
        elif np.all(leaf == 0):
            heads += 1
        else:
            kernels[path] = leaf
            assert leaf.size < 200 or 0.8 < np.std(leaf) * np.sqrt(np.prod(leaf.shape[:-1])) < 1.2
    assert heads == (3 if is_atari(script) else 1)
    if script is rosmo:  # another seed: other weights, and another key for what is drawn in training
        other = script.init_state((4,), small_model(script, seed=4))
        others = dict(jax.tree_util.tree_leaves_with_path(other.params))
        assert not any(np.array_equal(leaf, others[path]) for path, leaf in kernels.items())
        assert not np.array_equal(state.key, other.key)


def test_the_cheap_encoder():
    """Two convolutions of the image's maxima of 2 x 2 pixels, less the median of the newest frame's every fourth."""
    model = small_model(rosmo_atari)
    params, image = random_parameters(model), np.asarray(observations(rosmo_atari, 2)) // np.array([4, 3, 2, 1])
    half = image.reshape(-1, 42, 2, 42, 2, 4).max(axis=(2, 4))
    background = np.median(half[:, ::4, ::4, 3], axis=(1, 2))[:, None, None, None]
    kernels = [params["params"]["encoder"][name]["kernel"] for name in ("layers_0", "layers_2")]
    x = jnp.asarray((half - background) / 255, jnp.float32)
    convolution = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = convolution(jax.nn.relu(convolution(x, kernels[0], (2, 2), "SAME")), kernels[1], (2, 2), "SAME")
    assert_close(model.bind(params).representation(jnp.asarray(image, jnp.uint8)), x)


@pytest.mark.parametrize("script", [rosmo, rosmo_atari])
def test_bfloat16_is_the_networks_only(script):
    """Parameters and predictions, of which all else is made, stay float32; convolutions and products are of bfloat16."""
    model = small_model(script, compute_dtype="bfloat16")
    params = parameter_shapes(model)

    def kinds(tree: Any) -> set[Any]:
        return {x.dtype for x in jax.tree.leaves(tree)}

    def predictions(params: Any) -> Any:
        net = model.bind(params)
        first = net.representation(observations(script, 2))
        states = [first, net.dynamics(first, jnp.zeros(2, int))]
        return states, [net.prediction(state) for state in states]

    states, predicted = jax.eval_shape(predictions, params)
    products = re.findall(r"(\w+)\[\S* = (?:conv_general_dilated|dot_general)", str(jax.make_jaxpr(predictions)(params)))
    assert kinds(states) == {jnp.bfloat16.dtype} and set(products) == {"bf16"}
    assert kinds(predicted) == kinds(params) == {np.dtype("float32")}


# --------------------------------------------------------------------------------------------------- Policy improvement


class Roots(NamedTuple):
    """Random observations [S], what a model with random parameters says of them, and the formulas' one-step values."""

    params: Any
    observation: jax.Array
    state: jax.Array
    prediction: Any
    prior: jax.Array  # [S, A]
    value: jax.Array  # [S]
    q: jax.Array  # [S, A], r_g(s, a) + gamma v(g(s, a))

    def improved(self) -> jax.Array:
        return jax.nn.softmax(self.prediction.policy_logits + self.q - self.value[:, None])


@functools.cache
def every_root(script: Any) -> Roots:
    model = small_model(script)
    params, observation = random_parameters(model), observations(script, 64)

    @jax.jit
    def look_ahead(params: Any, observation: jax.Array) -> tuple:
        net, q = model.bind(params), []
        state = net.representation(observation)
        prediction = net.prediction(state)
        for action in range(model.num_actions):
            after = net.prediction(net.dynamics(state, jnp.full(64, action)))
            q.append(script.to_scalar(after.reward_logits) + 0.6 * script.to_scalar(after.value_logits))
        value = script.to_scalar(prediction.value_logits)
        return state, prediction, jax.nn.softmax(prediction.policy_logits), value, jnp.stack(q, axis=-1)

    return Roots(params, observation, *look_ahead(params, observation))


def roots(script: Any, number: int) -> Roots:
    """The first of them."""
    root = every_root(script)
    return Roots(root.params, *jax.tree.map(lambda x: x[:number], tuple(root[1:])))


def played(script: Any, root: Roots, *lead: int) -> Any:
    """Steps with these leading axes at the observations of the roots."""
    number = math.prod(lead)
    data = dataset(script, [number], observation=root.observation, action=jnp.arange(number, dtype=jnp.int32) % 3)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), data)


@pytest.mark.parametrize("script", ROSMO)
def test_labels_by_one_step(script):
    """The value, the improved policy and the advantage of the data's action; on Atari the latter two of K + 1 steps."""
    root, shown = roots(script, 12), 3 if is_atari(script) else 4
    make_labels = jax.jit(script.make_labels, static_argnames="model")
    labels = make_labels(root.params, KEY, played(script, root, 3, 4), model=small_model(script))
    advantage = np.asarray(root.q - root.value[:, None])[np.arange(12), np.arange(12) % 3]
    assert_close(labels.value, root.value.reshape(3, 4), rtol=1e-3)
    assert_close(labels.policy, root.improved().reshape(3, 4, -1)[:, :shown], rtol=1e-3)
    assert_close(labels.advantage, advantage.reshape(3, 4)[:, :shown], rtol=1e-3, atol=1e-4)
    assert np.abs(root.improved() - root.prior).max() > 0.3


@pytest.mark.parametrize(("script", "number"), [(rosmo, 3000), (rosmo_atari, 600)])
def test_sampled_policy_is_of_draws_from_the_prior(script, number):
    """Of two draws a state: each target is one that a pair of actions gives, as often as the prior draws that pair."""
    root = roots(script, 64)
    at = np.argmin(np.abs(np.max(root.prior, axis=-1) - 0.65))  # a prior that is far from uniform, and from one action
    root = Roots(root.params, *jax.tree.map(lambda x: jnp.repeat(x[at][None], number, axis=0), tuple(root[1:])))
    prior, advantage = np.asarray(root.prior[0]), np.asarray(root.q[0] - root.value[0])
    weight, targets = np.exp(advantage), np.zeros((len(prior), len(prior), len(prior)))
    for i, j in np.ndindex(targets.shape[:2]):
        targets[i, j, i] += weight[i] / (1 + weight[j])
        targets[i, j, j] += weight[j] / (1 + weight[i])
    model, steps = small_model(script, sampling=True, num_simulations=2), played(script, root, number // 4, 4)
    make_labels = jax.jit(functools.partial(script.make_labels, model=model))
    labels, others = (make_labels(root.params, jax.random.PRNGKey(i), steps) for i in range(2))
    taken = steps.action[:, : labels.advantage.shape[1]]
    assert_close(labels.value, np.full(steps.action.shape, root.value[0]), rtol=1e-3)
    assert_close(labels.advantage, advantage[taken], rtol=1e-3, atol=1e-4)
    ours = np.asarray(labels.policy).reshape(-1, len(prior))
    distance = np.abs(ours[:, None, None] - targets).max(axis=-1)
    assert distance.min(axis=(1, 2)).max() < 1e-3 and not np.array_equal(labels.policy, others.policy)
    pairs = list(itertools.combinations_with_replacement(range(len(prior)), 2))
    frequency = [np.mean(distance[:, i, j] < 1e-3) for i, j in pairs]
    expected = [prior[i] * prior[j] * (1 if i == j else 2) for i, j in pairs]
    np.testing.assert_allclose(frequency, expected, atol=2 / np.sqrt(len(ours)))


@pytest.mark.parametrize("script", MZU)
def test_labels_and_actions_are_the_searchs(script, monkeypatch):
    """From a search with the given parameters and key in the observations' states."""
    root, model, asked = roots(script, 12), small_model(script), []
    found = Found(action=jnp.arange(12) % 3, policy=root.prior[::-1], value=jnp.arange(12.0))

    def search(*arguments: Any) -> Any:
        asked.append(arguments[:-1])
        return found

    monkeypatch.setattr(script, "search", search)
    lead = (3, 4) if is_atari(script) else (12,)
    labels = script.make_labels(root.params, KEY, played(script, root, *lead), model)
    assert np.array_equal(labels.value, found.value.reshape(lead))
    assert np.array_equal(labels.policy, found.policy.reshape(*lead, -1))
    act = inspect.unwrap(script.act)  # before its compilation
    assert np.array_equal(act(root.params, KEY, given(script, root.observation), model), found.action)
    for params, key, state, prediction in asked:
        assert same((params, key), (root.params, KEY))
        assert_close((state, prediction), (root.state, root.prediction), rtol=1e-3)
    assert len(asked) == 2


def given(script: Any, observation: jax.Array) -> jax.Array:
    """Observations as environments give them."""
    return jnp.moveaxis(observation, -1, 1) if is_atari(script) else observation.reshape(len(observation), 2, 2)


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("script", ROSMO)
def test_actions_are_drawn_from(script, sampling):
    """The improved policy, or with --sampling the prior: as often as its probabilities, at six observations."""
    model, root, repeat = small_model(script, sampling=sampling), roots(script, 6), 300
    observation = jnp.repeat(given(script, root.observation), repeat, axis=0)
    drawn, again = (np.asarray(script.act(root.params, jax.random.PRNGKey(i), observation, model)) for i in range(2))
    frequency = [np.bincount(each, minlength=model.num_actions) / repeat for each in np.split(drawn, 6)]
    policy, other = (root.prior, root.improved())[:: 1 if sampling else -1]
    np.testing.assert_allclose(frequency, policy, atol=0.1)
    assert np.abs(policy - other).max() > 0.2 and policy.max(axis=-1).min() < 0.7 and not np.array_equal(drawn, again)


# -------------------------------------------------------------------------------------------------------------- Search


class Found(NamedTuple):
    """What a search returns."""

    action: Any
    policy: Any
    value: Any


@functools.cache
def searched(repeat: int, **flags: Any) -> tuple[Roots, Any]:
    """64 roots, `repeat` times each, and their searches."""
    root = roots(mzu, 64)
    root = Roots(root.params, *jax.tree.map(lambda x: jnp.repeat(x, repeat, axis=0), tuple(root[1:])))
    search = jax.jit(functools.partial(mzu.search, model=small_model(mzu, **flags)))
    return root, Found(*jax.tree.map(np.asarray, search(root.params, KEY, root.state, root.prediction)))


def test_mzu_q():
    """Two simulations at depth 1: a tried action's Q is its one-step value, an untried one's the root's value, which is the
    mean of what was seen. 20 searches of each root act by this policy, not by visit counts."""
    root, result = searched(20, policy_target="mzu_q", num_simulations=2, search_depth=1, tau=0.5)
    prior, value, q = (np.asarray(x, np.float64) for x in (root.prior, root.value, root.q))
    found = np.zeros(len(value), int)
    for visits in ((2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 1, 0), (1, 0, 1), (0, 1, 1)):
        mean = (value + q @ visits) / 3
        policy = prior * np.exp(np.where(visits, q, mean[:, None]) / 0.5)
        policy /= policy.sum(axis=-1, keepdims=True)
        found += np.isclose(result.value, mean, atol=1e-4) & np.isclose(result.policy, policy, atol=1e-4).all(axis=-1)
    assert found.min() == 1
    rank = np.argsort(np.argsort(result.policy, axis=-1), axis=-1)
    often = np.bincount(rank[np.arange(len(rank)), result.action]) / len(rank)
    expected = np.sort(result.policy, axis=-1).mean(axis=0)
    assert np.abs(often - expected).max() < 0.04 and 0.5 < expected.max() < 0.85


def test_temperature_0_acts_by_a_most_visited_action():
    """Other temperatures are mctx's, below."""
    _, result = searched(20, num_simulations=8, dirichlet_fraction=0.4, temperature=0.0)
    assert np.array_equal(result.policy[np.arange(len(result.action)), result.action], result.policy.max(axis=-1))


def both_searches(num_actions: int, **settings: Any) -> tuple[Any, Any]:
    """The script's and mctx's, of the same 64 roots, model and key."""
    model = mzu.Model(num_actions, mzu.Args(**settings))
    net = model.bind(params := random_parameters(model))
    state = net.representation(observations(mzu, 64))
    arguments = params, KEY, state, net.prediction(state)
    ours, theirs = (jax.jit(functools.partial(f, model=model))(*arguments) for f in (mzu.search, search_by_mctx))
    return Found(*jax.tree.map(np.asarray, ours)), Found(*jax.tree.map(np.asarray, theirs))


def search_by_mctx(params: Any, key: jax.Array, state: jax.Array, prediction: Any, model: Any) -> tuple:
    args = model.args
    value = mzu.to_scalar(prediction.value_logits)
    root = mctx.RootFnOutput(prior_logits=prediction.policy_logits, value=value, embedding=state)
    policy, settings = mctx.muzero_policy, {"dirichlet_fraction": args.dirichlet_fraction, "temperature": args.temperature}
    if args.policy_target == "gumbel":
        policy, settings = mctx.gumbel_muzero_policy, {}
    step, depth = functools.partial(mzu.expand, model=model), args.search_depth or args.num_simulations
    result = policy(params, key, root, step, args.num_simulations, max_depth=depth, **settings)
    return result.action, result.action_weights, result.search_tree.summary().value


def relative_to_the_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    ("num_simulations", "search_depth", "num_actions", "dirichlet_fraction"),
    [(20, 20, 2, 0.4), (20, 2, 4, 0.25), (50, 50, 18, 0.0), (4, 4, 3000, 0.0)],
)
def test_search_is_mctxs(num_simulations, search_depth, num_actions, dirichlet_fraction):
    """As many visits of every action of every root, the same actions, and the roots' values."""
    settings = {"num_simulations": num_simulations, "search_depth": search_depth, "dirichlet_fraction": dirichlet_fraction}
    ours, theirs = both_searches(num_actions, **settings, temperature=2.0)
    assert np.array_equal(np.round(num_simulations * ours.policy), np.round(num_simulations * theirs.policy))
    assert np.array_equal(ours.action, theirs.action)
    assert relative_to_the_largest(ours.value, theirs.value) < 1e-4


@pytest.mark.parametrize("discount", [1e-9, 0.6])
def test_search_at_small_discounts(discount):
    """What lies deep in a tree counts little there, and nothing overflows: the values of roots are mctx's."""
    ours, theirs = both_searches(3, num_simulations=20, discount=discount)
    assert relative_to_the_largest(ours.value, theirs.value) < 1e-4
    assert np.mean(np.abs(ours.policy - theirs.policy).max(axis=1) > 1e-4) < 0.05


def test_gumbel_search_is_mctxs():
    ours, theirs = both_searches(3, policy_target="gumbel", num_simulations=8, search_depth=3, discount=0.6)
    assert np.array_equal(ours.action, theirs.action)
    assert_close(ours, theirs)


def test_ties_are_broken_uniformly():
    """In a fresh network all actions are alike: at every root two random ones of four have a visit more than the others."""
    args = mzu.Args(num_simulations=6, search_depth=1, dirichlet_fraction=0.0, num_bins=21)
    num_roots, model = 4000, mzu.Model(4, args)
    state = mzu.init_state((50,), model)
    net = model.bind(state.params)
    states = net.representation(jax.random.normal(KEY, (num_roots, 50)))
    search = jax.jit(functools.partial(mzu.search, model=model))
    _, policy, _ = search(state.params, KEY, states, net.prediction(states))
    visits = np.round(6 * np.asarray(policy)).astype(int)
    assert (np.sort(visits) == [1, 1, 2, 2]).all()
    counts, expected = np.unique(visits, axis=0, return_counts=True)[1], num_roots / 6
    assert len(counts) == 6
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square of 5 degrees of freedom: 1 in 1,000


# ----------------------------------------------------------------------------------------------------------------- Loss


LOSS = {"value_coef": 0.7, "policy_coef": 0.3, "behavior_coef": 0.45, "dynamics_gradient_scale": 0.2}


def expected_targets(batch: Any, labels: Any, drawn: np.ndarray, args: Any) -> dict[str, np.ndarray]:
    """The targets' definitions, as loops over single steps. What is not known counts nothing, and is whatever it is."""
    k, n, size = args.unroll_steps, args.bootstrap_steps, len(batch.action)
    action, reward = np.zeros((size, k), int), np.zeros((size, k))
    value, policy, behavior = np.zeros((size, k + 1)), np.zeros((size, k + 1, 3)), np.zeros((size, k + 1), bool)
    known = np.ones((size, k + 1))
    batch, labels = jax.tree.map(np.asarray, (batch, labels))
    for b, t in itertools.product(range(size), range(k + 1)):
        restarted = batch.is_first[b, 1 : t + 2].any()
        if t < k:
            action[b, t] = drawn[b, t] if restarted else batch.action[b, t]
            reward[b, t] = 0 if restarted else batch.reward[b, t]
        policy[b, t] = 1 / 3
        ends = np.flatnonzero(batch.is_last[b, : t + 1])
        known[b, t] = len(ends) == 0 or batch.is_terminal[b, ends[0]]
        if not len(ends):
            policy[b, t], later = labels.policy[b, t], np.flatnonzero(batch.is_last[b, t : t + n + 1])
            steps = later[0] if len(later) else n
            value[b, t] = sum(args.discount**i * batch.reward[b, t + i] for i in range(steps))
            if not batch.is_terminal[b, t + steps]:
                value[b, t] += args.discount**steps * labels.value[b, t + steps]
        behavior[b, t] = labels.advantage[b, t] >= 0 and not restarted
    weights = {"reward_weight": known[:, :k] / known[:, :k].mean(), "weight": known / known.mean()}
    return {"action": action, "reward": reward, "value": value, "policy": policy, "behavior": behavior} | weights


def expected_loss(params: Any, batch: Any, targets: dict[str, np.ndarray], model: Any) -> tuple[jax.Array, dict]:
    """The losses, step after step."""
    k, net = model.args.unroll_steps, model.bind(params)
    known = targets["weight"] > 0

    def mean(x: jax.Array, t: int) -> jax.Array:
        """The part of step t in a mean over all that is known; of the rewards there is one step less."""
        return jnp.sum(jnp.where(known[:, t], x, 0)) / known.sum()

    def bins(x: np.ndarray) -> jax.Array:
        return rosmo.two_hot(rosmo.value_transform(x), model.args.num_bins)

    state = net.representation(batch.observation[:, 0])
    names = ("reward_loss", "value_loss", "policy_loss", "behavior_loss", "policy_entropy", "behavior_fraction")
    metrics = dict.fromkeys(names, jnp.zeros(()))
    for t in range(k + 1):
        if t > 0:
            state = net.dynamics(state, targets["action"][:, t - 1])
            state = 0.2 * state + jax.lax.stop_gradient(0.8 * state)
        reward, value, log_policy = (
            jax.nn.log_softmax(getattr(net.prediction(state), f"{name}_logits")) for name in ("reward", "value", "policy")
        )
        if t > 0:
            loss = mean(jnp.sum(bins(targets["reward"][:, t - 1]) * reward, axis=-1), t - 1)
            metrics["reward_loss"] -= loss * known.sum() / known[:, :k].sum()
        metrics["value_loss"] -= mean(jnp.sum(bins(targets["value"][:, t]) * value, axis=-1), t)
        metrics["policy_loss"] -= mean(jnp.sum(targets["policy"][:, t] * log_policy, axis=-1), t)
        taken = jnp.sum(jax.nn.one_hot(batch.action[:, t], 3) * log_policy, axis=-1)
        metrics["behavior_loss"] -= mean(targets["behavior"][:, t] * taken, t)
        metrics["policy_entropy"] -= mean(jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1), t)
        metrics["behavior_fraction"] += mean(targets["behavior"][:, t], t)
    total = metrics["reward_loss"] + sum(
        LOSS[f"{name}_coef"] * metrics[f"{name}_loss"] for name in ("value", "policy", "behavior")
    )
    return total, metrics | {"total_loss": total}


@functools.cache
def gradient_of(loss: Any) -> Any:
    """Compiled once for all tests here."""
    return jax.jit(jax.grad(loss, has_aux=True), static_argnames="model")


@pytest.mark.parametrize("truncated", [[], [1, 4, 9], [0, 2, 3, 5, 6]])
def test_targets_losses_and_gradients_at_other_settings(truncated):
    """Every coefficient, the discount, the steps, the bins and the gradient's scale, against the definitions.

    truncated: those of the episodes that end in no terminal state.
    """
    model, lengths = small_model(rosmo, **LOSS), [2, 2, 3, 8, 2, 2, 4, 9, 5, 3, 7, 6, 12]
    args, params = model.args, random_parameters(model)
    is_last = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    is_terminal = is_last & ~np.isin(np.cumsum(is_last) - 1, truncated)
    windows = np.arange(sum(lengths) - 7)[:, None] + np.arange(7)  # [B, T], of K = 2 and n = 4
    batch = jax.tree.map(lambda x: x[windows], dataset(rosmo, lengths, is_terminal=is_terminal))
    labels = random_labels(*batch.action.shape)
    targets = rosmo.make_targets(KEY, batch, labels, args)
    drawn = jax.random.randint(KEY, (len(batch.action), args.unroll_steps), 0, 3)
    expected = expected_targets(batch, labels, np.asarray(drawn), args)
    assert (expected["weight"].min() == 0) == bool(truncated)
    for name, values in expected.items():
        weight = {"reward": "reward_weight", "value": "weight"}.get(name)
        shown = np.asarray(targets._asdict()[weight]) > 0 if weight else np.True_
        np.testing.assert_allclose(shown * getattr(targets, name), shown * values, rtol=1e-5, atol=1e-4, err_msg=name)
    gradient, metrics = gradient_of(rosmo.loss)(params, batch, targets, model=model)
    their_gradient, their_metrics = gradient_of(expected_loss)(params, batch, expected, model=model)
    assert_close({name: metrics[name] for name in their_metrics}, their_metrics)
    assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-4)


def test_windows_of_which_nothing_is_known():
    """They begin where an episode was truncated: no loss, and a gradient that is a number."""
    model, data = small_model(rosmo, **LOSS), dataset(rosmo, [5, 9], is_terminal=np.zeros(14, bool))
    batch = jax.tree.map(lambda x: jnp.stack([x[4:11]] * 58), data)  # as many as above
    targets = rosmo.make_targets(KEY, batch, random_labels(58, 7), model.args)
    gradient, metrics = gradient_of(rosmo.loss)(random_parameters(model), batch, targets, model=model)
    assert float(metrics["total_loss"]) == 0 and all(np.all(x == 0) for x in jax.tree.leaves(gradient))


# ------------------------------------------------------------------------------------------------------------- Updates


def test_optimizer_against_its_formulas():
    """Clipping, Adam, decay of kernels, warm-up and staircase, over ten updates with small and large gradients."""
    settings = {"learning_rate": 0.01, "warmup_steps": 3, "learning_rate_decay": 0.5, "learning_rate_decay_steps": 2}
    optimizer = rosmo.make_optimizer(rosmo.Args(**settings, weight_decay=0.1, max_grad_norm=2.0))
    random = np.random.default_rng(0)
    params = {"dense": {"kernel": random.normal(size=(3, 2)), "bias": random.normal(size=2)}, "norm": {"scale": np.ones(2)}}
    state = optimizer.init(jax.tree.map(jnp.float32, params))
    ours, moments = jax.tree.map(jnp.float32, params), jax.tree.map(lambda x: (0 * x, 0 * x), params)
    update = jax.jit(optimizer.update)
    for t in range(10):
        gradient = jax.tree.map(lambda x: random.normal(size=x.shape) * [0.1, 5.0][t % 2], params)  # noqa: B023
        gradient["norm"]["scale"] *= 1e-7  # next to Adam's epsilon
        updates, state = update(jax.tree.map(jnp.float32, gradient), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
        rate = 0.01 * (t / 3 if t < 3 else 0.5 ** ((t - 3) // 2))
        for layer, name in (("dense", "kernel"), ("dense", "bias"), ("norm", "scale")):
            g = gradient[layer][name] * min(1, 2.0 / norm)
            first, second = moments[layer][name]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            moments[layer][name] = first, second
            step = first / (1 - 0.9 ** (t + 1)) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
            step += 0.1 * params[layer][name] * (name == "kernel")
            params[layer][name] = params[layer][name] - rate * step
        assert_close(ours, params)


def test_updates_one_by_one_and_in_one_call():
    """Sums of metrics over seven updates, target parameters copied after the third and the sixth only, the same key."""
    model = small_model(rosmo, target_update_interval=3, learning_rate=0.01, warmup_steps=1)
    data = dataset(rosmo, [9, 20, 11])
    labels = random_labels(len(data.action))
    states, sums = [jax.device_put(train_state(rosmo, model), jax.P())], []
    for step in range(1, 8):
        before = states[-1]
        after, metrics = rosmo.update_many(jax.tree.map(jnp.copy, before), jnp.int32(1), data, labels, model)
        assert int(after.step) == step and np.array_equal(after.key, before.key)
        assert same(after.params, before.params) == (step == 1)  # the learning rate begins at 0
        assert same(after.target_params, after.params if step % 3 == 0 else before.target_params)
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(after.params)))
        np.testing.assert_allclose(metrics["param_norm"], norm, rtol=1e-5)
        states.append(after)
        sums.append(metrics)
    last, metrics = rosmo.update_many(states[0], jnp.int32(7), data, labels, model)
    assert same(last, states[7])
    assert_close(metrics, jax.tree.map(lambda *each: sum(each), *sums), rtol=1e-5)


def with_draws_as_metrics(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates give as metrics what they are made of, and change nothing."""

    def update(state: Any, key: jax.Array, batch: Any, labels: Any, model: Any) -> tuple[Any, dict]:
        return state._replace(step=state.step + 1), {"key": key, "reward": batch.reward, "labels": labels}

    monkeypatch.setattr(script, "update", update)


def test_draws_of_updates(monkeypatch):
    """Each update has a key for actions of its own and the windows that were labelled for it, and reads their labels."""
    with_draws_as_metrics(rosmo, monkeypatch)
    model = small_model(rosmo, seed=11, target_update_interval=3)
    data, labels = dataset(rosmo, [60], reward=np.arange(60, dtype=np.float32)), random_labels(60)
    windows_key, actions_key, _ = jax.random.split(KEY, 3)
    for step in range(6):
        after, drawn = rosmo.update_many(train_state(rosmo, model, step), jnp.int32(1), data, labels, model)
        windows = rosmo.sample_windows(jax.random.fold_in(windows_key, step), 60, model.args)
        assert int(after.step) == step + 1 and np.array_equal(drawn["reward"], windows)
        assert same(drawn["labels"], jax.tree.map(lambda x: x[windows], labels))  # noqa: B023
        assert np.array_equal(drawn["key"], jax.random.fold_in(actions_key, step))


def test_draws_and_labels_of_an_atari_update(monkeypatch):
    """Labels of the windows' stacks come from the target parameters; updates, labels on each of the two devices and actions
    have keys of their own."""

    def make_labels(params: Any, key: jax.Array, batch: Any, model: Any) -> Any:
        assert batch.action.shape == (2, 4)
        kernel = params["params"]["with_action"]["kernel"]
        return rosmo_atari.Labels(value=key[None], policy=batch.observation, advantage=kernel[None])

    with_draws_as_metrics(rosmo_atari, monkeypatch)
    monkeypatch.setattr(rosmo_atari, "make_labels", make_labels)
    model = small_model(rosmo_atari, seed=14)
    data = dataset(rosmo_atari, [50], observation=observations(rosmo_atari, 50)[..., 0])
    windows = jax.tree.map(lambda x: x[10 + np.arange(4)[:, None] + np.arange(7)], data)
    _, actions_key, labels_key = jax.random.split(KEY, 3)
    for step in (0, 1):
        state = train_state(rosmo_atari, model, step)
        kernel = np.asarray(state.target_params["params"]["with_action"]["kernel"])
        after, drawn = rosmo_atari.update_windows(state, windows, model)
        assert int(after.step) == step + 1 and np.array_equal(drawn["reward"], windows.reward[:, 3:])
        assert np.array_equal(drawn["key"], jax.random.fold_in(actions_key, step))
        key = jax.random.fold_in(labels_key, step)
        assert np.array_equal(drawn["labels"].value, [jax.random.fold_in(key, i) for i in range(2)])
        assert np.array_equal(drawn["labels"].policy, rosmo_atari.stack_frames(windows).observation)
        assert np.array_equal(drawn["labels"].advantage, [kernel, kernel])


def test_labels_of_a_dataset(monkeypatch):
    """By the target parameters, of the steps that the interval's windows read, with a key for every device, chunk of
    these and interval, wherever in it the state is; zeros elsewhere."""

    def make_labels(params: Any, key: jax.Array, steps: Any, model: Any) -> Any:
        policy = jnp.broadcast_to(jax.random.uniform(key, (3,)), (len(steps.action), 3))
        return rosmo.Labels(steps.reward, policy, jnp.full(len(steps.action), params["params"]["torso"]["bias"][0]))

    monkeypatch.setattr(rosmo, "make_labels", make_labels)
    model, data = small_model(rosmo, seed=13, batch_size=600, target_update_interval=4), dataset(rosmo, [9000])
    windows_key, _, labels_key = jax.random.split(KEY, 3)
    for step, first in ((4, 4), (7, 4), (8, 8)):
        state = train_state(rosmo, model, step)
        labels = jax.tree.map(np.asarray, rosmo.label_dataset(state, data, model))
        keys = [jax.random.fold_in(windows_key, t) for t in range(first, first + 4)]
        read = np.unique([rosmo.sample_windows(key, 9000, model.args) for key in keys])
        assert 6 * 1024 < len(read) < 8900
        chunks = np.arange(len(read)) // 1024  # a device's
        keys = [jax.random.fold_in(jax.random.fold_in(labels_key, first), i) for i in range(chunks[-1] + 1)]
        expected = jax.tree.map(np.zeros_like, labels)
        expected.value[read] = data.reward[read]
        expected.policy[read] = np.array([jax.random.uniform(key, (3,)) for key in keys])[chunks]
        expected.advantage[read] = state.target_params["params"]["torso"]["bias"][0]
        assert same(labels, expected)


def test_labels_with_another_random_generator():
    """What updates draw one by one has labels, with JAX's generator "rbg" too, which draws many at once in another way."""
    model, data = small_model(rosmo, batch_size=64, target_update_interval=4), dataset(rosmo, [9000])
    with jax.default_prng_impl("rbg"):
        state = rosmo.init_state(data.observation.shape[1:], model)
        windows_key, policy = jax.random.split(state.key, 3)[0], rosmo.label_dataset(state, data, model).policy
        for t in range(4):
            windows = rosmo.sample_windows(jax.random.fold_in(windows_key, t), 9000, model.args)
            assert np.allclose(policy[windows].sum(-1), 1)


def test_labels_are_made_anew_for_every_interval(catch_dataset, tmp_path, monkeypatch):
    """No call of the compiled loop goes over the end of an interval, also after a resume; logged are means over updates."""
    calls: list[tuple[int, int, int]] = []

    class Updates:
        def lower(self, *_: Any) -> Any:
            return self

        def compile(self) -> Any:
            return self

        def __call__(self, state: Any, count: Any, data: Any, labels: int) -> tuple[Any, dict]:
            calls.append((int(state.step), int(count), labels))
            metrics = dict.fromkeys(("total_loss", "grad_norm", "param_norm"), np.float32(count))
            return state._replace(step=state.step + count), metrics

    monkeypatch.setattr(rosmo, "update_many", Updates())
    monkeypatch.setattr(rosmo, "label_dataset", lambda state, data, model: int(state.step) // 20)
    monkeypatch.setattr(rosmo, "evaluate", lambda *_: {"eval/return_mean": 0.0})
    run_dir = tmp_path / "run"
    flags = ["--data-dir", catch_dataset, "--batch-size", 16, "--target-update-interval", 20, "--log-interval", 30]
    for arguments in ([*flags, "--total-steps", 33, "--run-dir", run_dir], ["--resume", run_dir, "--total-steps", 137]):
        rosmo.main(rosmo.parse_args(list(map(str, arguments))))
    starts, counts, _ = zip(*calls, strict=True)
    assert list(starts) == [0, *np.cumsum(counts)[:-1]] and sum(counts) == 137 and len(calls) < 16
    for start, count, interval in calls:
        assert start // 20 == (start + count - 1) // 20 == interval
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [30, 33, 60, 90, 120, 137]
    assert {line["train/total_loss"] for line in lines} == {1.0}
