"""The recorder's Atari games against the emulator itself, its datasets, its policies, and what it refuses."""

import shutil

import ale_py
import cv2
import envpool
import numpy as np
import pytest

from data import record_atari
from data.dataset import InputError, open_dataset
from data.record_atari import SCORES, Args, ScriptedPolicy, first_step, make_environments, next_step, num_actions, record

ROMS = {"Breakout": "breakout", "Pong": "pong", "MsPacman": "ms_pacman", "Seaquest": "seaquest"}


class Dopamine:
    """Dopamine's pipeline (Castro et al. 2018, atari_lib.py) around ale-py, whose settings made RL Unplugged's data.

    Its resets play one no-op frame, as EnvPool's with noop_max=1 do; Dopamine's play none.
    """

    def __init__(self, env_id: str, seed: int, sticky_actions: float):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", sticky_actions)
        self._ale.setInt("random_seed", seed)
        self._ale.loadROM(ale_py.roms.get_rom_path(ROMS[env_id]))
        self._actions = self._ale.getMinimalActionSet()

    def reset(self) -> np.ndarray:
        self._ale.reset_game()
        self._ale.act(0)
        return self._resize(self._ale.getScreenGrayscale())

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        reward, screens = 0.0, []
        for _ in range(4):
            reward += self._ale.act(self._actions[action])
            screens.append(self._ale.getScreenGrayscale())
            if self._ale.game_over():
                break
        return self._resize(np.maximum.reduce(screens[-2:])), reward, self._ale.game_over()

    def _resize(self, screen: np.ndarray) -> np.ndarray:
        return cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("sticky_actions", [0.0, 0.25])
@pytest.mark.parametrize("env_id", ROMS)
def test_envpool_is_dopamines_pipeline(env_id, sticky_actions):
    environments = make_environments(env_id, 1, seed=0, sticky_actions=sticky_actions)
    dopamine = Dopamine(env_id, record_atari.environment_seeds(0, 1)[0], sticky_actions)
    step = first_step(environments)
    stack = [dopamine.reset()] * 4
    assert np.array_equal(step.observation[0], stack)
    for action in np.random.default_rng(0).integers(num_actions(env_id), size=300):
        was_last = step.is_last[0]
        step = next_step(environments, np.array([action]))
        if was_last:
            stack, reward, terminal = [dopamine.reset()] * 4, 0.0, False
        else:
            frame, reward, terminal = dopamine.step(action)
            stack = [*stack[1:], frame]
        found = (step.reward[0], step.is_first[0], step.is_last[0], step.is_terminal[0])
        assert found == (reward, was_last, terminal, terminal)
        # An episode's last frame, which no update uses, can differ if the game is over within the four frames.
        assert terminal or np.array_equal(step.observation[0], stack)


def test_truncated_at_the_limit(tmp_path, monkeypatch):
    make = envpool.make
    monkeypatch.setattr(envpool, "make", lambda task, **settings: make(task, **settings | {"max_episode_steps": 5}))
    data = open_dataset(record(Args("Pong", steps=20, num_envs=2, out=tmp_path / "pong")))
    assert np.flatnonzero(data.is_last).tolist() == [5, 11, 17, 23] and not data.is_terminal.any()


def test_game_over_just_at_the_limit():
    class Environments:
        def step(self, action):
            assert action.dtype == np.int32
            flags = {"terminated": np.array([1, 0, 0]), "elapsed_step": np.array([9, 9, 0]), "ram": np.zeros((3, 128))}
            return np.zeros((3, 4, 84, 84)), np.zeros(3), np.zeros(3, bool), np.array([True, True, False]), flags

    step = next_step(Environments(), np.zeros(3))
    assert step.is_first.tolist() == [False, False, True] and step.is_last.tolist() == [True, True, False]
    assert step.is_terminal.tolist() == [True, False, False]


def test_games():
    assert num_actions("Breakout") == 4 and num_actions("Seaquest") == 18
    references = {"random": 1.33, "online_dqn": 157.86}
    assert record_atari.reference_returns("Breakout") == references and record_atari.reference_returns("Solaris") is None
    assert SCORES["Breakout"] == references | {"BC": 235.0, "BCQ": 375.0, "DQN": 324.0, "IQN": 314.0, "REM": 362.0}
    assert len(SCORES) == 46 and set(SCORES) < set(record_atari.games())
    assert sum(sum(scores.values()) for scores in SCORES.values()) == pytest.approx(18_817_818.69, abs=0.001)
    assert str(record_atari.default_folder("Pong")) == "datasets/atari/Pong"


def test_recording(breakout_dataset):
    breakout = open_dataset(breakout_dataset)
    assert breakout.observation.shape[1:] == (84, 84) and breakout.observation.dtype == np.uint8
    lengths = np.diff(np.flatnonzero(np.append(breakout.is_first, True))) - 1
    assert 1500 <= lengths.sum() < 1504
    terminal = breakout.is_terminal[breakout.is_last]
    whole = breakout.meta["game_return"]["episodes"]
    assert whole > 4 and terminal.tolist() == whole * [True] + (len(lengths) - whole) * [False]  # truncated at the end
    assert len(lengths) - whole <= 4
    assert lengths[:whole].min() > 80  # five lives
    assert {
        **{"benchmark": "atari", "env_id": "Breakout", "num_actions": 4, "seed": 0, "num_envs": 4, "policy": "random"},
        **{"sticky_actions": 0.25, "rewards_clipped": True, "observation_shape": [84, 84]},
        **{"reference_returns": {"random": 1.33, "online_dqn": 157.86}},
        **{"source": "uniformly random play, seed 0, recorded by data/record_atari.py"},
    }.items() <= breakout.meta.items()
    assert np.bincount(breakout.action[~breakout.is_last]).min() > 0.2 * lengths.sum()  # of each of the four actions


