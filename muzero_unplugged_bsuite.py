# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.7", "flax>=0.11", "optax>=0.2.5", "orbax-checkpoint>=0.11.20", "numpy>=2.0", "tyro>=0.9.30", "tqdm>=4.66",
#     "wandb>=0.19",
#     "bsuite>=0.3.6", "gymnasium>=1.0",
#     "mctx>=0.0.5",
# ]
# ///
"""MuZero Unplugged on BSuite in one file: offline reinforcement learning by tree search with a learned model.

Schrittwieser et al.: "Online and Offline Reinforcement Learning by Planning with a Learned Model", NeurIPS 2021
(arXiv 2104.06294), with the model, the losses and the settings of ROSMO (arXiv 2210.05980).

    python muzero_unplugged_bsuite.py --env-id catch                       # the paper's settings, 200,000 updates
    python muzero_unplugged_bsuite.py --env-id catch --total-steps 20000   # about a minute on two cores
    python muzero_unplugged_bsuite.py --resume RUN_DIR                     # go on where a run was stopped
    python muzero_unplugged_bsuite.py --resume RUN_DIR --eval-only         # score its last checkpoint

In the comments B is the batch, T = K + n + 1 the window (K unroll steps, n bootstrap steps), S the size of a latent state,
A the number of actions, N the steps of the dataset; h, g and f are representation, dynamics and prediction.
"""

import argparse
import dataclasses
import difflib
import fcntl
import functools
import importlib.metadata
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from bsuite.environments import cartpole, catch, mountain_car
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm


class InputError(Exception):
    """What the program's user can put right: it is printed as one sentence, and the exit code is 2."""


# ---------------------------------------------------------------------------------------------------------------- Args


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "catch"  # the task: catch, cartpole or mountain_car, or an environment of Gymnasium, as CartPole-v1
    seed: int = 0  # everything random in the run follows from it
    total_steps: int = 200_000  # updates to make
    batch_size: int = 512  # windows per update
    run_dir: Path | None = None  # folder to make for this run; by default runs/<env>__<script>__<seed>__<time>
    resume: Path | None = None  # folder of a run to go on with; its settings are taken from there
    checkpoint_interval: int = 10_000  # updates between checkpoints
    data_dir: Path | None = None  # dataset folder; by default the task's under datasets/bsuite/, recorded if missing
    data_fraction: float = 1.0  # fraction of the episodes to train on, evenly spaced over the dataset, chosen by seed
    noise: float = 0.0  # probability that the environment replaces an action, in the data and in evaluation

    unroll_steps: int = 3  # K, the steps that the model is unrolled
    bootstrap_steps: int = 3  # n, the steps of the n-step return
    discount: float = 0.997**4  # gamma
    num_bins: int = 20  # bins of the reward and value distributions
    dynamics_width: int = 32  # hidden units of the dynamics network
    dynamics_gradient_scale: float = 0.5  # factor on the gradient into each next state
    value_coef: float = 0.25  # weight of the value loss
    policy_coef: float = 1.0  # weight of the policy loss
    num_simulations: int = 20  # simulations of a search
    search_depth: int | None = None  # depth to which the search tree grows; by default num_simulations
    dirichlet_fraction: float = 0.25  # share of Dirichlet noise in the root's prior
    temperature: float = 1.0  # of acting, by visit counts ** (1 / temperature); the policy target does not use it
    policy_target: Literal["visit_counts", "mzu_q", "gumbel"] = "visit_counts"  # how a search improves the policy
    tau: float = 1.0  # temperature of mzu_q's target, prior * exp(Q / tau) / Z
    learning_rate: float = 7e-4  # peak learning rate
    warmup_steps: int = 1_000  # updates over which the learning rate rises linearly from 0
    learning_rate_decay: float = 0.1  # factor on the learning rate every learning_rate_decay_steps
    learning_rate_decay_steps: int = 100_000  # updates between two decays, counted from the end of the warm-up
    weight_decay: float = 1e-4  # AdamW's decay, on kernels only
    max_grad_norm: float = 5.0  # global norm to which gradients are clipped
    target_update_interval: int = 200  # updates between copies of the parameters to the target parameters

    eval_interval: int = 5_000  # updates between evaluations
    eval_episodes: int = 32  # episodes per evaluation; with 0 there is no environment, and nothing is scored
    eval_envs: int = 32  # environments that play them side by side
    eval_only: bool = False  # with --resume: score the last checkpoint, print the result and stop
    log_interval: int = 1_000  # updates between lines of metrics.jsonl
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "rosmo"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases user or team
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the networks; parameters and losses stay float32
    updates_per_call: int = 50  # updates in one call of the compiled program; an interrupt waits for its end
    cpu_devices: int = 0  # without an accelerator, devices to split the batch over; 0 for as many as cores, at most 8
    distributed: bool = False  # this is one of several processes, on one host or more, that train together

    def __post_init__(self) -> None:
        """Raises InputError for values that make no sense."""
        zero = ["seed", "eval_episodes", "noise", "warmup_steps", "weight_decay", "cpu_devices"]
        zero += ["dirichlet_fraction", "temperature"]
        tiny, huge = sys.float_info.min, sys.float_info.max
        for name, value in vars(self).items():
            least = {"num_bins": 3}.get(name, 0 if name in zero or name.endswith(("_coef", "_scale")) else tiny)
            most = (
                1 if name.endswith(("_fraction", "noise", "discount", "_decay")) else 2**32 - 1 if name == "seed" else huge
            )
            if type(value) in (int, float) and not least <= value <= most:
                limits = "above 0" if least == tiny else f"at least {least}"
                limits += f" and at most {most}" if most < huge else ""
                raise InputError(f"--{name.replace('_', '-')} must be {limits}, not {value}")
        if self.distributed and self.run_dir is None:
            raise InputError("--distributed needs --run-dir: all processes train in one folder")
        if self.eval_only and (self.resume is None or self.eval_episodes == 0):
            raise InputError("--eval-only needs --resume RUN_DIR, and --eval-episodes above 0")
        if self.search_depth is not None and self.search_depth > self.num_simulations:
            raise InputError(f"{self.num_simulations} simulations cannot grow a tree of depth {self.search_depth}")
        used = {"visit_counts": ("dirichlet_fraction", "temperature"), "mzu_q": ("dirichlet_fraction", "tau"), "gumbel": ()}
        for name in ("dirichlet_fraction", "temperature", "tau"):
            if name not in used[self.policy_target] and getattr(self, name) != getattr(Args, name):
                raise InputError(f"--{name.replace('_', '-')} has no part in --policy-target {self.policy_target}")


