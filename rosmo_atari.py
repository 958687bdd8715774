# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.7.1", "flax>=0.11", "optax>=0.2.5", "orbax-checkpoint>=0.11.31", "numpy>=2.0", "tyro>=0.9.30",
#     "pydantic>=2.8", "tqdm>=4.66", "wandb>=0.19", "envpool>=1.2.5", "opencv-python-headless>=4.10",
# ]
# ///
"""ROSMO on Atari in one file: offline reinforcement learning by a one-step look-ahead with a learned model.

Liu, Li, Lee, Yan, Xu: "Efficient Offline Policy Optimization with a Learned Model", ICLR 2023 (arXiv 2210.05980).

    python rosmo_atari.py --env-id Breakout   # the paper's settings, for GPUs; --cpu-size suits a CPU

In the comments B is the batch, T = K + n + 1 the window (K unroll steps, n bootstrap steps), N the steps of the dataset,
S the shape of a latent state, A the number of actions; h, g and f are representation, dynamics and prediction.
"""

import functools
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import cv2
import envpool
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import P
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from tqdm import tqdm

Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config={"allow_inf_nan": False, "extra": "forbid"})
class Args:
    env_id: str = "Breakout"  # the game, as in "MsPacman"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # everything random in the run follows from it
    total_steps: PositiveInt = 200_000  # updates to make
    batch_size: PositiveInt = 512  # windows per update
    data_dir: Path | None = None  # dataset folder; by default the game's under datasets/atari/, recorded if missing
    data_fraction: Fraction = 1.0  # fraction of the episodes to train on, evenly spaced over the dataset, chosen by seed
    data_place: Literal["auto", "device", "host"] = "auto"  # where the frames are; auto: on accelerators if they fit
    data_readers: PositiveInt = 16  # threads that read batches ahead from the disk, with data_place host
    rom_dir: Path | None = None  # folder with atari/roms/*.bin, to play other ROMs than EnvPool's

    unroll_steps: PositiveInt = 5  # K, the steps that the model is unrolled
    bootstrap_steps: PositiveInt = 5  # n, the steps of the n-step return
    discount: Fraction = 0.997**4  # gamma
    num_bins: Annotated[int, Field(ge=3)] = 601  # bins of the reward and value distributions
    encoder: Literal["resnet", "cnn"] = "resnet"  # the paper's, or DQN's of 2013 at 42 x 42 (cheap; states are 11 x 11)
    channels: Annotated[int, Field(ge=2)] = 64  # channels of a latent state
    representation_blocks: NonNegativeInt = 6  # residual blocks of the representation network at its last size
    dynamics_blocks: NonNegativeInt = 2  # residual blocks of the dynamics network
    prediction_blocks: NonNegativeInt = 2  # residual blocks of the prediction network
    head_channels: PositiveInt = 128  # channels of the convolution of each of the three heads
    head_width: PositiveInt = 128  # hidden units of the two layers of each head
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
    eval_interval: PositiveInt = 20_000  # updates between evaluations
    eval_episodes: NonNegativeInt = 32  # episodes per evaluation, side by side; with 0 there is no environment
    eval_only: bool = False  # with --resume: score the last checkpoint, print the result and stop
    capture_video: bool = False  # film an episode of every evaluation, into the run's videos/
    log_interval: PositiveInt = 100  # updates between lines of metrics.jsonl
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "rosmo"  # Weights & Biases project
    cpu_devices: NonNegativeInt = 0  # on CPUs, devices that share the batch; 0: as many as divide it, of at most 8 cores
    distributed: bool = False  # this is one of several processes, on one host or more, that train together
    cpu_size: bool = False  # a size for CPUs: other defaults of networks, batch, K, n, learning rate and evaluation


CPU_SIZE: dict[str, Any] = {
    "batch_size": 32, "total_steps": 20_000, "num_bins": 81, "encoder": "cnn", "channels": 16, "representation_blocks": 0,
    "dynamics_blocks": 1, "prediction_blocks": 0, "head_channels": 8, "unroll_steps": 3, "bootstrap_steps": 3,
    "learning_rate": 2e-3, "warmup_steps": 200, "learning_rate_decay_steps": 15_000, "eval_interval": 2_500,
}  # fmt: skip


