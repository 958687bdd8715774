"""How agents are scored: which episodes count, in which environments, with which seeds, and the video of one."""

import cv2
import envpool
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_atari
import rosmo_bsuite

pytestmark = pytest.mark.timeout(60)  # a mistake in counting ends in an endless loop


class Recorded:
    """Environments whose first ends its episodes after 2 steps, the others after 40; observations hold the time.

    Rewards are 7 in the first, 0.5 in the others, and 1000 in a step that resets, which must not count.
    """

    made: list["Recorded"]

    def __init__(self, env_id, seeds):
        self.seeds, self.actions = list(seeds), []
        self.length, self.time = np.where(np.arange(len(seeds)) == 0, 2, 40), np.zeros(len(seeds), int)
        Recorded.made.append(self)

    def observation(self):
        return self.time.astype(np.float32)[:, None, None] * np.ones((10, 5), np.float32)

    def reset(self):
        return self.observation(), {}

    def step(self, action):
        self.actions.append(np.array(action))
        reset = self.time == self.length
        self.time = np.where(reset, 0, self.time + 1)
        over, first = self.time == self.length, np.arange(len(reset)) == 0
        return self.observation(), np.where(reset, 1000.0, np.where(first, 7.0, 0.5)), over & first, over & ~first, {}

    def close(self):
        pass


class RecordedFrames(Recorded):
    """The same with stacks of four frames, the newest last; a pixel is 20 times its frame's time."""

    def observation(self):
        times = np.maximum(self.time[:, None] + np.arange(-3, 1), 0)  # [V, 4]
        return (20 * times).astype(np.uint8)[..., None, None] * np.ones((84, 84), np.uint8)


def random_act(params, key, observation, model):
    return np.asarray(jax.random.randint(key, (len(observation),), 0, model.num_actions))


def evaluated(script, monkeypatch, step=0, meta=None, act=random_act, run_dir=None, **settings):
    Recorded.made = []
    monkeypatch.setattr(script, "make_environments", Recorded if script is rosmo_bsuite else RecordedFrames)
    monkeypatch.setattr(script, "act", act)
    model = script.Model(3, script.Args(**{"eval_episodes": 5, "eval_envs": 2} | settings))
    state = script.TrainState(np.int32(step), jnp.zeros(1), None, None, None)
    scores = script.evaluate(state, model, meta or {}, *([] if run_dir is None else [(), run_dir]))
    return scores, Recorded.made[-1]


@pytest.mark.parametrize("script", [rosmo_bsuite, rosmo_atari])
def test_evaluation_counts_every_environment_alike(script, monkeypatch):
    """5 episodes over 2 environments: one plays 3, the other 2, however long they last; steps that reset do not count."""
    scores, environments = evaluated(script, monkeypatch, meta={"reference_returns": {"random": 2.0, "online_dqn": 12.0}})
    assert scores == {
        "eval/return_mean": pytest.approx((3 * 14 + 2 * 20) / 5),
        "eval/return_std": pytest.approx(np.std([14, 14, 14, 20, 20])),
        "eval/return_min": 14.0,
        "eval/return_max": 20.0,
        "eval/length_mean": (3 * 2 + 2 * 40) / 5,
        "eval/episodes": 5,
        "eval/normalized_score": pytest.approx((16.4 - 2) / 10),
    }
    assert len(environments.actions) == 40 + 1 + 40
    assert "eval/normalized_score" not in evaluated(script, monkeypatch)[0]


@pytest.mark.parametrize("script", [rosmo_bsuite, rosmo_atari])
def test_seeds_of_evaluations(script, monkeypatch):
    """Every environment, step and run has its own; the same step of the same run the same."""
    (_, first), (_, again), (_, later), (_, other) = (
        evaluated(script, monkeypatch, step, seed=seed) for step, seed in ((0, 0), (0, 0), (10, 0), (0, 1))
    )
    assert first.seeds == again.seeds and np.array_equal(first.actions, again.actions)
    assert len({*first.seeds, *later.seeds, *other.seeds}) == 6
    assert not np.array_equal(first.actions, later.actions) and not np.array_equal(first.actions, other.actions)


def test_noise_replaces_actions(monkeypatch):
    """At its rate, by every action alike, and independently in the environments."""

    def no_act(params, key, observation, model):
        return np.zeros(len(observation), int)

    for noise in (0.0, 0.5, 1.0):
        _, environments = evaluated(rosmo_bsuite, monkeypatch, act=no_act, noise=noise, eval_episodes=40)
        actions, rate = np.array(environments.actions), noise * 2 / 3  # [820, 2]
        assert np.mean(actions != 0) == pytest.approx(rate, abs=0.06 if noise else 0)
        assert np.mean((actions != 0).all(axis=1)) == pytest.approx(rate**2, abs=0.05)
        assert not noise or np.bincount(actions.ravel(), minlength=3)[1:].min() > 200 * noise


