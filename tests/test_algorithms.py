"""The algorithms against their formulas, at other settings than the golden ones, and the randomness of every draw.

Networks have random weights everywhere, heads too, and target parameters of their own: at the start of a run all
predictions are alike, and a mistake in what is predicted from which parameters changes nothing.
"""

import functools
import inspect
import itertools
import math
from typing import Any, NamedTuple

import envpool
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import muzero_unplugged_atari as mzu_atari
import muzero_unplugged_bsuite as mzu
import rosmo_atari
import rosmo_bsuite as rosmo
from benchmark.search import random_network, search_by_mctx
from tests import programs
from tests.programs import SMALL

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


def is_atari(script: Any) -> bool:
    return script in (rosmo_atari, mzu_atari)


def small_model(script: Any, **flags: Any) -> Any:
    """The smallest networks: of 3 actions on BSuite, 4 on Atari."""
    small = ATARI if is_atari(script) else BSUITE
    return script.Model(4 if is_atari(script) else 3, script.Args(**small | flags))


@functools.cache
def parameter_shapes(model: Any) -> Any:
    shape = (84, 84, 4) if hasattr(model.args, "encoder") else (2, 2)

    def everything(net: Any, observation: jax.Array, action: jax.Array) -> Any:
        return net.prediction(net.dynamics(net.representation(observation), action))

    init = functools.partial(model.init, method=everything)
    return jax.eval_shape(init, KEY, jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32))


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
    return jnp.asarray(random.normal(size=(*lead, 2, 2)), jnp.float32)


def filled(kind: Any, **fields: Any) -> Any:
    """A named tuple from those of the fields that it has."""
    return kind(**{name: fields[name] for name in kind._fields})


def steps(script: Any, **fields: Any) -> Any:
    """Steps of episodes that all end by themselves."""
    return filled(script.Steps, **{"is_terminal": fields["is_last"]} | fields)


def dataset(script: Any, lengths: list[int], **fields: Any) -> Any:
    """Steps [N] of episodes with these numbers of steps; rewards from -60 to 60, so that some lie outside the bins."""
    random, total = np.random.default_rng(1), sum(lengths)
    is_last = np.isin(np.arange(total), np.cumsum(lengths) - 1)
    played = {
        "observation": observations(script, total),
        "action": np.where(is_last, 0, random.integers(3, size=total)).astype(np.int32),
        "reward": np.where(is_last, 0, random.uniform(-60, 60, size=total)).astype(np.float32),
        "is_first": np.roll(is_last, 1),
        "is_last": is_last,
    }
    return jax.tree.map(jnp.asarray, steps(script, **played | fields))


def random_labels(script: Any, *lead: int, num_actions: int = 3) -> Any:
    random = np.random.default_rng(2)
    value, advantage = (jnp.asarray(10 * random.normal(size=lead), jnp.float32) for _ in range(2))
    policy = jnp.asarray(random.dirichlet(np.ones(num_actions), size=lead), jnp.float32)
    return filled(script.Labels, value=value, policy=policy, advantage=advantage)


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
    "dynamics_blocks": 1, "prediction_blocks": 0, "head_channels": 8, "head_width": 128, "num_bins": 81, "unroll_steps": 3,
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
        interval = {"target_update_interval": 25} if script is rosmo_atari else {}
        assert CPU_SIZE | interval == script.CPU_SIZE


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
    expected = [(8, 8, 4, 16), (4, 4, 16, 6), *blocks, *heads, *[(11 * 11 * 5, 9)] * 3]
    assert kernels_of(small_model(rosmo_atari, encoder="cnn", **flags)) == sorted(expected)


@pytest.mark.parametrize("script", [rosmo, rosmo_atari])
def test_a_new_state(script):
    """Predictions of 0 at first, the other weights of the usual size, and the same target parameters."""
    state = script.init_state((84, 84, 4) if is_atari(script) else (2, 2), small_model(script, seed=3))
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
        other = script.init_state((2, 2), small_model(script, seed=4))
        others = dict(jax.tree_util.tree_leaves_with_path(other.params))
        assert not any(np.array_equal(leaf, others[path]) for path, leaf in kernels.items())
        assert not np.array_equal(state.key, other.key)


def test_the_cheap_encoder():
    """DQN's two convolutions of the image less its background, the median of the newest frame's every 8th pixel."""
    model = small_model(rosmo_atari)
    params, image = random_parameters(model), np.asarray(observations(rosmo_atari, 2)) // np.array([4, 3, 2, 1])
    background = np.median(image[:, ::8, ::8, 3], axis=(1, 2))[:, None, None, None]
    kernels = [params["params"]["encoder"][name]["kernel"] for name in ("layers_0", "layers_2")]
    x = jnp.asarray((image - background) / 255, jnp.float32)
    convolution = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = convolution(jax.nn.relu(convolution(x, kernels[0], (4, 4), "SAME")), kernels[1], (2, 2), "SAME")
    assert_close(model.bind(params).representation(jnp.asarray(image, jnp.uint8)), x)