# ---------------------------------------------------------------------------------------- Networks and value transforms


class Prediction(NamedTuple):
    policy_logits: jax.Array  # [..., A]
    reward_logits: jax.Array  # [..., num_bins], of the reward on the way into the state
    value_logits: jax.Array  # [..., num_bins]


def conv(channels: int, dtype: str, size: int = 3, stride: int = 1) -> nn.Conv:
    return nn.Conv(channels, (size, size), stride, use_bias=False, dtype=dtype)


def layer_norm(dtype: str, axes: tuple[int, ...] = (-3, -2, -1)) -> nn.LayerNorm:
    """Over height, width and channels together, with a scale and an offset for each channel."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, reduction_axes=axes, feature_axes=-1)


def avg_pool(x: jax.Array) -> jax.Array:
    """Means of 3 x 3 cells with stride 2, of those that are not padding."""
    return nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)


class ResBlock(nn.Module):
    """Residual block, normalised before its convolutions; with a stride it downsamples and projects its shortcut."""

    channels: int
    dtype: str
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(layer_norm(self.dtype)(x))
        shortcut = x if self.stride == 1 else conv(self.channels, self.dtype, stride=self.stride)(y)
        y = conv(self.channels, self.dtype, stride=self.stride)(y)
        return shortcut + conv(self.channels, self.dtype)(nn.relu(layer_norm(self.dtype)(y)))


class Head(nn.Module):
    """From states [..., S] to float32 logits [..., size]."""

    size: int
    args: Args

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, dtype = self.args.head_width, self.args.compute_dtype
        x = conv(self.args.head_channels, dtype, size=1)(nn.relu(layer_norm(dtype)(x)))
        x = nn.relu(layer_norm(dtype)(x)).reshape(*x.shape[:-3], -1)
        for _ in range(2):
            x = nn.relu(layer_norm(dtype, axes=(-1,))(nn.Dense(width, use_bias=False, dtype=dtype)(x)))
        return nn.Dense(self.size, dtype=dtype, kernel_init=nn.initializers.zeros)(x).astype(jnp.float32)


class Model(nn.Module):
    """The learned model of MuZero (Schrittwieser et al. 2020): representation h, dynamics g and prediction f."""

    num_actions: int
    args: Args

    def setup(self) -> None:
        args, channels, dtype = self.args, self.args.channels, self.args.compute_dtype
        block = functools.partial(ResBlock, channels, dtype)
        stem: list[Callable] = [conv(16, dtype, 4, 2), nn.relu, conv(channels, dtype, 4, 2)]  # to 21 x 21, 11 x 11
        if args.encoder == "resnet":
            stem = [conv(channels // 2, dtype, stride=2), ResBlock(channels // 2, dtype)]  # to 42 x 42, C / 2
            stem += [block(stride=2), block(), avg_pool, block(), avg_pool]  # to 21 x 21, 11 x 11, 6 x 6
        self.encoder = nn.Sequential([*stem, *(block() for _ in range(args.representation_blocks))])
        self.state_norm, self.with_action = layer_norm(dtype), conv(channels, dtype)
        self.transition = [block() for _ in range(args.dynamics_blocks)]
        self.torso = [block() for _ in range(args.prediction_blocks)]
        self.policy, self.reward, self.value = (Head(out, args) for out in (self.num_actions, args.num_bins, args.num_bins))

    def __call__(self, observation: jax.Array, action: jax.Array) -> Prediction:  # all networks, for their parameters
        return self.prediction(self.dynamics(self.representation(observation), action))

    def representation(self, observation: jax.Array) -> jax.Array:
        """h: observations [..., 84, 84, 4] uint8 to states [..., S]."""
        image = observation.astype(self.args.compute_dtype) / 255
        if self.args.encoder == "cnn":  # not normalised: the background becomes 0, or it would outweigh what moves
            image = functools.reduce(jnp.maximum, [image[..., i::2, j::2, :] for i in (0, 1) for j in (0, 1)])  # to 42 x 42
            image -= jnp.median(image[..., ::4, ::4, -1:], axis=(-3, -2, -1), keepdims=True)
        return self.encoder(image)

    def dynamics(self, state: jax.Array, action: jax.Array) -> jax.Array:
        """g: states [..., S] and actions [...] to next states [..., S]."""
        one_hot = jax.nn.one_hot(action, self.num_actions, dtype=state.dtype)[..., None, None, :]
        planes = jnp.broadcast_to(one_hot, (*state.shape[:-1], self.num_actions))
        state += self.with_action(jnp.concatenate([nn.relu(self.state_norm(state)), planes], axis=-1))
        for block in self.transition:
            state = block(state)
        return state

    def prediction(self, state: jax.Array) -> Prediction:
        """f: states [..., S] to float32 logits."""
        reward = self.reward(state)
        for block in self.torso:
            state = block(state)
        return Prediction(self.policy(state), reward, self.value(state))


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

    observation: Any  # [..., 84, 84] uint8 frames, or [..., 84, 84, 4] stacks, newest frame last
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
    """Labels of windows [B, T]: values [B, T]; of the first K + 1 steps policies [B, K+1, A] and advantages [B, K+1].
    The improved policy is p(a) = prior(a) exp(adv_g(s, a)) / Z, or sampled."""
    net, length = model.bind(target_params), model.args.unroll_steps + 1
    state = net.representation(steps.observation)
    prediction = net.prediction(state)
    values, taken = to_scalar(prediction.value_logits), steps.action[:, :length, None]
    state, logits, value = state[:, :length], prediction.policy_logits[:, :length], values[:, :length]
    if model.args.sampling:
        samples = jnp.moveaxis(jax.random.categorical(key, logits, shape=(model.args.num_simulations, *value.shape)), 0, -1)
        advantage = one_step_advantage(target_params, state, value, samples, model)
        policy = sampled_one_step_target(samples, advantage, model.num_actions)
        return Labels(values, policy, one_step_advantage(target_params, state, value, taken, model)[..., 0])
    every_action = jnp.broadcast_to(jnp.arange(model.num_actions), logits.shape)
    advantage = one_step_advantage(target_params, state, value, every_action, model)
    return Labels(values, jax.nn.softmax(logits + advantage), jnp.take_along_axis(advantage, taken, axis=-1)[..., 0])


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
    """Indices [B, 3 + T] of windows, drawn with replacement, and of the three steps before each, for its stacks."""
    window = args.unroll_steps + args.bootstrap_steps + 1
    start = jax.random.randint(key, (args.batch_size,), 0, num_steps - window + 1)
    return jnp.maximum(start[:, None] + jnp.arange(-3, window), 0)


def stack_frames(windows: Steps) -> Steps:
    """[B, 3 + T] to [B, T] with stacks of four frames; one that would reach before its episode repeats the first frame."""
    num_steps = windows.is_first.shape[1]
    first = jax.lax.cummax(jnp.where(windows.is_first, jnp.arange(num_steps), 0), axis=1)  # the episode's, at every step
    index = jnp.maximum(jnp.arange(3, num_steps)[:, None] + jnp.arange(-3, 1), first[:, 3:, None])  # [B, T, 4]
    stacks = jax.vmap(lambda frames, index: frames[index])(windows.observation, index)  # [B, T, 4, 84, 84]
    return jax.tree.map(lambda x: x[:, 3:], windows)._replace(observation=jnp.moveaxis(stacks, 2, -1))


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


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def update_windows(state: TrainState, windows: Steps, model: Model) -> tuple[TrainState, dict]:
    """One update on windows with history [B, 3 + T]."""
    _, actions_key, labels_key = (jax.random.fold_in(key, state.step) for key in jax.random.split(state.key, 3))

    @functools.partial(jax.shard_map, in_specs=(P(), P(), P("batch")), out_specs=P("batch"), check_vma=False)
    def label(target_params: Any, key: jax.Array, batch: Steps) -> Labels:
        return make_labels(target_params, jax.random.fold_in(key, jax.lax.axis_index("batch")), batch, model)

    batch = stack_frames(windows)
    return update(state, actions_key, batch, label(state.target_params, labels_key, batch), model)


# -------------------------------------------------------------------------------------------------------------- Dataset


class InputError(Exception):
    """What the program's user can put right: it is printed as one sentence, and the exit code is 2."""


