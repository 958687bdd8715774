"""How the scripts read a dataset: what they refuse, which steps they keep, and the windows and frames that they train on."""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_atari
import rosmo_bsuite
from data.dataset import InputError, open_dataset, write_dataset
from tests.programs import TINY, is_atari, run

ATARI = rosmo_atari.Args(**TINY)
both = pytest.mark.parametrize("script", [rosmo_bsuite, rosmo_atari], ids=lambda script: script.__name__)


def write(path, script=rosmo_bsuite, lengths=(4, 7, 5), **meta):
    """Every observation holds its place in the dataset."""
    shape, dtype = ((84, 84), np.uint8) if is_atari(script) else ((10, 5), np.float32)
    benchmark, env_id = ("atari", "Breakout") if is_atari(script) else ("bsuite", "catch")
    with write_dataset(path, benchmark=benchmark, env_id=env_id, num_actions=3, **meta) as writer:
        for i, length in enumerate(lengths):
            start = sum(lengths[:i]) + i
            place = np.arange(start, start + length + 1).astype(dtype)
            observation = place[:, None, None] * np.ones(shape, dtype)
            writer.add_episode(observation, np.arange(length) % 3, np.full(length, i), terminal=i % 2 == 0)
    return path


def load(script, folder, **settings):
    """The steps that are kept, their rows, and meta.json."""
    settings = {"unroll_steps": 2, "bootstrap_steps": 2} | settings
    loaded = script.load_dataset(folder, script.Args(**settings))
    return loaded if is_atari(script) else (loaded[0], loaded[0].observation[:, 0].astype(int), loaded[2])


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


def empty(folder):
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path)[:0])
    edit_meta(steps=0)(folder)


DAMAGED = [  # files
    (shutil.rmtree, "missing or damaged .*meta.json"),
    (lambda folder: (folder / "meta.json").write_text("[]"), "missing or damaged"),
    (edit_meta(steps=20), "do not hold 20"),
    *((lambda folder, f=f: os.truncate(folder / f"{f}.npy", 100), "missing or") for f in rosmo_bsuite.Steps._fields),
    (change("action", 0, 0, np.float32), "integers"),
    (change("is_last", 0, 0, np.uint8), "flags"),
    (lambda folder: np.save(folder / "observation.npy", np.zeros((19, 84, 84), np.int32)), "floats|bytes"),
    (lambda folder: np.save(folder / "action.npy", np.zeros(18, np.int32)), "do not hold 19"),
    (lambda folder: np.save(folder / "action.npy", np.zeros((19, 1), np.int32)), "do not hold 19"),
]


@both
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        *DAMAGED,
        (change("is_first", 3, True), "does not mark whole episodes"),
        (change("is_first", 0, False), "does not mark whole episodes"),
        (change("is_last", 18, False), "does not mark whole episodes"),
        (change("is_terminal", 3, True), "does not mark whole episodes"),
        (empty, "does not mark whole episodes|missing or damaged"),
        (change("action", 0, 3), "actions outside 0 to 2"),
        (change("action", 0, -1), "actions outside 0 to 2"),
        (change("reward", 4, 1), "a reward at an episode's last step"),
        (change("reward", 0, np.nan), "not finite"),
        (edit_meta(reference_returns={"random": 1, "online_dqn": 1}), "has equal reference_returns"),
        (edit_meta(reference_returns={"random": 1}), "missing or damaged .*online_dqn"),
    ],
)
def test_damage_is_named(script, tmp_path, damage, sentence):
    folder = write(tmp_path / "data", script)
    assert load(script, folder)[1].tolist() == list(range(19))
    damage(folder)
    with pytest.raises(script.InputError, match=f"the dataset {folder} .*{sentence}"):
        load(script, folder)


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGED])
def test_damaged_files_are_named(tmp_path, damage):
    """By data.dataset too."""
    folder = write(tmp_path / "data")
    damage(folder)
    with pytest.raises(InputError, match=str(folder)) as error:
        open_dataset(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("script", "damage", "settings", "sentence"),
    [
        (rosmo_bsuite, change("observation", (0, 0, 0), np.inf), {}, "numbers that are not finite"),
        (rosmo_bsuite, edit_meta(), {"env_id": "cartpole", "noise": 0.1}, r"of \('catch', 0.1\), not of \('cartpole', 0.1"),
        (rosmo_bsuite, edit_meta(), {"noise": 0.2}, r"of \('catch', 0.1\), not of \('catch', 0.2\) \(--env-id, --noise"),
        (rosmo_bsuite, edit_meta(), {"unroll_steps": 6, "noise": 0.1}, "no episode taken of .* K"),
        (rosmo_bsuite, change("reward", 0, -200), {}, "rewards or discounted returns that need --num-bins 29 or more"),
        (rosmo_bsuite, change("reward", slice(0, 2), (200, -200)), {"discount": 1}, "need --num-bins 29 or more"),
        (rosmo_bsuite, edit_meta(), {"num_bins": 5, "discount": 1}, "need --num-bins 7 or more"),
        (rosmo_atari, lambda x: np.save(x / "observation.npy", np.zeros((19, 84, 84, 4), np.uint8)), {}, "not uint8 84 x"),
        (rosmo_atari, lambda x: np.save(x / "observation.npy", np.zeros((19, 84, 84), np.uint16)), {}, "not uint8 84 x"),
        (rosmo_atari, lambda x: np.save(x / "observation.npy", np.zeros((84, 84, 19), np.uint8).T), {}, "in C order"),
        (rosmo_atari, edit_meta(), {"unroll_steps": 6}, "no episode taken of .* K"),
    ],
)
def test_datasets_that_do_not_fit(tmp_path, script, damage, settings, sentence):
    folder, fitting = write(tmp_path / "data", script, noise=0.1), {} if is_atari(script) else {"noise": 0.1}
    assert len(load(script, folder, **fitting, unroll_steps=5)[1]) == 19  # a window of 8 is the longest episode
    damage(folder)
    with pytest.raises(script.InputError, match=sentence):
        load(script, folder, **fitting | settings)