def products(jaxpr: Any) -> list[Any]:
    """Types of what is multiplied in the convolutions and matrix products of a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            found += [variable.aval.dtype for variable in equation.invars]
        for inner in jaxprs_in_params(equation.params):
            found += products(inner)
    return found


def kinds(tree: Any) -> set[Any]:
    return {x.dtype for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize("script", ALL)
def test_bfloat16_is_the_networks_only(script):
    """Convolutions and products of bfloat16; predictions, labels, parameters, gradients and losses of float32."""
    model = small_model(script, compute_dtype="bfloat16", target_update_interval=2)
    params, state = parameter_shapes(model), jax.eval_shape(lambda: train_state(script, model))
    observation = observations(script, 2)

    def predictions(params: Any) -> Any:
        net = model.bind(params)
        states = [net.representation(observation), net.dynamics(net.representation(observation), jnp.zeros(2, int))]
        return states, [net.prediction(state) for state in states]

    states, predicted = jax.eval_shape(predictions, params)
    assert kinds(states) == set(products(jax.make_jaxpr(predictions)(params).jaxpr)) == {jnp.bfloat16.dtype}
    assert kinds(predicted) == kinds(params) == {np.dtype("float32")}
    if is_atari(script):
        windows = jax.tree.map(lambda x: x[:28].reshape(4, 7, *x.shape[1:]), dataset(script, [13, 20]))
        windows = windows._replace(observation=jnp.zeros((4, 7, 84, 84), jnp.uint8))
        labels = script.make_labels, (params, KEY, windows._replace(observation=observations(script, 4, 7)))
        update = script.update_windows, (state, windows)
    else:
        data = dataset(script, [13, 20])
        labels = script.label_dataset, (state, data)
        update = script.update_many, (state, jnp.int32(1), data, random_labels(script, len(data.action)))
    for function, arguments in (labels, update):
        result = jax.eval_shape(functools.partial(function, model=model), *arguments)
        assert kinds(result) <= {np.dtype("float32"), np.dtype("int32"), np.dtype("uint32")}


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

    def repeated(self, each: int) -> "Roots":
        return Roots(self.params, *jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), tuple(self[1:])))


@functools.cache
def roots(script: Any, number: int) -> Roots:
    model = small_model(script)
    params, observation = random_parameters(model), observations(script, number)

    @jax.jit
    def look_ahead(params: Any, observation: jax.Array) -> tuple:
        net, q = model.bind(params), []
        state = net.representation(observation)
        prediction = net.prediction(state)
        for action in range(model.num_actions):
            after = net.prediction(net.dynamics(state, jnp.full(number, action)))
            q.append(script.to_scalar(after.reward_logits) + 0.6 * script.to_scalar(after.value_logits))
        value = script.to_scalar(prediction.value_logits)
        return state, prediction, jax.nn.softmax(prediction.policy_logits), value, jnp.stack(q, axis=-1)

    return Roots(params, observation, *look_ahead(params, observation))


def test_one_step_policy_at_another_discount():
    root, action = roots(rosmo, 64), jnp.arange(64) % 3
    improve_policy = jax.jit(rosmo.improve_policy, static_argnames="model")
    policy, advantage = improve_policy(root.params, KEY, root.state, root.prediction, action, model=small_model(rosmo))
    assert_close(policy, root.improved())
    assert_close(advantage, (root.q - root.value[:, None])[np.arange(64), action], rtol=1e-3)
    assert np.abs(root.improved() - root.prior).max() > 0.3


def test_sampled_policy_is_of_draws_from_the_prior():
    """Of two draws a state: each target is one that a pair of actions gives, as often as the prior draws that pair."""
    root = roots(rosmo, 64)
    at = np.argmin(np.abs(np.max(root.prior, axis=-1) - 0.65))  # a prior that is far from uniform, and from one action
    prior, value, q = (np.asarray(x[at]) for x in (root.prior, root.value, root.q))
    weight, targets = np.exp(q - value), np.zeros((3, 3, 3))
    for i, j in itertools.product(range(3), repeat=2):
        targets[i, j, i] += weight[i] / (1 + weight[j])
        targets[i, j, j] += weight[j] / (1 + weight[i])
    state, prediction = jax.tree.map(lambda x: jnp.repeat(x[at][None], 3000, axis=0), (root.state, root.prediction))
    model = small_model(rosmo, sampling=True, num_simulations=2)
    improve_policy = jax.jit(functools.partial(rosmo.improve_policy, model=model))
    action = jnp.arange(3000) % 3
    (ours, advantage), (others, _) = (
        jax.tree.map(np.asarray, improve_policy(root.params, jax.random.PRNGKey(i), state, prediction, action))
        for i in range(2)
    )
    assert_close(advantage, np.tile(q - value, 1000), rtol=1e-3)
    distance = np.abs(ours[:, None, None] - targets).max(axis=-1).reshape(len(ours), -1)
    assert distance.min(axis=1).max() < 1e-3 and not np.array_equal(ours, others)
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    frequency = [np.mean(distance[:, 3 * i + j] < 1e-3) for i, j in pairs]
    expected = [prior[i] * prior[j] * (1 if i == j else 2) for i, j in pairs]
    np.testing.assert_allclose(frequency, expected, atol=0.04)


@functools.cache
def searched(repeat: int, **flags: Any) -> tuple[Roots, Any]:
    """64 roots, `repeat` times each, and their searches."""
    root = roots(mzu, 64).repeated(repeat)
    search = jax.jit(functools.partial(mzu.search, model=small_model(mzu, **flags)))
    return root, jax.tree.map(np.asarray, search(root.params, KEY, root.state, root.prediction))


def test_mzu_q_takes_the_roots_value_for_an_untried_action():
    """Two simulations at depth 1: a tried action's Q is its one-step value, the root's value the mean of what was seen."""
    tau = 0.5
    root, result = searched(20, policy_target="mzu_q", num_simulations=2, search_depth=1, tau=tau)
    prior, value, q = (np.asarray(x, np.float64) for x in (root.prior, root.value, root.q))
    found = np.zeros(len(value), int)
    for visits in ((2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 1, 0), (1, 0, 1), (0, 1, 1)):
        mean = (value + q @ visits) / 3
        policy = prior * np.exp(np.where(visits, q, mean[:, None]) / tau)
        policy /= policy.sum(axis=-1, keepdims=True)
        found += np.isclose(result.value, mean, atol=1e-4) & np.isclose(result.policy, policy, atol=1e-4).all(axis=-1)
    assert found.min() == 1


def test_mzu_q_acts_by_its_policy():
    """Not by visit counts: 20 searches of each root act as its policies say."""
    _, result = searched(20, policy_target="mzu_q", num_simulations=2, search_depth=1, tau=0.5)
    chosen = np.eye(3)[result.action]
    order = np.argsort(result.policy, axis=-1)
    for rank in range(3):
        column = order[:, rank, None]
        often, expected = (np.mean(np.take_along_axis(x, column, axis=-1)) for x in (chosen, result.policy))
        assert abs(often - expected) < 0.04 and (rank < 2 or 0.5 < expected < 0.85)


def test_search_acts_by_visit_counts_and_temperature():
    """Actions by counts ** (1 / temperature), neither the most visited one nor as the prior says."""
    _, result = searched(20, num_simulations=8, dirichlet_fraction=0.4, temperature=2.0)
    weight = np.round(8 * result.policy) ** (1 / 2.0)
    most = np.argmax(result.policy, axis=-1)
    expected = np.mean(weight.max(axis=-1) / weight.sum(axis=-1))
    assert abs(np.mean(result.action == most) - expected) < 0.03 < 0.06 < np.mean(result.policy.max(axis=-1)) - expected


def test_noise_of_the_root():
    """One simulation goes where the prior, mixed with Dirichlet(0.3) noise, is largest: as often as with numpy's noise."""
    fraction, repeat = 0.4, 40
    root, result = searched(repeat, num_simulations=1, dirichlet_fraction=fraction)
    prior = np.asarray(root.prior[::repeat])
    noise = np.random.default_rng(0).dirichlet(np.full(3, 0.3), size=5000)
    best = np.argmax((1 - fraction) * prior[:, None] + fraction * noise, axis=-1)  # [64, 5000]
    expected = [np.mean(best == each[:, None]) for each in np.argsort(prior, axis=-1).T]
    ours = np.take_along_axis(result.policy, np.argsort(root.prior, axis=-1), axis=-1).mean(axis=0)
    np.testing.assert_allclose(ours, expected, atol=0.03)


