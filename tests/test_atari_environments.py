"""The Atari games in EnvPool against the emulator itself, the recorder's datasets, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import ale_py
import cv2
import numpy as np
import pytest

from data import atari, record_atari
from data.atari import environment_seeds, make_environments, normalized_score, num_actions, prior_scores
from data.dataset import InputError, open_dataset
from data.record_atari import Args, CheckpointPolicy, Replay, Step, first_step, next_step, record, record_if_missing
from data.runs import Checkpoints

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
    dopamine = Dopamine(env_id, environment_seeds(0, 1)[0], sticky_actions)
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
        assert (step.reward[0], step.is_first[0], step.is_last[0], step.is_terminal[0]) == (
            reward,
            was_last,
            terminal,
            terminal,
        )
        # An episode's last frame, which no update uses, can differ if the game is over within the four frames.
        assert terminal or np.array_equal(step.observation[0], stack)


def test_environments_of_other_seeds_and_numbers():
    def play(num_envs, seed):
        environments = make_environments("Seaquest", num_envs, seed)
        first_step(environments)
        return np.stack([next_step(environments, np.full(num_envs, t % 18)).observation for t in range(60)], axis=1)

    three, two, other = play(3, seed=1), play(2, seed=1), play(2, seed=2)
    assert np.array_equal(three[:2], two)
    for i in range(3):
        for j in range(2):
            assert not np.array_equal(three[i], other[j])


def test_cut_off_at_the_limit(monkeypatch):
    monkeypatch.setattr(atari, "MAX_EPISODE_STEPS", 5)
    environments = make_environments("Pong", 2, seed=0)
    step = first_step(environments)
    for t in range(1, 12):
        step = next_step(environments, np.zeros(2))
        assert (step.is_last == (t % 6 == 5)).all() and (step.is_first == (t % 6 == 0)).all()
        assert not step.is_terminal.any()


def test_scores():
    assert num_actions("Breakout") == 4 and num_actions("Seaquest") == 18
    scores = json.loads(atari.SCORES_FILE.read_text())["ms_pacman"]
    assert normalized_score("MsPacman", scores["random"]) == 0 and normalized_score("MsPacman", scores["online_dqn"]) == 1
    assert prior_scores("MsPacman") == {method: scores[method] for method in ("BC", "BCQ", "DQN", "IQN", "REM")}
    assert normalized_score("Solaris", 1000.0) is None and prior_scores("Solaris") == {}
    assert len(atari._scores()) == 46 and set(atari._scores()) <= set(atari.games())


@pytest.fixture(scope="module")
def breakout(tmp_path_factory):
    """Random play of four environments."""
    folder = tmp_path_factory.mktemp("atari") / "breakout"
    return open_dataset(record(Args("Breakout", steps=2500, num_envs=4, seed=3, out=folder)))


def test_recording(breakout):
    assert breakout.observation.shape[1:] == (84, 84) and breakout.observation.dtype == np.uint8
    lengths = np.diff(np.flatnonzero(np.append(breakout.is_first, True))) - 1
    assert 2500 <= lengths.sum() < 2504
    terminal = breakout.is_terminal[breakout.is_last]
    whole = breakout.meta["game_return"]["episodes"]
    assert whole > 4 and terminal.tolist() == whole * [True] + (len(lengths) - whole) * [False]  # cut off at the end
    assert len(lengths) - whole <= 4
    assert lengths[:whole].min() > 80  # five lives


def test_recorded_steps_are_the_games(breakout):
    """One episode is an environment's first; the emulator plays it again from its actions."""
    starts, ends = np.flatnonzero(breakout.is_first), np.flatnonzero(breakout.is_last)

    def same(seed, start, end):
        dopamine = Dopamine("Breakout", seed, sticky_actions=0.25)
        if not np.array_equal(dopamine.reset(), breakout.observation[start]):
            return False
        for t in range(start, end):
            frame, reward, terminal = dopamine.step(breakout.action[t])
            if (reward, terminal) != (breakout.reward[t], breakout.is_terminal[t + 1]):
                return False
            if not terminal and not np.array_equal(frame, breakout.observation[t + 1]):
                return False
        return True

    for seed in environment_seeds(3, 4)[:2]:
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


def test_script_beats_random_play(tmp_path, monkeypatch, breakout):
    monkeypatch.setattr(record_atari, "NOISE_LEVELS", (0.0,))
    scripted = open_dataset(record(Args("Breakout", "scripted", steps=4000, num_envs=8, out=tmp_path / "scripted")))
    # In 500 steps it scores more than five whole games of random play.
    assert scripted.meta["return_mean"] > 5 * breakout.meta["game_return"]["mean"] > 0


def test_noise_levels_in_turn(tmp_path):
    data = open_dataset(record(Args("Breakout", "scripted", steps=1500, num_envs=5, out=tmp_path / "scripted")))
    by_noise = data.meta["policy"]["game_return_by_noise"]
    assert [float(noise) for noise in by_noise] == [0, 0.1, 0.3, 0.6, 1]
    assert sum(summary["episodes"] for summary in by_noise.values()) == data.meta["game_return"]["episodes"]
    assert by_noise["1.0"]["episodes"] > 0