def test_the_datas_actions_are_the_games(tmp_path):
    """Compared before anything is made; on BSuite: test_use.py."""
    folder, run_dir = write(tmp_path / "data", rosmo_atari), tmp_path / "run"
    with pytest.raises(rosmo_atari.InputError, match=r"has .*actions.*, the dataset .*"):
        rosmo_atari.main(rosmo_atari.Args(**TINY, total_steps=1, data_dir=folder, run_dir=run_dir))
    assert not run_dir.exists()


def test_too_many_actions_for_an_exact_look_ahead():
    with pytest.raises(rosmo_bsuite.InputError, match="name --sampling"):
        rosmo_bsuite.label_dataset(None, None, rosmo_bsuite.Model(5000, rosmo_bsuite.Args()))


def test_vectors_and_matrices_become_vectors(tmp_path):
    folder = write(tmp_path / "data")
    vectors = np.random.default_rng(0).normal(size=(19, 7)).astype(np.float32)
    for shape in ((7,), (7, 1), (1, 7, 1)):
        np.save(folder / "observation.npy", vectors.reshape(19, *shape))
        data, _, meta = load(rosmo_bsuite, folder)
        assert np.array_equal(data.observation, vectors) and tuple(meta["observation_shape"]) == shape
        assert np.flatnonzero(data.is_last).tolist() == [4, 12, 18] and np.flatnonzero(data.is_terminal).tolist() == [4, 18]


