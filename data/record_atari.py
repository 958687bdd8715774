"""Records an Atari dataset in EnvPool: of random play, of a simple program, or of a DQN that learns.

    python -m data.record_atari --env-id Breakout --policy scripted --steps 100000
    python -m data.record_atari --env-id Seaquest --policy dqn --steps 1000000 --out datasets/atari/my_seaquest

As in RL Unplugged (Gulcehre et al. 2020, arXiv 2006.13888) frames are single, 84 x 84 and gray, actions are sticky with
probability 0.25, rewards are clipped to [-1, 1], and an episode ends at game over (is_terminal) or after 27,000 steps. The
episodes that are still running at the end are written as cut off. meta.json has the game's own, unclipped returns besides.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from data.dataset import InputError, check_disk, describe, run_program, summarize, write_dataset
from data.games import STEP_BYTES, check_game, default_folder, num_actions, reference_returns

DEFAULT_STEPS = 100_000  # of the dataset that the training scripts record where there is none
NOISE_LEVELS = (0.0, 0.1, 0.3, 0.6, 1.0)  # of the simple programs
PLAYERS = {
    "random": "uniformly random play",
    "scripted": f"a simple program that reads the game's memory, with noise of {', '.join(map(str, NOISE_LEVELS))}",
    "dqn": "a DQN learning from scratch",
}


@dataclass(frozen=True)
class Args:
    env_id: str  # the game, as in "MsPacman"
    policy: Literal["random", "scripted", "dqn"] = "random"  # who plays
    steps: int = DEFAULT_STEPS  # to play in all, rounded up to what the environments play at once
    seed: int = 0  # of the policy and the environments
    num_envs: int = 16  # environments side by side; each keeps its running episode in memory, at most 190 MB
    out: Path | None = None  # folder to make; by default where the training scripts look for it, under datasets/atari/


# --------------------------------------------------------------------------------------------------------- Environments


def environment_seeds(seed: int, num_envs: int) -> list[int]:
    """From 0 to 2**31 - 1. EnvPool's own, seed + i, would let the environments of neighbouring seeds play the same games."""
    return [int(state) >> 1 for state in np.random.SeedSequence(seed).generate_state(num_envs)]


def make_environments(env_id: str, num_envs: int, seed: int, sticky_actions: float = 0.25) -> Any:
    """Makes an EnvPool of num_envs games that behave as those of RL Unplugged did (Dopamine's: Castro et al. 2018).

    After a reset all four frames of a stack are the first one. The step *after* an episode's end is its reset: it ignores
    the action, and returns the next episode's first observation, reward 0, and info["elapsed_step"] 0. Environment i is the
    same for any num_envs. Raises InputError for an unknown game or impossible numbers.
    """
    check_game(env_id)
    if num_envs < 1:
        raise InputError(f"the number of environments must be at least 1, not {num_envs}")
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is from 0 to {2**32 - 1}, not {seed}")
    import envpool

    return envpool.make(
        f"{env_id}-v5",
        env_type="gymnasium",
        num_envs=num_envs,
        seed=environment_seeds(seed, num_envs),
        stack_num=4,
        repeat_action_probability=sticky_actions,
        noop_max=1,  # a reset plays one no-op frame; 0 hangs or crashes EnvPool 1.2.5
        use_fire_reset=False,
        episodic_life=False,
        reward_clip=False,
        full_action_space=False,
        max_episode_steps=27_000,  # 108,000 frames, half an hour of play
    )


class Step(NamedTuple):
    """What the V environments show after a step. The action at is_last is ignored: the environment resets."""

    observation: NDArray  # [V, 4, 84, 84] uint8, newest frame last
    ram: NDArray  # [V, 128] uint8, the console's memory
    reward: NDArray  # [V] float32, the game's, on the way here; 0 at is_first
    is_first: NDArray  # [V] bool
    is_last: NDArray  # [V] bool
    is_terminal: NDArray  # [V] bool, game over


