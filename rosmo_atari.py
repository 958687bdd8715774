# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.7", "flax>=0.11", "optax>=0.2.5", "orbax-checkpoint>=0.11.20", "numpy>=2.0", "tyro>=0.9.30", "tqdm>=4.66",
#     "wandb>=0.19",
#     "envpool>=1.2.5", "opencv-python-headless>=4.10",
# ]
# ///
"""ROSMO on Atari in one file: offline reinforcement learning by a one-step look-ahead with a learned model.

Liu, Li, Lee, Yan, Xu: "Efficient Offline Policy Optimization with a Learned Model", ICLR 2023 (arXiv 2210.05980).

    python rosmo_atari.py --env-id Breakout               # the paper's settings, 200,000 updates: for GPUs
    python rosmo_atari.py --env-id Breakout --cpu-size    # a network and a batch that suit a CPU
    python rosmo_atari.py --resume RUN_DIR                # go on where a run was stopped
    python rosmo_atari.py --resume RUN_DIR --eval-only    # score its last checkpoint

In the comments B is the batch, T = K + n + 1 the window (K unroll steps, n bootstrap steps), S the shape of a latent state
(6 x 6 x channels), A the number of actions, N the steps of the dataset; h, g, f are representation, dynamics and prediction.
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import envpool
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from envpool.atari.registration import atari_game_list
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm


class InputError(Exception):
    """What the program's user can put right: it is printed as one sentence, and the exit code is 2."""


# ---------------------------------------------------------------------------------------------------------------- Args


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "Breakout"  # the game, as in "MsPacman"
    seed: int = 0  # everything random in the run follows from it
    total_steps: int = 200_000  # updates to make
    batch_size: int = 512  # windows per update
    run_dir: Path | None = None  # folder to make for this run; by default runs/<env>__<script>__<seed>__<time>
    resume: Path | None = None  # folder of a run to go on with; its settings are taken from there
    checkpoint_interval: int = 10_000  # updates between checkpoints
    data_dir: Path | None = None  # dataset folder; by default the game's under datasets/atari/, recorded if missing
    data_fraction: float = 1.0  # fraction of the episodes to train on, evenly spaced over the dataset, chosen by seed
    data_place: Literal["auto", "device", "host"] = "auto"  # where the frames are; auto: on an accelerator if they fit

    unroll_steps: int = 5  # K, the steps that the model is unrolled
    bootstrap_steps: int = 5  # n, the steps of the n-step return
    discount: float = 0.997**4  # gamma
    num_bins: int = 601  # bins of the reward and value distributions
    encoder: Literal["resnet", "cnn"] = "resnet"  # the paper's, or DQN's of 2013 (cheap; states are 11 x 11)
    channels: int = 64  # channels of a latent state
    representation_blocks: int = 6  # residual blocks of the representation network at its last size
    dynamics_blocks: int = 2  # residual blocks of the dynamics network
    prediction_blocks: int = 2  # residual blocks of the prediction network
    head_channels: int = 128  # channels of the convolution of each of the three heads
    head_width: int = 128  # hidden units of the two layers of each head
    dynamics_gradient_scale: float = 0.5  # factor on the gradient into each next state
    value_coef: float = 0.25  # weight of the value loss
    policy_coef: float = 1.0  # weight of the policy loss
    behavior_coef: float = 0.2  # weight of the filtered behaviour cloning; 0 is one-step without regularisation
    sampling: bool = False  # sample num_simulations actions for the one-step target instead of trying every action
    num_simulations: int = 4  # actions sampled per state, with --sampling
    learning_rate: float = 7e-4  # peak learning rate
    warmup_steps: int = 1_000  # updates over which the learning rate rises linearly from 0
    learning_rate_decay: float = 0.1  # factor on the learning rate every learning_rate_decay_steps
    learning_rate_decay_steps: int = 100_000  # updates between two decays, counted from the end of the warm-up
    weight_decay: float = 1e-4  # AdamW's decay, on kernels only
    max_grad_norm: float = 5.0  # global norm to which gradients are clipped
    target_update_interval: int = 200  # updates between copies of the parameters to the target parameters

    eval_interval: int = 20_000  # updates between evaluations
    eval_episodes: int = 32  # episodes per evaluation; with 0 there is no environment, and nothing is scored
    eval_envs: int = 32  # environments that play them side by side
    eval_only: bool = False  # with --resume: score the last checkpoint, print the result and stop
    capture_video: bool = False  # film an episode of every evaluation, into the run's videos/
    log_interval: int = 100  # updates between lines of metrics.jsonl
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "rosmo"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases user or team
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the networks; parameters and losses stay float32
    cpu_devices: int = 0  # without an accelerator, devices to split the batch over; 0 for as many as cores, at most 8
    distributed: bool = False  # this is one of several processes, on one host or more, that train together
    cpu_size: bool = False  # a size for CPUs: other defaults for the batch, the networks, the updates and the evaluations

    def __post_init__(self) -> None:
        """Raises InputError for values that make no sense."""
        zero = ["seed", "eval_episodes", "warmup_steps", "weight_decay", "cpu_devices"]
        tiny, huge = sys.float_info.min, sys.float_info.max
        for name, value in vars(self).items():
            least = {"num_bins": 3, "channels": 2}.get(
                name, 0 if name in zero or name.endswith(("_coef", "_scale", "_blocks")) else tiny
            )
            most = 1 if name.endswith(("_fraction", "discount", "_decay")) else 2**32 - 1 if name == "seed" else huge
            if type(value) in (int, float) and not least <= value <= most:
                limits = "above 0" if least == tiny else f"at least {least}"
                limits += f" and at most {most}" if most < huge else ""
                raise InputError(f"--{name.replace('_', '-')} must be {limits}, not {value}")
        if self.distributed and self.run_dir is None:
            raise InputError("--distributed needs --run-dir: all processes train in one folder")
        if self.eval_only and (self.resume is None or self.eval_episodes == 0):
            raise InputError("--eval-only needs --resume RUN_DIR, and --eval-episodes above 0")
        if not self.sampling and self.num_simulations != Args.num_simulations:
            raise InputError("--num-simulations has no part in the exact target: name --sampling too")


