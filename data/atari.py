"""The Atari games: environments as in the datasets, normalised scores, and where the datasets lie.

Games have EnvPool's plain names: Breakout, MsPacman, UpNDown.
"""

import difflib
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import InputError

MAX_EPISODE_STEPS = 27_000  # 108,000 frames, half an hour of play
SETTINGS: dict[str, Any] = {
    "env_type": "gymnasium",
    "stack_num": 4,
    "noop_max": 1,  # a reset plays one no-op frame; 0 hangs or crashes EnvPool 1.2.5
    "use_fire_reset": False,
    "episodic_life": False,
    "reward_clip": False,
    "full_action_space": False,
}
# Of RL Unplugged (Gulcehre et al. 2020, arXiv 2006.13888): random play, the online DQN that made the data, offline methods.
SCORES_FILE = Path(__file__).parent / "rlu_atari_scores.json"
PRIOR_METHODS = ("BC", "BCQ", "DQN", "IQN", "REM")


@functools.cache
def games() -> tuple[str, ...]:
    """The names of all games that EnvPool knows."""
    from envpool.atari.registration import atari_game_list

    return tuple(_env_id(game) for game in atari_game_list)


def _env_id(game: str) -> str:
    """ms_pacman -> MsPacman"""
    return "".join(part.capitalize() for part in game.split("_"))


def check_game(env_id: str) -> None:
    """Raises InputError for an unknown game, with the closest known one."""
    if env_id not in games():
        known = {game.lower(): game for game in games()}
        name = env_id.lower().replace("_", "").replace("-", "").removeprefix("ale/")
        closest = known[difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]]
        raise InputError(f"there is no Atari game {env_id!r}; did you mean {closest!r}?")


def make_environments(env_id: str, num_envs: int, seed: int, sticky_actions: float = 0.25, num_threads: int = 0) -> Any:
    """Makes an EnvPool of num_envs games that behave as those of the datasets did (Dopamine's: Castro et al. 2018).

    reset() returns observations uint8 [num_envs, 4, 84, 84], the newest frame last, and an info dictionary; step(actions
    int32 [num_envs]) returns observations, rewards float32 (of the game, not clipped), terminated, truncated, info.
    After a reset all four frames are the first one. The step *after* an episode's end is its reset: it ignores the action,
    returns the next episode's first observation, reward 0, and info["elapsed_step"] 0. info["terminated"] tells game
    over; `truncated` is also set where a game is over just at the limit of 27,000 steps.

    Environment i is the same for any num_envs; its seed is drawn from `seed`, since EnvPool's own seed + i would let the
    environments of neighbouring seeds play the same games. num_threads: 0 for as many as cores.

    Raises InputError for an unknown game or impossible numbers.
    """
    check_game(env_id)
    if num_envs < 1:
        raise InputError(f"the number of environments must be at least 1, not {num_envs}")
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is from 0 to {2**32 - 1}, not {seed}")
    if not 0 <= sticky_actions <= 1:
        raise InputError(f"sticky actions have a probability, from 0 to 1, not {sticky_actions}")
    if num_threads < 0:
        raise InputError(f"the number of threads must be at least 0, not {num_threads}")
    import envpool

    return envpool.make(
        f"{env_id}-v5",
        num_envs=num_envs,
        num_threads=num_threads,
        seed=environment_seeds(seed, num_envs),
        repeat_action_probability=sticky_actions,
        max_episode_steps=MAX_EPISODE_STEPS,
        **SETTINGS,
    )


def environment_seeds(seed: int, num_envs: int) -> list[int]:
    """The seeds of the single environments, from 0 to 2**31 - 1."""
    return [int(state) >> 1 for state in np.random.SeedSequence(seed).generate_state(num_envs)]


@functools.cache
def num_actions(env_id: str) -> int:
    """The size of the game's minimal action set. Raises InputError for an unknown game."""
    check_game(env_id)
    import envpool

    return int(envpool.make_spec(f"{env_id}-v5", full_action_space=False).action_space.n)


def default_folder(env_id: str) -> Path:
    """The place of a game's dataset, where the recorder and the converters put it and the training scripts look for it."""
    return Path("datasets/atari") / env_id


@functools.cache
def _scores() -> dict[str, dict[str, float]]:
    return {_env_id(game): scores for game, scores in json.loads(SCORES_FILE.read_text()).items()}


def normalized_score(env_id: str, mean_return: float) -> float | None:
    """(return - random play) / (online DQN - random play); None for a game that is not among RL Unplugged's 46.

    mean_return: of the game's own, unclipped rewards.
    """
    if env_id not in _scores():
        return None
    scores = _scores()[env_id]
    return (mean_return - scores["random"]) / (scores["online_dqn"] - scores["random"])


def prior_scores(env_id: str) -> dict[str, float]:
    """RL Unplugged's published returns of offline BC, BCQ, DQN, IQN and REM; empty for a game that is not among its 46."""
    return {method: _scores()[env_id][method] for method in PRIOR_METHODS if env_id in _scores()}


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Writes frames uint8 [84, 84] as a video, 15 to a second as the games are played, each pixel enlarged to 4 x 4."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 15, (336, 336), isColor=False)
    if not writer.isOpened():
        print(f"warning: OpenCV cannot write {path}; there will be no video", file=sys.stderr)
        return
    for frame in frames:
        writer.write(np.kron(frame, np.ones((4, 4), np.uint8)))
    writer.release()