def both_searches(num_actions: int, num_roots: int, **settings: Any) -> tuple[Any, Any]:
    """The script's and mctx's, of the same roots, model and key. The model's values are of both signs and around 1."""
    model, params, state, prediction = random_network(num_actions, num_roots, scale=0.1, **settings)
    arguments = (params, KEY, state, prediction)
    ours, theirs = (jax.jit(functools.partial(f, model=model))(*arguments) for f in (mzu.search, search_by_mctx))
    return jax.tree.map(np.asarray, ours), jax.tree.map(np.asarray, theirs)


def relative_to_the_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


BUDGETS, FEW = [(8, 8), (20, 20), (20, 2), (50, 50), (64, 64)], [(3, 0.4), (2, 0.0), (4, 0.25), (18, 0.0), (3, 0.25)]


@pytest.mark.parametrize(
    ("num_simulations", "search_depth", "num_actions", "dirichlet_fraction"),
    [
        pytest.param(*budget, *case, marks=() if case == FEW[BUDGETS.index(budget)] else pytest.mark.slow)
        for budget in BUDGETS
        for case in sorted({(num_actions, noise) for num_actions in (2, 3, 4, 18) for noise in (0.0, 0.25)} | {(3, 0.4)})
    ],
)
def test_search_is_mctxs(num_simulations, search_depth, num_actions, dirichlet_fraction):
    """As many visits of every action of every root, the same actions, and the roots' values."""
    settings = {"num_simulations": num_simulations, "search_depth": search_depth, "dirichlet_fraction": dirichlet_fraction}
    ours, theirs = both_searches(num_actions, 64, **settings, temperature=2.0)
    assert np.array_equal(np.round(num_simulations * ours.policy), np.round(num_simulations * theirs.policy))
    assert np.array_equal(ours.action, theirs.action)
    assert relative_to_the_largest(ours.value, theirs.value) < 1e-4


@pytest.mark.parametrize("discount", [1e-3, 0.3, 0.6])
def test_search_at_small_discounts(discount):
    """What lies deep in a tree counts little there, and nothing overflows: the values of roots are mctx's."""
    ours, theirs = both_searches(3, 64, num_simulations=20, discount=discount)
    assert relative_to_the_largest(ours.value, theirs.value) < 1e-4
    assert np.mean(np.abs(ours.policy - theirs.policy).max(axis=1) > 1e-4) < 0.05