CPU_SIZE: dict[str, Any] = {
    **{"batch_size": 32, "total_steps": 20_000, "encoder": "cnn", "channels": 16, "representation_blocks": 0},
    **{"dynamics_blocks": 1, "prediction_blocks": 0, "head_channels": 8, "head_width": 128, "num_bins": 81},
    **{"unroll_steps": 3, "bootstrap_steps": 3, "learning_rate": 2e-3, "warmup_steps": 200, "eval_interval": 2_500},
    **{"learning_rate_decay_steps": 15_000, "target_update_interval": 25},
}


# -------------------------------------------------------------------------------------------------- Dataset and sampler


class Steps(NamedTuple):
    """Steps in time order: the whole dataset with leading axis [N], or a batch of windows with leading axes [B, T]."""

    observation: Any  # [..., 84, 84] uint8 frames, or [..., 84, 84, 4] stacks, newest frame last
    action: Any  # [...] int32; an episode's last step has none, and 0 here
    reward: Any  # [...] float32, of the action
    is_first: Any  # [...] bool
    is_last: Any  # [...] bool
    is_terminal: Any  # [...] bool; an episode whose last step is not terminal was cut off


def sharding(*axes: str) -> NamedSharding:
    """sharding("batch") splits the leading axis over all devices, sharding() gives each device the whole."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), jax.P(*axes))


def per_device(*in_specs: jax.P, out: jax.P) -> Callable:
    """Decorates a function that every device calls with its shares of the arguments."""
    return functools.partial(jax.shard_map, mesh=sharding().mesh, in_specs=in_specs, out_specs=out, check_vma=False)


def find_dataset(args: Args) -> Path:
    """The folder of the run's dataset. A default one that is missing is recorded, by the repository's data/.

    Raises InputError if it is missing and this file stands alone.
    """
    folder = Path("datasets", "atari", args.env_id)
    if args.data_dir is None and not folder.exists():
        try:
            from data.record_atari import record_if_missing
        except ImportError:
            raise InputError(f"there is no dataset {folder}: name the folder of one by --data-dir") from None
        record_if_missing(args.env_id)
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

    Raises InputError for a dataset that is missing, damaged, of another game, or too small for the settings.
    """
    data, meta = open_dataset(find_dataset(args))
    num_actions = meta["num_actions"] if environment is None else int(environment.single_action_space.n)
    found = (meta.get("env_id"), meta["num_actions"], data.observation.shape[1:], str(data.observation.dtype))
    wanted = (args.env_id, num_actions, (84, 84), "uint8")
    if found != wanted:
        raise InputError(f"the dataset has {found}, not (environment, actions, rows and columns, type) {wanted}")
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


