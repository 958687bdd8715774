"""Records an Atari dataset in EnvPool, of random play or of a simple program; and what is known of each game.

    python -m data.record_atari --env-id Breakout --policy scripted --steps 100000

As in RL Unplugged (Gulcehre et al. 2020, arXiv 2006.13888) frames are single, 84 x 84 and gray, actions are sticky with
probability 0.25, rewards are clipped to [-1, 1], and an episode ends at game over (is_terminal) or after 27,000 steps. The
episodes that are still running at the end are truncated. meta.json has the game's own, unclipped returns besides.
"""

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from data.dataset import STEP_BYTES, InputError, check_disk, describe, record_default, run_program, summarize, write_dataset

DEFAULT_STEPS = 100_000  # of the dataset that the training scripts record where there is none
NOISE_LEVELS = (0.0, 0.1, 0.3, 0.6, 1.0)  # of the simple programs
PLAYERS = {
    "random": "uniformly random play",
    "scripted": f"a simple program that reads the game's memory, with noise of {', '.join(map(str, NOISE_LEVELS))}",
}


@dataclass(frozen=True)
class Args:
    env_id: str  # the game, as in "MsPacman"
    policy: Literal["random", "scripted"] = "random"  # who plays
    steps: int = DEFAULT_STEPS  # to play in all, rounded up to what the environments play at once
    seed: int = 0  # of the policy and the environments
    num_envs: int = 16  # environments side by side; each keeps its running episode in memory, at most 190 MB
    out: Path | None = None  # folder to make; by default where the training scripts look for it, under datasets/atari/
    rom_dir: Path | None = None  # folder with atari/roms/*.bin, to play other ROMs than EnvPool's


# --------------------------------------------------------------------------------------------------------------- Games

# RL Unplugged's returns of its 46 games: random play, the online DQN that made the data, and offline BC, BCQ, DQN, IQN, REM.
SCORES: dict[str, dict[str, float]] = json.loads((Path(__file__).parent / "rlu_atari_scores.json").read_text())
# Of these EnvPool has other ROMs, and shows other pictures, than atari-py 0.2.5, with which the data were recorded.
# The old ROMs of the first ten have screens of 250 lines, of which EnvPool shows 210.
TALL_SCREENS = (
    "Amidar", "Assault", "BankHeist", "Carnival", "Centipede", "DoubleDunk", "Gopher", "Pooyan", "VideoPinball",
    "WizardOfWor",
)  # fmt: skip
OTHER_ROMS = (*TALL_SCREENS, "BattleZone", "Gravitar", "IceHockey", "Krull", "NameThisGame", "Riverraid", "RoadRunner")


@functools.cache
def games() -> tuple[str, ...]:
    """The names of all games that EnvPool knows, such as MsPacman."""
    from envpool.atari.registration import atari_game_list

    return tuple("".join(part.capitalize() for part in game.split("_")) for game in atari_game_list)


@functools.cache
def num_actions(env_id: str) -> int:
    """The size of the game's minimal action set. Raises InputError for an unknown game, with the closest known one."""
    import envpool

    if env_id not in games():
        known = {game.lower(): game for game in games()}
        closest = known[difflib.get_close_matches(env_id.lower(), known, n=1, cutoff=0.0)[0]]
        raise InputError(f"there is no Atari game {env_id!r}; did you mean {closest!r}?")
    return int(envpool.make_spec(f"{env_id}-v5", full_action_space=False).action_space.n)


def default_folder(env_id: str) -> Path:
    """The place of a game's dataset, where the recorder and the converter put it and the training scripts look for it."""
    return Path("datasets/atari") / env_id


def reference_returns(env_id: str) -> dict[str, float] | None:
    """RL Unplugged's returns of random play and of the online DQN; None for a game that is not among its 46."""
    return {name: SCORES[env_id][name] for name in ("random", "online_dqn")} if env_id in SCORES else None


# --------------------------------------------------------------------------------------------------------- Environments


def environment_seeds(seed: int, num_envs: int) -> list[int]:
    """From 0 to 2**31 - 1. EnvPool's own, seed + i, would let the environments of neighbouring seeds play the same games."""
    return [int(state) >> 1 for state in np.random.SeedSequence(seed).generate_state(num_envs)]


