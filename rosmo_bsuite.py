"""ROSMO on BSuite in one file: offline reinforcement learning by a one-step look-ahead with a learned model.

Liu, Li, Lee, Yan, Xu: "Efficient Offline Policy Optimization with a Learned Model", ICLR 2023 (arXiv 2210.05980).

    python rosmo_bsuite.py --env-id catch                       # the paper's settings, 200,000 updates
    python rosmo_bsuite.py --env-id catch --total-steps 20000   # about a minute on two cores
    python rosmo_bsuite.py --resume RUN_DIR                     # go on where a run was stopped
    python rosmo_bsuite.py --resume RUN_DIR --eval-only         # score its last checkpoint

In the comments B is the batch, T = K + n + 1 the window (K unroll steps, n bootstrap steps), S the size of a latent state,
A the number of actions, N the steps of the dataset; h, g and f are representation, dynamics and prediction.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding

from data.dataset import Dataset, InputError, check_fit, keep_fraction, open_dataset
from data.record_bsuite import make_environment, normalized_score, record_if_missing
from data.runs import Checkpoints, Log, Progress, catch_signals, open_run, parse_args, run_program, use_devices

# ---------------------------------------------------------------------------------------------------------------- Args


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "catch"  # the task: catch, cartpole or mountain_car
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

    eval_interval: int = 5_000  # updates between evaluations
    eval_episodes: int = 32  # episodes per evaluation
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
        if not self.sampling and self.num_simulations != Args.num_simulations:
            raise InputError("--num-simulations has no part in the exact target: name --sampling too")


# -------------------------------------------------------------------------------------------------- Dataset and sampler


class Steps(NamedTuple):
    """Steps in time order: the whole dataset with leading axis [N], or a batch of windows with leading axes [B, T]."""

    observation: jax.Array  # [..., rows, columns] float32
    action: jax.Array  # [...] int32
    reward: jax.Array  # [...] float32
    is_first: jax.Array  # [...] bool
    is_last: jax.Array  # [...] bool


def sharding(*axes: str) -> NamedSharding:
    """sharding("batch") splits the leading axis over all devices, sharding() gives each device the whole."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), jax.P(*axes))


def per_device(*in_specs: jax.P) -> Callable:
    """Decorates a function that every device calls with its shares of the arguments, and that returns the same on each."""
    return functools.partial(jax.shard_map, mesh=sharding().mesh, in_specs=in_specs, out_specs=jax.P(), check_vma=False)


def load_dataset(args: Args) -> Dataset:
    """Opens the run's dataset, records the standard one if it is missing, and keeps a fraction of the episodes.

    Raises InputError for a dataset that is missing, damaged, of another task or noise, or too small for the settings.
    """
    environment = make_environment(args.env_id, args.seed, args.noise)
    folder = args.data_dir or record_if_missing(args.env_id, args.noise)
    data = open_dataset(folder)
    if data.meta.get("noise", 0.0) != args.noise:
        raise InputError(f"{folder} has noise {data.meta.get('noise', 0.0)}, not {args.noise}: name it with --noise")
    data = keep_fraction(data, args.data_fraction, args.seed) if args.data_fraction < 1 else data
    window = args.unroll_steps + args.bootstrap_steps + 1
    shape, num_actions = environment.observation_spec().shape, environment.action_spec().num_values
    check_fit(data, args.env_id, num_actions, shape, window, args.batch_size)
    return data


def sample_windows(key: jax.Array, num_steps: int, args: Args) -> jax.Array:
    """Indices [B, T] of windows of consecutive steps, all starts alike; a window may run over an episode's end."""
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


def one_step_advantage(params: Any, state: jax.Array, value: jax.Array, action: jax.Array, model: Model) -> jax.Array:
    """adv_g(s, a) = r_g(s, a) + gamma v(g(s, a)) - v(s): states [..., S], values [...], actions [..., N] to [..., N]."""
    net = model.bind(params)
    states = jnp.repeat(jnp.expand_dims(state, action.ndim - 1), action.shape[-1], axis=action.ndim - 1)  # [..., N, S]
    after = net.prediction(net.dynamics(states, action))
    return to_scalar(after.reward_logits) + model.args.discount * to_scalar(after.value_logits) - value[..., None]


def sampled_one_step_target(action: jax.Array, advantage: jax.Array, num_actions: int) -> jax.Array:
    """The target from N actions drawn from the prior (Muesli, Hessel et al. 2021): [..., N], [..., N] to [..., A].

    Z_i = (1 + sum_j exp(adv_j) - exp(adv_i)) / N; p(a_i) += exp(adv_i) / (N Z_i). It weights -log pi; its sum is not 1.
    """
    weight = jnp.exp(advantage)
    weight /= 1 + jnp.sum(weight, axis=-1, keepdims=True) - weight
    return jnp.sum(weight[..., None] * jax.nn.one_hot(action, num_actions), axis=-2)