def batches(data: Steps, rows: np.ndarray, key: jax.Array, step: int, args: Args) -> Iterator[Steps]:
    """Windows [B, 3 + T] of these rows for update `step` and all after it, from device memory, host memory or disk."""
    memory = jax.local_devices()[0].memory_stats() or {"bytes_limit": 0, "bytes_in_use": 0}  # a CPU tells none
    fits = memory["bytes_limit"] - memory["bytes_in_use"] > 2 * len(rows) * data.observation[0].nbytes
    windows_key = jax.device_get(jax.random.split(key, 3)[0])
    index = jax.jit(lambda t: sample_windows(jax.random.fold_in(windows_key, t), len(rows), args))
    place: Any = jax.make_array_from_callback  # every process brings what its own devices need
    if args.data_place == "device" or (args.data_place == "auto" and fits):
        steps = jax.tree.map(lambda x: place((len(rows), *x.shape[1:]), sharding(), lambda part: x[rows[part[0]]]), data)
        gather = jax.jit(lambda steps, t: jax.tree.map(lambda x: x[index(t)], steps), out_shardings=sharding("batch"))
        return (gather(steps, np.int32(t)) for t in itertools.count(step))

    def read(t: int) -> Steps:
        at, over = rows[np.asarray(index(np.int32(t)))], sharding("batch")
        return jax.tree.map(lambda x: place(at.shape + x.shape[1:], over, lambda part: x[at[part[0]]]), data)

    return read_ahead(read, step)


