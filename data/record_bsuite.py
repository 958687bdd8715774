"""Records a BSuite dataset: every step of an online DQN that learns the task from scratch.

RL Unplugged (Gulcehre et al. 2020, arXiv 2006.13888) and the ROSMO paper made their BSuite data in this way. The agent has
the network and the settings of bsuite's DQN baseline, written as one compiled call per environment step.

    python -m data.record_bsuite --env-id catch
    python -m data.record_bsuite --env-id cartpole --noise 0.3 --seed 1 --out datasets/bsuite/my_cartpole
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import dm_env
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from bsuite.environments import base, cartpole, catch, mountain_car
from numpy.typing import NDArray
from tqdm import tqdm

from data.dataset import InputError, record_default, run_program, write_dataset

ENVIRONMENTS = {"catch": catch.Catch, "cartpole": cartpole.Cartpole, "mountain_car": mountain_car.MountainCar}
EPISODES = {"catch": 2000, "cartpole": 1000, "mountain_car": 500}
REFERENCE_RETURNS = {  # mean returns of random play and of RL Unplugged's online DQN
    "catch": {"random": -0.667, "online_dqn": 1.0},
    "cartpole": {"random": 64.833, "online_dqn": 1001.0},
    "mountain_car": {"random": -1000.0, "online_dqn": -102.167},
}


class NoisyActions:
    """A bsuite environment that replaces the action by a uniform one with probability `noise`; the agent is not told."""

    def __init__(self, environment: base.Environment, noise: float, seed: int):
        self._environment = environment
        self._noise = noise
        self._random = np.random.default_rng([seed, 1])  # not the agent's stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def step(self, action: int) -> dm_env.TimeStep:
        if self._random.random() < self._noise:
            action = int(self._random.integers(self.action_spec().num_values))
        return self._environment.step(action)


def make_environment(env_id: str, seed: int, noise: float = 0.0) -> NoisyActions:
    """Makes a bsuite environment. Raises InputError for an unknown name and for impossible numbers."""
    if env_id not in ENVIRONMENTS:
        raise InputError(f"there is no BSuite task {env_id!r} here, only {', '.join(ENVIRONMENTS)}")
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is from 0 to {2**32 - 1}, not {seed}")
    if not 0 <= noise <= 1:
        raise InputError(f"noise is a probability, from 0 to 1, not {noise}")
    return NoisyActions(ENVIRONMENTS[env_id](seed=seed), noise, seed)


def default_folder(env_id: str, noise: float) -> Path:
    """The place of a task's dataset, where record() puts it and the training scripts look for it."""
    return Path("datasets/bsuite") / (f"{env_id}_noise_{noise}" if noise else env_id)


class Settings(NamedTuple):
    """bsuite's default DQN (bsuite/baselines/jax/dqn)."""

    hidden_units: tuple[int, ...] = (64, 64)
    learning_rate: float = 1e-3
    batch_size: int = 32
    discount: float = 0.99
    replay_capacity: int = 10_000
    min_replay_size: int = 100
    target_update_period: int = 4
    epsilon: float = 0.05


class QNetwork(nn.Module):
    num_actions: int
    hidden_units: tuple[int, ...]

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        x = observation.reshape(observation.shape[0], -1)
        for units in self.hidden_units:
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_actions)(x)


class Transition(NamedTuple):
    observation: Any  # [...] float32
    action: Any  # [] int32
    reward: Any  # [] float32
    discount: Any  # [] float32, 0 at an episode's end
    next_observation: Any  # [...] float32


