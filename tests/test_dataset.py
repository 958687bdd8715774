"""The dataset format: whole or absent, and checked when opened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from data.dataset import FIELDS, InputError, describe, open_dataset, run_program, summarize, write_dataset

META = {"benchmark": "bsuite", "env_id": "catch", "num_actions": 3}
EPISODE = {
    "observation": np.zeros((3, 10, 5), np.float32), "action": np.array([2, 0]), "reward": np.zeros(2), "terminal": True,
}  # fmt: skip


def write(path, lengths=(4, 7, 5)):
    random = np.random.default_rng(0)
    with write_dataset(path, **META) as writer:
        for i, length in enumerate(lengths):
            observation = random.normal(size=(length + 1, 10, 5)).astype(np.float32)
            writer.add_episode(observation, random.integers(3, size=length), np.full(length, i), terminal=i % 2 == 0)
    return path


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


def test_summaries():
    assert summarize([*range(5), *range(100, 115)]) == {
        **{"episodes": 20, "mean": pytest.approx((10 + 15 * 107) / 20), "min": 0, "max": 114},
        **{"mean_first_tenth": 0.5, "mean_last_tenth": 113.5},
    }
    assert describe([1.0, 2.0]) == "episodes 2, mean 1.5, min 1, max 2, mean first tenth 1, mean last tenth 2"
    assert describe([]) == "episodes 0"


def test_an_error_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(**EPISODE)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"observation": np.zeros((1, 10, 5)), "action": [], "reward": []}, "one observation more"),
        ({"observation": np.zeros((4, 10, 5), np.float32)}, "one observation more"),
        ({"action": np.zeros(1)}, "one observation more"),
        ({"reward": np.zeros(3)}, "one observation more"),
        ({"observation": np.zeros((2, 10, 5), np.float32)}, "one observation more"),
        ({"action": np.array([0, 3])}, "actions are from 0 to 2, but here is 3"),
        ({"action": np.array([-1, 0])}, "actions are from 0 to 2, but here is -1"),
        ({"reward": np.array([0, np.nan])}, "not finite"),
        ({"observation": np.full((3, 10, 5), np.inf, np.float32)}, "not finite"),
        ({"observation": np.zeros((3, 10, 4), np.float32)}, r"observations change from .*\(10, 5\).* to .*\(10, 4\)"),
        ({"observation": np.zeros((3, 10, 5), np.uint8)}, "observations change from .*float32.* to .*uint8"),
    ],
)
def test_episodes_that_do_not_fit_are_refused_at_once(tmp_path, changed, sentence):
    with pytest.raises(InputError, match=sentence), write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(**EPISODE)
        writer.add_episode(**EPISODE | changed)
    assert list(tmp_path.iterdir()) == []


def test_no_episode(tmp_path):
    with pytest.raises(InputError, match="no episode"), write_dataset(tmp_path / "catch", **META):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)  # a dataset is on the disk before it appears
    with pytest.raises(InputError, match=r"the disk is full: .*catch needs more"):
        write(tmp_path / "catch")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_dataset_and_is_cleaned_up(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal, numpy as np
        from data.dataset import write_dataset
        with write_dataset({str(tmp_path / "catch")!r}, env_id="catch", num_actions=3) as writer:
            writer.add_episode(np.zeros((3, 10, 5), np.float32), np.zeros(2), np.zeros(2), terminal=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    result = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."}, timeout=60)
    assert result.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="no dataset folder"):
        open_dataset(tmp_path / "catch")
    assert len(list(tmp_path.iterdir())) == 1  # what the killed program left, hidden
    write(tmp_path / "catch")
    assert [path.name for path in tmp_path.iterdir()] == ["catch"]


def test_writers_side_by_side_do_not_clean_each_other_up(tmp_path):
    with write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(**EPISODE)
        write(tmp_path / "catch_2")
        with pytest.raises(InputError, match="appeared"), write_dataset(tmp_path / "catch_3", **META) as late:
            write(tmp_path / "catch_3")
            late.add_episode(**EPISODE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catch", "catch_2", "catch_3"]


def test_what_was_there_is_left_alone(tmp_path):
    (tmp_path / ".catch.mine").mkdir()
    write(tmp_path / "catch")
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "catch")
    assert (tmp_path / ".catch.mine").exists()


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def change(field, index, value):
    def damage(folder):
        array = np.load(folder / f"{field}.npy")
        array[index] = value
        np.save(folder / f"{field}.npy", array)

    return damage


def edit_meta(**entries):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text()) | entries
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def save(field, array):
    return lambda folder: np.save(folder / f"{field}.npy", array)


def empty(folder):
    for field in FIELDS:
        save(field, np.load(folder / f"{field}.npy")[:0])(folder)
    edit_meta(steps=0, episodes=0)(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no dataset folder"),
        (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
        (lambda folder: (folder / "meta.json").write_text('{"steps"'), "meta.json is missing, damaged or cut short"),
        (edit_meta(num_actions="3"), "meta.json is missing, damaged or cut short"),
        (edit_meta(format_version=9), "format version is not 1"),
        (edit_meta(env_id=None), "names no env_id"),
        (edit_meta(observation_shape=[5, 10]), r"observations are \[10, 5\], and meta.json says otherwise"),
        (edit_meta(steps=20), "meta.json says 20 steps"),
        (edit_meta(episodes=4), "does not mark 4 episodes"),
        (empty, "meta.json says 0 steps"),
        (lambda folder: (folder / "reward.npy").unlink(), "reward.npy is missing"),
        *((lambda folder, f=f: truncate(folder / f"{f}.npy"), f"{f}.npy is missing, damaged or cut short") for f in FIELDS),
        (lambda folder: (folder / "action.npy").write_bytes(b""), "action.npy is missing, damaged or cut short"),
        (save("action", np.zeros(19, np.int64)), r"action.npy .* holds int64 \(19,\)"),
        (save("action", np.zeros((19, 1), np.int32)), r"action.npy .* holds int32 \(19, 1\)"),
        (save("observation", np.zeros((19, 10, 5))), "observation.npy .* holds float64"),
        (save("observation", np.zeros((18, 10, 5), np.float32)), "meta.json says 19 steps"),
        (edit_meta(benchmark="atari"), "observation.npy .* holds float32"),  # frames are uint8
        (change("is_first", 3, True), "do not mark whole episodes"),
        (change("is_last", 18, False), "do not mark whole episodes"),
        (change("is_terminal", 3, True), "not an episode's last"),
        (change("action", 0, 3), "outside 0 to 2"),
        (change("action", 0, -1), "outside 0 to 2"),
        (change("action", 4, 1), "an episode's last step has an action"),
        (change("reward", 4, 1), "an episode's last step has an action or a reward"),
        (change("reward", 0, np.nan), "not finite"),
        (change("observation", (0, 0, 0), np.inf), "not finite"),
    ],
)
def test_damage_is_named(tmp_path, damage, sentence):
    folder = write(tmp_path / "catch")
    damage(folder)
    with pytest.raises(InputError, match=sentence) as error:
        open_dataset(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def failing(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("name another folder"), 2, "error: name another folder\n"),
        (OSError(errno.ENOSPC, "No space"), 2, "error: the disk is full; what was whole before is still there\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "error: /root/x: Permission denied\n"),
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


def test_a_program_that_is_told_to_end_leaves_nothing(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal
        from data.dataset import run_program, write_dataset
        def program():
            with write_dataset({str(tmp_path / "catch")!r}, env_id="catch", num_actions=3) as writer:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
        run_program(program)
    """)
    result = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."}, timeout=60)
    assert result.returncode == 128 + signal.SIGTERM and list(tmp_path.iterdir()) == []