def test_dqn(tmp_path):
    data = open_dataset(record(Args("Breakout", "dqn", steps=80, num_envs=4, out=tmp_path / "dqn")))
    assert data.meta["policy"]["updates"] >= 80 // 4 - 3  # it waits until four steps of each are there


@pytest.mark.parametrize(("rows", "stacks"), [
    (8, {7: [6, 6, 6, 7], 8: [6, 6, 7, 8], 9: [6, 7, 8, 9], 10: [7, 8, 9, 10]}),
    (12, {0: [0, 0, 0, 0], 1: [0, 0, 0, 1], 2: [0, 0, 1, 2], 3: [0, 1, 2, 3], 4: [1, 2, 3, 4], 6: [6, 6, 6, 6],
          7: [6, 6, 6, 7], 8: [6, 6, 7, 8], 9: [6, 7, 8, 9], 10: [7, 8, 9, 10]}),
])  # fmt: skip
def test_dqn_replay(rows, stacks):
    """Frames hold their time; the game is over at 5, where the action is ignored, and another starts at 6."""
    replay = Replay(rows, num_envs=1, seed=0)
    for t in range(12):
        flags = (np.array([flag]) for flag in (t in (0, 6), t == 5, t == 5))
        frames = np.full((1, 4, 84, 84), t, np.uint8)
        replay.add(Step(frames, np.zeros((1, 128)), np.array([0.01 * t if t < 11 else -5.0]), *flags), np.array([t]))
    batch = replay.sample(400)
    assert set(batch.action) == set(stacks)  # actions are their times
    for stack, t, reward, discount, following in zip(*(np.asarray(x) for x in batch), strict=True):
        assert stack[0, 0].tolist() == stacks[t]
        assert reward == pytest.approx(0.01 * (t + 1) if t < 10 else -1)
        assert discount == (t != 4)
        assert following[0, 0].tolist() == [*stacks[t][1:], t + 1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"env_id": "ms_pacmann"}, "did you mean 'MsPacman'"),
        ({"env_id": "ALE/Breakout-v5"}, "did you mean 'Breakout'"),
        (
            {"env_id": "Seaquest", "policy": "scripted"},
            "no script that plays Seaquest, only Breakout, Pong, Freeway, Boxing",
        ),
        ({"env_id": "Pong", "steps": 0}, "at least 1"),
        ({"env_id": "Pong", "num_envs": 0}, "at least 1"),
        ({"env_id": "Pong", "seed": 2**32}, "from 0 to"),
        ({"env_id": "Pong", "policy": "checkpoint"}, "needs --checkpoint"),
        ({"env_id": "Pong", "policy": "checkpoint", "checkpoint": Path("nowhere")}, "not the folder of a run"),
        ({"env_id": "Pong", "checkpoint": Path("nowhere")}, "goes with --policy checkpoint"),
    ],
)
def test_errors(tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        record(Args(**{"num_envs": 1} | arguments, out=tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_exists(tmp_path):
    with pytest.raises(InputError, match="exists already"):
        record(Args("Pong", steps=10, num_envs=1, out=tmp_path))


def test_too_little_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 7 * 10**8))
    with pytest.raises(InputError, match=r"needs about 0\.721 GB, and 0\.7 GB are free there: name fewer --steps"):
        record(Args("Pong", num_envs=1, out=tmp_path / "deeper" / "new"))
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_something_else(tmp_path):
    for script, env_id in (("rosmo_bsuite", "Pong"), ("rosmo_atari", "Breakout")):
        (tmp_path / "args.json").write_text(json.dumps({"script": script, "args": {"env_id": env_id}}))
        with pytest.raises(InputError, match=f"a run of {script}.py on {env_id}, no agent for Pong"):
            CheckpointPolicy("Pong", tmp_path, seed=0)


def test_missing_dataset_is_recorded_and_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record_atari, "DEFAULT_STEPS", 200)
    for env_id, player in (("Pong", "a simple program"), ("Qbert", "uniformly random play")):
        data = open_dataset(record_if_missing(env_id))
        output = capsys.readouterr().out
        assert player in output and "not RL Unplugged's" in output and f"recording {200} steps" in output
        assert data.meta["env_id"] == env_id and 200 <= len(data.action) < 250
        record_if_missing(env_id)
        assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="did you mean 'Pong'"):
        record_if_missing("Pongg")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_agent_of_a_run(tmp_path):
    script = pytest.importorskip("rosmo_atari")
    sizes = dict.fromkeys(("representation_blocks", "dynamics_blocks", "prediction_blocks"), 1)
    args = script.Args(env_id="Pong", channels=8, head_width=8, num_bins=11, **sizes)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run = {"script": "rosmo_atari", "args": dataclasses.asdict(args)}
    (run_dir / "args.json").write_text(json.dumps(run, default=str))
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(7, script.init_state((84, 84, 4), script.Model(6, args))._replace(step=np.int32(7)))
    checkpoints.close()
    out = record(Args("Pong", "checkpoint", steps=60, num_envs=2, checkpoint=run_dir, out=tmp_path / "pong"))
    data = open_dataset(out)
    assert data.meta["policy"] == {"name": "checkpoint", "updates": 7} and len(set(data.action)) > 1