class DQN:
    """Deep Q-learning (Mnih et al. 2015) with its replay buffer on the device."""

    def __init__(self, observation_shape: tuple[int, ...], num_actions: int, seed: int):
        settings = Settings()
        network = QNetwork(num_actions, settings.hidden_units)
        optimizer = optax.flatten(optax.adam(settings.learning_rate))  # one vector: fewer small kernels to launch
        params = network.init(jax.random.key(seed), jnp.zeros((1, *observation_shape)))
        blank = Transition(np.zeros(observation_shape, np.float32), np.int32(0), np.float32(0), np.float32(0),
                           np.zeros(observation_shape, np.float32))  # fmt: skip
        replay = jax.tree.map(lambda x: jnp.zeros((settings.replay_capacity, *x.shape), x.dtype), blank)
        self._state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params), replay)
        self._count = 0  # transitions seen
        self._num_actions = num_actions
        self._settings = settings
        self._random = np.random.default_rng(seed)
        self._greedy = jax.jit(lambda params, observation: jnp.argmax(network.apply(params, observation[None])[0]))

        def loss(params: Any, target_params: Any, batch: Transition) -> jax.Array:
            q = jnp.asarray(network.apply(params, batch.observation))  # [32, A]
            q = jnp.take_along_axis(q, batch.action[:, None], axis=1)[:, 0]
            next_q = jnp.max(jnp.asarray(network.apply(target_params, batch.next_observation)), axis=1)
            target = batch.reward + settings.discount * batch.discount * next_q
            return jnp.mean(jnp.square(q - jax.lax.stop_gradient(target)))

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: tuple, transition: Transition, count: int, indices: NDArray) -> tuple[tuple, jax.Array]:
            """Stores a transition, learns from one sampled batch, returns the greedy action at its next observation."""
            params, target_params, optimizer_state, replay = state
            slot = count % settings.replay_capacity
            replay = jax.tree.map(lambda buffer, x: buffer.at[slot].set(x), replay, transition)
            gradient = jax.grad(loss)(params, target_params, jax.tree.map(lambda buffer: buffer[indices], replay))
            updates, new_optimizer_state = optimizer.update(gradient, optimizer_state, params)
            params, optimizer_state = jax.tree.map(
                lambda new, old: jnp.where(count >= settings.min_replay_size, new, old),
                (optax.apply_updates(params, updates), new_optimizer_state),
                (params, optimizer_state),
            )
            target_params = optax.periodic_update(params, target_params, count, settings.target_update_period)
            greedy = jnp.argmax(network.apply(params, transition.next_observation[None])[0])
            return (params, target_params, optimizer_state, replay), greedy

        self._step = step

    def first_action(self, observation: NDArray) -> int:
        return self._explore(self._greedy(self._state[0], observation))

    def learn(self, transition: Transition) -> int:
        """Learns from a transition; returns the action to take after it (of no use if the transition is terminal)."""
        size = min(self._count + 1, self._settings.replay_capacity)
        indices = self._random.integers(size, size=self._settings.batch_size, dtype=np.int32)
        self._state, greedy = self._step(self._state, transition, np.int32(self._count), indices)
        self._count += 1
        return self._explore(greedy)

    def _explore(self, greedy: jax.Array) -> int:
        if self._random.random() < self._settings.epsilon:
            return int(self._random.integers(self._num_actions))
        return int(greedy)


def record(env_id: str, noise: float = 0.0, episodes: int | None = None, seed: int = 0, out: Path | None = None) -> Path:
    """Records a dataset with progress on stderr, prints its returns on stdout, and returns its folder.

    Raises InputError for impossible settings or a folder that exists already.

    Args:
        env_id: the task: catch, cartpole or mountain_car
        noise: probability with which the environment replaces the agent's action by a uniform one
        episodes: to record; by default 2,000 (catch), 1,000 (cartpole) or 500 (mountain_car)
        seed: of the agent and the environment
        out: folder to make; by default where the training scripts look for it, under datasets/bsuite/
    """
    environment = make_environment(env_id, seed, noise)
    episodes = EPISODES[env_id] if episodes is None else episodes
    out = default_folder(env_id, noise) if out is None else out
    num_actions = environment.action_spec().num_values
    agent = DQN(environment.observation_spec().shape, num_actions, seed)
    source = f"a DQN with bsuite's default settings learning from scratch, seed {seed}, recorded by data/record_bsuite.py"
    with (
        write_dataset(
            out, benchmark="bsuite", env_id=env_id, num_actions=num_actions, noise=noise, seed=seed, source=source,
            reference_returns=REFERENCE_RETURNS[env_id],
        ) as writer,
        tqdm(total=episodes, unit="episode", desc=f"recording {out}", mininterval=1) as progress,
    ):  # fmt: skip
        for _ in range(episodes):
            timestep = environment.reset()
            observations, actions, rewards = [timestep.observation], [], []
            action = agent.first_action(timestep.observation)
            while not timestep.last():
                actions.append(action)
                timestep = environment.step(action)
                observations.append(timestep.observation)
                rewards.append(timestep.reward)
                action = agent.learn(
                    Transition(observations[-2], np.int32(action), np.float32(timestep.reward),
                               np.float32(timestep.discount), timestep.observation)
                )  # fmt: skip
            writer.add_episode(
                np.array(observations, np.float32), np.array(actions), np.array(rewards), terminal=timestep.discount == 0
            )
            progress.update()
            progress.set_postfix(steps=writer.steps, mean_return=f"{np.mean(writer.returns[-100:]):.2f}", refresh=False)
    print(writer.summary(out))
    return out


def record_if_missing(env_id: str, noise: float) -> Path:
    """The standard dataset's folder; what is not there yet is announced and recorded."""
    folder = default_folder(env_id, noise)
    if not folder.exists():
        print(f"There is no dataset {folder}: recording all that a DQN sees while it learns {env_id}, as was done for the")
        print("paper. data/README.md says how to bring in the paper's own datasets.", flush=True)
        record_default(folder, lambda: record(env_id, noise))
    return folder


if __name__ == "__main__":
    run_program(lambda: tyro.cli(record, description=__doc__))
