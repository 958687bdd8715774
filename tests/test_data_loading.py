"""How the scripts read a dataset: what they refuse, which steps they keep, and the windows and frames that they train on."""

import dataclasses
import json
import os
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_atari
import rosmo_bsuite
from data.dataset import InputError, open_dataset, write_dataset
from tests.programs import TINY

ATARI = rosmo_atari.Args(**TINY)


def write(path, lengths=(4, 7, 5), env_id="catch", **meta):
    """Every observation holds its place in the dataset."""
    with write_dataset(path, benchmark="bsuite", env_id=env_id, num_actions=3, **meta) as writer:
        for i, length in enumerate(lengths):
            start = sum(lengths[:i]) + i
            observation = np.full((length + 1, 10, 5), np.arange(start, start + length + 1)[:, None, None], np.float32)
            writer.add_episode(observation, np.arange(length) % 3, np.full(length, i), terminal=i % 2 == 0)
    return path


def change(field, index, value, dtype=None):
    def damage(folder):
        array = np.load(folder / f"{field}.npy")
        array[index] = value
        np.save(folder / f"{field}.npy", array if dtype is None else array.astype(dtype))

    return damage


def edit_meta(**entries):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | entries))

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "catch/meta.json is missing"),
        (lambda folder: (folder / "meta.json").write_text('{"steps"'), "meta.json is missing, damaged"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json is missing, damaged"),
        (edit_meta(format_version=9), "its format version is not 1"),
        (edit_meta(steps=20), "meta.json says 20 steps"),
        (edit_meta(episodes=4), "does not mark 4 episodes"),
        (lambda folder: (folder / "reward.npy").unlink(), "reward.npy is missing"),
        *((lambda folder, f=f: os.truncate(folder / f"{f}.npy", 100), f"{f}.npy is") for f in rosmo_bsuite.Steps._fields),
        (change("action", 0, 0, np.int64), "action.npy .*it holds int64"),
        (change("is_last", 0, 0, np.uint8), "is_last.npy .*it holds uint8"),
        (change("observation", 0, 0, np.float64), "observation.npy .*it holds float64"),
        (lambda folder: np.save(folder / "action.npy", np.zeros((19, 1), np.int32)), r"action.npy .*int32 \(19, 1\)"),
        (lambda folder: np.save(folder / "observation.npy", np.zeros(19, np.float32)), "observation.npy .*float32"),
        (lambda folder: np.save(folder / "observation.npy", np.float32(3)), "observation.npy is"),
        (change("is_first", 3, True), "do not mark whole episodes"),
        (change("is_first", 0, False), "do not mark whole episodes"),
        (change("is_last", 18, False), "do not mark whole episodes"),
        (change("is_terminal", 3, True), "not an episode's last"),
        (change("action", 0, 3), "an action is outside 0 to 2"),
        (change("action", 0, -1), "an action is outside 0 to 2"),
        (change("action", 4, 1), "an episode's last step has an action or a reward"),
        (change("reward", 4, 1), "an episode's last step has an action or a reward"),
        (change("reward", 0, np.nan), "not finite"),
        (change("observation", (0, 0, 0), np.inf), "not finite"),
    ],
)
def test_damage_is_named(tmp_path, damage, sentence):
    """By the scripts, and by data.dataset too."""
    folder = write(tmp_path / "catch")
    rosmo_bsuite.open_dataset(folder)
    damage(folder)
    with pytest.raises(rosmo_bsuite.InputError, match=sentence):
        rosmo_bsuite.open_dataset(folder)
    with pytest.raises(InputError, match=sentence) as error:
        open_dataset(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def environment(shape, num_actions):
    spaces = types.SimpleNamespace(shape=shape), types.SimpleNamespace(n=num_actions)
    return types.SimpleNamespace(single_observation_space=spaces[0], single_action_space=spaces[1])


@pytest.mark.parametrize(
    ("settings", "shape", "num_actions", "sentence"),
    [
        ({"env_id": "cartpole"}, (10, 5), 3, r"\('catch', 3, \(10, 5\), 'float32'\), not .*\('cartpole', 3"),
        ({}, (10, 5), 4, r"\('catch', 3, \(10, 5\), 'float32'\), not .*\('catch', 4"),
        ({}, (1, 6), 3, r"not .*\('catch', 3, \(1, 6\)"),
        ({"noise": 0.2}, (10, 5), 3, "has noise 0.1, not 0.2: name it by --noise"),
        ({"unroll_steps": 5}, (10, 5), 3, "windows of 9 steps are longer than every episode of the data .at most 8"),
    ],
)
def test_datasets_that_do_not_fit(tmp_path, settings, shape, num_actions, sentence):
    fitting = {"noise": 0.1, "batch_size": 14, "data_dir": write(tmp_path / "catch", noise=0.1)}
    # A batch may be larger than the 13 windows: they are drawn with replacement.
    data, rows, meta = rosmo_bsuite.load_dataset(rosmo_bsuite.Args(**fitting), environment((10, 5), 3))
    assert np.array_equal(rows, np.arange(19)) and meta["noise"] == 0.1 and isinstance(data.observation, np.memmap)
    with pytest.raises(rosmo_bsuite.InputError, match=sentence):
        rosmo_bsuite.load_dataset(rosmo_bsuite.Args(**fitting | settings), environment(shape, num_actions))


def test_without_an_environment_the_dataset_tells_the_shapes(tmp_path):
    """A vector becomes a matrix of one row; other shapes are refused."""
    folder = write(tmp_path / "plant")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"env_id": "plant"}))
    args = rosmo_bsuite.Args(env_id="plant", batch_size=2, data_dir=folder, eval_episodes=0)
    vectors = np.random.default_rng(0).normal(size=(19, 7)).astype(np.float32)
    np.save(folder / "observation.npy", vectors)
    data, _, meta = rosmo_bsuite.load_dataset(args)
    assert np.array_equal(data.observation, vectors[:, None]) and meta["num_actions"] == 3
    np.save(folder / "observation.npy", np.zeros((19, 2, 3, 4), np.float32))
    with pytest.raises(rosmo_bsuite.InputError, match=r"not \(environment, actions, rows and columns, type"):
        rosmo_bsuite.load_dataset(args)


