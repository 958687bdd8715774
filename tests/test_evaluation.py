"""How agents are scored: which steps count, in which environments, with which seeds, and the video of one."""

from pathlib import Path

import cv2
import envpool
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_atari
import rosmo_bsuite
from data import record_atari
from data.dataset import InputError

pytestmark = pytest.mark.timeout(60)  # a mistake in counting ends in an endless loop


class Recorded:
    """Environments whose first ends its episodes after 2 steps, the others after 40; observations hold the time.

    Rewards are 7 in the first, 0.5 in the others, and 1000 in a step that resets, which must not count.
    """

    def __init__(self, num_envs, seeds=()):
        self.num_envs, self.seeds, self.actions = num_envs, list(seeds), []
        self.length, self.time = np.where(np.arange(num_envs) == 0, 2, 40), np.zeros(num_envs, int)

    def observation(self):
        return self.time.astype(np.float32)[:, None, None] * np.ones((10, 5), np.float32)

    def reset(self, seed=()):
        self.seeds += seed
        return self.observation(), {}

    def step(self, action):
        self.actions.append(np.array(action))
        reset = self.time == self.length
        self.time = np.where(reset, 0, self.time + 1)
        over, first = self.time == self.length, np.arange(len(reset)) == 0
        return self.observation(), np.where(reset, 1000.0, np.where(first, 7.0, 0.5)), over & first, over & ~first, {}


class RecordedFrames(Recorded):
    """The same with stacks of four frames, the newest last; a pixel is 20 times its frame's time."""

    def observation(self):
        times = np.maximum(self.time[:, None] + np.arange(-3, 1), 0)  # [V, 4]
        return (20 * times).astype(np.uint8)[..., None, None] * np.ones((84, 84), np.uint8)


def random_act(params, key, observation, model):
    assert params.shape == (1,)
    return np.asarray(jax.random.randint(key, (len(observation),), 0, model.num_actions))


def evaluated(script, monkeypatch, step=0, meta=None, act=random_act, run_dir=None, **settings):
    """The scores, and the environments."""
    model = script.Model(3, script.Args(**{"eval_episodes": 5} | settings))
    state = script.TrainState(np.int32(step), jnp.zeros(1), None, None, None)
    monkeypatch.setattr(script, "act", act)
    if script is rosmo_bsuite:
        environments = Recorded(model.args.eval_episodes)
        return script.evaluate(state, environments, model, meta or {}), environments
    made = []
    monkeypatch.setattr(
        script, "make_environments", lambda _, seeds, rom_dir: made.append(RecordedFrames(len(seeds), seeds)) or made[0]
    )
    return script.evaluate(state, model, meta or {}, run_dir), made[0]


both = pytest.mark.parametrize("script", [rosmo_bsuite, rosmo_atari], ids=lambda script: script.__name__)


@both
def test_evaluation_counts_one_episode_of_each_environment(script, monkeypatch):
    """What comes after its end does not count."""
    scores, environments = evaluated(script, monkeypatch, meta={"reference_returns": {"random": 2.0, "online_dqn": 12.0}})
    assert scores == {
        "eval/return_mean": pytest.approx((14 + 4 * 20) / 5),
        "eval/return_std": pytest.approx(np.std([14, 20, 20, 20, 20])),
        "eval/return_min": 14.0,
        "eval/return_max": 20.0,
        "eval/normalized_score": pytest.approx((18.8 - 2) / 10),
    }
    assert len(environments.actions) == 40
    assert "eval/normalized_score" not in evaluated(script, monkeypatch)[0]


@both
def test_seeds_of_evaluations(script, monkeypatch):
    """Every environment, step and run has its own; the same step of the same run the same."""
    (_, first), (_, again), (_, later), (_, other) = (
        evaluated(script, monkeypatch, step, seed=seed) for step, seed in ((0, 0), (0, 0), (10, 0), (0, 1))
    )
    assert first.seeds == again.seeds and np.array_equal(first.actions, again.actions)
    assert len({*first.seeds, *later.seeds, *other.seeds}) == 15
    assert len({str(actions) for actions in first.actions}) > 20  # a key for each step
    assert not np.array_equal(first.actions, later.actions) and not np.array_equal(first.actions, other.actions)