def first_step(environments: Any) -> Step:
    observation, info = environments.reset()
    nothing = np.zeros(len(observation), bool)
    return Step(observation, info["ram"], np.zeros(len(observation), np.float32), ~nothing, nothing, nothing)


def next_step(environments: Any, action: NDArray) -> Step:
    observation, reward, terminated, truncated, info = environments.step(action.astype(np.int32))
    # Game over just at the limit counts as truncated in EnvPool, but it is game over.
    is_last = terminated | truncated
    return Step(observation, info["ram"], reward, info["elapsed_step"] == 0, is_last, is_last & (info["terminated"] == 1))


# ------------------------------------------------------------------------------------------------- Random and scripted


class RandomPolicy:
    """Uniform actions. Policies turn a Step into actions [V]."""

    def __init__(self, num_actions: int, seed: int):
        self._num_actions = num_actions
        self._random = np.random.default_rng([seed, 1])  # not the environments' stream

    def __call__(self, step: Step) -> NDArray:
        return self._random.integers(self._num_actions, size=len(step.reward))


# The scripts take the memory [V, 128] now and a step before, as int, and the steps since the episode's start [V], and return
# actions [V] of the minimal action set. Where the memory has what: Anand et al. 2019, arXiv 1906.08226.


def play_breakout(ram: NDArray, before: NDArray, clock: NDArray) -> NDArray:
    """Goes where the ball is; fires where there is none. What a small network can learn to see in an hour's training."""
    ball_x, ball_y, paddle = ram[:, 99], ram[:, 101], ram[:, 72]
    offset = ball_x - (paddle + 8)
    move = np.where(offset > 10, 2, np.where(offset < -10, 3, 0))  # RIGHT, LEFT, NOOP
    return np.where(ball_y == 0, 1, move)  # FIRE


def play_pong(ram: NDArray, before: NDArray, clock: NDArray) -> NDArray:
    """Goes where the ball will be in a step."""
    ball, paddle = ram[:, 54], ram[:, 51]
    speed = ball - before[:, 54]
    speed = np.where(np.abs(speed) < 30, speed, 0)  # else it is a new ball
    offset = ball + speed - (paddle + 7) - 0.7 * (paddle - before[:, 51])
    move = np.where(offset > 8, 3, np.where(offset < -8, 2, 0))  # LEFT is down, RIGHT is up
    return np.where((ram[:, 49] == 0) | (ball == 0), 1, move)  # FIRE


def play_freeway(ram: NDArray, before: NDArray, clock: NDArray) -> NDArray:
    """Walks on."""
    return np.ones(len(ram), int)  # UP


# By vertical and horizontal direction (up, none, down; left, none, right): moves, and moves with FIRE.
MOVE = np.array([[7, 2, 6], [4, 0, 3], [9, 5, 8]])
PUNCH = np.array([[15, 10, 14], [12, 1, 11], [17, 13, 16]])


def play_boxing(ram: NDArray, before: NDArray, clock: NDArray) -> NDArray:
    """Comes near, a little above or below, where the gloves meet the nose, and punches every second step."""
    x, y = ram[:, 33] - ram[:, 32], ram[:, 35] - ram[:, 34]  # from here to the opponent
    horizontal = np.where(np.abs(x) > 24, np.sign(x), 0)
    vertical = np.where(np.abs(y) < 3, np.where(y < 0, 1, -1), np.where(np.abs(y) > 12, np.sign(y), 0))
    punch = (horizontal == 0) & (clock % 2 == 0)
    return np.where(punch, PUNCH[vertical + 1, horizontal + 1], MOVE[vertical + 1, horizontal + 1])


SCRIPTS: dict[str, Callable[[NDArray, NDArray, NDArray], NDArray]]
SCRIPTS = {"Breakout": play_breakout, "Pong": play_pong, "Freeway": play_freeway, "Boxing": play_boxing}