# -------------------------------------------------------------------------------------------------- Dataset and sampler


class Steps(NamedTuple):
    """Steps in time order: the whole dataset with leading axis [N], or a batch of windows with leading axes [B, T]."""

    observation: Any  # [..., rows, columns] float32
    action: Any  # [...] int32; an episode's last step has none, and 0 here
    reward: Any  # [...] float32, of the action
    is_first: Any  # [...] bool
    is_last: Any  # [...] bool
    is_terminal: Any  # [...] bool; an episode whose last step is not terminal was cut off


def sharding(*axes: str) -> NamedSharding:
    """sharding("batch") splits the leading axis over all devices, sharding() gives each device the whole."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), jax.P(*axes))


def per_device(*in_specs: jax.P) -> Callable:
    """Decorates a function that every device calls with its shares of the arguments, and that returns the same on each."""
    return functools.partial(jax.shard_map, mesh=sharding().mesh, in_specs=in_specs, out_specs=jax.P(), check_vma=False)


def find_dataset(args: Args) -> Path:
    """The folder of the run's dataset. A default one that is missing is recorded, by the repository's data/.

    Raises InputError if it is missing and this file stands alone.
    """
    folder = Path("datasets", "bsuite", f"{args.env_id}_noise_{args.noise}" if args.noise else args.env_id)
    if args.data_dir is None and not folder.exists():
        try:
            if args.env_id not in BSuite.TASKS:
                raise ImportError
            from data.record_bsuite import record_if_missing
        except ImportError:
            raise InputError(f"there is no dataset {folder}: name the folder of one by --data-dir") from None
        record_if_missing(args.env_id, args.noise)
    return args.data_dir or folder


def open_dataset(folder: Path) -> tuple[Steps, dict[str, Any]]:
    """The arrays [N] of a dataset folder, memory-mapped, and its meta.json. Format: data/README.md in the repository.

    Raises InputError, naming the file, where something is missing, damaged or does not fit the format.
    """
    dtypes, arrays = {"observation": ("float32", "uint8"), "action": ("int32",), "reward": ("float32",)}, {}
    try:
        file = folder / "meta.json"
        meta = json.loads(file.read_text())
        length, episodes, num_actions = (int(meta[name]) for name in ("steps", "episodes", "num_actions"))
        for field in Steps._fields:
            file = folder / f"{field}.npy"
            x = arrays[field] = np.load(file, mmap_mode="r")
            is_column = field != "observation"
            if x.dtype not in dtypes.get(field, ("bool",)) or not 0 < len(x) == length or is_column != (x.ndim == 1):
                raise ValueError(f"it holds {x.dtype} {x.shape}, and meta.json says {length} steps")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise InputError(f"{file} is missing, damaged or cut short: {error!r}") from None
    data = Steps(**arrays)
    is_first, is_last, last_step = data.is_first, data.is_last, data.is_last.nonzero()
    floats = [data.reward] + ([data.observation] if data.observation.dtype == "float32" else [])
    for wrong, fault in (
        (meta.get("format_version") != 1, "its format version is not 1"),
        (not is_first[0] or (is_first != np.roll(is_last, 1)).any(), "is_first and is_last do not mark whole episodes"),
        (is_first.sum() != episodes, f"is_first does not mark {episodes} episodes, as meta.json says"),
        ((data.is_terminal & ~is_last).any(), "is_terminal marks a step that is not an episode's last"),
        (data.action.min() < 0 or data.action.max() >= num_actions, f"an action is outside 0 to {num_actions - 1}"),
        (data.action[last_step].any() or data.reward[last_step].any(), "an episode's last step has an action or a reward"),
        (not all(np.isfinite(x).all() for x in floats), "a reward or an observation is not finite"),
    ):
        if wrong:
            raise InputError(f"{folder} is damaged: {fault}")
    return data, meta


def load_dataset(args: Args, environment: Any = None) -> tuple[Steps, np.ndarray, dict]:
    """The run's dataset [N], the rows [M] of it to train on (all steps of a fraction of its episodes), and its meta.json.

    It must fit the environment, if there is one. Observations that are vectors become matrices of one row.
    Raises InputError for a dataset that is missing, damaged, of another task or noise, or too small for the settings.
    """
    data, meta = open_dataset(find_dataset(args))
    if data.observation.ndim == 2:  # vectors
        data = data._replace(observation=data.observation[:, None])
    shape, num_actions = data.observation.shape[1:], meta["num_actions"]
    found = (meta.get("env_id"), num_actions, shape, str(data.observation.dtype))
    if environment is not None:
        shape, num_actions = environment.single_observation_space.shape, int(environment.single_action_space.n)
    wanted = (args.env_id, num_actions, shape, "float32")
    if found != wanted or len(shape) != 2:
        raise InputError(f"the dataset has {found}, not (environment, actions, rows and columns, type) {wanted}")
    if meta.get("noise", 0.0) != args.noise:
        raise InputError(f"the dataset has noise {meta.get('noise', 0.0)!r}, not {args.noise}: name it by --noise")
    episodes, window = meta["episodes"], args.unroll_steps + args.bootstrap_steps + 1
    # Of as many equal stretches of the dataset as episodes are kept, one episode each, drawn by seed.
    edges = np.linspace(0, episodes, max(1, round(args.data_fraction * episodes)) + 1).astype(int)
    kept = np.random.default_rng(args.seed).integers(edges[:-1], edges[1:])
    rows = np.isin(np.cumsum(data.is_first) - 1, kept).nonzero()[0].astype(np.int32)
    longest = np.diff(np.append(data.is_first[rows], True).nonzero()[0]).max()
    if longest < window:
        raise InputError(f"windows of {window} steps are longer than every episode of the data (at most {longest} steps)")
    return data, rows, meta


def sample_windows(key: jax.Array, num_steps: int, args: Args) -> jax.Array:
    """Indices [B, T] of windows of consecutive steps, drawn with replacement; they may run over an episode's end."""
    window = args.unroll_steps + args.bootstrap_steps + 1
    start = jax.random.randint(key, (args.batch_size,), 0, num_steps - window + 1)
    return jax.lax.with_sharding_constraint(start, sharding("batch"))[:, None] + jnp.arange(window)


# ------------------------------------------------------------------------------------------------------------- Networks


class Prediction(NamedTuple):
    policy_logits: jax.Array  # [..., A]
    reward_logits: jax.Array  # [..., num_bins], of the reward on the way into the state
    value_logits: jax.Array  # [..., num_bins]