def test_noise_replaces_actions(monkeypatch):
    """At its rate, by every action alike, and independently in the environments."""

    def no_act(params, key, observation, model):
        return np.zeros(len(observation), int)

    for noise in (0.0, 0.5, 1.0):
        _, environments = evaluated(rosmo_bsuite, monkeypatch, act=no_act, noise=noise, eval_episodes=40)
        actions, rate = np.array(environments.actions), noise * 2 / 3  # [40, 40]
        assert np.mean(actions != 0) == pytest.approx(rate, abs=0.06 if noise else 0)
        assert np.mean((actions[:, ::2] != 0) & (actions[:, 1::2] != 0)) == pytest.approx(rate**2, abs=0.06)
        assert not noise or np.bincount(actions.ravel(), minlength=3)[1:].min() > 400 * noise


def test_video(monkeypatch, tmp_path):
    """The first environment's episode, frame by frame: the newest of each stack."""
    settings = {"eval_episodes": 3, "step": 30, "run_dir": tmp_path}
    evaluated(rosmo_atari, monkeypatch, **settings, capture_video=False)
    assert not (tmp_path / "videos").exists()
    evaluated(rosmo_atari, monkeypatch, **settings, capture_video=True)
    video, frames = cv2.VideoCapture(str(tmp_path / "videos" / "30.webm")), []
    while (frame := video.read()[1]) is not None:
        frames.append(frame)
    assert [frame.shape for frame in frames] == [(336, 336, 3)] * 3
    assert [frame.mean() for frame in frames] == pytest.approx([0, 20, 40], abs=4)


def test_bsuite_tasks_are_bsuites():
    """Each seed is another game; every end is terminal; what was played before a seed has no part in what comes."""
    for env_id, shape in (("catch", (10, 5)), ("cartpole", (1, 6)), ("mountain_car", (1, 3))):
        environments = gymnasium.make_vec(env_id, 2, "sync")
        assert environments.single_observation_space.shape == shape and environments.single_action_space.n == 3
    environments = gymnasium.make_vec("catch", 3, "sync")

    def play(seeds):
        frames = [environments.reset(seed=seeds)[0].copy()]
        for t in range(1, 60):
            observation, reward, terminated, truncated, _ = environments.step(np.ones(3, int))
            frames.append(observation.copy())
            assert (terminated == (t % 10 == 9)).all() and not truncated.any()
            assert (np.abs(reward) == (t % 10 == 9)).all()
        return np.stack(frames, axis=1)

    games = play([1, 2, 1])
    assert np.array_equal(games[0], games[2]) and not np.array_equal(games[0], games[1])
    assert np.array_equal(play([1, 2, 3])[:2], games[:2])


def test_settings_of_atari(monkeypatch, tmp_path):
    """The recorder's too: game scores that are not clipped, and half an hour of play at most; seeds as they are given."""
    asked = []
    monkeypatch.setattr(envpool, "make", lambda *name, **settings: asked.append((*name, settings)))
    rosmo_atari.make_environments("MsPacman", [3, 2**30 + 1, 2**31 + 5])
    record_atari.make_environments("MsPacman", 3, seed=0)
    rosmo_atari.make_environments("MsPacman", [3], Path("roms"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no roms/atari/roms/ms_pacman"):
        record_atari.make_environments("MsPacman", 3, seed=0, rom_dir=Path("roms"))
    Path("roms/atari/roms").mkdir(parents=True)
    Path("roms/atari/roms/ms_pacman.bin").touch()
    record_atari.make_environments("MsPacman", 3, seed=0, rom_dir=Path("roms"))
    expected = {
        "env_type": "gymnasium", "num_envs": 3, "stack_num": 4, "noop_max": 1, "repeat_action_probability": 0.25,
        "use_fire_reset": False, "episodic_life": False, "reward_clip": False, "full_action_space": False,
        "max_episode_steps": 27000,
    }  # fmt: skip
    seeds = [3, 2**30 + 1, 5], record_atari.environment_seeds(0, 3)
    assert asked[:2] == [("MsPacman-v5", expected | {"seed": seed}) for seed in seeds]
    assert [settings.get("base_path") for _, settings in asked] == [None, None, "roms", "roms"]
