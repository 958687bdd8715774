"""The dataset format: whole or absent, and checked when opened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap

import dm_env
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from bsuite.environments import catch
from hypothesis import given, settings
from hypothesis import strategies as st

import rosmo_bsuite
from data import record_bsuite
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
        writer.meta |= {"found": np.int64(7), "odd": {1, 2}, "env_id": "pong", "steps": 0, "late": None, "noise": "0"}
    meta = open_dataset(tmp_path / "catch").meta
    assert meta["reference_returns"] == returns and meta["found"] == 7 and "note" not in meta
    assert (meta["odd"], meta["env_id"], meta["steps"]) == ("{1, 2}", "catch", 3) and not {"late", "noise"} & meta.keys()
    for name in ("reference_returns", "observation_shape"):  # folders written before these were there
        del meta[name]
    (tmp_path / "catch" / "meta.json").write_text(json.dumps(meta))
    assert open_dataset(tmp_path / "catch").meta == meta


def test_numpys_numbers_in_meta_become_pythons(tmp_path):
    numbers = {"noise": np.float32(0.5), "seed": np.uint8(3), "levels": np.arange(2), "names": {1: [np.bool_(True)]}}
    copied = {"format_version": 7, "steps": 99, "episodes": 0, "return_mean": 5.0}  # as if from another meta.json
    with write_dataset(tmp_path / "catch", **META | {"num_actions": np.int64(3)}, **numbers, **copied) as writer:
        writer.add_episode(**EPISODE)
    meta = open_dataset(tmp_path / "catch").meta
    assert {**META, "noise": 0.5, "seed": 3, "levels": [0, 1], "names": {"1": [True]}}.items() <= meta.items()
    assert (meta["format_version"], meta["steps"], meta["episodes"], meta["return_mean"]) == (1, 3, 1, 0)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        *(({"num_actions": n}, "num_actions is an integer of at least 1") for n in (0, 3.0, "3", None, np.arange(2), 2**40)),
        ({"env_id": None}, "names no env_id"),
        ({"env_id": 7}, "names no env_id"),
        ({"noise": "0.0"}, "its noise is '0.0', which is no number"),
        ({"reference_returns": {"random": 0.0}}, "not two numbers: random and, unlike it, online_dqn"),
        ({"reference_returns": {"random": 1.0, "online_dqn": 1.0}}, "not two numbers"),
        ({"reference_returns": [0, 1]}, "not two numbers"),
        ({"source": InputError}, "meta.json cannot hold source: JSON has no type"),
        ({"source": 1j}, "cannot hold source"),
        ({"levels": {(1, 2): 3}}, "cannot hold levels"),
        ({"mean": np.float64("nan")}, "cannot hold mean"),
    ],
)
def test_meta_that_nobody_can_use_is_refused_at_once(tmp_path, changed, sentence):
    with pytest.raises(InputError, match=sentence), write_dataset(tmp_path / "catch", **META | changed):
        raise AssertionError("too late")
    assert list(tmp_path.iterdir()) == []


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
        ({"action": np.zeros(1, int)}, "one observation more"),
        ({"reward": np.zeros(3)}, "one observation more"),
        ({"observation": np.zeros((2, 10, 5), np.float32)}, "one observation more"),
        ({"action": np.array([0, 3])}, "actions are from 0 to 2, but here is 3"),
        ({"action": np.array([-1, 0])}, "actions are from 0 to 2, but here is -1"),
        ({"reward": np.array([0, np.nan])}, "not finite"),
        ({"observation": np.full((3, 10, 5), np.inf, np.float32)}, "not finite"),
        ({"action": np.array([0.7, 1.7])}, "actions are integers, not float64"),
        ({"action": np.array([0.0, 1.0])}, "actions are integers, not float64"),
        ({"action": np.array([True, False])}, "actions must be an array of numbers, .* not bool"),
        ({"action": np.zeros((2, 2), int)}, r"actions are one number a step, not an array \(2, 2\)"),
        ({"action": 1}, r"actions must be an array .* not int64 \(\)"),
        ({"reward": np.zeros((2, 1))}, r"rewards are one number a step, not an array \(2, 1\)"),
        ({"reward": np.array([0, 1e39])}, "rewards are not finite, or beyond the range of float32"),
        ({"reward": np.array([0, 2**24 + 1])}, "rewards are int64, and cannot be stored as float32 without loss"),
        ({"reward": ["a", "b"]}, "rewards must be an array .* not <U1"),
        ({"observation": np.zeros((3, 10, 5), bool)}, "observations must be an array of numbers, .* not bool"),
        ({"observation": np.zeros((3, 10, 5), complex)}, "observations must be an array"),
        ({"observation": {"image": np.zeros((3, 10, 5))}}, "observations must be an array"),
        ({"observation": [[1.0], [1.0, 2.0], [1.0]]}, "observations have no common shape"),
        ({"observation": np.full((3, 10, 5), -1e39)}, "observations are not finite, or beyond the range of float32"),
        ({"observation": np.full((3, 10, 5), 2**63 - 1)}, "observations are int64, and cannot be stored as float32"),
        ({"observation": np.zeros(3)}, r"an observation has the shape \(\), but they are arrays of one axis or more"),
        ({"observation": np.zeros((3, 0))}, r"an observation has the shape \(0,\)"),
        *(({"terminal": x}, "terminal is True or False, not") for x in (None, "no", 2, 0.5, np.array([True, False]))),
    ],
)
def test_episodes_that_do_not_fit_are_refused_at_once(tmp_path, changed, sentence):
    with pytest.raises(InputError, match=sentence), write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(**EPISODE | changed)
    assert list(tmp_path.iterdir()) == []


def test_episodes_that_differ_from_earlier_ones_are_refused_and_the_others_kept(tmp_path):
    with write_dataset(tmp_path / "catch", **META) as writer:
        for observation, sentence in [
            (np.zeros((3, 10, 4), np.float32), r"observations change from .*\(10, 5\).* to .*\(10, 4\)"),
            (np.zeros((3, 84, 84), np.uint8), "observations change from .*float32.* to .*uint8"),
        ]:
            writer.add_episode(**EPISODE)
            with pytest.raises(InputError, match=sentence):
                writer.add_episode(**EPISODE | {"observation": observation})
    assert open_dataset(tmp_path / "catch").meta["episodes"] == 2


@pytest.mark.parametrize(
    ("observation", "sentence"),
    [
        (np.zeros((3, 10, 5), np.float32), r"shape \(10, 5\), but Atari's are single frames of 84x84"),
        (np.zeros((3, 4, 84, 84), np.uint8), r"shape \(4, 84, 84\), but Atari's are single"),
        (np.zeros((3, 84, 84), np.float32), "observations are float32, and cannot be stored as uint8"),
        (np.full((3, 84, 84), 256), "observations are int64, and cannot be stored as uint8"),
        (np.full((3, 84, 84), -1), "observations are int64, and cannot be stored as uint8"),
    ],
)
def test_other_frames_than_ataris_are_refused_at_once(tmp_path, observation, sentence):
    with (
        pytest.raises(InputError, match=sentence),
        write_dataset(tmp_path / "catch", **META | {"benchmark": "atari"}) as writer,
    ):
        writer.add_episode(**EPISODE | {"observation": observation})


FRAMES = np.arange(3 * 84 * 84).reshape(3, 84, 84) % 256


@pytest.mark.parametrize(
    ("benchmark", "changed", "dtype"),
    [
        ("own", {"observation": np.full((3, 2), 0.1)}, np.float32),
        ("own", {"observation": np.full((3, 2), 0.5, np.float16)}, np.float32),
        ("own", {"observation": np.full((3, 2), 0.5, ">f8")}, np.float32),
        ("own", {"observation": np.full((3, 2), -(2**24))}, np.float32),
        ("own", {"observation": np.full((3, 128), 255, np.uint8)}, np.float32),
        ("own", {"observation": [[1, 2], [3, 4], [5, 6]]}, np.float32),
        ("own", {"observation": FRAMES.astype(np.uint8)}, np.uint8),
        ("own", {"observation": FRAMES}, np.float32),
        ("atari", {"observation": FRAMES.astype(np.uint8)}, np.uint8),
        ("atari", {"observation": FRAMES}, np.uint8),
        ("own", {"action": [np.int64(2), 1], "reward": [np.float64(0.1), 3]}, np.float32),
        ("own", {"action": np.array([2, 1], np.uint64), "reward": np.array([-3, 2**30])}, np.float32),
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


def arrays(shapes, dtypes, **elements):
    return st.sampled_from(dtypes).flatmap(lambda dtype: hnp.arrays(dtype, st.sampled_from(shapes), **elements))


@st.composite
def recordings(draw):
    """A few episodes, of which some can be written and some not."""
    tail = draw(st.sampled_from([(2,), (2,), (2,), (2, 3), (84, 84), (), (0,)]))
    kinds = ("f4", "f8", "i8", "u1") * 3 + ("?", "f2", ">f4", "u8", "c8", "U1")
    episodes = []
    for n in draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)):
        actions = hnp.arrays(st.sampled_from(("i8", "i4", "u1")), n, elements=st.integers(0, 2))
        episode = {
            "observation": arrays([(n + 1, *tail)] * 5 + [(n, *tail)], kinds),
            "action": st.one_of(actions, actions, actions, arrays([n, (n, 2), (n, 1)], kinds)),
            "reward": arrays([n] * 5 + [(n, 1), n + 1], kinds),
            "terminal": st.sampled_from([True, False, np.bool_(True), 0, "no", np.array([True])]),
        }
        episodes.append({name: draw(strategy) for name, strategy in episode.items()})
    return episodes


def test_what_is_written_can_be_opened(tmp_path):
    seen = []

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(
        added=recordings(),
        benchmark=st.sampled_from(["bsuite", "bsuite", None, "atari"]),
        num_actions=st.sampled_from([3, np.int64(3), np.array(3), 0]),
        noise=st.sampled_from([0.0, np.float32(0.5), None, "0.0", np.nan]),
        references=st.sampled_from([None, {"random": np.float64(0), "online_dqn": 1}, {}, {"random": 0}]),
    )
    def check(added, benchmark, num_actions, noise, references):
        path, kept = tmp_path / str(len(seen)), []
        meta = {"benchmark": benchmark, "noise": noise, "reference_returns": references}
        try:
            with write_dataset(path, env_id="own", num_actions=num_actions, **meta) as writer:
                for episode in added:
                    try:
                        writer.add_episode(**episode)
                        kept.append(episode)
                    except InputError as error:
                        assert "\n" not in str(error)
        except InputError:
            assert kept == [] and not path.exists()
            return
        data, (steps, _) = open_dataset(path), rosmo_bsuite.open_dataset(path)
        for theirs in (data, steps):
            wanted = np.concatenate([episode["observation"] for episode in kept]).astype(theirs.observation.dtype)
            assert np.array_equal(theirs.observation, wanted)
            for field in ("action", "reward"):
                wanted = np.concatenate([episode[field] for episode in kept]).astype(getattr(theirs, field).dtype)
                assert np.array_equal(getattr(theirs, field)[~theirs.is_last], wanted)
            assert theirs.is_terminal[theirs.is_last].tolist() == [episode["terminal"] for episode in kept]
        seen.append(len(kept))

    check()
    assert len(seen) >= 10 and max(seen) > 1


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
            writer.add_episode(np.zeros((3, 10, 5), np.float32), [0, 0], [0, 0], terminal=True)
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


def test_places_that_cannot_be_written_to_are_named_at_once(tmp_path, monkeypatch):
    def mkdtemp(prefix, dir):
        raise OSError(errno.EROFS, "Read-only file system", f"{dir}/{prefix}")

    (tmp_path / "datasets").write_text("a file")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    for path, sentence in [
        ("datasets/bsuite/catch", r"datasets/bsuite/catch cannot be made: datasets/bsuite: Not a directory"),
        ("datasets/catch", r"datasets/catch cannot be made: datasets: File exists"),
        ("x" * 250, r"x cannot be made: .*: File name too long"),
        ("link", "link exists already"),
        ("new", r"new cannot be made: .*new\.partial-: Read-only file system"),
    ]:
        with monkeypatch.context() as read_only:
            if path == "new":
                read_only.setattr(tempfile, "mkdtemp", mkdtemp)
            with pytest.raises(InputError, match=sentence), write_dataset(path, **META):
                raise AssertionError("too late")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datasets", "link"]


def test_a_program_may_change_its_folder_while_it_writes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with write_dataset("own", **META) as writer:
        writer.add_episode(**EPISODE)
        monkeypatch.chdir("elsewhere")
    assert open_dataset(tmp_path / "own").meta["steps"] == 3


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
        (edit_meta(noise="0.0"), "its noise is '0.0', which is no number"),
        (edit_meta(noise=None), "its noise is None"),
        (edit_meta(reference_returns={"random": "0", "online_dqn": "1"}), "not two numbers"),
        (edit_meta(reference_returns="none"), "not two numbers"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json is missing, damaged or cut short"),
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
        (save("observation", np.zeros(19, np.float32)), r"observation.npy .* holds float32 \(19,\)"),
        (
            lambda folder: np.savez((folder / "action.npy").open("wb"), np.zeros(19)),
            "action.npy is missing, damaged",
        ),
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
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), 2, "error: /x/y: Read-only file system\n"),
        (FileExistsError(errno.EEXIST, "File exists", "datasets"), 2, "error: datasets: File exists\n"),
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


@pytest.mark.parametrize("env_id", record_bsuite.ENVIRONMENTS)
def test_bsuites_own_tasks_end_in_a_terminal_state(env_id):
    environment = record_bsuite.make_environment(env_id, seed=0)
    timestep = environment.reset()
    while not timestep.last():
        timestep = environment.step(1)
    assert timestep.discount == 0


def test_the_discount_decides_which_ends_of_bsuite_are_terminal(tmp_path, monkeypatch):
    class Short(catch.Catch):
        """Every second episode is cut off after four steps."""

        episodes = steps = 0

        def _reset(self):
            self.episodes, self.steps = self.episodes + 1, 0
            return super()._reset()

        def _step(self, action):
            self.steps += 1
            timestep = super()._step(action)
            cut = self.steps == 4 and self.episodes % 2 == 0
            return dm_env.truncation(reward=0.0, observation=timestep.observation) if cut else timestep

    monkeypatch.setitem(record_bsuite.ENVIRONMENTS, "catch", Short)
    data = open_dataset(record_bsuite.record("catch", episodes=4, out=tmp_path / "catch"))
    assert np.flatnonzero(data.is_last).tolist() == [9, 14, 24, 29]
    assert np.flatnonzero(data.is_terminal).tolist() == [9, 24]