def require(is_right: Any, fault: str) -> None:
    if not is_right:
        raise InputError(fault)


def load_dataset(folder: Path, args: Args) -> tuple[Steps, np.ndarray, dict[str, Any]]:
    """Steps [N] with memory-mapped frames, rows [M] of the episodes that are kept, and meta.json. Format: data/README.md.
    Raises InputError for a dataset that is missing or damaged, of another game, or would make training silently wrong."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        data = Steps(*(np.load(folder / f"{field}.npy", "r" if field == "observation" else None) for field in Steps._fields))
        _, length, num_actions = meta["env_id"], meta["steps"], meta["num_actions"]
        reference = meta.get("reference_returns") or {"random": 0, "online_dqn": 1}
        require(reference["random"] != reference["online_dqn"], f"the dataset {folder} has equal reference_returns")
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        raise InputError(f"the dataset {folder} is missing or damaged ({error}): name another by --data-dir") from None
    of = f"the dataset {folder}"
    shapes = {data.observation.shape[:1], *(x.shape for x in data[1:])}
    is_whole = "".join(x.dtype.kind for x in data) == "uifbbb" and shapes == {(length,)}
    require(is_whole, f"{of} is damaged: its arrays do not hold {length} bytes, integers, floats and three times flags")
    form = data.observation.dtype.name, data.observation.shape[1:], data.observation.flags.c_contiguous
    require(form == ("uint8", (84, 84), True), f"{of} has observations of {form[:2]}, not uint8 84 x 84 in C order")
    is_whole = np.array_equal(data.is_first, np.roll(data.is_last, 1)) and data.is_last[data.is_terminal].all()
    require(is_whole and length and data.is_first[0], f"{of} does not mark whole episodes by is_first, is_last, is_terminal")
    require(data.action.min() >= 0 and data.action.max() < num_actions, f"{of} has actions outside 0 to {num_actions - 1}")
    require(not data.reward[data.is_last].any(), f"{of} has a reward at an episode's last step, which has no action")
    require(np.isfinite(data.reward).all(), f"{of} has a reward that is not finite (reward.npy)")
    # Of as many equal stretches of the dataset as episodes are kept, one episode each, drawn by seed.
    episode = np.cumsum(data.is_first) - 1  # [N], of the step
    edges = np.linspace(0, episode[-1] + 1, max(1, round(args.data_fraction * (episode[-1] + 1))) + 1).astype(int)
    kept = np.isin(episode, np.random.default_rng(args.seed).integers(edges[:-1], edges[1:]))
    has_window = np.bincount(episode[kept]).max() > args.unroll_steps + args.bootstrap_steps
    require(has_window, f"no episode taken of {of} has K + n + 1 steps")
    return data, kept.nonzero()[0].astype(np.int32), meta


def read_frames(file: np.memmap, rows: np.ndarray) -> np.ndarray:
    """Frames [..., 84, 84] at rows [...] of the file. Rows that lie side by side are read at once: disks are fast so."""
    frames = np.empty((rows.size, *file.shape[1:]), np.uint8)
    starts = np.flatnonzero(np.diff(rows.ravel(), prepend=-2) != 1)
    with open(str(file.filename), "rb") as raw:
        for start, end in zip(starts, [*starts[1:], rows.size], strict=True):
            raw.seek(file.offset + int(rows.flat[start]) * frames[0].nbytes)
            raw.readinto(frames[start:end].data)
    return frames.reshape(*rows.shape, *file.shape[1:])


def batches(data: Steps, rows: np.ndarray, key: Any, step: int, args: Args) -> Iterator[Steps]:
    """Windows [B, 3 + T] of these rows for update `step` and all after it, from device memory or ahead from the disk."""
    split, count, bytes_needed = NamedSharding(key.sharding.mesh, P("batch")), jax.device_count(), len(rows) * 84 * 84
    windows_key = jax.device_get(jax.random.split(key, 3)[0])
    index = jax.jit(lambda t: sample_windows(jax.random.fold_in(windows_key, t), len(rows), args))
    memory = jax.local_devices()[0].memory_stats() or {"bytes_limit": 0, "bytes_in_use": 0}  # a CPU tells none
    room = (memory["bytes_limit"] - memory["bytes_in_use"]) // 2

    def place(at: np.ndarray, where: Any) -> Steps:
        """The steps at these rows of the dataset. Every process brings what its own devices need."""

        def bring(x: np.ndarray) -> jax.Array:
            read = functools.partial(read_frames, x) if isinstance(x, np.memmap) else x.__getitem__
            return jax.make_array_from_callback((*at.shape, *x.shape[1:]), where, lambda part: read(at[part[0]]))  # type: ignore

        return jax.tree.map(bring, data)

    def read_batch(t: int) -> Steps:
        return place(rows[np.asarray(index(np.int32(t)))], split)

    if args.data_place == "device" or (args.data_place == "auto" and bytes_needed < room * count):
        where = split if bytes_needed > room > 0 else key.sharding  # too much for one device: each has a share of the rows
        shares = np.append(rows, np.zeros(-len(rows) % count, np.int32)).reshape(count, -1)
        join = jax.jit(lambda *x: jnp.concatenate(x, 1).reshape(shares.size, *x[0].shape[2:]), out_shardings=where)
        steps = jax.tree.map(join, *(place(x, where) for x in np.array_split(shares, min(100, shares.shape[1]), axis=1)))
        gather = jax.jit(lambda steps, t: jax.tree.map(lambda x: x[index(t)], steps), out_shardings=split)
        yield from (gather(steps, np.int32(t)) for t in itertools.count(step))
    with ThreadPoolExecutor(args.data_readers) as pool:  # each reads a batch ahead of its use
        waiting = deque(pool.submit(read_batch, t) for t in range(step, step + args.data_readers))
        for t in itertools.count(step + args.data_readers):
            yield waiting.popleft().result()
            waiting.append(pool.submit(read_batch, t))


# --------------------------------------------------------------------------------- Environments, acting and evaluation


def make_environments(env_id: str, seeds: list[int], rom_dir: Path | None = None) -> Any:
    """Games [V] side by side. Observations [V, 4, 84, 84] uint8, newest frame last; rewards are the game's own. The settings
    are Dopamine's (Castro et al. 2018), as of the datasets, whose ROMs are others for some games (data/README.md)."""
    dopamine: dict[str, Any] = {
        "stack_num": 4, "repeat_action_probability": 0.25, "use_fire_reset": False, "episodic_life": False,
        "noop_max": 1,  # a reset plays one no-op frame; 0 hangs or crashes EnvPool 1.2.5
        "max_episode_steps": 27_000,  # 108,000 frames, half an hour of play
        "reward_clip": False, "full_action_space": False, **({"base_path": str(rom_dir)} if rom_dir else {}),
    }  # fmt: skip
    seeds = [seed % 2**31 for seed in seeds]
    return envpool.make(f"{env_id}-v5", env_type="gymnasium", num_envs=len(seeds), seed=seeds, **dopamine)


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Writes frames uint8 [84, 84], 15 a second as played, pixels enlarged to 4 x 4. OpenCV's line on a tag is harmless."""
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"VP90"), 15, (336, 336), isColor=False)
    for frame in frames:
        writer.write(np.kron(frame, np.ones((4, 4), np.uint8)))
    writer.release()