def test_gumbel_search_is_mctxs():
    settings = {"num_simulations": 8, "search_depth": 3, "discount": 0.6}
    model, params, state, prediction = random_network(3, 64, policy_target="gumbel", **settings)
    ours = jax.jit(functools.partial(mzu.search, model=model))(params, KEY, state, prediction)

    def step(params: Any, key: jax.Array, action: jax.Array, state: jax.Array) -> tuple[Any, jax.Array]:
        net = model.bind(params)
        state = net.dynamics(state, action)
        after = net.prediction(state)
        reward, value = mzu.to_scalar(after.reward_logits), mzu.to_scalar(after.value_logits)
        discount = jnp.full_like(value, 0.6)
        return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=after.policy_logits, value=value), state

    value = mzu.to_scalar(prediction.value_logits)
    root = mctx.RootFnOutput(prior_logits=prediction.policy_logits, value=value, embedding=state)
    result = jax.jit(lambda: mctx.gumbel_muzero_policy(params, KEY, root, step, num_simulations=8, max_depth=3))()
    assert np.array_equal(ours.action, result.action)
    assert_close(ours.policy, result.action_weights)
    assert_close(ours.value, result.search_tree.summary().value)


def test_two_simulations_rank_no_action_above_the_priors_favourite():
    """The second goes there again or elsewhere, whatever the values are: what benchmark/README.md says of the budget."""
    settings = {"num_simulations": 2, "dirichlet_fraction": 0.0}
    model, params, state, prediction = random_network(3, 1024, scale=0.1, **settings)
    result = jax.jit(functools.partial(mzu.search, model=model))(params, KEY, state, prediction)
    favourite = jnp.argmax(prediction.policy_logits, axis=-1, keepdims=True)
    assert set(np.unique(jnp.take_along_axis(result.policy, favourite, axis=-1))) == {0.5, 1.0}


@pytest.mark.parametrize(("num_simulations", "visited"), [(1, [1, 0, 0, 0]), (6, [2, 2, 1, 1])])
def test_ties_are_broken_uniformly(num_simulations, visited):
    """In a fresh network all actions are alike: at every root a random one, or two, have a visit more than the others."""
    args = mzu.Args(num_simulations=num_simulations, search_depth=1, dirichlet_fraction=0.0, num_bins=21)
    num_roots, model = 4000, mzu.Model(4, args)
    state = mzu.init_state((10, 5), model)
    net = model.bind(state.params)
    states = net.representation(jax.random.normal(KEY, (num_roots, 10, 5)))
    search = jax.jit(functools.partial(mzu.search, model=model))
    result = search(state.params, KEY, states, net.prediction(states))
    visits = np.round(num_simulations * np.asarray(result.policy)).astype(int)
    assert (np.sort(visits) == sorted(visited)).all()
    counts = np.unique(visits, axis=0, return_counts=True)[1]
    assert len(counts) == math.comb(4, visited.count(max(visited)))
    expected = num_roots / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square of 5 degrees of freedom: 1 in 1,000


# ----------------------------------------------------------------------------------------------------------------- Loss


def test_random_actions_are_uniform():
    drawn = rosmo.random_actions(KEY, (1000, 6), 5)
    assert drawn.dtype == jnp.int32
    for step in range(6):
        np.testing.assert_allclose(np.bincount(drawn[:, step], minlength=5), 200, atol=60)
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn, rosmo.random_actions(jax.random.PRNGKey(8), (1000, 6), 5))


def test_scale_gradient():
    x = jnp.array([1.0, -2.0])
    value, pullback = jax.vjp(lambda x: rosmo.scale_gradient(x, 0.2), x)
    np.testing.assert_allclose(value, x, rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.array([10.0, 1.0]))[0], [2.0, 0.2], rtol=1e-6)


LOSS = {"value_coef": 0.7, "policy_coef": 0.3, "behavior_coef": 0.45, "dynamics_gradient_scale": 0.2}


def windows_of(data: Any, window: int) -> Any:
    """All windows [B, T] of a dataset, B being made even."""
    index = np.arange((len(data.action) - window + 1) // 2 * 2)[:, None] + np.arange(window)
    return jax.tree.map(lambda x: x[index], data)


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


def two_hot(x: np.ndarray, num_bins: int) -> np.ndarray:
    limit = (num_bins - 1) // 2
    x = np.clip(np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 0.001 * x, -limit, limit)
    low = np.floor(x).astype(int)
    eye = np.eye(num_bins)
    upper = (x - low)[..., None]
    return (1 - upper) * eye[low + limit] + upper * eye[np.minimum(low + limit + 1, num_bins - 1)]


def expected_loss(params: Any, batch: Any, targets: dict[str, np.ndarray], model: Any) -> tuple[jax.Array, dict]:
    """The losses, step after step, and the scaled gradient by its derivative instead of a stopped part."""
    k, net = model.args.unroll_steps, model.bind(params)
    known = targets["weight"] > 0

    def mean(x: jax.Array, t: int) -> jax.Array:
        """The part of step t in a mean over all that is known; of the rewards there is one step less."""
        return jnp.sum(jnp.where(known[:, t], x, 0)) / known.sum()

    @jax.custom_vjp
    def held_back(x: jax.Array) -> jax.Array:
        return x

    held_back.defvjp(lambda x: (x, None), lambda _, g: (LOSS["dynamics_gradient_scale"] * g,))
    bins = {name: two_hot(targets[name], model.args.num_bins) for name in ("reward", "value")}
    state = net.representation(batch.observation[:, 0])
    losses: dict[str, list] = {name: [] for name in ("reward", "value", "policy", "behavior", "entropy")}
    for t in range(k + 1):
        if t > 0:
            state = held_back(net.dynamics(state, targets["action"][:, t - 1]))
        reward, value, log_policy = (
            jax.nn.log_softmax(getattr(net.prediction(state), f"{name}_logits")) for name in ("reward", "value", "policy")
        )
        if t > 0:
            losses["reward"].append(-mean(jnp.sum(bins["reward"][:, t - 1] * reward, axis=-1), t - 1))
        losses["value"].append(-mean(jnp.sum(bins["value"][:, t] * value, axis=-1), t))
        losses["policy"].append(-mean(jnp.sum(targets["policy"][:, t] * log_policy, axis=-1), t))
        taken = jnp.sum(jax.nn.one_hot(batch.action[:, t], 3) * log_policy, axis=-1)
        losses["behavior"].append(-mean(jnp.where(targets["behavior"][:, t], taken, 0), t))
        losses["entropy"].append(-mean(jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1), t))
    means = {name: sum(each) for name, each in losses.items()}
    means["reward"] *= known.sum() / known[:, :k].sum()
    total = means["reward"] + sum(LOSS[f"{name}_coef"] * means[name] for name in ("value", "policy", "behavior"))
    metrics = {f"{name}_loss": means[name] for name in ("reward", "value", "policy", "behavior")}
    metrics |= {
        "policy_entropy": means["entropy"],
        "behavior_fraction": np.mean(targets["behavior"][known]),
        "total_loss": total,
    }
    return total, metrics