def make_environments(
    env_id: str, num_envs: int, seed: int, sticky_actions: float = 0.25, rom_dir: Path | None = None
) -> Any:
    """Makes an EnvPool of num_envs games with the settings of RL Unplugged (Dopamine's: Castro et al. 2018).

    After a reset all four frames of a stack are the first one. The step *after* an episode's end is its reset: it ignores
    the action, and returns the next episode's first observation, reward 0, and info["elapsed_step"] 0. Environment i is the
    same for any num_envs. Raises InputError for an unknown game, a missing ROM or impossible numbers.
    """
    num_actions(env_id)
    if num_envs < 1:
        raise InputError(f"the number of environments must be at least 1, not {num_envs}")
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is from 0 to {2**32 - 1}, not {seed}")
    import envpool

    rom = Path(rom_dir or "", "atari/roms", f"{envpool.make_spec(f'{env_id}-v5').config.task}.bin")
    if rom_dir and not rom.exists():
        raise InputError(f"there is no {rom} (--rom-dir)")
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
        **({"base_path": str(rom_dir)} if rom_dir else {}),
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


# ------------------------------------------------------------------------------------------------------------- Scripted


# The scripts take the memory [V, 128] now and a step before, as int, and return actions [V] of the minimal action set. Where
# the memory has what: Anand et al. 2019, arXiv 1906.08226.


def play_breakout(ram: NDArray, before: NDArray) -> NDArray:
    """Goes where the ball is; fires where there is none. What a small network can learn to see in an hour's training."""
    ball_x, ball_y, paddle = ram[:, 99], ram[:, 101], ram[:, 72]
    offset = ball_x - (paddle + 8)
    move = np.where(offset > 10, 2, np.where(offset < -10, 3, 0))  # RIGHT, LEFT, NOOP
    return np.where(ball_y == 0, 1, move)  # FIRE


def play_pong(ram: NDArray, before: NDArray) -> NDArray:
    """Goes where the ball will be in a step."""
    ball, paddle = ram[:, 54], ram[:, 51]
    speed = ball - before[:, 54]
    speed = np.where(np.abs(speed) < 30, speed, 0)  # else it is a new ball
    offset = ball + speed - (paddle + 7) - 0.7 * (paddle - before[:, 51])
    move = np.where(offset > 8, 3, np.where(offset < -8, 2, 0))  # LEFT is down, RIGHT is up
    return np.where((ram[:, 49] == 0) | (ball == 0), 1, move)  # FIRE


