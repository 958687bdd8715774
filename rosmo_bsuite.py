# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.7.1", "flax>=0.11", "optax>=0.2.5", "orbax-checkpoint>=0.11.31", "numpy>=2.0", "tyro>=0.9.30",
#     "pydantic>=2.8", "tqdm>=4.66", "wandb>=0.19", "bsuite>=0.3.6", "gymnasium>=1.0",
# ]
# ///
"""ROSMO on BSuite in one file: offline reinforcement learning by a one-step look-ahead with a learned model.

Liu, Li, Lee, Yan, Xu: "Efficient Offline Policy Optimization with a Learned Model", ICLR 2023 (arXiv 2210.05980).

    python rosmo_bsuite.py --env-id catch     # the paper's settings; --total-steps 20000 is about a minute

In the comments B is the batch, T = K + n + 1 the window (K unroll steps, n bootstrap steps), N the steps of the dataset,
F, S and A the sizes of observation, latent state and actions; h, g and f are representation, dynamics and prediction.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import P
from jax.flatten_util import ravel_pytree
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from tqdm import tqdm

Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config={"allow_inf_nan": False, "extra": "forbid"})
class Args:
    env_id: str = "catch"  # the task: catch, cartpole or mountain_car, or an environment of Gymnasium, as CartPole-v1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # everything random in the run follows from it
    total_steps: PositiveInt = 200_000  # updates to make
    batch_size: PositiveInt = 512  # windows per update
    data_dir: Path | None = None  # dataset folder; by default the task's under datasets/bsuite/, recorded if missing
    data_fraction: Fraction = 1.0  # fraction of the episodes to train on, evenly spaced over the dataset, chosen by seed
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability of a random action, in the data and in evaluation

    unroll_steps: PositiveInt = 3  # K, the steps that the model is unrolled
    bootstrap_steps: PositiveInt = 3  # n, the steps of the n-step return
    discount: Fraction = 0.997**4  # gamma
    num_bins: Annotated[int, Field(ge=3)] = 20  # bins of the reward and value distributions; 20 hold returns from -97 to 97
    dynamics_width: PositiveInt = 32  # hidden units of the dynamics network
    dynamics_gradient_scale: NonNegativeFloat = 0.5  # factor on the gradient into each next state
    value_coef: NonNegativeFloat = 0.25  # weight of the value loss
    policy_coef: NonNegativeFloat = 1.0  # weight of the policy loss
    behavior_coef: NonNegativeFloat = 0.2  # weight of the filtered behaviour cloning; 0 is one-step without regularisation
    sampling: bool = False  # sample num_simulations actions for the one-step target instead of trying every action
    num_simulations: PositiveInt = 4  # actions sampled per state, with --sampling
    learning_rate: PositiveFloat = 7e-4  # peak learning rate
    warmup_steps: NonNegativeInt = 1_000  # updates over which the learning rate rises linearly from 0
    learning_rate_decay: Fraction = 0.1  # factor on the learning rate every learning_rate_decay_steps
    learning_rate_decay_steps: PositiveInt = 100_000  # updates between two decays, counted from the end of the warm-up
    weight_decay: NonNegativeFloat = 1e-4  # AdamW's decay, on kernels only
    max_grad_norm: PositiveFloat = 5.0  # global norm to which gradients are clipped
    target_update_interval: PositiveInt = 200  # updates between copies of the parameters to the target parameters
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the networks; parameters and losses stay float32

    run_dir: Path | None = None  # folder to make; by default runs/<env>__<script>__<seed>__<time>
    resume: Path | None = None  # folder of a run to go on with; its settings are taken from there
    checkpoint_interval: PositiveInt = 10_000  # updates between checkpoints; the last two are kept
    eval_interval: PositiveInt = 5_000  # updates between evaluations
    eval_episodes: NonNegativeInt = 32  # episodes per evaluation, side by side; with 0 there is no environment
    eval_max_steps: PositiveInt = 100_000  # steps at which an evaluation cuts an episode that does not end
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # fraction of the episodes whose losses are only evaluated
    eval_only: bool = False  # with --resume: score the last checkpoint, print the result and stop
    log_interval: PositiveInt = 1_000  # updates between lines of metrics.jsonl
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "rosmo"  # Weights & Biases project
    cpu_devices: NonNegativeInt = 0  # on CPUs, devices that share the batch; 0: as many as divide it, of at most 8 cores
    distributed: bool = False  # this is one of several processes, on one host or more, that train together


# ---------------------------------------------------------------------------------------- Networks and value transforms


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

    def __call__(self, observation: jax.Array, action: jax.Array) -> Prediction:  # all networks, for their parameters
        return self.prediction(self.dynamics(self.representation(observation), action))

    def representation(self, observation: jax.Array) -> jax.Array:
        """h: observations [..., F] to states [..., S]."""
        return self.encoder(observation)

    def dynamics(self, state: jax.Array, action: jax.Array) -> jax.Array:
        """g: states [..., S] and actions [...] to next states [..., S]."""
        one_hot = jax.nn.one_hot(action, self.num_actions, dtype=state.dtype)
        return self.transition(jnp.concatenate([state, one_hot], axis=-1))

    def prediction(self, state: jax.Array) -> Prediction:
        """f: states [..., S] to float32 logits. The three linear heads are one product, which is faster."""
        logits = self.heads(nn.relu(self.torso(state))).astype(jnp.float32)
        return Prediction(*jnp.split(logits, (self.num_actions, self.num_actions + self.args.num_bins), axis=-1))


def value_transform(x: jax.Array) -> jax.Array:
    """phi(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x (Pohlen et al. 2018, arXiv 1805.11593)."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + 0.001 * x


def inverse_value_transform(x: jax.Array) -> jax.Array:
    """phi^-1. The inner sqrt(1 + u) - 1 is written as u / (sqrt(1 + u) + 1), which loses no digits to cancellation."""
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
    return inverse_value_transform(jnp.dot(jax.nn.softmax(logits), support(logits.shape[-1]), precision="highest"))


# --------------------------------------------------------------------------------------------------- Policy improvement


@functools.partial(jax.vmap, in_axes=(None, None, None, -1, None), out_axes=-1)
def one_step_advantage(params: Any, state: jax.Array, value: jax.Array, action: jax.Array, model: Model) -> jax.Array:
    """adv_g(s, a) = r_g(s, a) + gamma v(g(s, a)) - v(s): states [..., S], values [...], actions [..., N] to [..., N]."""
    net = model.bind(params)
    after = net.prediction(net.dynamics(state, action))
    return to_scalar(after.reward_logits) + model.args.discount * to_scalar(after.value_logits) - value


def sampled_one_step_target(action: jax.Array, advantage: jax.Array, num_actions: int) -> jax.Array:
    """The target from N actions drawn from the prior (Muesli, Hessel et al. 2021): [..., N], [..., N] to [..., A].

    Z_i = (1 + sum_{j != i} exp(adv_j)) / N; p(a_i) += exp(adv_i) / (N Z_i). It weights -log pi; its sum is not 1.
    An addend is at most e^30, with which gradients are finite.
    """
    others = jnp.where(jnp.eye(advantage.shape[-1], dtype=bool), -jnp.inf, advantage[..., None, :])  # j != i
    log_nz = jnp.logaddexp(0, jax.nn.logsumexp(others, axis=-1))  # log(N Z_i)
    weight = jnp.exp(jnp.minimum(advantage - log_nz, 30))
    return jnp.sum(weight[..., None] * jax.nn.one_hot(action, num_actions), axis=-2)


# ----------------------------------------------------------------------------------------------------- Targets and loss


class Steps(NamedTuple):
    """Steps in time order: the whole dataset with leading axis [N], or a batch of windows with leading axes [B, T]."""

    observation: Any  # [..., F] float32
    action: Any  # [...] int32; an episode's last step has none, and 0 here
    reward: Any  # [...] float32, of the action
    is_first: Any  # [...] bool
    is_last: Any  # [...] bool
    is_terminal: Any  # [...] bool; an episode whose last step is not terminal was truncated


class Labels(NamedTuple):
    """What the target parameters say of steps, with the leading axes of Steps."""

    value: jax.Array  # [...]
    policy: jax.Array  # [..., A], improved
    advantage: jax.Array  # [...], adv_g(s, a) of the data's action


class Targets(NamedTuple):
    action: jax.Array  # [B, K] int32, the actions to unroll
    reward: jax.Array  # [B, K]
    value: jax.Array  # [B, K+1]
    policy: jax.Array  # [B, K+1, A]
    reward_weight: jax.Array  # [B, K], of the reward losses: 0 where nothing is known, else equal; their mean is 1
    weight: jax.Array  # [B, K+1], the same of all other losses
    behavior: jax.Array  # [B, K+1] bool, whether to clone the data's action


def make_labels(target_params: Any, key: jax.Array, steps: Steps, model: Model) -> Labels:
    """Labels [...] of steps [...]. The improved policy is p(a) = prior(a) exp(adv_g(s, a)) / Z, or sampled."""
    net, taken = model.bind(target_params), steps.action[..., None]
    state = net.representation(steps.observation)
    prediction = net.prediction(state)
    logits, value = prediction.policy_logits, to_scalar(prediction.value_logits)
    if model.args.sampling:
        samples = jnp.moveaxis(jax.random.categorical(key, logits, shape=(model.args.num_simulations, *value.shape)), 0, -1)
        advantage = one_step_advantage(target_params, state, value, samples, model)
        policy = sampled_one_step_target(samples, advantage, model.num_actions)
        return Labels(value, policy, one_step_advantage(target_params, state, value, taken, model)[..., 0])
    every_action = jnp.broadcast_to(jnp.arange(model.num_actions), logits.shape)
    advantage = one_step_advantage(target_params, state, value, every_action, model)
    return Labels(value, jax.nn.softmax(logits + advantage), jnp.take_along_axis(advantage, taken, axis=-1)[..., 0])


def n_step_return(batch: Steps, value: jax.Array, args: Args) -> jax.Array:
    """z_t = sum_{i<n} D_i r_{t+i} + D_n v_{t+n}, D_0 = 1, D_{i+1} = D_i gamma (1 - is_last_{t+i+1}): [B, T] to [B, K+1].

    Of an episode truncated at step L, within n steps of t, no more rewards are known: gamma^(L-t) v_L stands for them.
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


def make_targets(key: jax.Array, batch: Steps, labels: Labels, args: Args) -> Targets:
    """Targets of windows [B, T]; what lies after a terminal state in the window is an absorbing state.

    From the step on at which an episode was truncated nothing is known: there all losses have weight 0.
    """
    k, length, num_actions = args.unroll_steps, args.unroll_steps + 1, labels.policy.shape[-1]
    is_last, next_is_first = batch.is_last[:, :length], batch.is_first[:, 1 : length + 1]
    is_truncated = is_last & ~batch.is_terminal[:, :length] & (jnp.cumsum(is_last, axis=1) == 1)  # the window's first end
    flags = is_last, next_is_first, is_truncated
    ended, restarted, truncated = (jax.lax.cummax(x.astype(int), axis=1) == 1 for x in flags)  # is there one so far?
    known = 1 - truncated
    return Targets(
        action=jnp.where(restarted[:, :k], jax.random.randint(key, (len(ended), k), 0, num_actions), batch.action[:, :k]),
        reward=jnp.where(restarted[:, :k], 0, batch.reward[:, :k]),
        value=jnp.where(ended, 0, n_step_return(batch, labels.value, args)),
        policy=jnp.where(ended[..., None], 1 / num_actions, labels.policy[:, :length]),
        reward_weight=known[:, :k] / jnp.maximum(known[:, :k].mean(), 1e-6),
        weight=known / jnp.maximum(known.mean(), 1e-6),
        behavior=(labels.advantage[:, :length] >= 0) & ~restarted,  # the filter H(adv_g(s, a)), H(x) = 1 for x >= 0
    )


def loss(params: Any, batch: Steps, targets: Targets, model: Model) -> tuple[jax.Array, dict]:
    """The training loss, a mean over the steps of all windows of which something is known, and the metrics to log."""
    args, net = model.args, model.bind(params)
    states = [net.representation(batch.observation[:, 0])]  # of the online encodings only o_0's is used
    for i in range(args.unroll_steps):
        states.append(optax.scale_gradient(net.dynamics(states[-1], targets.action[:, i]), args.dynamics_gradient_scale))
    prediction = net.prediction(jnp.stack(states, axis=1))  # [B, K+1, ...]
    log_policy = jax.nn.log_softmax(prediction.policy_logits)
    behavior_action, cloned = batch.action[:, : args.unroll_steps + 1, None], targets.weight * targets.behavior

    def cross_entropy(logits: jax.Array, scalar: jax.Array, weight: jax.Array) -> jax.Array:
        return (weight * optax.softmax_cross_entropy(logits, two_hot(value_transform(scalar), args.num_bins))).mean()

    metrics = {
        "reward_loss": cross_entropy(prediction.reward_logits[:, 1:], targets.reward, targets.reward_weight),
        "value_loss": cross_entropy(prediction.value_logits, targets.value, targets.weight),
        "policy_loss": -(targets.weight * jnp.sum(targets.policy * log_policy, axis=-1)).mean(),
        "behavior_loss": -(cloned * jnp.take_along_axis(log_policy, behavior_action, axis=-1)[..., 0]).mean(),
        "policy_entropy": -(targets.weight * jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)).mean(),
        "behavior_fraction": cloned.mean(),
    }
    total = metrics["reward_loss"] + args.value_coef * metrics["value_loss"] + args.policy_coef * metrics["policy_loss"]
    total += args.behavior_coef * metrics["behavior_loss"]
    return total, metrics | {"total_loss": total}


# -------------------------------------------------------------------------------------------------------------- Updates


class TrainState(NamedTuple):
    step: jax.Array  # [] int32, updates made
    params: Any
    target_params: Any
    optimizer_state: Any
    key: jax.Array  # stays as it is: it is split for windows, actions and labels, and the update's number folded in


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
    params = jax.jit(model.init)(init_key, jnp.zeros((1, *observation_shape)), jnp.zeros(1, jnp.int32))
    optimizer_state = make_optimizer(model.args).init(params)
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer_state, key)


def sample_windows(key: jax.Array, num_steps: int, args: Args) -> jax.Array:
    """Indices [B, T] of windows of consecutive steps, drawn with replacement; they may run over an episode's end."""
    window = args.unroll_steps + args.bootstrap_steps + 1
    start = jax.random.randint(key, (args.batch_size,), 0, num_steps - window + 1)
    return jax.lax.with_sharding_constraint(start, P("batch"))[:, None] + jnp.arange(window)


def update(state: TrainState, key: jax.Array, batch: Steps, labels: Labels, model: Model) -> tuple[TrainState, dict]:
    """One update on one batch of windows [B, T] with their labels [B, T]."""

    @functools.partial(jax.shard_map, in_specs=(P(), P("batch"), P("batch")), out_specs=P(), check_vma=False)
    def mean_gradient(params: Any, batch: Steps, targets: Targets) -> tuple[Any, dict]:
        """Each device takes its share of the batch. One array is exchanged: on CPUs that is faster than many."""
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
    """Labels [N] of the steps that windows read before the next target copy; zeros for the others.

    Until the target parameters change, a step has the same labels in all windows that hold it, so it is labelled once:
    draw the windows up to the next copy, as update_many will, and label their steps in chunks.
    """
    require(model.args.sampling or model.num_actions <= 4096, "exact look-ahead keeps A^2 numbers a step: name --sampling")
    length, interval = len(data.action), model.args.target_update_interval
    size = jax.device_count() * min(1024 if jax.default_backend() == "cpu" else 2**14, 2**24 // model.num_actions**2 + 1)
    windows_key, _, labels_key = jax.random.split(state.key, 3)
    updates = state.step - state.step % interval + jnp.arange(interval)
    windows = jax.lax.map(lambda t: sample_windows(jax.random.fold_in(windows_key, t), length, model.args), updates)
    is_read = jnp.zeros(length, bool).at[windows].set(True)
    chunks = jnp.nonzero(is_read, size=-(-length // size) * size, fill_value=length)[0].reshape(-1, size)

    @functools.partial(jax.shard_map, in_specs=(P(), P(), P(), P("batch")), out_specs=P("batch"), check_vma=False)
    def label(target_params: Any, key: jax.Array, i: jax.Array, steps: Steps) -> Labels:
        return make_labels(target_params, jax.random.fold_in(key, i + jax.lax.axis_index("batch")), steps, model)

    def label_chunk(i: jax.Array, labels: Labels) -> Labels:
        steps = jax.tree.map(lambda x: x[chunks[i]], data)
        new = label(state.target_params, jax.random.fold_in(labels_key, updates[0]), i * jax.device_count(), steps)
        return jax.tree.map(lambda x, y: x.at[chunks[i]].set(y, mode="drop"), labels, new)

    zeros = Labels(jnp.zeros(length), jnp.zeros((length, model.num_actions)), jnp.zeros(length))
    return jax.lax.fori_loop(0, -(-is_read.sum() // size), label_chunk, zeros)


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


# -------------------------------------------------------------------------------------------------------------- Dataset


class InputError(Exception):
    """What the program's user can put right: it is printed as one sentence, and the exit code is 2."""


def require(is_right: Any, fault: str) -> None:
    if not is_right:
        raise InputError(fault)


def load_dataset(folder: Path, args: Args) -> tuple[Steps, Steps, dict[str, Any]]:
    """The steps [N] to train on, those to evaluate the losses on, and meta.json. Format: data/README.md in the repository.
    Raises InputError for a dataset that is missing or damaged, of another task, or would make training silently wrong."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        data = Steps(*(np.load(folder / f"{field}.npy") for field in Steps._fields))
        found, length, num_actions = (meta["env_id"], meta.get("noise", 0.0)), meta["steps"], meta["num_actions"]
        reference = meta.get("reference_returns") or {"random": 0, "online_dqn": 1}
        require(reference["random"] != reference["online_dqn"], f"the dataset {folder} has equal reference_returns")
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        raise InputError(f"the dataset {folder} is missing or damaged ({error}): name another by --data-dir") from None
    of = f"the dataset {folder}"
    shapes = {data.observation.shape[:1], *(x.shape for x in data[1:])}
    is_whole = "".join(x.dtype.kind for x in data) == "fifbbb" and shapes == {(length,)}
    require(is_whole, f"{of} is damaged: its arrays do not hold {length} floats, integers, floats and three times flags")
    require(found == (args.env_id, args.noise), f"{of} is of {found}, not of {args.env_id, args.noise} (--env-id, --noise)")
    is_whole = np.array_equal(data.is_first, np.roll(data.is_last, 1)) and data.is_last[data.is_terminal].all()
    require(is_whole and length and data.is_first[0], f"{of} does not mark whole episodes by is_first, is_last, is_terminal")
    require(data.action.min() >= 0 and data.action.max() < num_actions, f"{of} has actions outside 0 to {num_actions - 1}")
    require(not data.reward[data.is_last].any(), f"{of} has a reward at an episode's last step, which has no action")
    require(np.isfinite(data.reward).all() and np.isfinite(data.observation).all(), f"{of} has numbers that are not finite")
    returns = [0.0]  # discounted, from the last step on
    for reward, is_last in zip(data.reward[::-1].tolist(), data.is_last[::-1].tolist(), strict=True):
        returns.append(reward + (0 if is_last else args.discount * returns[-1]))
    bins = 2 * int(np.ceil(value_transform(np.abs(np.append(returns, data.reward)).max()))) + 1
    require(args.num_bins >= bins, f"{of} has rewards or discounted returns that need --num-bins {bins} or more")
    episode, random = np.cumsum(data.is_first) - 1, np.random.default_rng(args.seed)  # [N], of the step

    def draw(episodes: np.ndarray, fraction: float) -> np.ndarray:  # one of each of equal stretches of them
        edges = np.linspace(0, len(episodes), max(1, round(fraction * len(episodes))) + 1).astype(int)
        return episodes[random.integers(edges[:-1], edges[1:])]

    drawn = draw(np.arange(episode[-1] + 1), args.data_fraction)
    held_out = np.isin(episode, draw(drawn, args.eval_fraction) if args.eval_fraction else [])
    kept = np.isin(episode, drawn) & ~held_out
    longest = [np.bincount(episode[part], minlength=1).max() for part in ([kept, held_out] if held_out.any() else [kept])]
    require(min(longest) > args.unroll_steps + args.bootstrap_steps, f"no episode taken of {of} has K + n + 1 steps")
    meta["observation_shape"] = data.observation.shape[1:]
    data = data._replace(observation=data.observation.reshape(length, -1))
    return jax.tree.map(lambda x: x[kept], data), jax.tree.map(lambda x: x[held_out], data), meta


# --------------------------------------------------------------------------------- Environments, acting and evaluation


BSUITE = {"catch": "Catch", "cartpole": "Cartpole", "mountain_car": "MountainCar"}  # classes of bsuite.environments


class BSuite(gymnasium.Env):
    """A task of bsuite (Osband et al. 2020) as a Gymnasium environment; every end of an episode is terminal."""

    def __init__(self, name: str) -> None:
        self.make = getattr(importlib.import_module(f"bsuite.environments.{name}"), BSUITE[name])  # here: it takes a second
        self.task = self.make()
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self.task.observation_spec().shape)
        self.action_space = gymnasium.spaces.Discrete(self.task.action_spec().num_values)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.task = self.task if seed is None else self.make(seed=seed)
        return self.task.reset().observation, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        timestep = self.task.step(int(action))
        return timestep.observation, timestep.reward, timestep.last(), False, {}


for name in BSUITE.keys() - gymnasium.registry.keys():
    gymnasium.register(name, functools.partial(BSuite, name), disable_env_checker=True, order_enforce=False)


@functools.partial(jax.jit, static_argnames="model")
def act(params: Any, key: jax.Array, observation: jax.Array, model: Model) -> jax.Array:
    """Actions [V] at observations [V, ...]."""
    net = model.bind(params)
    state = net.representation(observation.reshape(len(observation), -1))
    prediction = net.prediction(state)
    logits, value = prediction.policy_logits, to_scalar(prediction.value_logits)
    if model.args.sampling:
        return jax.random.categorical(key, logits)  # of the prior
    every_action = jnp.broadcast_to(jnp.arange(model.num_actions), logits.shape)
    return jax.random.categorical(key, logits + one_step_advantage(params, state, value, every_action, model))


def evaluate(state: TrainState, environments: Any, model: Model, meta: dict[str, Any]) -> dict[str, float]:
    """Plays one episode in each of the environments and returns the "eval/..." metrics. meta: the dataset's."""
    number, seed = environments.num_envs, [model.args.seed, int(state.step)]
    act_seed, *seeds = np.random.SeedSequence(seed).generate_state(1 + number).tolist()
    params = jax.tree.map(lambda x: x.addressable_data(0), state.params)
    observation, _ = environments.reset(seed=seeds)
    returns, is_playing, steps = np.zeros(number), np.ones(number, bool), 0
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], ("batch",))):  # one device acts
        key, random = jax.random.PRNGKey(act_seed), np.random.default_rng(seed)  # of actions, and of their noise
        while is_playing.any() and steps < model.args.eval_max_steps:
            key, act_key = jax.random.split(key)
            action = np.asarray(act(params, act_key, observation, model))
            is_noise = random.random(number) < model.args.noise
            action = np.where(is_noise, random.integers(model.num_actions, size=number), action)
            observation, reward, terminated, truncated, _ = environments.step(action)
            returns += np.where(is_playing, reward, 0)
            is_playing, steps = is_playing & ~(terminated | truncated), steps + 1
    scores = {f"eval/return_{name}": float(getattr(returns, name)()) for name in ("mean", "std", "min", "max")}
    scores |= {"eval/cut_episodes": int(is_playing.sum())} if is_playing.any() else {}
    if reference := meta.get("reference_returns"):
        gain, whole = scores["eval/return_mean"] - reference["random"], reference["online_dqn"] - reference["random"]
        scores["eval/normalized_score"] = gain / whole
    return scores


# ----------------------------------------------------------------------------------------------------------------- Main


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line. What it does not name is, with --resume, as in that run."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    require(not (args.resume and args.run_dir), "--resume goes on in the folder that it names: name no --run-dir beside it")
    if args.resume:
        require((args.resume / "args.json").exists(), f"{args.resume} is not the folder of a run: it has no args.json")
        saved = Args(**json.loads((args.resume / "args.json").read_text())["args"])
        args = tyro.cli(Args, args=argv, default=saved, description=__doc__)
        require(args.seed == saved.seed, "--seed cannot be changed: the random key is in the checkpoint")
    elif args.run_dir and (args.run_dir / "args.json").exists():  # the same command goes on, in a job that is queued again
        saved = Args(**json.loads((args.run_dir / "args.json").read_text())["args"])
        args = Args(**vars(args) | {"data_dir": args.data_dir.absolute() if args.data_dir else saved.data_dir})
        same = vars(args) | {"resume": saved.resume, "run_dir": saved.run_dir} == vars(saved)
        require(same, f"{args.run_dir} has a run with other settings: name another --run-dir, or go on with --resume")
    require(not args.eval_only or (args.resume and args.eval_episodes), "--eval-only needs --resume and --eval-episodes")
    require(not args.distributed or args.resume or args.run_dir, "--distributed needs --run-dir: all train in one folder")
    require(args.sampling or args.num_simulations == Args.num_simulations, "--num-simulations is used with --sampling only")
    return args


def main(args: Args, stopped_by: Any = ()) -> None:
    """Trains until the end or until stopped_by holds a signal; or, with --eval-only, scores the last checkpoint."""
    jax.set_mesh(jax.sharding.Mesh(jax.devices(), ("batch",)))  # P("batch") is a share for each device, P() is the whole
    require(":/" not in f"{args.resume} {args.run_dir}", "the folder of a run is on a disk of this machine, not a URL")
    require(args.eval_only or args.batch_size % jax.device_count() == 0, "the number of devices must divide --batch-size")
    name = f"{args.env_id.replace('/', '_')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = args.resume or args.run_dir or Path("runs", name)
    folder = args.data_dir or Path("datasets/bsuite", f"{args.env_id}_noise_{args.noise}" if args.noise else args.env_id)
    if not args.data_dir and args.env_id in BSUITE and Path(__file__).parent.joinpath("data/record_bsuite.py").exists():
        importlib.import_module("data.record_bsuite").record_if_missing(args.env_id, args.noise)
    if args.eval_only:
        meta = json.loads((run_dir / "args.json").read_text())["dataset"]
        require(meta["env_id"] == args.env_id, f"{run_dir} is of {meta['env_id']}, not of {args.env_id} (--env-id)")
    else:
        data, held_out, meta = load_dataset(folder, args)
    environments = None
    if args.eval_episodes:
        sys.path.append(os.getcwd())  # for --env-id my_module:Name-v0
        try:
            spec = gymnasium.envs.registration.EnvSpec.from_json(meta["env_spec"]) if "env_spec" in meta else args.env_id
            environments = gymnasium.make_vec(spec, args.eval_episodes, "sync")
        except Exception as error:  # the environment's own
            raise InputError(f"{args.env_id} cannot be made: {error!r}") from error
        found = f"{environments.single_action_space} and {environments.single_observation_space.shape}"
        wanted = f"{gymnasium.spaces.Discrete(meta['num_actions'])} and {tuple(meta['observation_shape'])}"
        require(found == wanted, f"{args.env_id} has actions and observations {found}, the dataset {wanted}")
    model = Model(meta["num_actions"], args)
    state = jax.device_put(jax.device_get(init_state((int(np.prod(meta["observation_shape"])),), model)), P())

    if first := jax.process_index() == 0:  # of several processes the first writes and talks
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume or args.run_dir))
    ocp = importlib.import_module("orbax.checkpoint")  # here: it takes 0.2 s
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    checkpoints = ocp.CheckpointManager((run_dir / "checkpoints").absolute(), options=options)
    if args.eval_only or checkpoints.latest_step():
        sys.unraisablehook = lambda _: None  # where a restore fails, its threads print more
        try:
            state = checkpoints.restore(None, args=ocp.args.StandardRestore(state))
        except Exception as error:  # Orbax raises many kinds
            raise InputError(f"{run_dir} has no checkpoint of this network, or a damaged one: {error!r:.150}") from None
    step = int(state.step)
    require(step <= args.total_steps, f"{run_dir} has made {step} updates: --total-steps is {args.total_steps}")
    if args.eval_only:
        print(json.dumps({"step": step, **evaluate(state, environments, model, meta)}))
        return
    if first:
        commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
        run = {"args": vars(args) | {"data_dir": folder.absolute()}, "dataset": meta, "git_commit": commit.stdout.strip()}
        run["versions"] = {name: sys.modules[name].__version__ for name in ("jax", "flax", "optax", "numpy", "gymnasium")}
        (run_dir / "args.json.new").write_text(json.dumps(run, indent=2, default=str) + "\n")
        os.replace(run_dir / "args.json.new", run_dir / "args.json")
        log_file = (run_dir / "metrics.jsonl").open("a+", buffering=1)
        log_file.seek(0)  # what a killed run logged after its last checkpoint is dropped, and comes again
        log_file.truncate(sum(len(text) for text in log_file if text.endswith("\n") and json.loads(text)["step"] <= step))
        if args.track:
            wandb = importlib.import_module("wandb")
            wandb.init(project=args.wandb_project, name=run_dir.name, config=vars(args), resume="auto", dir=run_dir)
        print(f"{run_dir}: {len(data.action)} steps of data, {jax.device_count()} x {jax.devices()[0].device_kind}")

    data, held_out = jax.device_put((data, held_out), P())
    labels = label_dataset(state, data, model)
    compiled = update_many.lower(state, np.int32(0), data, labels, model).compile()
    intervals = (args.log_interval, args.eval_interval, args.checkpoint_interval, args.target_update_interval)
    bar = tqdm(initial=step, total=args.total_steps, unit="update", disable=None if first else True)
    sums, logged_step, seconds = dict[str, float](), step, 0.0
    while step < args.total_steps and not stopped_by:
        start = time.perf_counter()
        if step % args.target_update_interval == 0:
            labels = label_dataset(state, data, model)
        count = min(args.total_steps - step, *(every - step % every for every in intervals))
        state, metrics = compiled(state, np.int32(count), data, labels)
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in jax.device_get(metrics).items()}  # waits
        step, seconds = step + count, seconds + time.perf_counter() - start
        bar.update(count)
        if not np.isfinite([sums["total_loss"], sums["grad_norm"], sums["param_norm"]]).all():
            sys.exit(f"error: loss or gradient is not finite after {step} updates; {run_dir} keeps its last checkpoint")
        done, line = step == args.total_steps, dict[str, float]()
        if done or step % args.log_interval == 0:
            line = {f"train/{name}": value / (step - logged_step) for name, value in sums.items()}
            line["train/updates_per_second"] = (step - logged_step) / seconds
            sums, logged_step, seconds = {}, step, 0.0
        if environments and (done or step % args.eval_interval == 0):
            line |= evaluate(state, environments, model, meta)
        if len(held_out.action) and (done or step % args.eval_interval == 0):  # the losses of an update that is not kept
            copy = jax.tree.map(jnp.copy, state)
            _, metrics = update_many(copy, np.int32(1), held_out, label_dataset(copy, held_out, model), model)
            line |= {f"eval/{name}": float(value) for name, value in metrics.items() if "loss" in name}
        if line and first:
            log_file.write(json.dumps({"step": step, **line}) + "\n")
            shown = [name for name in line if "eval/" in name or name in ("train/total_loss", "train/updates_per_second")]
            bar.write(f"{step} updates: " + ", ".join(f"{name} {line[name]:.4g}" for name in shown))
            if args.track:
                wandb.log(line, step=step)
        if done or stopped_by or step % args.checkpoint_interval == 0:  # last: a kill loses only what comes after it
            checkpoints.save(step, args=ocp.args.StandardSave(state))


if __name__ == "__main__":
    stopped_by = list[int]()

    def stop(signum: int, _: Any) -> None:  # a first signal ends the loop, with a checkpoint; a second one the program
        stopped_by.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    try:
        args = parse_args()
        jax.config.update("jax_compilation_cache_dir", os.getenv("JAX_COMPILATION_CACHE_DIR", f"{Path.home()}/.cache/jax"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shares = [n for n in range(1, min(cores, 8) + 1) if args.batch_size % n == 0]
        jax.config.update("jax_num_cpu_devices", args.cpu_devices or shares[-1])
        if args.distributed and not args.eval_only:
            jax.distributed.initialize()  # JAX finds the other processes on clusters that it knows, as Slurm
        elif not args.eval_only:
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
        main(args, stopped_by)
    except (InputError, ValidationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