def improve_policy(params: Any, key: jax.Array, state: jax.Array, prediction: Prediction, model: Model) -> jax.Array:
    """The improved policy [..., A] at states [..., S] with their prediction: p(a) = prior(a) exp(adv_g(s, a)) / Z."""
    logits, value = prediction.policy_logits, to_scalar(prediction.value_logits)
    if model.args.sampling:
        draws = (model.args.num_simulations, *value.shape)
        action = jnp.moveaxis(jax.random.categorical(key, logits, shape=draws), 0, -1)  # [..., N]
        advantage = one_step_advantage(params, state, value, action, model)
        return sampled_one_step_target(action, advantage, model.num_actions)
    action = jnp.broadcast_to(jnp.arange(model.num_actions), logits.shape)  # [..., A]
    return jax.nn.softmax(logits + one_step_advantage(params, state, value, action, model))


# ----------------------------------------------------------------------------------------------------------------- Loss


class Labels(NamedTuple):
    """What the target parameters say of steps, with the leading axes of Steps."""

    reward: jax.Array  # [...], predicted on the way into the step's state
    value: jax.Array  # [...]
    policy: jax.Array  # [..., A], improved


class Targets(NamedTuple):
    action: jax.Array  # [B, K] int32, the actions to unroll
    reward: jax.Array  # [B, K]
    value: jax.Array  # [B, K+1]
    policy: jax.Array  # [B, K+1, A]
    behavior: jax.Array  # [B, K+1] bool, whether to clone the data's action


def make_labels(target_params: Any, key: jax.Array, observation: jax.Array, model: Model) -> Labels:
    """Labels [...] of observations [..., rows, columns]."""
    net = model.bind(target_params)
    state = net.representation(observation)
    prediction = net.prediction(state)
    policy = improve_policy(target_params, key, state, prediction, model)
    return Labels(to_scalar(prediction.reward_logits), to_scalar(prediction.value_logits), policy)


def n_step_return(reward: jax.Array, is_last: jax.Array, value: jax.Array, args: Args) -> jax.Array:
    """z_t = sum_{i<n} D_i r_{t+i} + D_n v_{t+n}, D_0 = 1, D_{i+1} = D_i gamma (1 - is_last_{t+i+1}): [B, T] to [B, K+1]."""
    length = args.unroll_steps + 1
    result, discount = jnp.zeros_like(value[:, :length]), jnp.ones_like(value[:, :length])
    for i in range(args.bootstrap_steps):
        result += discount * reward[:, i : i + length]
        discount *= args.discount * ~is_last[:, i + 1 : i + 1 + length]
    return result + discount * value[:, args.bootstrap_steps :]


def random_actions(key: jax.Array, shape: tuple[int, ...], num_actions: int) -> jax.Array:
    """Uniform actions, to unroll after an episode's end."""
    return jax.random.randint(key, shape, 0, num_actions)


def make_targets(key: jax.Array, batch: Steps, labels: Labels, args: Args) -> Targets:
    """Targets of windows [B, T]; what lies after an episode's last step in the window is an absorbing state."""
    k, length, num_actions = args.unroll_steps, args.unroll_steps + 1, labels.policy.shape[-1]
    ended = jax.lax.cummax(batch.is_last[:, :length].astype(int), axis=1) == 1  # any is_last in 0..t
    restarted = jax.lax.cummax(batch.is_first[:, 1 : length + 1].astype(int), axis=1) == 1  # any is_first in 1..t+1
    # The behaviour filter H(adv_t), H(x) = 1 for x >= 0, with the advantage at the observed next state.
    now, after = labels.value[:, :length], slice(1, length + 1)
    advantage = labels.reward[:, after] + args.discount * labels.value[:, after] - now
    return Targets(
        action=jnp.where(restarted[:, :k], random_actions(key, (len(ended), k), num_actions), batch.action[:, :k]),
        reward=jnp.where(restarted[:, :k], 0, batch.reward[:, :k]),
        value=jnp.where(ended, 0, n_step_return(batch.reward, batch.is_last, labels.value, args)),
        policy=jnp.where(ended[..., None], 1 / num_actions, labels.policy[:, :length]),
        behavior=(advantage >= 0) & ~restarted,
    )


def scale_gradient(x: jax.Array, scale: float) -> jax.Array:
    """x itself, with its gradient multiplied by scale."""
    return scale * x + jax.lax.stop_gradient((1 - scale) * x)