def play_freeway(ram: NDArray, before: NDArray) -> NDArray:
    """Walks on, and waits where a car of the next lane comes within four steps."""
    car = 108 + np.clip((ram[:, 14] - 2) // 16, 0, 9)[:, None]
    x = np.take_along_axis(ram, car, axis=1)
    speed = x - np.take_along_axis(before, car, axis=1)
    speed = np.where(np.abs(speed) < 9, speed, 0)  # else it has left the screen and come back
    return np.where((np.abs(x + speed * np.arange(4) - 46) < 7).any(axis=1), 0, 1)  # NOOP, UP


SCRIPTS = {"Breakout": play_breakout, "Pong": play_pong, "Freeway": play_freeway}


class ScriptedPolicy:
    """Actions [V] for a Step, by the game's script. Uniform ones replace them with a probability that episodes take in turn
    from NOISE_LEVELS."""

    def __init__(self, env_id: str, num_envs: int, seed: int):
        if env_id not in SCRIPTS:
            raise InputError(f"there is no script that plays {env_id}, only {', '.join(SCRIPTS)}; --policy random plays any")
        self._script = SCRIPTS[env_id]
        self._num_actions = num_actions(env_id)
        self._random = np.random.default_rng([seed, 1])  # not the environments' stream
        self._before = np.zeros((num_envs, 128), int)
        self._level = np.zeros(num_envs, int)
        self._episodes = 0  # begun

    def __call__(self, step: Step) -> NDArray:
        num_envs, ram = len(step.reward), step.ram.astype(int)
        new = np.flatnonzero(step.is_first)
        self._level[new] = (self._episodes + np.arange(len(new))) % len(NOISE_LEVELS)
        self._episodes += len(new)
        self._before = np.where(step.is_first[:, None], ram, self._before)
        action = self._script(ram, self._before)
        self._before = ram
        noisy = self._random.random(num_envs) < np.array(NOISE_LEVELS)[self._level]
        return np.where(noisy, self._random.integers(self._num_actions, size=num_envs), action)


# -------------------------------------------------------------------------------------------------------------- Recorder


def record(args: Args) -> Path:
    """Records a dataset with progress on stderr, prints its returns on stdout, and returns its folder.

    Raises InputError for impossible settings, a folder that exists already, or too little room on the disk.
    """
    out = default_folder(args.env_id) if args.out is None else args.out
    environments = make_environments(args.env_id, args.num_envs, args.seed, rom_dir=args.rom_dir)
    # Every episode has an observation more than it has actions.
    check_disk(out, 1.02 * args.steps * STEP_BYTES, "name fewer --steps or another --out")
    random = np.random.default_rng([args.seed, 1])  # not the environments' stream
    scripted = ScriptedPolicy(args.env_id, args.num_envs, args.seed) if args.policy == "scripted" else None
    notice = {"notice": f"These data were recorded with the ROMs in {args.rom_dir}."} if args.rom_dir else {}
    # Frames, actions and rewards of the running episodes.
    running: list[tuple[list, list, list]] = [([], [], []) for _ in range(args.num_envs)]
    returns: list[float] = []  # the game's, of whole episodes
    with (
        write_dataset(
            out, benchmark="atari", env_id=args.env_id, num_actions=num_actions(args.env_id), seed=args.seed,
            source=f"{PLAYERS[args.policy]}, seed {args.seed}, recorded by data/record_atari.py", num_envs=args.num_envs,
            sticky_actions=0.25, rewards_clipped=True, policy=args.policy, reference_returns=reference_returns(args.env_id),
            **notice,
        ) as writer,
        tqdm(total=args.steps, unit="step", desc=f"recording {out}", mininterval=1) as progress,
    ):  # fmt: skip
        step, steps, action = first_step(environments), 0, np.zeros(args.num_envs, int)
        while True:
            played = int(np.sum(~step.is_first))
            steps += played
            progress.update(min(played, args.steps - progress.n))
            for v in range(args.num_envs):
                if step.is_first[v]:
                    running[v] = [], [], []
                frames, actions, rewards = running[v]
                if not step.is_first[v]:
                    actions.append(action[v])
                    rewards.append(step.reward[v])
                frames.append(step.observation[v, -1].copy())
                if step.is_last[v] or (actions and steps >= args.steps):
                    writer.add_episode(np.stack(frames), np.array(actions), np.clip(rewards, -1, 1), step.is_terminal[v])
                if step.is_last[v]:
                    returns.append(float(np.sum(rewards)))
                    progress.set_postfix(episodes=len(returns), game_return=f"{np.mean(returns[-100:]):.2f}", refresh=False)
            if steps >= args.steps:
                break
            action = scripted(step) if scripted else random.integers(num_actions(args.env_id), size=args.num_envs)
            step = next_step(environments, action)
        writer.meta["game_return"] = summarize(returns)
    print(writer.summary(out))
    print(f"the game's own, of whole episodes: {describe(returns)}")
    return out


def record_if_missing(env_id: str, rom_dir: Path | None = None) -> Path:
    """The default dataset's folder; what is not there yet is announced and recorded."""
    folder = default_folder(env_id)
    if not folder.exists():
        policy: Literal["random", "scripted"] = "scripted" if env_id in SCRIPTS else "random"

        def program() -> None:
            num_actions(env_id)  # a wrong name is an error before anything is announced
            print(f"There is no dataset {folder}: recording {DEFAULT_STEPS:,} steps of {PLAYERS[policy]}. This is not")
            print("RL Unplugged's data and gives no score to compare; data/README.md says how to get the real ones.")
            record(Args(env_id, policy, DEFAULT_STEPS, rom_dir=rom_dir))

        record_default(folder, program)
    return folder


if __name__ == "__main__":
    run_program(lambda: record(tyro.cli(Args, description=__doc__)))