def read_ahead(read: Callable[[int], Steps], step: int, ahead: int = 4) -> Iterator[Steps]:
    """read(step), read(step + 1) and so on, each begun `ahead` calls before its use, in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(read, t) for t in range(step, step + ahead))
        for t in itertools.count(step + ahead):
            yield waiting.popleft().result()
            waiting.append(pool.submit(read, t))


# ------------------------------------------------------------------------------------------------------------- Networks


class Prediction(NamedTuple):
    policy_logits: jax.Array  # [..., A]
    reward_logits: jax.Array  # [..., num_bins], of the reward on the way into the state
    value_logits: jax.Array  # [..., num_bins]


def conv(channels: int, dtype: str, size: int = 3, stride: int = 1) -> nn.Conv:
    return nn.Conv(channels, (size, size), stride, use_bias=False, dtype=dtype)


def layer_norm(dtype: str, axes: tuple[int, ...] = (-3, -2, -1)) -> nn.LayerNorm:
    """Over height, width and channels together, with a scale and an offset for each channel."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, reduction_axes=axes, feature_axes=-1)


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
        pool = jnp.vectorize(lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", False), signature="(h,w,c)->(i,j,c)")
        block = functools.partial(ResBlock, channels, dtype)
        stem: list[Callable] = [conv(16, dtype, 8, 4), nn.relu, conv(channels, dtype, 4, 2)]  # to 21 x 21, 11 x 11
        if args.encoder == "resnet":
            stem = [conv(channels // 2, dtype, stride=2), ResBlock(channels // 2, dtype)]  # to 42 x 42, C / 2
            stem += [block(stride=2), block(), pool, block(), pool]  # to 21 x 21, 11 x 11, 6 x 6; means without the padding
        self.encoder = nn.Sequential([*stem, *(block() for _ in range(args.representation_blocks))])
        self.state_norm, self.with_action = layer_norm(dtype), conv(channels, dtype)
        self.transition = nn.Sequential([*(block() for _ in range(args.dynamics_blocks)), lambda x: x])
        self.torso = nn.Sequential([*(block() for _ in range(args.prediction_blocks)), lambda x: x])
        self.policy, self.reward, self.value = (Head(out, args) for out in (self.num_actions, args.num_bins, args.num_bins))

    def representation(self, observation: jax.Array) -> jax.Array:
        """h: observations [..., 84, 84, 4] uint8 to states [..., S]."""
        image = observation.astype(self.args.compute_dtype) / 255
        if self.args.encoder == "cnn":  # not normalised: the background becomes 0, or it would outweigh what moves
            image -= jnp.median(image[..., ::8, ::8, -1:], axis=(-3, -2, -1), keepdims=True)
        return self.encoder(image)

    def dynamics(self, state: jax.Array, action: jax.Array) -> jax.Array:
        """g: states [..., S] and actions [...] to next states [..., S]."""
        one_hot = jax.nn.one_hot(action, self.num_actions, dtype=state.dtype)[..., None, None, :]
        planes = jnp.broadcast_to(one_hot, (*state.shape[:-1], self.num_actions))
        return self.transition(state + self.with_action(jnp.concatenate([nn.relu(self.state_norm(state)), planes], axis=-1)))

    def prediction(self, state: jax.Array) -> Prediction:
        """f: states [..., S] to float32 logits."""
        after = self.torso(state)
        return Prediction(self.policy(after), self.reward(state), self.value(after))


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


def one_step_advantage(params: Any, state: jax.Array, value: jax.Array, action: jax.Array, model: Model) -> jax.Array:
    """adv_g(s, a) = r_g(s, a) + gamma v(g(s, a)) - v(s): states [..., S], values [...], actions [..., N] to [..., N]."""
    net = model.bind(params)
    states = jnp.repeat(jnp.expand_dims(state, action.ndim - 1), action.shape[-1], axis=action.ndim - 1)  # [..., N, S]
    after = net.prediction(net.dynamics(states, action))
    return to_scalar(after.reward_logits) + model.args.discount * to_scalar(after.value_logits) - value[..., None]


def sampled_one_step_target(action: jax.Array, advantage: jax.Array, num_actions: int) -> jax.Array:
    """The target from N actions drawn from the prior (Muesli, Hessel et al. 2021): [..., N], [..., N] to [..., A].

    Z_i = (1 + sum_j exp(adv_j) - exp(adv_i)) / N; p(a_i) += exp(adv_i) / (N Z_i). It weights -log pi; its sum is not 1.
    An addend is at most e^30, with which gradients are finite.
    """
    others = jnp.where(jnp.eye(advantage.shape[-1], dtype=bool), 0, advantage[..., None, :])  # exp(0) is the 1 in Z_i
    weight = jnp.exp(jnp.minimum(advantage - jax.nn.logsumexp(others, axis=-1), 30))
    return jnp.sum(weight[..., None] * jax.nn.one_hot(action, num_actions), axis=-2)


def improve_policy(
    params: Any, key: jax.Array, state: jax.Array, prediction: Prediction, action: jax.Array, model: Model
) -> tuple[jax.Array, jax.Array]:
    """The improved policy at states [..., S] with their prediction, p(a) = prior(a) exp(adv_g(s, a)) / Z [..., A], and the
    advantages adv_g(s, action) [...] of the data's actions [...]."""
    logits, value = prediction.policy_logits, to_scalar(prediction.value_logits)
    if model.args.sampling:
        draws = (model.args.num_simulations, *value.shape)
        samples = jnp.moveaxis(jax.random.categorical(key, logits, shape=draws), 0, -1)  # [..., N]
        advantage = one_step_advantage(params, state, value, jnp.append(samples, action[..., None], axis=-1), model)
        return sampled_one_step_target(samples, advantage[..., :-1], model.num_actions), advantage[..., -1]
    every_action = jnp.broadcast_to(jnp.arange(model.num_actions), logits.shape)
    advantage = one_step_advantage(params, state, value, every_action, model)
    return jax.nn.softmax(logits + advantage), jnp.take_along_axis(advantage, action[..., None], axis=-1)[..., 0]


# ----------------------------------------------------------------------------------------------------------------- Loss


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


def make_labels(target_params: Any, key: jax.Array, batch: Steps, model: Model) -> Labels:
    """Labels of windows [B, T]: values [B, T]; of the first K + 1 steps policies [B, K+1, A] and advantages [B, K+1]."""
    net, length = model.bind(target_params), model.args.unroll_steps + 1
    state = net.representation(batch.observation)
    prediction = net.prediction(state)
    first, first_prediction, action = jax.tree.map(lambda x: x[:, :length], (state, prediction, batch.action))
    return Labels(
        to_scalar(prediction.value_logits), *improve_policy(target_params, key, first, first_prediction, action, model)
    )


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
        behavior=(labels.advantage[:, :length] >= 0) & ~restarted,  # the filter H(adv_g(s, a)), H(x) = 1 for x >= 0
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

    @per_device(jax.P(), jax.P("batch"), jax.P("batch"), out=jax.P())
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


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def update_windows(state: TrainState, windows: Steps, model: Model) -> tuple[TrainState, dict]:
    """One update on windows with history [B, 3 + T]."""

    @per_device(jax.P(), jax.P(), jax.P("batch"), out=jax.P("batch"))
    def label(target_params: Any, key: jax.Array, batch: Steps) -> Labels:
        """Each device labels its share of the batch."""
        return make_labels(target_params, jax.random.fold_in(key, jax.lax.axis_index("batch")), batch, model)

    _, actions_key, labels_key = (jax.random.fold_in(key, state.step) for key in jax.random.split(state.key, 3))
    batch = stack_frames(windows)
    return update(state, actions_key, batch, label(state.target_params, labels_key, batch), model)


# --------------------------------------------------------------------------------- Environments, acting and evaluation


def make_environments(env_id: str, seeds: Sequence[int]) -> Any:
    """A game for each of the seeds, side by side; the step after an episode's end resets, and ignores its action.

    Observations [V, 4, 84, 84] uint8, newest frame last, and all else as when the datasets were made (Dopamine: Castro et
    al. 2018); rewards are the game's own. Raises InputError for an unknown game, with the closest known one.
    """
    games = ["".join(part.capitalize() for part in game.split("_")) for game in atari_game_list]
    if env_id not in games:
        closest = difflib.get_close_matches(env_id, games, n=1, cutoff=0.0)[0]
        raise InputError(f"there is no game {env_id!r}; did you mean {closest!r}?")
    return envpool.make(
        f"{env_id}-v5",
        env_type="gymnasium",
        num_envs=len(seeds),
        seed=[seed % 2**31 for seed in seeds],
        stack_num=4,
        repeat_action_probability=0.25,
        noop_max=1,  # a reset plays one no-op frame; 0 hangs or crashes EnvPool 1.2.5
        use_fire_reset=False,
        episodic_life=False,
        reward_clip=False,
        full_action_space=False,
        max_episode_steps=27_000,  # 108,000 frames, half an hour of play
    )


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Writes frames uint8 [84, 84], 15 to a second as the games are played, each pixel enlarged to 4 x 4."""
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 15, (336, 336), isColor=False)
    for frame in frames:
        writer.write(np.kron(frame, np.ones((4, 4), np.uint8)))
    writer.release()


@functools.partial(jax.jit, static_argnames="model")
def act(params: Any, key: jax.Array, observation: jax.Array, model: Model) -> jax.Array:
    """Actions [V] at observations [V, 84, 84, 4] uint8, drawn from the improved policy (with sampling, from the prior)."""
    net = model.bind(params)
    state = net.representation(observation)
    prediction = net.prediction(state)
    logits, value = prediction.policy_logits, to_scalar(prediction.value_logits)
    if model.args.sampling:
        return jax.random.categorical(key, logits)
    every_action = jnp.broadcast_to(jnp.arange(model.num_actions), logits.shape)
    return jax.random.categorical(key, logits + one_step_advantage(params, state, value, every_action, model))


def evaluate(
    state: TrainState, model: Model, meta: dict[str, Any], stopped_by: Sequence[int] = (), run_dir: Path | None = None
) -> dict[str, Any]:
    """Plays eval_episodes episodes in the real environment and returns the "eval/..." metrics; {} if stopped_by a signal.

    How many episodes each environment plays is fixed beforehand, so that short episodes do not count more often. meta: the
    dataset's; with its reference returns, the normalised score is (return - random play) / (online DQN - random play).
    run_dir: with --capture-video, the first environment's first episode is filmed into its videos/.
    """
    args, step = model.args, int(state.step)
    num_envs = min(args.eval_envs, args.eval_episodes)
    episodes_left = args.eval_episodes // num_envs + (np.arange(num_envs) < args.eval_episodes % num_envs)
    act_seed, *seeds = np.random.SeedSequence([args.seed, step]).generate_state(1 + num_envs).tolist()
    environments = make_environments(args.env_id, seeds)
    params, key = jax.tree.map(lambda x: x.addressable_data(0), state.params), jax.random.PRNGKey(act_seed)
    observation, _ = environments.reset()  # [V, 4, 84, 84]
    film, first_left = [observation[0, -1].copy()], episodes_left[0]  # of the first environment's first episode
    returns, lengths = list[float](), list[int]()
    running_return, running_length = np.zeros(num_envs), np.zeros(num_envs, int)
    is_reset = np.zeros(num_envs, bool)  # the step after an episode's end resets; it ignores its action and is not counted
    while episodes_left.any():
        if stopped_by:
            return {}
        key, act_key = jax.random.split(key)
        action = np.asarray(act(params, act_key, np.moveaxis(observation, 1, -1), model))
        observation, reward, terminated, truncated, _ = environments.step(action)
        running_return += np.where(is_reset, 0, reward)
        running_length += ~is_reset
        is_reset = terminated | truncated
        film += [observation[0, -1].copy()] if args.capture_video and episodes_left[0] == first_left else []
        finished = is_reset & (episodes_left > 0)
        returns, lengths = [*returns, *running_return[finished]], [*lengths, *running_length[finished]]
        episodes_left -= finished
        running_return[is_reset], running_length[is_reset] = 0, 0
    environments.close()
    if args.capture_video and run_dir:
        write_video(run_dir / "videos" / f"{step}.mp4", film)
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
    first.add_argument("--cpu-size", "--cpu_size", action="store_true")
    resume = first.parse_known_args(argv)[0].resume
    default = Args(**CPU_SIZE) if first.parse_known_args(argv)[0].cpu_size else default
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
        state = init_state((84, 84, 4), model)
        state = restore(open_checkpoints(args.resume, read_only=True), state)
        scores = evaluate(state, model, read_run(args.resume)["dataset"], (), args.resume)
        print(json.dumps({"step": int(state.step), **scores}))
        return 0
    data, rows, meta = load_dataset(args, environment)
    model = Model(meta["num_actions"], args)
    state = init_state((84, 84, 4), model)
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
    windows = batches(data, rows, state.key, step, args)
    batch = next(windows)
    compiled_update = update_windows.lower(state, batch, model).compile()
    sums, logged_step, seconds, calls = dict[str, float](), step, 0.0, itertools.count()
    while True:
        if (step % args.eval_interval == 0 or step == args.total_steps) and step not in scored and environment:
            save(checkpoints, state)
            if scores := evaluate(state, model, meta, stopped_by, run_dir):
                scored.add(step)
                write(step, scores)
                say(f"{step} updates: " + ", ".join(f"{name[5:]} {value:.4g}" for name, value in scores.items()))
        # Of several processes all must stop after the same call: after a signal to any of them JAX agrees on one.
        stop = bool(stopped_by) if jax.process_count() == 1 else checkpoints.reached_preemption(next(calls))
        if step == args.total_steps or stop:
            break
        start = time.perf_counter()
        state, metrics = compiled_update(state, batch)
        batch = next(windows)
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in jax.device_get(metrics).items()}  # waits
        seconds += time.perf_counter() - start
        if not np.isfinite([sums["total_loss"], sums["grad_norm"], sums["param_norm"]]).all():
            sys.exit(f"error: loss or gradient is not finite after {step} updates; {run_dir} keeps its last checkpoint")
        step += 1
        means = {f"train/{name}": value / (step - logged_step) for name, value in sums.items()}
        means["train/updates_per_second"] = speed = (step - logged_step) / seconds
        progress = f"loss {means['train/total_loss']:.3f}, {speed:.1f} updates/s"
        bar.set_postfix_str(progress, refresh=False)
        bar.update(1)
        if step == first_step + 1 and jax.default_backend() == "cpu":
            minutes = (args.total_steps - step) / speed / 60
            hint = "" if args.cpu_size else "; --cpu-size suits a CPU"
            say(f"no accelerator: {progress}, {minutes:.1f} minutes left{hint}")
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
