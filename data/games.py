"""The Atari games by EnvPool's plain names (Breakout, MsPacman, UpNDown): their actions, datasets and published returns."""

import difflib
import functools
import json
from pathlib import Path

from data.dataset import InputError

# Of RL Unplugged (Gulcehre et al. 2020, arXiv 2006.13888): random play, the online DQN that made the data, offline methods.
SCORES_FILE = Path(__file__).parent / "rlu_atari_scores.json"
STEP_BYTES = 84 * 84 + 11  # of a dataset: a frame, and action, reward and flags
REFERENCES = ("random", "online_dqn")
PRIOR_METHODS = ("BC", "BCQ", "DQN", "IQN", "REM")


def _env_id(game: str) -> str:
    """ms_pacman -> MsPacman"""
    return "".join(part.capitalize() for part in game.split("_"))


@functools.cache
def games() -> tuple[str, ...]:
    """The names of all games that EnvPool knows."""
    from envpool.atari.registration import atari_game_list

    return tuple(_env_id(game) for game in atari_game_list)


def check_game(env_id: str) -> None:
    """Raises InputError for an unknown game, with the closest known one."""
    if env_id not in games():
        known = {game.lower(): game for game in games()}
        closest = known[difflib.get_close_matches(env_id.lower(), known, n=1, cutoff=0.0)[0]]
        raise InputError(f"there is no Atari game {env_id!r}; did you mean {closest!r}?")


@functools.cache
def num_actions(env_id: str) -> int:
    """The size of the game's minimal action set. Raises InputError for an unknown game."""
    check_game(env_id)
    import envpool

    return int(envpool.make_spec(f"{env_id}-v5", full_action_space=False).action_space.n)


def default_folder(env_id: str) -> Path:
    """The place of a game's dataset, where the recorder and the converter put it and the training scripts look for it."""
    return Path("datasets/atari") / env_id


@functools.cache
def _scores() -> dict[str, dict[str, float]]:
    return {_env_id(game): scores for game, scores in json.loads(SCORES_FILE.read_text()).items()}


def reference_returns(env_id: str) -> dict[str, float] | None:
    """RL Unplugged's returns of random play and of the online DQN; None for a game that is not among its 46."""
    return {name: _scores()[env_id][name] for name in REFERENCES} if env_id in _scores() else None


def prior_scores(env_id: str) -> dict[str, float]:
    """RL Unplugged's returns of offline BC, BCQ, DQN, IQN and REM; empty for a game that is not among its 46."""
    return {method: _scores()[env_id][method] for method in PRIOR_METHODS if env_id in _scores()}
