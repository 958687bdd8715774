"""The dataset format: whole or absent, and checked when opened."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import dm_env
import numpy as np
import pytest
from bsuite.environments import catch

from data import record_bsuite
from data.dataset import InputError, open_dataset, run_program, write_dataset
from tests.test_data_loading import write

META = {"benchmark": "bsuite", "env_id": "catch", "num_actions": 3}
EPISODE = {
    "observation": np.zeros((3, 10, 5), np.float32), "action": np.array([2, 0]), "reward": np.zeros(2), "terminal": True,
}  # fmt: skip


def test_round_trip(tmp_path):
    data = open_dataset(write(tmp_path / "catch"))
    assert data.observation.shape == (19, 10, 5) and isinstance(data.observation, np.memmap)
    assert np.flatnonzero(data.is_first).tolist() == [0, 5, 13]
    assert np.flatnonzero(data.is_last).tolist() == [4, 12, 18]
    assert np.flatnonzero(data.is_terminal).tolist() == [4, 18]
    assert data.reward[:6].tolist() == [0] * 5 + [1] and data.reward[12] == 0 and data.reward[11] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["catch"] and data.path.stat().st_mode & 0o777 == 0o755
    assert data.meta == META | {
        **{"format_version": 1, "observation_shape": [10, 5], "steps": 19, "episodes": 3},
        **{"return_mean": pytest.approx(17 / 3), "return_min": 0, "return_max": 10},
        **{"return_mean_first_tenth": 0, "return_mean_last_tenth": 10},
    }


def test_meta(tmp_path):
    returns = {"random": -0.667, "online_dqn": 1.0}
    with write_dataset(tmp_path / "catch", **META, reference_returns=returns, note=None) as writer:
        writer.add_episode(**EPISODE)
        writer.meta["found"] = 7
    meta = open_dataset(tmp_path / "catch").meta
    assert meta["reference_returns"] == returns and meta["found"] == 7 and "note" not in meta
    for name in ("reference_returns", "observation_shape"):  # folders written before these were there
        del meta[name]
    (tmp_path / "catch" / "meta.json").write_text(json.dumps(meta))
    assert open_dataset(tmp_path / "catch").meta == meta


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        *(({"num_actions": n}, "num_actions is an integer from 1 on") for n in (0, 3.0, "3", None, np.arange(2))),
        ({"env_id": None}, "env_id is a name"),
        ({"noise": "0.0"}, "noise is a number"),
        ({"reference_returns": {"random": 0.0}}, "are two numbers: random and, unlike it, online_dqn"),
        ({"reference_returns": {"random": 1.0, "online_dqn": 1.0}}, "are two numbers"),
        ({"source": InputError}, "its meta.json cannot be: type object 'InputError'"),
        ({"mean": np.float64("nan")}, "its meta.json cannot be"),
    ],
)
def test_meta_that_nobody_can_use_is_refused_at_once(tmp_path, changed, sentence):
    with pytest.raises(InputError, match=sentence), write_dataset(tmp_path / "catch", **META | changed):
        raise AssertionError("too late")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"observation": np.zeros((1, 10, 5)), "action": [], "reward": []}, "one observation more"),
        ({"observation": np.zeros((4, 10, 5), np.float32)}, "one observation more"),
        ({"reward": np.zeros(3)}, "one observation more"),
        ({"action": np.array([0, 3])}, "actions are from 0 to 2, but here is 3"),
        ({"action": np.array([-1, 0])}, "actions are from 0 to 2, but here is -1"),
        ({"observation": np.full((3, 10, 5), np.inf, np.float32)}, "not finite"),
        ({"action": np.array([0.0, 1.0])}, "actions are integers, not float64"),
        ({"action": np.array([True, False])}, "actions must be an array of numbers, .* not bool"),
        ({"action": np.zeros((2, 2), int)}, r"actions are one number a step, not an array \(2, 2\)"),
        ({"action": 1}, r"actions must be an array .* not int64 \(\)"),
        ({"reward": np.array([0, 1e39])}, "rewards are float64, and do not fit into float32, or are not finite"),
        ({"observation": [[1.0], [1.0, 2.0], [1.0]]}, "observations have no common shape"),
        ({"observation": np.zeros(3)}, r"an observation has the shape \(\), but they are arrays of one axis or more"),
        ({"observation": np.zeros((3, 0))}, r"an observation has the shape \(0,\)"),
        *(({"terminal": x}, "terminal is True or False, not") for x in (None, "no", 2, 0.5, np.array([True, False]))),
    ],
)
def test_episodes_that_do_not_fit_are_refused_at_once(tmp_path, changed, sentence):
    with pytest.raises(InputError, match=sentence), write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(**EPISODE | changed)
    assert list(tmp_path.iterdir()) == []


FRAMES = np.arange(3 * 84 * 84).reshape(3, 84, 84) % 256


@pytest.mark.parametrize(
    ("benchmark", "changed", "dtype"),
    [
        ("own", {"observation": np.full((3, 2), 0.1)}, np.float32),
        ("own", {"observation": np.full((3, 2), 0.5, ">f8")}, np.float32),
        ("own", {"observation": np.full((3, 2), -(2**24))}, np.float32),
        ("own", {"observation": np.full((3, 128), 255, np.uint8)}, np.float32),
        ("own", {"observation": FRAMES.astype(np.uint8)}, np.uint8),
        ("own", {"observation": FRAMES}, np.float32),
        ("atari", {"observation": FRAMES.astype(np.uint8)}, np.uint8),
        ("atari", {"observation": FRAMES}, np.uint8),
        ("own", {"action": [np.int64(2), 1], "reward": [np.float64(0.1), 3]}, np.float32),
        ("own", {"terminal": np.bool_(False)}, np.float32),
    ],
)
def test_what_can_be_converted_is(tmp_path, benchmark, changed, dtype):
    episode = EPISODE | changed
    with write_dataset(tmp_path / "own", **META | {"benchmark": benchmark}) as writer:
        writer.add_episode(**episode)
    data = open_dataset(tmp_path / "own")
    assert data.observation.dtype == dtype and np.array_equal(data.observation, np.asarray(episode["observation"], dtype))
    assert data.action.tolist() == [*episode["action"], 0]
    assert data.reward.tolist() == [*np.asarray(episode["reward"], np.float32), 0]
    assert data.is_terminal.tolist() == [False, False, episode["terminal"]]


@pytest.mark.parametrize("frames", [FRAMES + 0.5, FRAMES + 1, FRAMES - 1])
def test_frames_of_atari_are_bytes(tmp_path, frames):
    with write_dataset(tmp_path / "own", **META | {"benchmark": "atari"}) as writer:
        with pytest.raises(InputError, match="do not fit into uint8"):
            writer.add_episode(**EPISODE | {"observation": frames})
        writer.add_episode(**EPISODE | {"observation": FRAMES})


def test_observations_that_differ_from_earlier_ones_are_refused(tmp_path):
    with write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(**EPISODE)
        with pytest.raises(InputError, match=r"observations change from .*\(10, 5\).* to .*\(10, 4\)"):
            writer.add_episode(**EPISODE | {"observation": np.zeros((3, 10, 4), np.float32)})


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)  # a dataset is on the disk before it appears
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "catch")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_dataset_and_is_cleaned_up(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal, numpy as np
        from data.dataset import write_dataset
        with write_dataset({str(tmp_path / "catch")!r}, env_id="catch", num_actions=3) as writer:
            writer.add_episode(np.zeros((3, 10, 5), np.float32), [0, 0], [0, 0], terminal=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    result = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."}, timeout=60)
    assert result.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match=r"meta\.json is missing"):
        open_dataset(tmp_path / "catch")
    assert len(list(tmp_path.iterdir())) == 1  # what the killed program left, hidden
    write(tmp_path / "catch")
    assert [path.name for path in tmp_path.iterdir()] == ["catch"]


def test_writers_side_by_side_do_not_clean_each_other_up(tmp_path):
    with write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(**EPISODE)
        write(tmp_path / "catch_2")
        with pytest.raises(InputError, match="appeared meanwhile"), write_dataset(tmp_path / "catch_3", **META) as late:
            write(tmp_path / "catch_3")
            late.add_episode(**EPISODE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catch", "catch_2", "catch_3"]


def failing(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("name another folder"), 2, "error: name another folder\n"),
        (OSError(errno.ENOSPC, "No space"), 2, "error: [Errno 28] No space\n"),
        (PermissionError(errno.EACCES, "No right", "/root/x"), 2, "error: [Errno 13] No right: '/root/x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(capsys, monkeypatch, error, code, sentence):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_program(failing(error))
    assert end.value.code == code and capsys.readouterr() == ("", sentence)
    for other in (OSError(errno.EIO, "Input/output error"), ValueError()):
        with pytest.raises(type(other)):
            run_program(failing(other))
    run_program(lambda: 7)


def test_the_discount_decides_which_ends_of_bsuite_are_terminal(tmp_path, monkeypatch):
    class Short(catch.Catch):
        """Every second episode is truncated after four steps."""

        episodes = steps = 0

        def _reset(self):
            self.episodes, self.steps = self.episodes + 1, 0
            return super()._reset()

        def _step(self, action):
            self.steps += 1
            timestep = super()._step(action)
            over = self.steps == 4 and self.episodes % 2 == 0
            return dm_env.truncation(reward=0.0, observation=timestep.observation) if over else timestep

    monkeypatch.setitem(record_bsuite.ENVIRONMENTS, "catch", Short)
    data = open_dataset(record_bsuite.record("catch", episodes=4, out=tmp_path / "catch"))
    assert np.flatnonzero(data.is_last).tolist() == [9, 14, 24, 29]
    assert np.flatnonzero(data.is_terminal).tolist() == [9, 24]