class MLP(nn.Module):
    """Dense layers with relu between them and none after the last."""

    layers: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, features in enumerate(self.layers):
            x = nn.Dense(features, dtype=self.dtype)(nn.relu(x) if i else x)
        return x


class Model(nn.Module):
    """The learned model of MuZero (Schrittwieser et al. 2020): representation h, dynamics g and prediction f."""

    num_actions: int
    args: Args

    def setup(self) -> None:
        dtype = self.args.compute_dtype
        self.encoder = MLP((64, 64, 32), dtype)
        self.transition = MLP((self.args.dynamics_width, 32), dtype)
        self.torso = nn.Dense(32, dtype=dtype)
        self.heads = nn.Dense(self.num_actions + 2 * self.args.num_bins, dtype=dtype, kernel_init=nn.initializers.zeros)

    def representation(self, observation: jax.Array) -> jax.Array:
        """h: observations [..., rows, columns] to states [..., S]."""
        return self.encoder(observation.reshape(*observation.shape[:-2], -1))

    def dynamics(self, state: jax.Array, action: jax.Array) -> jax.Array:
        """g: states [..., S] and actions [...] to next states [..., S]."""
        one_hot = jax.nn.one_hot(action, self.num_actions, dtype=state.dtype)
        return self.transition(jnp.concatenate([state, one_hot], axis=-1))

    def prediction(self, state: jax.Array) -> Prediction:
        """f: states [..., S] to float32 logits. The three linear heads are one product, which is faster."""
        logits = self.heads(nn.relu(self.torso(state))).astype(jnp.float32)
        return Prediction(*jnp.split(logits, (self.num_actions, self.num_actions + self.args.num_bins), axis=-1))


# ----------------------------------------------------------------------------------------------------- Value transforms


def value_transform(x: jax.Array) -> jax.Array:
    """phi(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x (Pohlen et al. 2018, arXiv 1805.11593)."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + 0.001 * x


def inverse_value_transform(x: jax.Array) -> jax.Array:
    """phi^-1, exactly; written as (sqrt(1 + u) - 1) = u / (sqrt(1 + u) + 1), which loses no digits to cancellation."""
    y = jnp.abs(x) + 1 + 0.001
    return jnp.sign(x) * (jnp.square(2 * y / (jnp.sqrt(1 + 4 * 0.001 * y) + 1)) - 1)


def support(num_bins: int) -> jax.Array:
    """The integers that the bins stand for, from -m on, m = (num_bins - 1) // 2."""
    return jnp.arange(num_bins, dtype=jnp.float32) - (num_bins - 1) // 2


def two_hot(x: jax.Array, num_bins: int) -> jax.Array:
    """[...] to [..., num_bins]: weights of the two integers around x (clipped to [-m, m]) whose mean is x."""
    limit = (num_bins - 1) // 2
    return jnp.maximum(0, 1 - jnp.abs(jnp.clip(x, -limit, limit)[..., None] - support(num_bins)))


def to_scalar(logits: jax.Array) -> jax.Array:
    """[..., num_bins] to [...]: phi^-1 of the distribution's mean."""
    return inverse_value_transform(jax.nn.softmax(logits) @ support(logits.shape[-1]))


# --------------------------------------------------------------------------------------------------- Policy improvement


class Search(NamedTuple):
    action: jax.Array  # [B] int32, to act by
    policy: jax.Array  # [B, A], improved
    value: jax.Array  # [B], of the root after the search


def expand(params: Any, key: jax.Array, action: jax.Array, state: jax.Array, model: Model) -> tuple[Any, jax.Array]:
    """One step of the model from states [B, S] with actions [B], as mctx wants it, and the next states [B, S]."""
    net = model.bind(params)
    state = net.dynamics(state, action)
    prediction = net.prediction(state)
    reward, value = to_scalar(prediction.reward_logits), to_scalar(prediction.value_logits)
    discount, prior_logits = jnp.full_like(value, model.args.discount), prediction.policy_logits
    return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=prior_logits, value=value), state


class Nodes(NamedTuple):
    """B search trees of M nodes: the root, then one for each simulation."""

    state: jax.Array  # [M, B, S]
    prior: jax.Array  # [M, A, B], P(s, a)
    value: jax.Array  # [M, B], of the value head
    reward: jax.Array  # [M, B], the discounted sum of rewards on the way from the root
    discount: jax.Array  # [M, B], gamma ** depth
    depth: jax.Array  # [M, B] int32
    parent: jax.Array  # [M, B] int32
    action: jax.Array  # [M, B] int32, that leads from the parent to the node
    path: jax.Array  # [M, M / 24, B] int32, bits of the nodes on the way from the root, which has none, to this one


def puct(nodes: Nodes, visits: jax.Array, returns: jax.Array, order: jax.Array) -> jax.Array:
    """Actions [M, B] that maximise Q(s,a) + P(s,a) sqrt(N(s)) / (1 + N(s,a)) (c_1 + log((N(s) + c_2 + 1) / c_2)).

    Q is normalised by the least and the greatest of the node's value and its Q; an action not tried has 0. Ties are broken
    by order [M, A, B], distinct integers of which order % A is the action.
    """
    count = 1 + visits.sum(axis=1)  # N(s)
    value = (nodes.value + returns.sum(axis=1)) / count
    q = jnp.where(visits > 0, returns / jnp.maximum(visits, 1), value[:, None])
    low, high = jnp.minimum(q.min(axis=1), value)[:, None], jnp.maximum(q.max(axis=1), value)[:, None]
    q = jnp.where(visits > 0, (q - low) / jnp.maximum(high - low, 1e-8), 0)
    exploration = jnp.sqrt(count) * (1.25 + jnp.log((count + 19_652 + 1) / 19_652))
    score = q + exploration[:, None] * nodes.prior / (1 + visits)
    is_best = score >= score.max(axis=1, keepdims=True)
    return jnp.where(is_best, order, -1).max(axis=1) % visits.shape[1]