@pytest.mark.parametrize("cut_off", [[], [1, 4, 9], [0, 2, 3, 5, 6]])
def test_targets_losses_and_gradients_at_other_settings(cut_off):
    """Every coefficient, the discount, the steps, the bins and the gradient's scale, against the definitions.

    cut_off: those of the episodes that end in no terminal state.
    """
    model, lengths = small_model(rosmo, **LOSS), [2, 2, 3, 8, 2, 2, 4, 9, 5, 3, 7, 6, 12]
    args, params = model.args, random_parameters(model)
    is_last = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    is_terminal = is_last & ~np.isin(np.cumsum(is_last) - 1, cut_off)
    batch = windows_of(dataset(rosmo, lengths, is_terminal=is_terminal), args.unroll_steps + args.bootstrap_steps + 1)
    labels = random_labels(rosmo, *batch.action.shape)
    targets = rosmo.make_targets(KEY, batch, labels, args)
    drawn = rosmo.random_actions(KEY, (len(batch.action), args.unroll_steps), 3)
    expected = expected_targets(batch, labels, np.asarray(drawn), args)
    assert (expected["weight"].min() == 0) == bool(cut_off)
    for name, values in expected.items():
        weight = {"reward": "reward_weight", "value": "weight"}.get(name)
        shown = np.asarray(targets._asdict()[weight]) > 0 if weight else np.True_
        np.testing.assert_allclose(shown * getattr(targets, name), shown * values, rtol=1e-5, atol=1e-4, err_msg=name)
    pairs = (functools.partial(rosmo.loss, targets=targets), functools.partial(expected_loss, targets=expected))
    (gradient, metrics), (their_gradient, their_metrics) = (
        jax.jit(jax.grad(functools.partial(each, batch=batch, model=model), has_aux=True))(params) for each in pairs
    )
    assert_close({name: metrics[name] for name in their_metrics}, their_metrics)
    assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (rosmo, {}),
        (rosmo, {"sampling": True, "num_simulations": 5, "unroll_steps": 4, "bootstrap_steps": 1, "discount": 0.95}),
        (rosmo_atari, {}),
        (rosmo_atari, {"sampling": True, "num_simulations": 2, "discount": 0.95}),
    ],
)
def test_behavior_filter(script, flags):
    """An action is cloned where r_g + gamma v(g(s, a)) - v(s) >= 0 by the target parameters, step after step; none is
    cloned at an episode's end, cut off or not, and after it."""
    model = small_model(script, num_bins=11, **flags)
    args, lengths = model.args, [2, 3, 9, 2, 12]
    is_last = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    data = dataset(script, lengths, is_terminal=is_last & (np.arange(sum(lengths)) > 10))
    batch = windows_of(data, args.unroll_steps + args.bootstrap_steps + 1)

    @jax.jit
    def behavior_of(params: Any, batch: Any) -> jax.Array:
        return script.make_targets(KEY, batch, script.make_labels(params, KEY, batch, model), args).behavior

    @jax.jit
    def look_ahead(params: Any, observation: Any, action: Any) -> tuple[Any, Any, Any]:
        net = model.bind(params)
        state = net.representation(observation[None])
        after = net.prediction(net.dynamics(state, action[None]))
        return after.reward_logits[0], after.value_logits[0], net.prediction(state).value_logits[0]

    params = random_parameters(model, 5)
    reward, value, before = (script.to_scalar(x) for x in jax.vmap(look_ahead, (None, 0, 0))(params, *data[:2]))
    advantage = np.asarray(reward + args.discount * value - before)
    expected = np.zeros((len(batch.action), args.unroll_steps + 1), bool)
    for b, t in np.ndindex(expected.shape):
        expected[b, t] = advantage[b + t] >= 0 and not any(data.is_first[b + 1 : b + t + 2])
    np.testing.assert_array_equal(behavior_of(params, batch), expected)
    assert 0.2 < np.mean(advantage >= 0) < 0.9 and 0.1 < expected.mean() < 0.8