def loss(params: Any, batch: Steps, targets: Targets, model: Model) -> tuple[jax.Array, dict]:
    """The training loss, a mean over steps and windows, and the metrics to log."""
    args, net = model.args, model.bind(params)
    states = [net.representation(batch.observation[:, 0])]  # of the online encodings only o_0's is used
    for i in range(args.unroll_steps):
        states.append(scale_gradient(net.dynamics(states[-1], targets.action[:, i]), args.dynamics_gradient_scale))
    prediction = net.prediction(jnp.stack(states, axis=1))  # [B, K+1, ...]
    log_policy = jax.nn.log_softmax(prediction.policy_logits)
    behavior_action = batch.action[:, : args.unroll_steps + 1, None]

    def cross_entropy(logits: jax.Array, scalar: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy(logits, two_hot(value_transform(scalar), args.num_bins)).mean()

    metrics = {
        "reward_loss": cross_entropy(prediction.reward_logits[:, 1:], targets.reward),
        "value_loss": cross_entropy(prediction.value_logits, targets.value),
        "policy_loss": -jnp.sum(targets.policy * log_policy, axis=-1).mean(),
        "behavior_loss": -(targets.behavior * jnp.take_along_axis(log_policy, behavior_action, axis=-1)[..., 0]).mean(),
        "policy_entropy": -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1).mean(),
        "behavior_fraction": targets.behavior.mean(),
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
def label_dataset(state: TrainState, observation: jax.Array, model: Model) -> Labels:
    """Labels [N], made once a step, of the steps that windows read before the next target copy; zeros for the others."""
    length, interval, num_devices, size = len(observation), model.args.target_update_interval, jax.device_count(), 1024
    updates = state.step - state.step % interval + jnp.arange(interval)
    windows_key, _, labels_key = jax.random.split(state.key, 3)
    windows = jax.vmap(lambda t: sample_windows(jax.random.fold_in(windows_key, t), length, model.args))(updates)
    is_read = jnp.zeros(length, bool).at[windows].set(True)
    num_rows = -(-length // (num_devices * size))
    chunks = jnp.nonzero(is_read, size=num_rows * num_devices * size, fill_value=length)[0]

    @per_device(jax.P(), jax.P(), jax.P(), jax.P(), jax.P(None, "batch"))
    def label_rows(params: Any, key: jax.Array, observation: jax.Array, count: jax.Array, chunks: jax.Array) -> Labels:
        """Each device labels one chunk of every row; chunks: its own [num_rows, 1, size]."""

        def label_chunk(i: jax.Array, labels: Labels) -> Labels:
            chunk_key = jax.random.fold_in(key, i * num_devices + jax.lax.axis_index("batch"))
            new = make_labels(params, chunk_key, observation[chunks[i, 0]], model)
            return jax.tree.map(lambda x, y: x.at[chunks[i, 0]].set(y, mode="drop"), labels, new)

        shapes = jax.eval_shape(functools.partial(make_labels, model=model), params, key, observation)
        labels = jax.lax.fori_loop(0, count, label_chunk, jax.tree.map(jnp.zeros_like, shapes))
        return jax.lax.psum(labels, "batch")

    key, count = jax.random.fold_in(labels_key, updates[0]), -(-is_read.sum() // (num_devices * size))
    return label_rows(state.target_params, key, observation, count, chunks.reshape(num_rows, num_devices, size))


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


# ------------------------------------------------------------------------------------------------ Acting and evaluation


@functools.partial(jax.jit, static_argnames="model")
def act(params: Any, key: jax.Array, observation: jax.Array, model: Model) -> jax.Array:
    """Actions [V] at observations [V, rows, columns], drawn from the improved policy (with sampling, from the prior)."""
    net = model.bind(params)
    state = net.representation(observation)
    prediction = net.prediction(state)
    if model.args.sampling:
        return jax.random.categorical(key, prediction.policy_logits)
    return jax.random.categorical(key, jnp.log(improve_policy(params, key, state, prediction, model)))


def evaluate(state: TrainState, model: Model, stopped_by: Sequence[int] = ()) -> dict[str, Any]:
    """Plays eval_episodes episodes in the real environment and returns the "eval/..." metrics; {} if stopped_by a signal.

    How many episodes each environment plays is fixed beforehand, so that short episodes do not count more often.
    """
    args, step = model.args, int(state.step)
    num_envs = min(args.eval_envs, args.eval_episodes)
    episodes_left = args.eval_episodes // num_envs + (np.arange(num_envs) < args.eval_episodes % num_envs)
    seeds = np.random.SeedSequence([args.seed, step]).generate_state(num_envs + 1).tolist()
    environments = [make_environment(args.env_id, seed, args.noise) for seed in seeds[1:]]
    params, key = jax.tree.map(lambda x: x.addressable_data(0), state.params), jax.random.PRNGKey(seeds[0])
    timesteps = [environment.reset() for environment in environments]
    returns, lengths, running_return, running_length = [], [], np.zeros(num_envs), np.zeros(num_envs, int)
    while episodes_left.any():
        if stopped_by:
            return {}
        key, act_key = jax.random.split(key)
        action = np.asarray(act(params, act_key, np.stack([timestep.observation for timestep in timesteps]), model))
        for i in np.flatnonzero(episodes_left):
            timesteps[i] = environments[i].step(int(action[i]))
            running_return[i] += timesteps[i].reward
            running_length[i] += 1
            if timesteps[i].last():
                returns.append(running_return[i])
                lengths.append(running_length[i])
                running_return[i] = running_length[i] = 0
                episodes_left[i] -= 1
                timesteps[i] = environments[i].reset()
    scores = {f"eval/return_{name}": float(getattr(np, name)(returns)) for name in ("mean", "std", "min", "max")}
    scores |= {"eval/length_mean": float(np.mean(lengths)), "eval/episodes": len(returns)}
    return scores | {"eval/normalized_score": normalized_score(args.env_id, scores["eval/return_mean"])}


# ----------------------------------------------------------------------------------------------------------------- Main


def main(args: Args) -> int:
    """Trains, or with --eval-only evaluates, and returns the exit code."""
    environment = make_environment(args.env_id, args.seed, args.noise)
    use_devices(args.batch_size, args.cpu_devices, args.distributed)
    model = Model(environment.action_spec().num_values, args)
    state = init_state(environment.observation_spec().shape, model)
    if args.eval_only and args.resume:
        state = Checkpoints(args.resume, read_only=True).restore(state)
        print(json.dumps({"step": int(state.step), **evaluate(state, model)}))
        return 0
    dataset = load_dataset(args)
    steps = Steps(*(getattr(dataset, field) for field in Steps._fields))
    data = jax.device_put(jax.tree.map(np.asarray, steps), sharding())
    stopped_by = catch_signals()
    run_dir = open_run(args, Path(__file__), dataset)
    checkpoints = Checkpoints(run_dir)
    state = checkpoints.restore(state) if args.resume else state
    step = first_step = int(state.step)
    log = Log(run_dir, step, args)
    if step > args.total_steps or (step == args.total_steps and step in log.scored):
        raise InputError(f"{run_dir} has made {step} updates already: name more with --total-steps")
    checkpoints.save(step, state)
    print(f"{run_dir}: {len(data.action)} steps of data, {jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)
    start = time.perf_counter()
    labels = label_dataset(state, data.observation, model)
    compiled_updates = update_many.lower(state, np.int32(0), data, labels, model).compile()
    seconds = log.seconds
    seconds["compile"] += time.perf_counter() - start
    hint = "--total-steps 20000 suits a CPU"
    progress = Progress(step, args.total_steps, seconds["update"], hint, args.target_update_interval)
    intervals = (args.log_interval, args.eval_interval, args.checkpoint_interval, args.target_update_interval)
    sums, logged_step, logged_seconds = dict[str, float](), step, seconds["update"]
    while True:
        if (step % args.eval_interval == 0 or step == args.total_steps) and step not in log.scored:
            start = time.perf_counter()
            checkpoints.save(step, state)
            scores = evaluate(state, model, stopped_by)
            seconds["evaluation"] += time.perf_counter() - start
            log.write(step, scores)
            progress.print_scores(step, scores)
        if step == args.total_steps or stopped_by.anywhere():
            break
        start = time.perf_counter()
        if step % args.target_update_interval == 0 and step != first_step:
            labels = label_dataset(state, data.observation, model)
        count = min(args.updates_per_call, args.total_steps - step, *(every - step % every for every in intervals))
        state, metrics = compiled_updates(state, np.int32(count), data, labels)
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in jax.device_get(metrics).items()}  # waits
        seconds["update"] += time.perf_counter() - start
        if not np.isfinite([sums["total_loss"], sums["grad_norm"], sums["param_norm"]]).all():
            checkpoints.close()
            sys.exit(f"error: loss or gradient is not finite after {step} updates; {run_dir} keeps its last checkpoint")
        step += count
        means = {f"train/{name}": value / (step - logged_step) for name, value in sums.items()}
        if is_log := step % args.log_interval == 0 or step == args.total_steps:
            means["train/updates_per_second"] = (step - logged_step) / (seconds["update"] - logged_seconds)
            log.write(step, means | {f"time/{name}": value for name, value in seconds.items()})
            sums, logged_step, logged_seconds = {}, step, seconds["update"]
        progress.update(step, means["train/total_loss"], seconds["update"], is_log)
        if step % args.checkpoint_interval == 0:
            checkpoints.save(step, state)
    checkpoints.save(step, state)
    for each in (progress, log, checkpoints):
        each.close()
    if stopped_by and (step < args.total_steps or step not in log.scored):
        print(f"stopped after {step} updates; go on with --resume {run_dir}")
        return 128 + stopped_by[0]
    return 0


if __name__ == "__main__":
    run_program(lambda: main(parse_args(Args, Path(__file__), __doc__)))