class ScriptedPolicy:
    """A game's script. A uniform action replaces its own with a probability that episodes take in turn from NOISE_LEVELS."""

    def __init__(self, env_id: str, num_envs: int, seed: int):
        if env_id not in SCRIPTS:
            raise InputError(f"there is no script that plays {env_id}, only {', '.join(SCRIPTS)}; --policy random plays any")
        self._script = SCRIPTS[env_id]
        self._num_actions = num_actions(env_id)
        self._random = np.random.default_rng([seed, 1])  # not the environments' stream
        self._before = np.zeros((num_envs, 128), int)
        self._clock, self._level = np.zeros((2, num_envs), int)
        self._episodes = 0  # begun

    def __call__(self, step: Step) -> NDArray:
        num_envs, ram = len(step.reward), step.ram.astype(int)
        new = np.flatnonzero(step.is_first)
        self._level[new] = (self._episodes + np.arange(len(new))) % len(NOISE_LEVELS)
        self._episodes += len(new)
        self._clock = np.where(step.is_first, 0, self._clock + 1)
        self._before = np.where(step.is_first[:, None], ram, self._before)
        action = self._script(ram, self._before, self._clock)
        self._before = ram
        noisy = self._random.random(num_envs) < np.array(NOISE_LEVELS)[self._level]
        return np.where(noisy, self._random.integers(self._num_actions, size=num_envs), action)


# ------------------------------------------------------------------------------------------------------------------ DQN


class QNetwork(nn.Module):
    """From stacks [B, 84, 84, 4] uint8 to action values [B, A] (Mnih et al. 2015)."""

    num_actions: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        x = observation.astype(jnp.float32) / 255
        for channels, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.relu(nn.Conv(channels, (size, size), stride, padding="VALID")(x))
        return nn.Dense(self.num_actions)(nn.relu(nn.Dense(512)(x.reshape(len(x), -1))))


class Transition(NamedTuple):
    observation: Any  # [B, 84, 84, 4] uint8
    action: Any  # [B] int
    reward: Any  # [B] float32, clipped
    discount: Any  # [B] float32, 0 at game over
    next_observation: Any  # [B, 84, 84, 4] uint8


class Replay:
    """The latest steps, in a ring: row t has what the V environments showed, and the actions that they then got."""

    def __init__(self, rows: int, num_envs: int, seed: int):
        self._frame = np.zeros((rows, num_envs, 84, 84), np.uint8)
        self._action = np.zeros((rows, num_envs), np.int32)
        self._reward = np.zeros((rows, num_envs), np.float32)
        self._is_first, self._is_last, self._is_terminal = np.zeros((3, rows, num_envs), bool)
        self._random = np.random.default_rng([seed, 2])
        self.rows = 0  # written since the start

    def add(self, step: Step, action: NDArray) -> None:
        row = self.rows % len(self._frame)
        self._frame[row], self._action[row] = step.observation[:, -1], action
        self._reward[row] = np.clip(step.reward, -1, 1)
        self._is_first[row], self._is_last[row], self._is_terminal[row] = step.is_first, step.is_last, step.is_terminal
        self.rows += 1

    def sample(self, size: int) -> Transition:
        """Draws uniformly from the transitions that are whole; four rows must have been written."""
        t, v = np.zeros(0, int), np.zeros(0, int)
        oldest = max(0, self.rows - len(self._frame))
        oldest += 3 if oldest else 0  # the stack before it is overwritten
        while len(t) < size:
            new_t = self._random.integers(oldest, self.rows - 1, size=size)
            new_v = self._random.integers(self._frame.shape[1], size=size)
            acted = ~self._is_last[new_t % len(self._frame), new_v]
            t, v = np.append(t, new_t[acted])[:size], np.append(v, new_v[acted])[:size]
        row, after = t % len(self._frame), (t + 1) % len(self._frame)
        discount = np.where(self._is_terminal[after, v], 0, 1).astype(np.float32)
        return Transition(self._stack(t, v), self._action[row, v], self._reward[after, v], discount, self._stack(t + 1, v))

    def _stack(self, t: NDArray, v: NDArray) -> NDArray:
        """[B, 84, 84, 4]; where it would reach before its episode, it repeats the episode's first frame."""
        frames = [t]
        for _ in range(3):
            frames.append(np.where(self._is_first[frames[-1] % len(self._frame), v], frames[-1], frames[-1] - 1))
        return np.stack([self._frame[each % len(self._frame), v] for each in reversed(frames)], axis=-1)