def search(params: Any, key: jax.Array, state: jax.Array, prediction: Prediction, model: Model) -> Search:
    """Monte Carlo tree search in the model from states [B, S] with their prediction (Schrittwieser et al. 2020, appendix B).

    No tree is walked: each simulation looks at all nodes at once. An edge (s, a) keeps its visits N(s, a) and returns
    W(s, a), the sum of what the simulations through it returned, so that Q(s, a) = W(s, a) / N(s, a).
    The improved policy is the root's visit counts N(a) / sum_b N(b) (MuZero); or prior(a) exp(Q(s, a) / tau) / Z (MZU-Q,
    Grill et al. 2020), Q being the root's value where no simulation went; or Gumbel MuZero's (Danihelka et al. 2022).
    """
    args, value = model.args, to_scalar(prediction.value_logits)
    if args.policy_target == "gumbel":
        start = mctx.RootFnOutput(prior_logits=prediction.policy_logits, value=value, embedding=state)
        step, depth = functools.partial(expand, model=model), args.search_depth or args.num_simulations
        result = mctx.gumbel_muzero_policy(params, key, start, step, args.num_simulations, max_depth=depth)
        return Search(result.action, result.action_weights, result.search_tree.summary().value)
    batch, num_actions = prediction.policy_logits.shape
    index, actions, trees = np.arange(args.num_simulations + 1)[:, None], np.arange(num_actions)[:, None], np.arange(batch)
    bits = jnp.where(index // 24 == index[::24].T // 24, 1 << index % 24, 0)[..., None]  # [M, M / 24, 1]
    action_key, noise_key, order_key = jax.random.split(key, 3)
    noise = jax.random.dirichlet(noise_key, jnp.full(num_actions, 0.3), (batch,))
    prior = (1 - args.dirichlet_fraction) * jax.nn.softmax(prediction.policy_logits) + args.dirichlet_fraction * noise
    order = jax.random.randint(order_key, (len(index), num_actions, batch), 0, 2**20) * num_actions + actions
    zeros, none, path = jnp.zeros(batch), jnp.zeros(batch, int), jnp.zeros((bits.shape[1], batch), int)
    root = Nodes(state, prior.T, value, zeros, zeros + 1, none, none, none, path)
    nodes = jax.tree.map(lambda x: jnp.zeros((len(index), *x.shape), x.dtype).at[0].set(x), root)

    def simulate(i: jax.Array, carry: tuple[Nodes, jax.Array, jax.Array]) -> tuple[Nodes, jax.Array, jax.Array]:
        # Selection: the path is all nodes to which best actions lead, the whole way from the root. Nodes below i exist.
        nodes, visits, returns = carry
        best = puct(nodes, visits, returns, order)
        is_off = jnp.take_along_axis(best, nodes.parent, axis=0) != nodes.action
        off = jnp.where(is_off[:, None], bits, 0.0).sum(axis=0).astype(int)  # float32 adds 24 bits exactly, and fast
        on_path = ((nodes.path & off) == 0).all(axis=1) & (index < i) & (nodes.depth < (args.search_depth or len(index)))
        leaf = jnp.where(on_path, index, 0.0).max(axis=0).astype(int)
        # Expansion: node i follows from the leaf; at the depth limit it is one more of the same.
        action, reward, discount, depth = (x[leaf, trees] for x in (best, nodes.reward, nodes.discount, nodes.depth))
        step, state = expand(params, key, action, nodes.state[leaf, trees], model)
        reward, discount = reward + discount * step.reward, jnp.maximum(discount * args.discount, 1e-30)
        prior, path = jax.nn.softmax(step.prior_logits).T, nodes.path[leaf, :, trees].T | bits[i]
        new = Nodes(state, prior, step.value, reward, discount, depth + 1, leaf, action, path)
        # Backup of the return from each node of the path on.
        g = (reward + discount * step.value - nodes.reward) / nodes.discount
        chosen = on_path[:, None] & (best[:, None] == actions)
        nodes = jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), nodes, new)
        return nodes, visits + chosen, returns + jnp.where(chosen, g[:, None], 0)

    edges = jnp.zeros_like(nodes.prior)
    _, visits, returns = jax.lax.fori_loop(1, len(index), simulate, (nodes, edges, edges))
    visits, returns = visits[0].T, returns[0].T  # [B, A]
    value = (root.value + returns.sum(axis=1)) / len(index)
    if args.policy_target == "mzu_q":
        q = jnp.where(visits > 0, returns / jnp.maximum(visits, 1), value[:, None])
        logits = prediction.policy_logits + q / args.tau
        return Search(jax.random.categorical(action_key, logits), jax.nn.softmax(logits), value)
    logits = jnp.log(visits / visits.max(axis=1, keepdims=True)) / max(args.temperature, 1e-30)
    return Search(jax.random.categorical(action_key, logits), visits / args.num_simulations, value)


# ----------------------------------------------------------------------------------------------------------------- Loss


class Labels(NamedTuple):
    """What the target parameters say of steps, with the leading axes of Steps."""

    value: jax.Array  # [...]
    policy: jax.Array  # [..., A], improved


class Targets(NamedTuple):
    action: jax.Array  # [B, K] int32, the actions to unroll
    reward: jax.Array  # [B, K]
    value: jax.Array  # [B, K+1]
    policy: jax.Array  # [B, K+1, A]
    reward_weight: jax.Array  # [B, K], of the reward losses: 0 where nothing is known, else equal; their mean is 1
    weight: jax.Array  # [B, K+1], the same of all other losses


def make_labels(target_params: Any, key: jax.Array, steps: Steps, model: Model) -> Labels:
    """Labels [B] of steps [B]. Windows that share a step share its search and its Dirichlet noise."""
    net = model.bind(target_params)
    state = net.representation(steps.observation)
    prediction = net.prediction(state)
    result = search(target_params, key, state, prediction, model)
    return Labels(result.value, result.policy)


def n_step_return(batch: Steps, value: jax.Array, args: Args) -> jax.Array:
    """z_t = sum_{i<n} D_i r_{t+i} + D_n v_{t+n}, D_0 = 1, D_{i+1} = D_i gamma (1 - is_last_{t+i+1}): [B, T] to [B, K+1].

    An episode that was cut off at step L, within n steps of t, has no more rewards: gamma^(L-t) v_L stands for them.
    """
    length = args.unroll_steps + 1
    result, discount = jnp.zeros_like(value[:, :length]), jnp.ones_like(value[:, :length])
    for i in range(args.bootstrap_steps):
        after = slice(i + 1, i + 1 + length)
        result += discount * batch.reward[:, i : i + length]
        discount *= args.discount
        result += jnp.where(batch.is_last[:, after] & ~batch.is_terminal[:, after], discount * value[:, after], 0)
        discount *= ~batch.is_last[:, after]
    return result + discount * value[:, args.bootstrap_steps :]


def random_actions(key: jax.Array, shape: tuple[int, ...], num_actions: int) -> jax.Array:
    """Uniform actions, to unroll after an episode's end."""
    return jax.random.randint(key, shape, 0, num_actions)