@functools.partial(jax.jit, static_argnames="model")
def act(params: Any, key: jax.Array, observation: jax.Array, model: Model) -> jax.Array:
    """Actions [V] at observations [V, 4, 84, 84] uint8."""
    net = model.bind(params)
    state = net.representation(jnp.moveaxis(observation, 1, -1))
    prediction = net.prediction(state)
    logits, value = prediction.policy_logits, to_scalar(prediction.value_logits)
    if model.args.sampling:
        return jax.random.categorical(key, logits)  # of the prior
    every_action = jnp.broadcast_to(jnp.arange(model.num_actions), logits.shape)
    return jax.random.categorical(key, logits + one_step_advantage(params, state, value, every_action, model))


def evaluate(state: TrainState, model: Model, meta: dict[str, Any], run_dir: Path) -> dict[str, float]:
    """Plays eval_episodes episodes side by side and returns the "eval/..." metrics. meta: the dataset's."""
    number, step = model.args.eval_episodes, int(state.step)
    act_seed, *seeds = np.random.SeedSequence([model.args.seed, step]).generate_state(1 + number).tolist()
    environments = make_environments(model.args.env_id, seeds, model.args.rom_dir)
    params = jax.tree.map(lambda x: x.addressable_data(0), state.params)
    observation, _ = environments.reset()  # [V, 4, 84, 84]
    returns, is_playing = np.zeros(number), np.ones(number, bool)
    film = [observation[0, -1].copy()]
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], ("batch",))):  # one device acts
        key = jax.random.PRNGKey(act_seed)
        while is_playing.any():
            key, act_key = jax.random.split(key)
            action = np.asarray(act(params, act_key, observation, model))
            observation, reward, terminated, truncated, _ = environments.step(action)
            film += [observation[0, -1].copy()] if model.args.capture_video and is_playing[0] else []
            returns += np.where(is_playing, reward, 0)
            is_playing &= ~(terminated | truncated)
    if model.args.capture_video and jax.process_index() == 0:
        write_video(run_dir / "videos" / f"{step}.webm", film)
    scores = {f"eval/return_{name}": float(getattr(returns, name)()) for name in ("mean", "std", "min", "max")}
    if reference := meta.get("reference_returns"):
        gain, whole = scores["eval/return_mean"] - reference["random"], reference["online_dqn"] - reference["random"]
        scores["eval/normalized_score"] = gain / whole
    return scores