def test_act_sees_stacks_with_the_newest_frame_last(monkeypatch):
    seen = []

    def act(params, key, observation, model):
        seen.append(np.array(observation))
        return np.zeros(len(observation), int)

    evaluated(rosmo_atari, monkeypatch, act=act)
    assert seen[1].shape == (2, 84, 84, 4) and seen[1][1, 5, 7].tolist() == [0, 0, 0, 20]
    assert seen[3][1, 0, 0].tolist() == [0, 20, 40, 60]


def test_video(monkeypatch, tmp_path):
    """The first environment's first episode, frame by frame: the newest of each stack."""
    settings = {"eval_episodes": 3, "step": 30, "run_dir": tmp_path}
    evaluated(rosmo_atari, monkeypatch, **settings, capture_video=False)
    assert not (tmp_path / "videos").exists()
    evaluated(rosmo_atari, monkeypatch, **settings, capture_video=True)
    video, frames = cv2.VideoCapture(str(tmp_path / "videos" / "30.mp4")), []
    while (frame := video.read()[1]) is not None:
        frames.append(frame)
    assert [frame.shape for frame in frames] == [(336, 336, 3)] * 3
    assert [frame.mean() for frame in frames] == pytest.approx([0, 20, 40], abs=4)


def test_bsuite_tasks_are_bsuites():
    """Each seed is another game; a step after the end resets; every end is terminal."""
    for env_id, shape in (("catch", (10, 5)), ("cartpole", (1, 6)), ("mountain_car", (1, 3))):
        environments = rosmo_bsuite.make_environments(env_id, [1, 2])
        assert environments.single_observation_space.shape == shape and environments.single_action_space.n == 3
        assert environments.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.NEXT_STEP

    def play(seeds):
        environments = rosmo_bsuite.make_environments("catch", seeds)
        frames = [environments.reset()[0].copy()]
        for t in range(1, 60):
            observation, reward, terminated, truncated, _ = environments.step(np.ones(len(seeds), int))
            frames.append(observation.copy())
            assert (terminated == (t % 10 == 9)).all() and not truncated.any()
            assert (np.abs(reward) == (t % 10 == 9)).all()
        return np.stack(frames, axis=1)

    games = play([1, 2, 1])
    assert np.array_equal(games[0], games[2]) and not np.array_equal(games[0], games[1])


def test_environments_of_gymnasium():
    """Vectors as matrices of one row, float32; seeds; a time limit is no terminal state."""
    environments = rosmo_bsuite.make_environments("MountainCar-v0", [1, 2, 1])
    observation, _ = environments.reset()
    assert observation.shape == (3, 1, 2) and observation.dtype == np.float32 and environments.single_action_space.n == 3
    assert np.array_equal(observation[0], observation[2]) and not np.array_equal(observation[0], observation[1])
    for t in range(1, 202):
        observation, _, terminated, truncated, _ = environments.step(np.zeros(3, int))
        assert not terminated.any() and (truncated == (t == 200)).all()
    assert observation.shape == (3, 1, 2) and np.array_equal(observation[0], observation[2])


@pytest.mark.parametrize(
    ("env_id", "sentence"),
    [
        ("CartPol-v1", "there is no task 'CartPol-v1'; did you mean 'CartPole-v1'"),
        ("catsh", "did you mean 'catch'"),
        ("CartPole-v7", "there is no task 'CartPole-v7'"),
        ("nothing:CartPole-v1", "there is no task 'nothing:CartPole-v1'"),
        ("Pendulum-v1", "Pendulum-v1 has .*not vectors or matrices and a number of actions"),
        ("FrozenLake-v1", "FrozenLake-v1 has .*not vectors or matrices and a number of actions"),
        ("Blackjack-v1", "Blackjack-v1 has .*not vectors or matrices and a number of actions"),
    ],
)
def test_environments_that_do_not_fit(env_id, sentence):
    with pytest.raises(rosmo_bsuite.InputError, match=sentence):
        rosmo_bsuite.make_environments(env_id, [0])


def test_actions_that_do_not_begin_at_0(monkeypatch):
    environment = gymnasium.make("CartPole-v1")
    environment.action_space = gymnasium.spaces.Discrete(2, start=1)
    monkeypatch.setattr(gymnasium, "make", lambda *_, **__: environment)
    with pytest.raises(rosmo_bsuite.InputError, match="a number of actions from 0"):
        rosmo_bsuite.make_environment("CartPole-v1", 0)


def test_settings_of_atari(monkeypatch):
    """Those of the datasets, game scores that are not clipped, and half an hour of play at most; seeds as they are given."""
    settings = {}
    monkeypatch.setattr(envpool, "make", lambda name, **given: settings.update(given, name=name))
    rosmo_atari.make_environments("MsPacman", [3, 2**31 + 5])
    assert settings == {
        "name": "MsPacman-v5", "env_type": "gymnasium", "num_envs": 2, "seed": [3, 5], "stack_num": 4, "noop_max": 1,
        "repeat_action_probability": 0.25, "use_fire_reset": False, "episodic_life": False, "reward_clip": False,
        "full_action_space": False, "max_episode_steps": 27000,
    }  # fmt: skip