def make_targets(key: jax.Array, batch: Steps, labels: Labels, args: Args) -> Targets:
    """Targets of windows [B, T]; what lies after a terminal state in the window is an absorbing state.

    From the step on at which an episode was cut off nothing is known: there all losses have weight 0.
    """
    k, length, num_actions = args.unroll_steps, args.unroll_steps + 1, labels.policy.shape[-1]
    ended = jax.lax.cummax(batch.is_last[:, :length].astype(int), axis=1) == 1  # any is_last in 0..t
    restarted = jax.lax.cummax(batch.is_first[:, 1 : length + 1].astype(int), axis=1) == 1  # any is_first in 1..t+1
    first_end = batch.is_last[:, :length] & (jnp.cumsum(batch.is_last[:, :length], axis=1) == 1)
    cut_off = jax.lax.cummax((first_end & ~batch.is_terminal[:, :length]).astype(int), axis=1)  # 1 from a cut-off on
    return Targets(
        action=jnp.where(restarted[:, :k], random_actions(key, (len(ended), k), num_actions), batch.action[:, :k]),
        reward=jnp.where(restarted[:, :k], 0, batch.reward[:, :k]),
        value=jnp.where(ended, 0, n_step_return(batch, labels.value, args)),
        policy=jnp.where(ended[..., None], 1 / num_actions, labels.policy[:, :length]),
        reward_weight=(1 - cut_off[:, :k]) / jnp.maximum(1 - cut_off[:, :k].mean(), 1e-6),
        weight=(1 - cut_off) / jnp.maximum(1 - cut_off.mean(), 1e-6),
    )


def scale_gradient(x: jax.Array, scale: float) -> jax.Array:
    """x itself, with its gradient multiplied by scale."""
    return scale * x + jax.lax.stop_gradient((1 - scale) * x)


def loss(params: Any, batch: Steps, targets: Targets, model: Model) -> tuple[jax.Array, dict]:
    """The training loss, a mean over the steps of all windows of which something is known, and the metrics to log."""
    args, net = model.args, model.bind(params)
    states = [net.representation(batch.observation[:, 0])]  # of the online encodings only o_0's is used
    for i in range(args.unroll_steps):
        states.append(scale_gradient(net.dynamics(states[-1], targets.action[:, i]), args.dynamics_gradient_scale))
    prediction = net.prediction(jnp.stack(states, axis=1))  # [B, K+1, ...]
    log_policy = jax.nn.log_softmax(prediction.policy_logits)

    def cross_entropy(logits: jax.Array, scalar: jax.Array, weight: jax.Array) -> jax.Array:
        return (weight * optax.softmax_cross_entropy(logits, two_hot(value_transform(scalar), args.num_bins))).mean()

    metrics = {
        "reward_loss": cross_entropy(prediction.reward_logits[:, 1:], targets.reward, targets.reward_weight),
        "value_loss": cross_entropy(prediction.value_logits, targets.value, targets.weight),
        "policy_loss": -(targets.weight * jnp.sum(targets.policy * log_policy, axis=-1)).mean(),
        "policy_entropy": -(targets.weight * jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)).mean(),
    }
    total = metrics["reward_loss"] + args.value_coef * metrics["value_loss"] + args.policy_coef * metrics["policy_loss"]
    return total, metrics | {"total_loss": total}


# ---------------------------------------------------------------------------------------------------------- Update step


class TrainState(NamedTuple):
    step: jax.Array  # [] int32, updates made
    params: Any
    target_params: Any
    optimizer_state: Any
    key: jax.Array  # stays as it is: update t draws from fold_in(part, t) of its three parts: windows, actions, labels


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW: warm-up to the peak, staircase decay, weight decay on kernels only."""
    schedule = optax.warmup_exponential_decay_schedule(
        0.0, args.learning_rate, args.warmup_steps, args.learning_rate_decay_steps, args.learning_rate_decay, staircase=True
    )
    kernels = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel")
    adamw = optax.adamw(schedule, weight_decay=args.weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)


def init_state(observation_shape: tuple[int, ...], model: Model) -> TrainState:
    """The state before the first update."""
    init_key, key = jax.random.split(jax.random.PRNGKey(model.args.seed))
    init = jax.jit(nn.init(lambda net, *x: net.prediction(net.dynamics(net.representation(x[0]), x[1])), model))
    params = init(init_key, jnp.zeros((1, *observation_shape)), jnp.zeros(1, jnp.int32))
    optimizer_state = make_optimizer(model.args).init(params)
    state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer_state, key)
    return jax.device_put(jax.device_get(state), sharding())


def update(state: TrainState, key: jax.Array, batch: Steps, labels: Labels, model: Model) -> tuple[TrainState, dict]:
    """One update on one batch of windows [B, T] with their labels [B, T]."""

    @per_device(jax.P(), jax.P("batch"), jax.P("batch"))
    def mean_gradient(params: Any, batch: Steps, targets: Targets) -> tuple[Any, dict]:
        """Each device takes its share of the batch; gradient and metrics are averaged in a single exchange."""
        flat, unravel = ravel_pytree(jax.grad(loss, has_aux=True)(params, batch, targets, model))
        return unravel(jax.lax.pmean(flat, "batch"))

    gradient, metrics = mean_gradient(state.params, batch, make_targets(key, batch, labels, model.args))
    updates, optimizer_state = make_optimizer(model.args).update(gradient, state.optimizer_state, state.params)
    params, step = optax.apply_updates(state.params, updates), state.step + 1
    target_params = optax.periodic_update(params, state.target_params, step, model.args.target_update_interval)
    metrics |= {"grad_norm": optax.tree.norm(gradient), "param_norm": optax.tree.norm(params)}
    return TrainState(step, params, target_params, optimizer_state, state.key), metrics


@functools.partial(jax.jit, static_argnames="model")
def label_dataset(state: TrainState, data: Steps, model: Model) -> Labels:
    """Labels [N], made once a step, of the steps that windows read before the next target copy; zeros for the others."""
    length, interval, num_devices, size = len(data.action), model.args.target_update_interval, jax.device_count(), 1024
    updates = state.step - state.step % interval + jnp.arange(interval)
    windows_key, _, labels_key = jax.random.split(state.key, 3)
    windows = jax.vmap(lambda t: sample_windows(jax.random.fold_in(windows_key, t), length, model.args))(updates)
    is_read = jnp.zeros(length, bool).at[windows].set(True)
    num_rows = -(-length // (num_devices * size))
    chunks = jnp.nonzero(is_read, size=num_rows * num_devices * size, fill_value=length)[0]

    @per_device(jax.P(), jax.P(), jax.P(), jax.P(), jax.P(None, "batch"))
    def label_rows(params: Any, key: jax.Array, data: Steps, count: jax.Array, chunks: jax.Array) -> Labels:
        """Each device labels one chunk of every row; chunks: its own [num_rows, 1, size]."""

        def label_chunk(i: jax.Array, labels: Labels) -> Labels:
            chunk_key = jax.random.fold_in(key, i * num_devices + jax.lax.axis_index("batch"))
            new = make_labels(params, chunk_key, jax.tree.map(lambda x: x[chunks[i, 0]], data), model)
            return jax.tree.map(lambda x, y: x.at[chunks[i, 0]].set(y, mode="drop"), labels, new)

        shapes = jax.eval_shape(functools.partial(make_labels, model=model), params, key, data)
        labels = jax.lax.fori_loop(0, count, label_chunk, jax.tree.map(jnp.zeros_like, shapes))
        return jax.lax.psum(labels, "batch")

    key, count = jax.random.fold_in(labels_key, updates[0]), -(-is_read.sum() // (num_devices * size))
    return label_rows(state.target_params, key, data, count, chunks.reshape(num_rows, num_devices, size))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def update_many(state: TrainState, count: jax.Array, data: Steps, labels: Labels, model: Model) -> tuple[TrainState, dict]:
    """Makes `count` updates in one compiled loop and sums their metrics. data and labels are the whole dataset's, [N]."""

    def next_update(state: TrainState) -> tuple[TrainState, dict]:
        windows_key, actions_key, _ = jax.random.split(state.key, 3)
        index = sample_windows(jax.random.fold_in(windows_key, state.step), len(data.action), model.args)
        batch, batch_labels = jax.tree.map(lambda x: x[index], (data, labels))
        return update(state, jax.random.fold_in(actions_key, state.step), batch, batch_labels, model)

    def body(_: jax.Array, carry: tuple[TrainState, dict]) -> tuple[TrainState, dict]:
        state, metrics = next_update(carry[0])
        return state, jax.tree.map(jnp.add, carry[1], metrics)

    return jax.lax.fori_loop(0, count, body, (state, jax.tree.map(jnp.zeros_like, jax.eval_shape(next_update, state)[1])))