# ----------------------------------------------------------------------------------------------------------------- Main


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line. What it does not name is, with --resume, as in that run."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    args = tyro.cli(Args, args=argv, default=Args(**CPU_SIZE), description=__doc__) if args.cpu_size else args
    require(not (args.resume and args.run_dir), "--resume goes on in the folder that it names: name no --run-dir beside it")
    if args.resume:
        require((args.resume / "args.json").exists(), f"{args.resume} is not the folder of a run: it has no args.json")
        saved = Args(**json.loads((args.resume / "args.json").read_text())["args"])
        args = tyro.cli(Args, args=argv, default=saved, description=__doc__)
        require((args.seed, args.cpu_size) == (saved.seed, saved.cpu_size), "--seed and --cpu-size stay as they were")
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
    folder = args.data_dir or Path("datasets/atari", args.env_id)
    if not (args.data_dir or folder.exists()) and Path(__file__).parent.joinpath("data/record_atari.py").exists():
        importlib.import_module("data.record_atari").record_if_missing(args.env_id, rom_dir=args.rom_dir)
    if args.eval_only:
        meta = json.loads((run_dir / "args.json").read_text())["dataset"]
    else:
        data, rows, meta = load_dataset(folder, args)
    require(meta["env_id"] == args.env_id, f"the dataset is of {meta['env_id']}, not of {args.env_id} (--env-id)")
    if args.eval_episodes:
        require(f"{args.env_id}-v5" in envpool.list_all_envs(), f"EnvPool has no game {args.env_id}; one is MsPacman")
        spec = envpool.make_spec(f"{args.env_id}-v5")
        rom, found = f"atari/roms/{spec.config.task}.bin", spec.gymnasium_action_space.n
        require(not args.rom_dir or (args.rom_dir / rom).exists(), f"{args.rom_dir} has no {rom}")
        require(found == meta["num_actions"], f"{args.env_id} has {found} actions, the dataset {meta['num_actions']}")
    model = Model(meta["num_actions"], args)
    state = jax.device_put(jax.device_get(init_state((84, 84, 4), model)), P())

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
        print(json.dumps({"step": step, **evaluate(state, model, meta, run_dir)}))
        return
    if first:
        commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
        run = {"args": vars(args) | {"data_dir": folder.absolute()}, "dataset": meta, "git_commit": commit.stdout.strip()}
        run["versions"] = {name: sys.modules[name].__version__ for name in ("jax", "flax", "optax", "numpy", "envpool")}
        (run_dir / "args.json.new").write_text(json.dumps(run, indent=2, default=str) + "\n")
        os.replace(run_dir / "args.json.new", run_dir / "args.json")
        log_file = (run_dir / "metrics.jsonl").open("a+", buffering=1)
        log_file.seek(0)  # what a killed run logged after its last checkpoint is dropped, and comes again
        log_file.truncate(sum(len(text) for text in log_file if text.endswith("\n") and json.loads(text)["step"] <= step))
        if args.track:
            wandb = importlib.import_module("wandb")
            wandb.init(project=args.wandb_project, name=run_dir.name, config=vars(args), resume="auto", dir=run_dir)
        print(end=f"{meta['notice']}\n" if "notice" in meta else "")
        print(f"{run_dir}: {len(rows)} steps of data, {jax.device_count()} x {jax.devices()[0].device_kind}")

    windows = batches(data, rows, state.key, step, args)
    batch = next(windows)
    compiled = update_windows.lower(state, batch, model).compile()
    bar = tqdm(initial=step, total=args.total_steps, unit="update", disable=None if first else True)
    sums, first_step, logged_step, seconds, wait_seconds = dict[str, float](), step, step, 0.0, 0.0
    running, is_due = list[dict[str, jax.Array]](), True  # metrics of the updates on the device; whether all are awaited
    intervals = (args.log_interval, args.eval_interval, args.checkpoint_interval)
    while step < args.total_steps and not (is_due and stopped_by):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        wait_seconds -= time.perf_counter()
        batch = next(windows)
        wait_seconds += time.perf_counter()
        step, running = step + 1, [*running, metrics]
        is_due = bool(stopped_by) or step in (first_step + 1, args.total_steps) or 0 in [step % every for every in intervals]
        while len(running) > (0 if is_due else 1):  # waits for all updates but one, so that the device always has work
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in jax.device_get(running.pop(0)).items()}
        seconds += time.perf_counter() - start
        bar.update(1)
        if sums and not np.isfinite([sums["total_loss"], sums["grad_norm"], sums["param_norm"]]).all():
            sys.exit(f"error: loss or gradient is not finite after {step} updates; {run_dir} keeps its last checkpoint")
        if first and step == first_step + 1 and jax.default_backend() == "cpu" and not args.cpu_size:
            bar.write(f"no accelerator: an update takes {seconds:.2f} s; --cpu-size suits a CPU")
        done, line = step == args.total_steps, dict[str, float]()
        if done or step % args.log_interval == 0:
            line = {f"train/{name}": value / (step - logged_step) for name, value in sums.items()}
            line |= {"train/updates_per_second": (step - logged_step) / seconds, "train/wait_seconds": wait_seconds}
            sums, logged_step, seconds, wait_seconds = {}, step, 0.0, 0.0
        if args.eval_episodes and (done or step % args.eval_interval == 0):
            start = time.perf_counter()
            line |= {**evaluate(state, model, meta, run_dir), "eval/seconds": time.perf_counter() - start}
        if line and first:
            log_file.write(json.dumps({"step": step, **line}) + "\n")
            shown = [name for name in line if "eval/" in name or name in ("train/total_loss", "train/updates_per_second")]
            bar.write(f"{step} updates: " + ", ".join(f"{name} {line[name]:.4g}" for name in shown))
            if args.track:
                video = run_dir / "videos" / f"{step}.webm"
                wandb.log(line | ({"eval/video": wandb.Video(str(video))} if video.exists() else {}), step=step)
        if done or (is_due and stopped_by) or step % args.checkpoint_interval == 0:  # last: what comes after it can be lost
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