def test_recorded_steps_are_the_games(breakout_dataset):
    """One episode is an environment's first; the emulator plays it again from its actions."""
    data = open_dataset(breakout_dataset)
    starts, ends = np.flatnonzero(data.is_first), np.flatnonzero(data.is_last)

    def same(seed, start, end):
        dopamine = Dopamine("Breakout", seed, sticky_actions=0.25)
        if not np.array_equal(dopamine.reset(), data.observation[start]):
            return False
        for t in range(start, end):
            frame, reward, terminal = dopamine.step(data.action[t])
            if (reward, terminal) != (data.reward[t], data.is_terminal[t + 1]):
                return False
            if not terminal and not np.array_equal(frame, data.observation[t + 1]):
                return False
        return True

    for seed in record_atari.environment_seeds(0, 4)[:2]:
        assert sum(same(seed, start, end) for start, end in zip(starts, ends, strict=True)) == 1


def test_rewards_are_clipped_and_the_games_returns_kept(tmp_path):
    data = open_dataset(record(Args("Qbert", steps=1500, num_envs=1, out=tmp_path / "qbert")))
    environments = make_environments("Qbert", 1, seed=0)
    first_step(environments)
    # The action of an episode's last step is not counted: the environment resets.
    rewards = np.array([next_step(environments, data.action[t : t + 1]).reward[0] for t in range(len(data.action) - 1)])
    assert np.array_equal(np.clip(rewards, -1, 1), data.reward[:-1]) and rewards.max() > 1
    whole = np.flatnonzero(data.is_terminal)
    returns = [rewards[start:end].sum() for start, end in zip(np.flatnonzero(data.is_first), whole, strict=False)]
    game_return = data.meta["game_return"]
    assert len(returns) > 1 and game_return == {
        **{"episodes": len(returns), "mean": np.mean(returns), "min": min(returns), "max": max(returns)},
        **{"mean_first_tenth": returns[0], "mean_last_tenth": returns[-1]},
    }


def test_recording_is_the_same_for_the_same_seed(tmp_path):
    first, second, third = (
        open_dataset(record(Args("Pong", "scripted", steps=300, num_envs=3, seed=seed, out=tmp_path / str(i))))
        for i, seed in enumerate((5, 5, 6))
    )
    assert np.array_equal(first.action, second.action) and np.array_equal(first.observation, second.observation)
    assert not np.array_equal(first.action, third.action)
    assert first.meta["policy"] == "scripted" and "memory, with noise of 0.0, 0.1, 0.3, 0.6, 1.0" in first.meta["source"]


# Random play has scored about 1.5, -5 and 0 by then.
@pytest.mark.parametrize(("env_id", "steps", "least"), [("Breakout", 250, 4), ("Pong", 300, -2), ("Freeway", 150, 2)])
def test_scripts_beat_random_play(monkeypatch, env_id, steps, least):
    monkeypatch.setattr(record_atari, "NOISE_LEVELS", (0.0,))
    environments, policy = make_environments(env_id, 4, seed=0), ScriptedPolicy(env_id, 4, seed=0)
    step, score = first_step(environments), 0.0
    for _ in range(steps):
        step = next_step(environments, policy(step))
        score += step.reward.mean()
    assert score >= least


def test_noise_levels_in_turn():
    policy, steps = ScriptedPolicy("Freeway", 5, seed=0), 3000  # without noise it always plays action 1 of three
    none, envs = np.zeros(5, bool), np.arange(5)
    step = record_atari.Step(np.zeros((5, 4, 84, 84)), np.zeros((5, 128)), np.zeros(5), none, none, none)
    for begin, levels in [
        (envs >= 0, [0, 0.1, 0.3, 0.6, 1]),
        (envs >= 3, [0, 0.1, 0.3, 0, 0.1]),  # the sixth episode has the first level, the seventh the second
        (envs == 0, [0.3, 0.1, 0.3, 0, 0.1]),
    ]:
        other = sum(policy(step._replace(is_first=is_first)) != 1 for is_first in [begin, *[none] * steps])
        assert other / steps == pytest.approx(np.array(levels) * 2 / 3, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"env_id": "ms_pacmann"}, "did you mean 'MsPacman'"),
        ({"env_id": "Seaquest", "policy": "scripted"}, "no script that plays Seaquest, only Breakout, Pong, Freeway;"),
        ({"env_id": "Pong", "steps": 0}, "there is no episode to write"),
        ({"env_id": "Pong", "num_envs": 0}, "at least 1"),
        ({"env_id": "Pong", "seed": 2**32}, "from 0 to 4294967295"),
    ],
)
def test_errors(tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        record(Args(**{"num_envs": 1} | arguments, out=tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_exists_and_too_little_disk(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="exists already"):
        record(Args("Pong", steps=10, num_envs=1, out=tmp_path))
    usage, asked = shutil._ntuple_diskusage(10**9, 0, 7 * 10**8), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    with pytest.raises(InputError, match=r"needs about 0\.721 GB, and 0\.7 GB are free there: name fewer --steps"):
        record(Args("Pong", num_envs=1, out=tmp_path / "deeper" / "new"))
    assert list(tmp_path.iterdir()) == [] and asked == [tmp_path]