def test_atari_wants_frames_of_bytes(tmp_path):
    """Stacks and float32 are refused."""
    folder = write(tmp_path / "float")
    for shape, dtype in (((84, 84), np.float32), ((84, 84, 4), np.uint8)):
        np.save(folder / "observation.npy", np.zeros((19, *shape), dtype))
        with pytest.raises(rosmo_atari.InputError, match="the dataset has"):
            rosmo_atari.load_dataset(rosmo_atari.Args(**TINY, env_id="catch", data_dir=folder))


def test_a_fraction_is_evenly_spaced_and_chosen_by_seed(tmp_path):
    folder = write(tmp_path / "catch", lengths=[7] * 100)

    def kept(fraction, seed):
        args = rosmo_bsuite.Args(data_dir=folder, batch_size=1, data_fraction=fraction, seed=seed)
        data, rows, _ = rosmo_bsuite.load_dataset(args)
        assert (np.diff(rows.reshape(-1, 8)) == 1).all()
        assert data.is_first[rows[::8]].all() and data.is_last[rows[7::8]].all()
        return rows[::8] // 8  # the episodes' numbers

    first, second = kept(0.1, 0), kept(0.1, 1)
    for numbers in (first, second):
        assert (numbers // 10).tolist() == list(range(10))  # one of every ten
    assert not np.array_equal(first, second)
    assert [len(kept(fraction, 0)) for fraction in (0.001, 0.144, 0.29, 0.7, 1.0)] == [1, 14, 29, 70, 100]


def test_the_default_dataset(tmp_path, monkeypatch):
    """What is there is taken; what is missing is recorded; where there is no recorder, one sentence says what to do."""
    monkeypatch.chdir(tmp_path)
    args = rosmo_bsuite.Args(env_id="catch", noise=0.1)
    recorded = []
    recorder = type(sys)("data.record_bsuite")
    recorder.record_if_missing = lambda *arguments: recorded.append(arguments)
    monkeypatch.setitem(sys.modules, "data.record_bsuite", recorder)
    assert str(rosmo_bsuite.find_dataset(args)) == "datasets/bsuite/catch_noise_0.1" and recorded == [("catch", 0.1)]
    assert str(rosmo_bsuite.find_dataset(dataclasses.replace(args, data_dir=tmp_path / "x"))) == str(tmp_path / "x")
    (tmp_path / "datasets" / "bsuite" / "catch").mkdir(parents=True)
    assert str(rosmo_bsuite.find_dataset(rosmo_bsuite.Args())) == "datasets/bsuite/catch" and len(recorded) == 1
    monkeypatch.setitem(sys.modules, "data.record_bsuite", None)
    with pytest.raises(rosmo_bsuite.InputError, match=r"no dataset datasets/bsuite/catch_noise_0\.1: name .* --data-dir"):
        rosmo_bsuite.find_dataset(args)


# ------------------------------------------------------------------------------------------------------------- Windows


def test_windows_cover_the_dataset():
    """Every start as often as every other; on Atari with the three steps before it."""
    key = jax.random.PRNGKey(0)
    args = rosmo_bsuite.Args(batch_size=4096, unroll_steps=3, bootstrap_steps=2)
    index = np.asarray(rosmo_bsuite.sample_windows(key, 20, args))
    assert index.shape == (4096, 6) and (np.diff(index, axis=1) == 1).all()
    assert np.bincount(index[:, 0], minlength=15).min() > 200 and index.max() == 19
    index = np.asarray(rosmo_atari.sample_windows(key, 20, dataclasses.replace(ATARI, batch_size=4096)))
    assert index.shape == (4096, 8) and (np.diff(index[:, 3:], axis=1) == 1).all() and index.min() == 0
    assert np.bincount(index[:, 3], minlength=16).min() > 190 and index.max() == 19
    assert (index[:, :4] == np.maximum(index[:, 3:4] + np.arange(-3, 1), 0)).all()


def test_stacks_at_episode_starts():
    """Of every window of five episodes: the stack of step t holds the frames of t - 3 to t, none from before its episode."""
    lengths = [2, 3, 8, 5, 9]
    total, window = sum(lengths), 5
    starts = np.cumsum([0, *lengths])
    is_first = np.isin(np.arange(total), starts)
    frames = np.broadcast_to(np.arange(total, dtype=np.uint8)[:, None, None], (total, 84, 84))
    index = np.maximum(np.arange(total - window + 1)[:, None] + np.arange(-3, window), 0)
    columns = [jnp.asarray(np.arange(total)[index])] * 2 + [jnp.asarray(is_first[index])] * 3
    steps = rosmo_atari.stack_frames(rosmo_atari.Steps(jnp.asarray(frames[index]), *columns))
    stacks = np.asarray(steps.observation)
    assert stacks.shape == (total - window + 1, window, 84, 84, 4) and stacks.dtype == np.uint8
    assert np.array_equal(steps.action, index[:, 3:])
    for b in range(total - window + 1):
        for t in range(b, b + window):
            first = starts[starts <= t].max()
            assert stacks[b, t - b, 0, 0].tolist() == [max(t - 3 + i, first) for i in range(4)]
            assert (stacks[b, t - b] == stacks[b, t - b, :1, :1]).all()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_batches_from_host_and_device_are_equal(breakout_dataset, fraction):
    """They are the rows that sample_windows names of the episodes that are kept, in the order of the updates."""
    args = dataclasses.replace(ATARI, data_dir=breakout_dataset, data_fraction=fraction)
    data, rows, _ = rosmo_atari.load_dataset(args)
    key = jax.random.PRNGKey(3)
    host, device = (
        rosmo_atari.batches(data, rows, key, 7, dataclasses.replace(args, data_place=place)) for place in ("host", "device")
    )
    windows_key = jax.random.split(key, 3)[0]
    for t in (7, 8, 9):
        first, second = next(host), next(device)
        assert first.observation.shape == (4, 8, 84, 84) and first.observation.dtype == np.uint8
        index = rows[np.asarray(rosmo_atari.sample_windows(jax.random.fold_in(windows_key, t), len(rows), args))]
        for ours, theirs, whole in zip(first, second, data, strict=True):
            assert np.array_equal(ours, whole[index]) and np.array_equal(theirs, whole[index])
            assert ours.sharding == rosmo_atari.sharding("batch")


@pytest.mark.timeout(60)
def test_reading_ahead():
    """In order, no more than `ahead` calls before their use, and an error comes out where its batch is used."""
    read = []

    def slow(t):
        read.append(t)
        if t == 12:
            raise OSError("the disk has gone")
        return t

    items = rosmo_atari.read_ahead(slow, 7, ahead=3)
    for t in range(7, 12):
        assert next(items) == t and len(read) <= t - 7 + 4
    with pytest.raises(OSError, match="the disk has gone"):
        next(items)