@both
def test_a_fraction_is_evenly_spaced_and_chosen_by_seed(script, tmp_path):
    folder = write(tmp_path / "data", script, lengths=[7] * 100)
    if script is rosmo_bsuite:
        np.save(folder / "observation.npy", np.arange(800, dtype=np.float32)[:, None])

    def kept(fraction, seed):
        data, rows, _ = load(script, folder, data_fraction=fraction, seed=seed, num_bins=601)
        assert (np.diff(rows.reshape(-1, 8)) == 1).all() and (rows[::8] % 8 == 0).all()
        assert is_atari(script) or (data.is_first[::8].all() and len(data.action) == len(rows))
        return rows[::8] // 8  # the episodes' numbers

    first, second = kept(0.1, 0), kept(0.1, 1)
    for numbers in (first, second):
        assert (numbers // 10).tolist() == list(range(10))  # one of every ten
    assert not np.array_equal(first, second)
    assert [len(kept(fraction, 0)) for fraction in (0.001, 0.144, 0.29, 0.7, 1.0)] == [1, 14, 29, 70, 100]


def test_the_default_dataset(tmp_path, monkeypatch, catch_dataset):
    """What is there is taken; what is missing is recorded; what is named is not. The run has a folder by its second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rosmo_bsuite.time, "strftime", lambda _: "20260101-000000")
    recorded, small = [], {"total_steps": 1, "eval_episodes": 0, "batch_size": 2}

    def record_if_missing(env_id, noise):
        recorded.append((env_id, noise))
        if not (folder := tmp_path / "datasets/bsuite/catch_noise_0.1").exists():
            shutil.copytree(catch_dataset, folder)
            edit_meta(noise=0.1)(folder)

    recorder = types.SimpleNamespace(record_if_missing=record_if_missing)
    monkeypatch.setitem(sys.modules, "data.record_bsuite", recorder)
    rosmo_bsuite.main(rosmo_bsuite.Args(**small, noise=0.1))
    with pytest.raises(FileExistsError, match="runs/catch__rosmo_bsuite__0__20260101-000000"):
        rosmo_bsuite.main(rosmo_bsuite.Args(**small, noise=0.1))
    assert recorded == 2 * [("catch", 0.1)]
    for settings in ({"data_dir": "nowhere"}, {"env_id": "plant"}):
        with pytest.raises(rosmo_bsuite.InputError, match="is missing or damaged"):
            rosmo_bsuite.main(rosmo_bsuite.Args(**small | settings))
    atari = types.SimpleNamespace(record_if_missing=lambda *args, **kwargs: recorded.append((args, kwargs)))
    monkeypatch.setitem(sys.modules, "data.record_atari", atari)
    with pytest.raises(rosmo_atari.InputError, match="datasets/atari/Pong is missing or damaged"):
        run(rosmo_atari, ["--env-id", "Pong", "--rom-dir", "roms"])
    assert recorded[2:] == [(("Pong",), {"rom_dir": Path("roms")})]


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


@pytest.mark.parametrize(("fraction", "room", "placed"), [(1.0, 0.9, "host"), (0.5, 1.1, "shares"), (0.5, 3.0, "whole")])
def test_batches_are_the_same_wherever_the_frames_are(breakout_dataset, monkeypatch, fraction, room, placed):
    """They are the rows that sample_windows names of the episodes that are kept, in the order of the updates.

    room: of two devices, in units of the frames. Twice the frames must fit where they go.
    """
    args = dataclasses.replace(ATARI, data_fraction=fraction)
    data, rows, _ = rosmo_atari.load_dataset(breakout_dataset, args)
    assert isinstance(data.observation, np.memmap)  # frames stay on the disk
    stats = {"bytes_limit": int(room * len(rows) * 84 * 84), "bytes_in_use": 0}
    local, shapes, read = jax.local_devices(), list[tuple](), rosmo_atari.read_frames
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: stats), *local[1:]])
    monkeypatch.setattr(rosmo_atari, "read_frames", lambda x, at: shapes.append(at.shape) or read(x, at))
    key = jax.random.PRNGKey(3)
    split, windows_key = jax.sharding.NamedSharding(key.sharding.mesh, jax.P("batch")), jax.random.split(key, 3)[0]
    windows = rosmo_atari.batches(data, rows, key, 7, args)
    for t in range(7, 14):
        batch = next(windows)
        assert batch.observation.shape == (4, 8, 84, 84) and batch.observation.dtype == np.uint8
        index = rows[np.asarray(rosmo_atari.sample_windows(jax.random.fold_in(windows_key, t), len(rows), args))]
        for ours, whole in zip(batch, data, strict=True):
            assert np.array_equal(ours, whole[index]) and ours.sharding == split
    if placed == "host":
        assert all(shape == (2, 8) for shape in shapes)
    else:  # the rows in two halves: each device reads one, or both at once
        assert {shape[0] for shape in shapes} == {{"shares": 1, "whole": 2}[placed]}
        assert sum(map(math.prod, shapes)) == len(rows) + len(rows) % 2


@pytest.mark.timeout(60)
def test_reading_ahead(tmp_path, monkeypatch):
    """No more than four batches before their use; an error comes out where its batch is used."""
    data, rows, _ = rosmo_atari.load_dataset(write(tmp_path / "data", rosmo_atari), ATARI)
    devices, reads, read_frames = jax.device_count(), list[tuple](), rosmo_atari.read_frames

    def read(file, at):
        reads.append(at.shape)
        if len(reads) > 9 * devices:
            raise OSError("the disk has gone")
        return read_frames(file, at)

    monkeypatch.setattr(rosmo_atari, "read_frames", read)
    windows = rosmo_atari.batches(
        data, rows, jax.random.PRNGKey(0), 0, dataclasses.replace(ATARI, data_place="host", data_readers=4)
    )
    for used in range(1, 10):
        assert next(windows).reward.shape == (4, 8)
        time.sleep(0.1)  # for what may be read by now
        assert used * devices <= len(reads) <= (used + 4) * devices
    with pytest.raises(OSError, match="the disk has gone"):
        next(windows)