def test_behavior_filter_keeps_an_advantage_of_zero():
    """H(0) = 1, as in the paper (the authors' code has 0)."""
    args = small_model(rosmo).args
    batch = windows_of(dataset(rosmo, [20]), args.unroll_steps + args.bootstrap_steps + 1)
    labels = jax.tree.map(jnp.zeros_like, random_labels(rosmo, *batch.action.shape))
    assert rosmo.make_targets(KEY, batch, labels, args).behavior.all()


def test_two_hot_at_the_edges():
    """Of 20 bins the last counts in the expectation, never as a target."""
    assert rosmo.support(20).tolist() == list(range(-9, 11)) and rosmo.support(5).tolist() == [-2, -1, 0, 1, 2]
    for x, bins in ((100.0, {18: 1.0}), (-100.0, {0: 1.0}), (0.0, {9: 1.0}), (2.25, {11: 0.75, 12: 0.25})):
        expected = np.zeros(20)
        expected[list(bins)] = list(bins.values())
        np.testing.assert_allclose(rosmo.two_hot(jnp.float32(x), 20), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- Update step


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
    labels = random_labels(rosmo, len(data.action))
    states, sums = [jax.device_put(train_state(rosmo, model), rosmo.sharding())], []
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


@pytest.mark.parametrize("script", [rosmo, rosmo_atari])
def test_actions_after_an_episodes_end_have_the_updates_key(script, monkeypatch):
    class Asked(Exception):
        pass

    def make_targets(*arguments: Any) -> Any:
        raise Asked(arguments)

    monkeypatch.setattr(script, "make_targets", make_targets)
    model = small_model(script)
    with pytest.raises(Asked) as asked:
        script.update(train_state(script, model), jax.random.PRNGKey(5), "windows", "their labels", model)
    key, *others = asked.value.args[0]
    assert np.array_equal(key, jax.random.PRNGKey(5)) and others == ["windows", "their labels", model.args]


def test_draws_of_updates(monkeypatch):
    """Each update has a key for actions of its own and the windows that were labelled for it, and reads their labels."""
    model = small_model(rosmo, seed=11, target_update_interval=3)
    data = dataset(rosmo, [60], reward=np.arange(60, dtype=np.float32))
    labels = random_labels(rosmo, 60)._replace(value=1000 + jnp.arange(60.0))

    def update(state: Any, key: jax.Array, batch: Any, labels: Any, model: Any) -> tuple[Any, dict]:
        return state._replace(step=state.step + 1), {"windows": batch.reward, "labels": labels.value, "key": key}

    monkeypatch.setattr(rosmo, "update", update)
    seen, (windows_key, *_) = [], jax.random.split(KEY, 3)
    for step in range(6):
        after, drawn = rosmo.update_many(train_state(rosmo, model, step), jnp.int32(1), data, labels, model)
        assert int(after.step) == step + 1
        assert np.array_equal(drawn["labels"], drawn["windows"] + 1000) and (np.diff(drawn["windows"]) == 1).all()
        keys = jax.random.fold_in(windows_key, step), drawn["key"]
        windows = [rosmo.sample_windows(key, 60, model.args) for key in keys]
        assert np.array_equal(drawn["windows"], windows[0]) and not np.array_equal(drawn["windows"], windows[1])
        assert len(np.unique(drawn["windows"][:, 0])) > 4
        seen.append(drawn)
    for one, other in itertools.combinations(seen, 2):
        assert not np.array_equal(one["windows"], other["windows"]) and not np.array_equal(one["key"], other["key"])


@pytest.mark.parametrize("script", ALL)
def test_labels_of_steps(script, monkeypatch):
    """What the given parameters predict; the policy, and MuZero Unplugged's value, of the improvement with the given key."""
    root, model, asked = roots(script, 6), small_model(script), []
    policy, value, lead = root.prior[::-1], jnp.arange(6.0), (2, 3) if is_atari(script) else (6,)

    def search(params: Any, key: jax.Array, state: jax.Array, prediction: Any, model: Any) -> Any:
        asked.append((params, key, state, prediction))
        return script.Search(action=None, policy=policy, value=value)

    def improve_policy(params: Any, key: Any, state: Any, prediction: Any, action: jax.Array, model: Any) -> Any:
        asked.append((params, key, state, prediction))
        return policy.reshape(*lead, -1), 10.0 + action

    replaced = search if hasattr(script, "search") else improve_policy
    monkeypatch.setattr(script, replaced.__name__, replaced)
    make_labels = jax.jit(lambda *arguments: (script.make_labels(*arguments, model), *asked))
    played = jax.tree.map(lambda x: x[:6].reshape(*lead, *x.shape[1:]), dataset(script, [9]))
    played = played._replace(observation=root.observation.reshape(*lead, *root.observation.shape[1:]))
    labels, (params, key, state, prediction) = make_labels(root.params, KEY, played)
    assert same((params, key), (root.params, KEY))
    assert_close(state.reshape(root.state.shape), root.state, rtol=1e-3)
    assert_close(prediction.policy_logits.reshape(policy.shape), root.prediction.policy_logits, rtol=1e-3)
    assert_close(labels.policy.reshape(policy.shape), policy)
    if replaced is improve_policy:
        assert np.array_equal(labels.advantage, 10 + played.action) and np.unique(played.action).size == 3
        value = root.value
    assert labels.value.shape == lead
    assert_close(labels.value.ravel(), value, rtol=1e-3)


def test_labels_of_a_dataset_are_the_target_parameters():
    """Of the steps that the interval's windows read; zeros elsewhere."""
    model = small_model(rosmo, seed=12, batch_size=4, target_update_interval=2)
    state, data = train_state(rosmo, model, 6), dataset(rosmo, [80])
    labels = rosmo.label_dataset(state, data, model)
    make_labels = jax.jit(rosmo.make_labels, static_argnames="model")
    expected, online = (make_labels(params, KEY, data, model=model) for params in (state.target_params, state.params))
    windows_key = jax.random.split(state.key, 3)[0]
    windows = [rosmo.sample_windows(jax.random.fold_in(windows_key, step), 80, model.args) for step in (6, 7)]
    read = np.isin(np.arange(80), np.array(windows))
    assert 15 < read.sum() < 70
    for ours, theirs, others in zip(labels, expected, online, strict=True):
        assert_close(ours[read], theirs[read], rtol=1e-3, atol=1e-4)
        assert np.all(ours[~read] == 0) and np.std(theirs[read], axis=0).min() > 0.05
        assert np.abs(theirs - others)[read].max() > 0.3


def test_draws_of_labels(monkeypatch):
    """No two steps of a dataset that takes several calls a device, and no two intervals, draw the same; two updates do."""
    model = small_model(rosmo, seed=13, batch_size=600, target_update_interval=4)
    data = dataset(rosmo, [5000])

    def make_labels(params: Any, key: jax.Array, steps: Any, model: Any) -> Any:
        x = jax.random.uniform(key, (len(steps.action), 3), minval=1.0, maxval=2.0)
        return filled(rosmo.Labels, value=x[:, 1], policy=x, advantage=x[:, 0])

    monkeypatch.setattr(rosmo, "make_labels", make_labels)
    states = [train_state(rosmo, model, step) for step in (0, 3, 4)]
    drawn = [np.asarray(rosmo.label_dataset(state, data, model).policy) for state in states]
    assert np.array_equal(drawn[0], drawn[1])
    both = np.concatenate([drawn[0], drawn[2]])
    both = both[both[:, 0] > 0]
    assert len(both) > 9000 and both.min() >= 1 and both.max() <= 2
    assert len(np.unique(both[:, 0])) > 0.99 * len(both)


def test_draws_and_labels_of_an_atari_update(monkeypatch):
    """Labels come from the target parameters; devices, updates, labels and actions each have a key of their own."""
    model = small_model(rosmo_atari, seed=14)
    keys, (windows_key, *_) = list[int](), jax.random.split(KEY, 3)

    def make_labels(params: Any, key: jax.Array, batch: Any, model: Any) -> Any:
        lead, kernel = batch.action.shape, params["params"]["with_action"]["kernel"]
        advantage, value = (jnp.broadcast_to(x, lead) for x in (kernel[0, 0, 0, 0], key[1]))
        return filled(rosmo_atari.Labels, value=value, policy=batch.observation[..., 0, 0, :], advantage=advantage)

    def update(state: Any, key: jax.Array, batch: Any, labels: Any, model: Any) -> tuple[Any, dict]:
        return state._replace(step=state.step + 1), {"key": key, "labels": labels, "action": batch.action}

    monkeypatch.setattr(rosmo_atari, "make_labels", make_labels)
    monkeypatch.setattr(rosmo_atari, "update", update)
    data = dataset(rosmo_atari, [50], observation=np.zeros(50))
    windows = jax.tree.map(lambda x: x[10 + np.arange(4)[:, None] + np.arange(7)], data)
    frames = jnp.broadcast_to(jnp.arange(10, 17, dtype=jnp.uint8)[:, None, None], (4, 7, 84, 84))
    for step in (0, 1, 2):
        state = train_state(rosmo_atari, model, step)
        kernel = np.asarray(state.target_params["params"]["with_action"]["kernel"])
        after, drawn = rosmo_atari.update_windows(state, windows._replace(observation=frames), model)
        labels = drawn["labels"]
        assert int(after.step) == step + 1 and np.all(labels.advantage == kernel[0, 0, 0, 0])
        assert np.array_equal(drawn["action"], windows.action[:, 3:])
        assert np.array_equal(labels.policy[0], np.arange(10, 14)[:, None] + np.arange(4))
        others = [
            jax.random.fold_in(windows_key, step),
            drawn["key"],
            *(jax.random.fold_in(drawn["key"], i) for i in range(2)),
        ]
        keys += [*(int(key[1]) for key in others), *np.unique(labels.value).tolist()]
    assert len(keys) == len(set(keys)) == 3 * (4 + jax.device_count())


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
    flags = ["--data-dir", catch_dataset, *SMALL, "--target-update-interval", 20, "--log-interval", 30]
    assert programs.run(rosmo, [*flags, "--total-steps", 33, "--run-dir", tmp_path / "run"]) == 0
    assert programs.run(rosmo, ["--resume", tmp_path / "run", "--total-steps", 137]) == 0
    starts, counts, _ = zip(*calls, strict=True)
    assert list(starts) == [0, *np.cumsum(counts)[:-1]] and sum(counts) == 137 and len(calls) < 16
    for start, count, interval in calls:
        assert start // 20 == (start + count - 1) // 20 == interval
    logged = [line for line in programs.metrics(tmp_path / "run") if "train/total_loss" in line]
    assert [line["step"] for line in logged] == [30, 33, 60, 90, 120, 137]
    assert {line["train/total_loss"] for line in logged} == {1.0}


# --------------------------------------------------------------------------------------------------------------- Frames


def test_stacks_equal_envpools():
    """What stack_frames makes of frames, over the starts of several episodes, is the stack that EnvPool gives."""
    settings = {"episodic_life": False, "noop_max": 1, "use_fire_reset": False, "max_episode_steps": 12}
    games = envpool.make("Breakout-v5", env_type="gymnasium", num_envs=2, stack_num=4, seed=3, **settings)
    random = np.random.default_rng(0)
    stacks, first = [games.reset()[0]], [np.ones(2, bool)]
    for _ in range(60):
        observation, _, _, _, info = games.step(random.integers(4, size=2).astype(np.int32))
        stacks.append(observation)
        first.append(info["elapsed_step"] == 0)
    stacks, is_first = np.stack(stacks, axis=1), np.stack(first, axis=1)  # [2, 61, 4, 84, 84], [2, 61]
    assert (is_first.sum(axis=1) > 4).all()
    index = np.maximum(np.arange(-3, 61), 0)  # a dataset's first windows repeat its first step
    zeros = np.zeros(is_first.shape)
    windows = steps(rosmo_atari, observation=stacks[:, :, -1], action=zeros, reward=zeros, is_first=is_first, is_last=zeros)
    ours = rosmo_atari.stack_frames(jax.tree.map(lambda x: jnp.asarray(x[:, index]), windows)).observation
    assert np.array_equal(ours, np.moveaxis(stacks, 2, -1))
    assert not np.array_equal(ours[..., 0], ours[..., 3])


# --------------------------------------------------------------------------------------------------------------- Acting


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("script", ROSMO)
def test_actions_are_drawn_from(script, sampling):
    """The improved policy, or with --sampling the prior: as often as its probabilities, at six observations."""
    model, root, repeat = small_model(script, sampling=sampling), roots(script, 6), 300
    observation = jnp.repeat(root.observation, repeat, axis=0)
    drawn, again = (np.asarray(script.act(root.params, jax.random.PRNGKey(i), observation, model)) for i in range(2))
    frequency = [np.bincount(each, minlength=model.num_actions) / repeat for each in np.split(drawn, 6)]
    policy, other = (root.prior, root.improved())[:: 1 if sampling else -1]
    np.testing.assert_allclose(frequency, policy, atol=0.1)
    assert np.abs(policy - other).max() > 0.2 and policy.max(axis=-1).min() < 0.7 and not np.array_equal(drawn, again)


@pytest.mark.parametrize("script", MZU)
def test_actions_are_the_searchs(script, monkeypatch):
    """From a search with the given parameters and key in the observations' states."""
    model = small_model(script)
    root, asked = roots(script, 6), []

    def search(*arguments: Any) -> Any:
        asked.append(arguments[:-1])
        return filled(script.Search, action=jnp.arange(6) % 3, policy=jnp.ones((6, 4)) / 4, value=jnp.zeros(6))

    monkeypatch.setattr(script, "search", search)
    inner = inspect.unwrap(script.act)  # before its compilation
    act = jax.jit(lambda *arguments: (inner(*arguments, model), *asked))
    action, (params, key, state, prediction) = act(root.params, KEY, root.observation)
    assert action.tolist() == [0, 1, 2, 0, 1, 2] and same((params, key), (root.params, KEY))
    assert_close((state, prediction), (root.state, root.prediction), rtol=1e-3)


@pytest.mark.parametrize("script", ALL)
def test_evaluation_acts_with_the_parameters(script, monkeypatch):
    """Not with the target parameters, and with another key at every step and in every evaluation."""
    model = script.Model(4 if is_atari(script) else 3, script.Args(eval_envs=2, eval_episodes=2))
    keys = []

    class Enough(Exception):
        pass

    def act(params: Any, key: jax.Array, observation: Any, model: Any) -> np.ndarray:
        assert params["params"] == {"which": 1}
        keys.append(tuple(np.asarray(key).tolist()))
        if len(keys) % 3 == 0:
            raise Enough
        return np.zeros(len(observation), np.int32)

    monkeypatch.setattr(script, "act", act)
    for step in (0, 1):
        params, target_params = ({"params": {"which": jnp.int32(which)}} for which in (1, 2))
        state = script.TrainState(jnp.int32(step), params, target_params, None, KEY)
        with pytest.raises(Enough):
            script.evaluate(state, model, {})
    assert len(set(keys)) == 6


# ------------------------------------------------------------------------------------------------------------- Variants


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (rosmo, {"sampling": True, "num_simulations": 2}),
        (rosmo_atari, {"sampling": True, "num_simulations": 2}),
        (mzu, {"policy_target": "mzu_q", "tau": 0.5}),
        (mzu_atari, {"policy_target": "mzu_q", "search_depth": 2}),
        (mzu_atari, {"policy_target": "gumbel"}),
    ],
)
def test_variants_label_and_act(script, flags):
    """Shapes only; what a variant changes is above."""
    model = small_model(script, **flags)
    params, lead = parameter_shapes(model), (2, 4) if is_atari(script) else (5,)
    played = dataset(script, [8])
    played = jax.tree.map(lambda x: x[: np.prod(lead)].reshape(*lead, *x.shape[1:]), played)
    labels = jax.eval_shape(functools.partial(script.make_labels, model=model), params, KEY, played)
    improved = (2, 3) if script is rosmo_atari else lead
    assert labels.value.shape == lead and labels.policy.shape == (*improved, model.num_actions)
    action = jax.eval_shape(functools.partial(script.act, model=model), params, KEY, observations(script, 5))
    assert action.shape == (5,) and action.dtype == jnp.int32