# --------------------------------------------------------------------------------- Environments, acting and evaluation


class BSuite(gymnasium.Env):
    """A task of bsuite (Osband et al. 2020) as a Gymnasium environment; every end of an episode is terminal."""

    TASKS: ClassVar = {"catch": catch.Catch, "cartpole": cartpole.Cartpole, "mountain_car": mountain_car.MountainCar}

    def __init__(self, env_id: str, seed: int) -> None:
        self.task = self.TASKS[env_id](seed=seed)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self.task.observation_spec().shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(self.task.action_spec().num_values)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return self.task.reset().observation, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        timestep = self.task.step(int(action))
        return timestep.observation, timestep.reward, timestep.last(), False, {}


def make_environment(env_id: str, seed: int) -> gymnasium.Env:
    """A task of bsuite, or an environment of Gymnasium with its observations as float32 matrices; a vector is one row.

    Raises InputError for an unknown name, with the closest known one, and for other observations or actions.
    """
    if env_id in BSuite.TASKS:
        return BSuite(env_id, seed)
    try:
        environment = gymnasium.make(env_id, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError) as error:
        known = [*BSuite.TASKS, *gymnasium.registry]
        if env_id in known:
            raise InputError(f"{env_id} cannot be made: {str(error).strip().splitlines()[0]}") from None
        closest = difflib.get_close_matches(env_id, known, n=1, cutoff=0.0)[0]
        raise InputError(f"there is no task {env_id!r}; did you mean {closest!r}?") from None
    actions, space = environment.action_space, environment.observation_space
    if not isinstance(actions, gymnasium.spaces.Discrete) or actions.start != 0 or len(space.shape or ()) not in (1, 2):
        raise InputError(f"{env_id} has {space} and {actions}, not vectors or matrices and a number of actions from 0")
    shape = (1, *(space.shape or ()))[-2:]
    matrices = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
    environment.reset(seed=seed)
    return gymnasium.wrappers.TransformObservation(environment, lambda x: np.float32(x).reshape(shape), matrices)


def make_environments(env_id: str, seeds: Sequence[int]) -> Any:
    """An environment for each of the seeds, side by side; the step after an episode's end resets, and ignores its action."""
    return gymnasium.vector.SyncVectorEnv([functools.partial(make_environment, env_id, seed) for seed in seeds])


@functools.partial(jax.jit, static_argnames="model")
def act(params: Any, key: jax.Array, observation: jax.Array, model: Model) -> jax.Array:
    """Actions [V] at observations [V, rows, columns], by search."""
    net = model.bind(params)
    state = net.representation(observation)
    return search(params, key, state, net.prediction(state), model).action


def evaluate(state: TrainState, model: Model, meta: dict[str, Any], stopped_by: Sequence[int] = ()) -> dict[str, Any]:
    """Plays eval_episodes episodes in the real environment and returns the "eval/..." metrics; {} if stopped_by a signal.

    How many episodes each environment plays is fixed beforehand, so that short episodes do not count more often. meta: the
    dataset's; with its reference returns, the normalised score is (return - random play) / (online DQN - random play).
    """
    args, step = model.args, int(state.step)
    num_envs = min(args.eval_envs, args.eval_episodes)
    episodes_left = args.eval_episodes // num_envs + (np.arange(num_envs) < args.eval_episodes % num_envs)
    act_seed, *seeds = np.random.SeedSequence([args.seed, step]).generate_state(1 + num_envs).tolist()
    environments = make_environments(args.env_id, seeds)
    random = np.random.default_rng([args.seed, step])  # of action noise
    params, key = jax.tree.map(lambda x: x.addressable_data(0), state.params), jax.random.PRNGKey(act_seed)
    observation, _ = environments.reset()  # [V, rows, columns]
    returns, lengths = list[float](), list[int]()
    running_return, running_length = np.zeros(num_envs), np.zeros(num_envs, int)
    is_reset = np.zeros(num_envs, bool)  # the step after an episode's end resets; it ignores its action and is not counted
    while episodes_left.any():
        if stopped_by:
            return {}
        key, act_key = jax.random.split(key)
        action = np.asarray(act(params, act_key, observation, model))
        noisy = random.random(num_envs) < args.noise
        action = np.where(noisy, random.integers(model.num_actions, size=num_envs), action)
        observation, reward, terminated, truncated, _ = environments.step(action)
        running_return += np.where(is_reset, 0, reward)
        running_length += ~is_reset
        is_reset = terminated | truncated
        finished = is_reset & (episodes_left > 0)
        returns, lengths = [*returns, *running_return[finished]], [*lengths, *running_length[finished]]
        episodes_left -= finished
        running_return[is_reset], running_length[is_reset] = 0, 0
    environments.close()
    scores = {f"eval/return_{name}": float(getattr(np, name)(returns)) for name in ("mean", "std", "min", "max")}
    scores |= {"eval/length_mean": float(np.mean(lengths)), "eval/episodes": len(returns)}
    if reference := meta.get("reference_returns"):
        gain, whole = scores["eval/return_mean"] - reference["random"], reference["online_dqn"] - reference["random"]
        scores["eval/normalized_score"] = gain / whole
    return scores