class DQNPolicy:
    """Deep Q-learning from scratch (Mnih et al. 2015) with Dopamine's settings (Castro et al. 2018).

    For short runs its schedules are shorter. It makes an update every four steps; its replay takes 7 kB of memory a step.
    """

    batch_size, update_period, discount = 32, 4, 0.99

    def __init__(self, num_actions: int, num_envs: int, steps: int, seed: int):
        self._min_replay = min(20_000, steps // 20)
        self._epsilon_steps = max(1, min(250_000, steps // 4))  # over which epsilon falls from 1 to 0.01
        self._target_period = max(1, min(8_000, steps // 50) // self.update_period)  # updates
        self._network = QNetwork(num_actions)
        self._optimizer = optax.adam(6.25e-5, eps=1.5e-4)
        params = jax.jit(self._network.init)(jax.random.key(seed), jnp.zeros((1, 84, 84, 4), jnp.uint8))
        self._state = (params, jax.tree.map(jnp.copy, params), self._optimizer.init(params), jnp.int32(0))
        self._greedy = jax.jit(lambda params, stack: jnp.argmax(jnp.asarray(self._network.apply(params, stack)), axis=-1))
        self._replay = Replay(-(-min(steps, 1_000_000) // num_envs) + 4, num_envs, seed)
        self._random = np.random.default_rng([seed, 1])  # not the environments' stream
        self._num_actions = num_actions
        self._updates_due = 0.0

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _learn(self, state: tuple, batch: Transition) -> tuple:
        params, target_params, optimizer_state, count = state

        def loss(params: Any) -> jax.Array:
            q = jnp.asarray(self._network.apply(params, batch.observation))  # [B, A]
            q = jnp.take_along_axis(q, batch.action[:, None], axis=1)[:, 0]
            next_q = jnp.max(jnp.asarray(self._network.apply(target_params, batch.next_observation)), axis=1)
            return optax.huber_loss(q, batch.reward + self.discount * batch.discount * next_q).mean()

        updates, optimizer_state = self._optimizer.update(jax.grad(loss)(params), optimizer_state, params)
        params = optax.apply_updates(params, updates)
        target_params = optax.periodic_update(params, target_params, count + 1, self._target_period)
        return params, target_params, optimizer_state, count + 1

    def __call__(self, step: Step) -> NDArray:
        num_envs = len(step.reward)
        played = self._replay.rows * num_envs
        epsilon = max(0.01, 1 - 0.99 * max(0, played - self._min_replay) / self._epsilon_steps)
        explore = self._random.random(num_envs) < epsilon
        action = self._random.integers(self._num_actions, size=num_envs)
        if not explore.all():
            greedy = self._greedy(self._state[0], np.moveaxis(step.observation, 1, -1))
            action = np.where(explore, action, np.asarray(greedy))
        self._replay.add(step, action)
        if played >= self._min_replay and self._replay.rows >= 4:
            self._updates_due += num_envs / self.update_period
            while self._updates_due >= 1:
                self._state = self._learn(self._state, self._replay.sample(self.batch_size))
                self._updates_due -= 1
        return action


# -------------------------------------------------------------------------------------------------------------- Recorder


def make_policy(args: Args) -> RandomPolicy | ScriptedPolicy | DQNPolicy:
    """Raises InputError for a game without a script."""
    if args.policy == "random":
        return RandomPolicy(num_actions(args.env_id), args.seed)
    if args.policy == "scripted":
        return ScriptedPolicy(args.env_id, args.num_envs, args.seed)
    return DQNPolicy(num_actions(args.env_id), args.num_envs, args.steps, args.seed)


def record(args: Args) -> Path:
    """Records a dataset with progress on stderr, prints its returns on stdout, and returns its folder.

    Raises InputError for impossible settings, a folder that exists already, or too little room on the disk.
    """
    if args.steps < 1:
        raise InputError(f"the number of steps must be at least 1, not {args.steps}")
    out = default_folder(args.env_id) if args.out is None else args.out
    environments = make_environments(args.env_id, args.num_envs, args.seed)
    if not out.exists():
        # Every episode has an observation more than it has actions.
        check_disk(out, 1.02 * args.steps * STEP_BYTES, "name fewer --steps or another --out")
    policy = make_policy(args)
    # Frames, actions and rewards of the running episodes.
    running: list[tuple[list, list, list]] = [([], [], []) for _ in range(args.num_envs)]
    returns: list[float] = []  # the game's, of whole episodes
    with (
        write_dataset(
            out, benchmark="atari", env_id=args.env_id, num_actions=num_actions(args.env_id), seed=args.seed,
            source=f"{PLAYERS[args.policy]}, seed {args.seed}, recorded by data/record_atari.py", num_envs=args.num_envs,
            sticky_actions=0.25, rewards_clipped=True, policy=args.policy, reference_returns=reference_returns(args.env_id),
        ) as writer,
        tqdm(total=args.steps, unit="step", desc=f"recording {out}", mininterval=1) as progress,
    ):  # fmt: skip

        def write_episode(v: int, terminal: bool) -> None:
            frames, actions, rewards = running[v]
            writer.add_episode(np.stack(frames), np.array(actions), np.clip(rewards, -1, 1), terminal)

        step, steps, action = first_step(environments), 0, np.zeros(args.num_envs, int)
        while True:
            for v, (frames, actions, rewards) in enumerate(running):
                if step.is_first[v]:
                    for part in running[v]:
                        part.clear()
                else:
                    actions.append(action[v])
                    rewards.append(step.reward[v])
                frames.append(step.observation[v, -1].copy())
                if step.is_last[v]:
                    write_episode(v, step.is_terminal[v])
                    returns.append(float(np.sum(rewards)))
                    progress.set_postfix(episodes=len(returns), game_return=f"{np.mean(returns[-100:]):.2f}", refresh=False)
            played = int(np.sum(~step.is_first))
            steps += played
            progress.update(min(played, args.steps - progress.n))
            if steps >= args.steps:
                break
            action = policy(step)
            step = next_step(environments, action)
        for v, (_, actions, _) in enumerate(running):
            if actions and not step.is_last[v]:
                write_episode(v, terminal=False)
        writer.meta["game_return"] = summarize(returns)
    print(writer.summary(out))
    print(f"the game's own, of whole episodes: {describe(returns)}")
    return out


def record_if_missing(env_id: str) -> Path:
    """The default dataset's folder; what is not there yet is announced and recorded."""
    folder = default_folder(env_id)
    if not folder.exists():
        check_game(env_id)  # a wrong name is an error before anything is announced
        policy: Literal["random", "scripted"] = "scripted" if env_id in SCRIPTS else "random"
        print(f"There is no dataset {folder}: recording {DEFAULT_STEPS:,} steps of {PLAYERS[policy]}. This is not")
        print("RL Unplugged's data and gives no score to compare; data/README.md says how to get the real ones.", flush=True)
        try:
            record(Args(env_id, policy, DEFAULT_STEPS))
        except InputError:
            if not folder.exists():  # else another program has recorded it meanwhile
                raise
    return folder


if __name__ == "__main__":
    run_program(lambda: record(tyro.cli(Args, description=__doc__)))