# ---------------------------------------------------------------------- Run folder, checkpoints, logging, command line


def use_devices(args: Args) -> None:
    """Splits a CPU into devices, so that all its cores work on a batch, and joins the other processes of --distributed.

    JAX finds those on clusters that it knows (Slurm, for one), and elsewhere by the environment's JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises InputError if it does not, or if the devices cannot share the batch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(n for n in range(1, min(cores, 8) + 1) if args.batch_size % n == 0)
    with suppress(RuntimeError):  # JAX has started already
        jax.config.update("jax_num_cpu_devices", args.cpu_devices or most)
    if args.distributed:
        count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        try:
            jax.distributed.initialize(num_processes=int(count or 0) or None, process_id=int(index) if index else None)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"--distributed: {error}") from None
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # JAX asserts that it knows the platform
        raise InputError(f"JAX has no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}") from None
    if args.batch_size % jax.device_count() != 0:
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {jax.device_count()} devices")


def catch_signals() -> list[int]:
    """From now on a first signal only goes into this list, and a second one ends the program.

    Of several processes, each turns its signal into SIGTERM, of which JAX's own handler tells all (reached_preemption).
    """
    caught: list[int] = []

    def catch(signum: int, _: Any) -> None:
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, *([signal.SIGTERM] if jax.process_count() == 1 else [])):
        signal.signal(signum, catch)
    return caught


def read_run(run_dir: Path) -> dict[str, Any]:
    """The args.json of a run of this script. Raises InputError if the folder has none."""
    try:
        run = json.loads((run_dir / "args.json").read_text())
        script, _, _ = run["script"], run["args"]["data_dir"], run["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run_dir} is not the folder of a run that can be resumed: {error!r}") from None
    if script != Path(__file__).stem:
        raise InputError(f"{run_dir} is a run of {script}.py, not of {Path(__file__).name}")
    return run


def open_run(args: Args, meta: dict[str, Any]) -> dict[str, Any]:
    """Makes the run's folder, or takes that of --resume, keeps other programs out, and returns what args.json shall say.

    Raises InputError if the folder exists already, another program trains in it, or a resumed run's dataset has changed.
    """
    script, data_dir, before, commit = Path(__file__), str(find_dataset(args).absolute()), None, None
    name = f"{args.env_id.replace('/', '_')}__{script.stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    for i in itertools.count(1):  # two runs may begin in the same second
        run_dir = args.run_dir or Path("runs", f"{name}_{i}" if i > 1 else name)
        with suppress(FileExistsError):
            run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
            break
        if args.run_dir:
            raise InputError(f"{run_dir} exists already: name another --run-dir, or go on with --resume")
    try:
        fcntl.lockf(os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the end
    except OSError as error:
        if isinstance(error, BlockingIOError):  # else the file system has no locks
            raise InputError(f"another program is training in {run_dir}") from None
    if args.resume:
        before = read_run(run_dir)
        if before["dataset"] != meta and before["args"]["data_dir"] == data_dir:
            raise InputError(f"{data_dir} is no longer the dataset that {run_dir} was trained on")
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = subprocess.check_output(["git", "-C", script.parent, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL)
    return {
        "id": before["id"] if before else uuid.uuid4().hex[:8],
        "script": script.stem,
        "args": vars(args) | {"run_dir": run_dir, "data_dir": data_dir},
        "dataset": meta,
        "git_commit": commit and commit.decode().strip(),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": {"python": sys.version} | {each.name: each.version for each in importlib.metadata.distributions()},
    }


def open_checkpoints(run_dir: Path, read_only: bool = False) -> ocp.CheckpointManager:
    """A run's checkpoints: each whole or absent, the last two are kept. read_only: another program may write them."""
    options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
    if not read_only:
        options = dataclasses.replace(options, create=True, max_to_keep=2, cleanup_tmp_directories=True)
    return ocp.CheckpointManager((run_dir / "checkpoints").absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    if checkpoints.latest_step() != int(state.step):
        checkpoints.save(int(state.step), args=ocp.args.StandardSave(state), force=True)


def restore(checkpoints: ocp.CheckpointManager, like: TrainState) -> TrainState:
    """The last checkpoint, in the shapes and places of `like`. Raises InputError if there is none or it cannot be read."""
    *before, step = sorted(checkpoints.all_steps()) or [None]
    if step is None:
        raise InputError(f"{checkpoints.directory} holds no checkpoint")
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # where a restore fails, its threads print more
    try:
        state = checkpoints.restore(step, args=ocp.args.StandardRestore(like))
    except Exception as error:  # Orbax raises many kinds, also a bare one
        reason = str(error.__cause__ or error).strip().split("\n")[0].split(" [tensorstore")[0][:600]
        others = "".join(f"; before it there is {checkpoints.directory}/{step}" for step in before)
        raise InputError(f"the checkpoint {checkpoints.directory}/{step} cannot be read ({reason}){others}") from None
    sys.unraisablehook = hook
    return state


def open_log(run: dict[str, Any], step: int) -> tuple[set[int], Callable[[int, dict[str, Any]], None]]:
    """The steps that are scored, and a function that appends to metrics.jsonl and, with --track, to Weights & Biases.

    Writes args.json. Drops the lines after `step`: a killed run wrote them after its last checkpoint, and they come again.
    Raises InputError if there is nothing left to do.
    """
    args, path, tracker = run["args"], run["args"]["run_dir"] / "metrics.jsonl", None
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    texts = [text for text in texts if text.endswith("\n") and json.loads(text)["step"] <= step]
    scored = {0} | {json.loads(text)["step"] for text in texts if "eval/return_mean" in text}
    if step > args["total_steps"] or (step == args["total_steps"] and (step in scored or not args["eval_episodes"])):
        raise InputError(f"{path.parent} has made {step} updates already: name more with --total-steps")
    if jax.process_index() > 0:
        return scored, lambda step, metrics: None
    for name, text in {"args.json": json.dumps(run, indent=2, default=str) + "\n", path.name: "".join(texts)}.items():
        path.with_name(f"{name}.new").write_text(text)
        path.with_name(f"{name}.new").rename(path.with_name(name))
    file = path.open("a")
    if args["track"]:
        import wandb

        names = {"project": args["wandb_project"], "entity": args["wandb_entity"], "name": path.parent.name, "id": run["id"]}
        tracker = wandb.init(**names, config=args, dir=str(path.parent), resume="allow")

    def write(step: int, metrics: dict[str, Any]) -> None:
        file.write(json.dumps({"step": step, **metrics}) + "\n")
        file.flush()
        if tracker is not None:
            tracker.log(metrics, step=step)

    return scored, write


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """Reads the command line. What it does not name is, with --resume, as in that run, which goes on in its folder.

    Raises InputError for values that make no sense, or if --resume names no run of this script.
    """
    first, default = argparse.ArgumentParser(add_help=False, allow_abbrev=False), Args()
    first.add_argument("--resume", type=Path)
    resume = first.parse_known_args(argv)[0].resume
    if resume is not None:
        saved = read_run(resume)["args"]
        if unknown := sorted(saved.keys() - vars(default).keys()):
            print(f"{resume} has settings that this program lacks: {', '.join(unknown)}", file=sys.stderr)
        saved |= {"resume": resume, "run_dir": resume, "data_dir": Path(saved["data_dir"]), "eval_only": False}
        default = Args(**{name: value for name, value in saved.items() if name not in unknown})
    args = tyro.cli(Args, args=argv, default=default, description=__doc__)
    if resume and args.run_dir != resume:
        raise InputError("--resume goes on in the folder that it names: there is no --run-dir beside it")
    return args


# ----------------------------------------------------------------------------------------------------------------- Main


def main(args: Args) -> int:
    """Trains, or with --eval-only evaluates, and returns the exit code."""
    use_devices(args)
    environment = make_environments(args.env_id, [args.seed]) if args.eval_episodes else None
    if args.eval_only and args.resume and environment:
        model = Model(int(environment.single_action_space.n), args)
        state = init_state(environment.single_observation_space.shape, model)
        state = restore(open_checkpoints(args.resume, read_only=True), state)
        scores = evaluate(state, model, read_run(args.resume)["dataset"])
        print(json.dumps({"step": int(state.step), **scores}))
        return 0
    dataset, rows, meta = load_dataset(args, environment)
    model = Model(meta["num_actions"], args)
    state = init_state(dataset.observation.shape[1:], model)
    data = jax.device_put(jax.tree.map(lambda x: x[rows], dataset), sharding())
    stopped_by = catch_signals()
    first = jax.process_index() == 0  # of several processes the first writes and talks
    run = open_run(args, meta) if first else {"args": vars(args)}
    multihost_utils.sync_global_devices("the run's folder is there")
    run_dir = run["args"]["run_dir"]
    checkpoints = open_checkpoints(run_dir)
    state = state if checkpoints.latest_step() is None else restore(checkpoints, state)
    step = first_step = int(state.step)
    scored, write = open_log(run, step)
    save(checkpoints, state)
    bar = tqdm(initial=step, total=args.total_steps, unit="update", disable=None if first else True, dynamic_ncols=True)
    say = functools.partial(bar.write, file=sys.stdout if first else io.StringIO())
    say(f"{run_dir}: {len(rows)} steps of data, {jax.device_count()} x {jax.devices()[0].device_kind}")
    labels = label_dataset(state, data, model)
    compiled_updates = update_many.lower(state, np.int32(0), data, labels, model).compile()
    intervals = (args.log_interval, args.eval_interval, args.checkpoint_interval, args.target_update_interval)
    sums, logged_step, seconds, calls = dict[str, float](), step, 0.0, itertools.count()
    while True:
        if (step % args.eval_interval == 0 or step == args.total_steps) and step not in scored and environment:
            save(checkpoints, state)
            if scores := evaluate(state, model, meta, stopped_by):
                scored.add(step)
                write(step, scores)
                say(f"{step} updates: " + ", ".join(f"{name[5:]} {value:.4g}" for name, value in scores.items()))
        # Of several processes all must stop after the same call: after a signal to any of them JAX agrees on one.
        stop = bool(stopped_by) if jax.process_count() == 1 else checkpoints.reached_preemption(next(calls))
        if step == args.total_steps or stop:
            break
        start = time.perf_counter()
        if step % args.target_update_interval == 0 and step != first_step:
            labels = label_dataset(state, data, model)
        count = min(args.updates_per_call, args.total_steps - step, *(every - step % every for every in intervals))
        state, metrics = compiled_updates(state, np.int32(count), data, labels)
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in jax.device_get(metrics).items()}  # waits
        seconds += time.perf_counter() - start
        if not np.isfinite([sums["total_loss"], sums["grad_norm"], sums["param_norm"]]).all():
            sys.exit(f"error: loss or gradient is not finite after {step} updates; {run_dir} keeps its last checkpoint")
        step += count
        means = {f"train/{name}": value / (step - logged_step) for name, value in sums.items()}
        means["train/updates_per_second"] = speed = (step - logged_step) / seconds
        progress = f"loss {means['train/total_loss']:.3f}, {speed:.1f} updates/s"
        bar.set_postfix_str(progress, refresh=False)
        bar.update(count)
        if step == first_step + count and jax.default_backend() == "cpu":
            minutes = (args.total_steps - step) / speed / 60
            say(f"no accelerator: {progress}, {minutes:.1f} minutes left; --total-steps 20000 suits a CPU")
        if step % args.log_interval == 0 or step == args.total_steps:
            write(step, means)
            if bar.disable:  # stderr is no terminal
                say(f"{step}/{args.total_steps} updates, {progress}")
            sums, logged_step, seconds = {}, step, 0.0
        if step % args.checkpoint_interval == 0:
            save(checkpoints, state)
    save(checkpoints, state)
    bar.close()
    checkpoints.close()
    if step < args.total_steps or (environment and step not in scored):
        say(f"stopped after {step} updates; go on with --resume {run_dir}")
        return 128 + (stopped_by[0] if stopped_by else signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(parse_args()))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        known = type(error).__name__ == "InputError" or isinstance(error, OSError) or "wandb" in type(error).__module__
        if not known and not any(word in str(error) for word in ("No space left on device", "RESOURCE_EXHAUSTED")):
            raise
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
