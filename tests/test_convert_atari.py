"""The converter of Atari datasets, against what TensorFlow Datasets and Dopamine themselves wrote and read."""

import errno
import gzip
import http.server
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from tfrecord import example_pb2

from data import dqn_replay, rl_unplugged
from data.convert_atari import FILES, OPEN, Args, convert, parse_shards, subset
from data.dataset import FIELDS, InputError, open_dataset
from data.tfrecords import masked_crc, read_records, step_arrays

FIXTURES = Path(__file__).parent / "fixtures"
RAW = FIXTURES / "rlu_breakout" / "raw"  # to RL Unplugged's layout
TFDS = FIXTURES / "rlu_breakout" / "tfds"  # prepared from it by TensorFlow Datasets' own builder
DQN = FIXTURES / "dqn_replay_breakout"  # saved by Dopamine's own replay buffer


def breakout(out, *source, **settings):
    return Args(env_id="Breakout", source=source, out=out, **settings)


def fixture_episodes(kept=None):
    """The steps that the converted dataset has to have, as TensorFlow Datasets reads them."""
    truth = np.load(FIXTURES / "rlu_breakout" / "truth.npz")
    ends = np.cumsum(truth["episodes"][:, 2])
    kept = range(len(ends)) if kept is None else kept
    steps = np.concatenate([np.arange(ends[i] - truth["episodes"][i, 2], ends[i]) for i in kept])
    truth = {field: truth[field][steps] for field in FIELDS}
    truth["observation"] = truth["observation"][..., 0]
    for field in ("action", "reward"):
        truth[field] = np.where(truth["is_last"], 0, truth[field])
    return truth


def assert_equals(folder, truth):
    data = open_dataset(folder)
    for field in FIELDS:
        assert np.array_equal(getattr(data, field), truth[field]), field
    return data


@pytest.mark.parametrize("source", [RAW, TFDS])
def test_rl_unplugged_equals_what_tensorflow_datasets_reads(tmp_path, source):
    data = assert_equals(convert(breakout(tmp_path / "new", source, percentage=100.0, max_episodes=99)), fixture_episodes())
    assert data.is_terminal.sum() < data.is_last.sum()  # the fixture has episodes that are cut off
    files = sorted(file for file in source.rglob("*") if file.is_file() and file.suffix != ".json")
    assert {
        **{"benchmark": "atari", "env_id": "Breakout", "num_actions": 4, "sticky_actions": 0.25, "rewards_clipped": True},
        **{"source": "RL Unplugged, recorded while a DQN learns", "files": [file.name for file in files]},
        **{"percentage": 100.0, "max_episodes": 99, "observation_shape": [84, 84]},
        **{"reference_returns": {"random": 1.33, "online_dqn": 157.86}},
    }.items() <= data.meta.items()
    name = "tfds" if source == TFDS else "rl_unplugged"
    estimate = OPEN[name]([file for file in files if FILES[name].fullmatch(file.name)])
    assert estimate.steps == pytest.approx(len(data.action), rel=0.1) and estimate.length == 238


def test_dqn_replay_equals_what_dopamine_was_given(tmp_path):
    truth = np.load(DQN / "truth.npz")
    data = open_dataset(convert(breakout(tmp_path / "new", DQN)))
    assert np.diff(np.flatnonzero(np.append(data.is_first, True))).tolist() == (truth["lengths"] + 1).tolist()
    for field in ("observation", "action", "reward"):
        assert np.array_equal(getattr(data, field)[~data.is_last], truth[field]), field
    last = np.flatnonzero(data.is_last)
    assert np.array_equal(data.observation[last], data.observation[last - 1])
    assert data.is_terminal[last].all() and data.meta["sticky_actions"] == 0.25 and "rewards_clipped" not in data.meta
    assert data.meta["reference_returns"] == {"random": 1.33, "online_dqn": 157.86}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"shards": ("1",)}, range(4, 8)),
        ({"shards": ("0", "2-2")}, [*range(4), *range(8, 12)]),
        ({"max_episodes": 5}, range(5)),
        ({"percentage": 25.0}, [3, 7, 11]),
        ({"percentage": 50.0, "max_episodes": 2}, [1, 3]),
    ],
)
@pytest.mark.parametrize("source", [RAW, TFDS])
def test_a_part_of_the_data(tmp_path, source, settings, kept):
    assert_equals(convert(breakout(tmp_path / "new", source, **settings)), fixture_episodes(kept))


def test_single_files(tmp_path):
    out = convert(breakout(tmp_path / "raw", RAW / "Breakout" / "run_1-00001-of-00003"))
    assert_equals(out, fixture_episodes(range(4, 8)))
    (file,) = TFDS.rglob("*checkpoint_02*")
    assert_equals(convert(breakout(tmp_path / "tfds", file)), fixture_episodes(range(8, 12)))
    out = convert(breakout(tmp_path / "dqn", DQN / "$store$_observation_ckpt.1.gz"))
    assert open_dataset(out).meta["episodes"] == 3


def test_percentages_are_spread_evenly():
    for percentage in (0.1, 1, 10, 33.3, 70, 100):
        taken = list(subset(range(10_000), percentage, None))
        assert len(taken) == round(100 * percentage) and np.ptp(np.diff(taken)) <= 1
    assert list(subset(iter(range(10)), 50, 3)) == [1, 3, 5]


def write_checkpoint(folder, number, observation, action, reward, terminal, add_count=None):
    folder.mkdir(exist_ok=True)
    arrays = {"observation": observation, "action": action, "reward": reward, "terminal": terminal}
    files = {f"$store$_{name}": array for name, array in arrays.items()}
    if add_count is not None:
        files["add_count"] = np.array(add_count)
    for name, array in files.items():
        with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb") as file:
            np.save(file, array)
    return folder


def replay_rows(rows, ends):
    random = np.random.default_rng(0)
    observation = random.integers(1, 256, (rows, 84, 84), np.uint8)
    terminal = np.isin(np.arange(rows), ends).astype(np.uint8)
    return [observation, random.integers(1, 4, rows).astype(np.int32), np.ones(rows, np.float32), terminal]


def test_a_checkpoints_edge_cuts_an_episode(tmp_path):
    columns = replay_rows(20, [8])
    for column in columns[:3]:
        column[9:12] = 0  # the second episode's padding; the first one began in the checkpoint before
    folder = write_checkpoint(tmp_path / "dqn", 0, *columns)
    write_checkpoint(folder, 1, *(column[:10] for column in columns))
    data = open_dataset(convert(breakout(tmp_path / "new", folder)))
    rows = [*range(9), 8, *range(12, 20), *range(9), 8]  # checkpoint 1 ends in an episode of padding alone
    assert np.array_equal(data.observation, columns[0][rows])
    assert np.flatnonzero(data.is_last).tolist() == [9, 17, 27] and np.flatnonzero(data.is_terminal).tolist() == [9, 27]
    assert data.reward.tolist() == [1] * 9 + [0] + [1] * 7 + [0] + [1] * 9 + [0]


def test_padding_is_three_rows_of_zeros(tmp_path):
    columns = replay_rows(20, [9, 19])
    columns[0][0:4] = columns[0][10:12] = columns[1][0:4] = columns[1][10:11] = 0
    data = open_dataset(convert(breakout(tmp_path / "new", write_checkpoint(tmp_path / "dqn", 0, *columns))))
    rows = [*range(3, 10), 9, *range(11, 20), 19]  # the fourth is a black frame; so is the second where there is an action
    assert np.array_equal(data.observation, columns[0][rows])


def test_episodes_that_are_too_long_to_be_true(tmp_path, monkeypatch):
    for module, source, sentence in ((dqn_replay, DQN, "more than 5 steps"), (rl_unplugged, RAW, "are no episode")):
        monkeypatch.setattr(module, "LONGEST", 5)
        with pytest.raises(InputError, match=sentence):
            convert(breakout(tmp_path / "new", source))


@pytest.mark.parametrize(
    ("add_count", "rows"),
    [(20, [*range(20)]), (12, [*range(12)]), (39, [*range(19)]), (47, [*range(7), *range(7, 20)])],
)
def test_the_place_where_a_replay_buffer_was_written_cuts_an_episode(tmp_path, add_count, rows):
    columns = replay_rows(20, [15] if add_count == 12 else [])  # what lies beyond the count was never written
    folder = write_checkpoint(tmp_path / "dqn", 0, *columns, add_count=add_count)
    data = open_dataset(convert(breakout(tmp_path / "new", folder)))
    assert np.array_equal(data.observation, columns[0][rows]) and not data.is_terminal.any()
    assert np.flatnonzero(data.is_first).tolist() == ([0, 7] if add_count == 47 else [0])


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def frame(record):
    """A record as it stands in a TFRecord file."""
    length = struct.pack("<Q", len(record))
    return length + struct.pack("<I", masked_crc(length)) + record + struct.pack("<I", masked_crc(record))


def drop_a_record(path):
    path.write_bytes(b"".join(map(frame, list(read_records(path))[:-1])))


def announce(path, size, pack):
    """A file that begins with a record of this size."""
    length = struct.pack("<Q", size)
    path.write_bytes(pack(length + struct.pack("<I", masked_crc(length)) + bytes(100)))


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_a_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def drop_a_frame(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[: -84 * 84]))


def one(folder, pattern):
    (path,) = folder.rglob(pattern)
    return path


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("source", "damage", "sentence"),
    [
        (RAW, lambda s: cut(one(s, "*00001-of*"), 90_000), r"run_1-00001-of-00003 is damaged or cut short at record \d"),
        (RAW, lambda s: flip_a_bit(one(s, "*00001-of*"), 90_000), r"run_1-00001-of-00003 is damaged .* at record \d"),
        (RAW, lambda s: flip_a_bit(one(s, "*00001-of*"), -3), r"run_1-00001-of-00003 is damaged .* at record 4"),
        (RAW, lambda s: cut(one(s, "*00002-of*"), 0), r"run_1-00002-of-00003 holds no episode"),
        (RAW, lambda s: one(s, "*00001-of*").unlink(), r"Breakout lacks shard 1; --shards converts a part"),
        (RAW, lambda s: one(s, "*00002-of*").unlink(), r"Breakout lacks shard 2; --shards converts a part"),
        (RAW, lambda s: (s / "Breakout").rename(s / "Pong"), r"run_1-00000-of-00003 is of Pong, not of Breakout"),
        (RAW, lambda s: shutil.rmtree(s / "Breakout"), r"holds no files of a known format"),
        (RAW, lambda s: shutil.copy(one(s, "*00-of*"), one(s, "*01-of*")), r"run_1-00001-of-00003 is a copy of .*00000-of"),
        (RAW, lambda s: replace_by_a_folder(one(s, "*01-of*")), r"run_1-00001-of-00003 is no file, or a link to nothing"),
        (RAW, lambda s: replace_by_a_dangling_link(one(s, "*01-of*")), r"run_1-00001-of-00003 is no file, or a link"),
        (
            RAW,
            lambda s: announce(one(s, "*01-of*"), 2**38, gzip.compress),
            r"00001-of-00003 .* record 0: .* 274877906944 by",
        ),
        (RAW, lambda s: announce(one(s, "*01-of*"), 2**31, bytes), r"00001-of-00003 is damaged at record 0"),
        (RAW, lambda s: one(s, "*02-of*").rename(s / "run_2-00000-of-00001"), r"several datasets .*run 2"),
        (TFDS, lambda s: cut(one(s, "*_01.tf*"), 90_000), r"checkpoint_01\.tfrecord-00000-of-00001 is damaged .* record \d"),
        (TFDS, lambda s: flip_a_bit(one(s, "*_01.tf*"), 90_000), r"checkpoint_01\.tfrecord-00000-of-00001 is damaged"),
        (TFDS, lambda s: one(s, "*_01.tf*").unlink(), r"1\.1\.0 lacks shard 1; --shards"),
        (TFDS, lambda s: one(s, "*_02.tf*").unlink(), r"1\.1\.0 lacks shard 2; --shards"),
        (TFDS, lambda s: drop_a_record(one(s, "*_01.tf*")), r"_01\.tfrecord\S* is damaged .* holds 3 ep.*info\.json says 4"),
        (TFDS, lambda s: cut(one(s, "*_02.tf*"), 0), r"_02\.tfrecord\S* is damaged .* it holds no episodes"),
        (TFDS, lambda s: edit(one(s, "dataset_info.json"), '"4"', '"x"'), r"dataset_info.json does not fit .*_00\.tf"),
        (TFDS, lambda s: edit(one(s, "dataset_info.json"), '"splits": [', '"splits": [7,'), r"dataset_info.json is damaged"),
        (TFDS, lambda s: shutil.copy(one(s, "*_00.tf*"), one(s, "*_01.tf*")), r"_01\.tfrecord\S* is a copy of \S*_00\.tf"),
        (TFDS, lambda s: replace_by_a_folder(one(s, "*_01.tf*")), r"_01\.tfrecord\S* is missing, or no file"),
        (TFDS, lambda s: replace_by_a_dangling_link(one(s, "*_01.tf*")), r"_01\.tfrecord\S* is (missing, or )?no file"),
        (TFDS, lambda s: announce(one(s, "*_01.tf*"), 2**38, bytes), r"_01\.tfrecord\S* .* 274877906944 bytes"),
        (TFDS, lambda s: edit(one(s, "features.json"), '"float32"', '"float99"'), r"record 0: steps/reward is .*float99"),
        (TFDS, lambda s: edit(one(s, "features.json"), '"float32"', "[]"), r"record 0: steps/reward is missing, or not as"),
        (
            TFDS,
            lambda s: edit(one(s, "features.json"), '"shape": {}', '"shape": 7'),
            r"record 0: steps/action is missing, or",
        ),
        (TFDS, lambda s: edit(one(s, "features.json"), '"image": {', '"picture": {'), r"not PNG images, but None"),
        (TFDS, lambda s: replace_by_a_folder(one(s, "features.json")), r"features.json does not describe episodes"),
        (TFDS, lambda s: one(s, "features.json").unlink(), r"holds 0 datasets"),
        (TFDS, lambda s: edit(one(s, "features.json"), '"png"', '"jpeg"'), r"not PNG images, but jpeg"),
        (TFDS, lambda s: edit(one(s, "dataset_info.json"), "Breakout_run", "Pong_run"), r"is of Pong, not of Breakout"),
        (TFDS, lambda s: edit(one(s, "dataset_info.json"), '"splits"', "splits"), r"dataset_info.json is damaged"),
        (DQN, lambda s: cut(one(s, "*observation_ckpt.1.gz"), 9_000), r"observation_ckpt.1.gz is damaged .* from row \d+"),
        (
            DQN,
            lambda s: drop_a_frame(one(s, "*observation_ckpt.1.gz")),
            r"observation_ckpt.1.gz is damaged .*: it ends there",
        ),
        (DQN, lambda s: flip_a_bit(one(s, "*observation_ckpt.0.gz"), 20_000), r"observation_ckpt.0.gz is damaged"),
        (DQN, lambda s: flip_a_bit(one(s, "*observation_ckpt.0.gz"), -6), r"observation_ckpt.0.gz is damaged"),
        (DQN, lambda s: flip_a_bit(one(s, "*reward_ckpt.0.gz"), 60), r"reward_ckpt.0.gz is damaged"),
        (DQN, lambda s: flip_a_bit(one(s, "*action_ckpt.0.gz"), -6), r"action_ckpt.0.gz is damaged"),
        (DQN, lambda s: cut(one(s, "*terminal_ckpt.1.gz"), 0), r"terminal_ckpt.1.gz is damaged"),
        (DQN, lambda s: one(s, "*reward_ckpt.1.gz").unlink(), r"reward_ckpt.1.gz is missing"),
        (
            DQN,
            lambda s: [shutil.copy(f, f"{f}"[:-4] + "1.gz") for f in s.glob("*_ckpt.0.gz")],
            r"ckpt.1.gz is a copy of .*0.gz",
        ),
        (DQN, lambda s: replace_by_a_folder(one(s, "*reward_ckpt.1.gz")), r"reward_ckpt.1.gz is damaged .*directory"),
        (DQN, lambda s: replace_by_a_dangling_link(one(s, "*terminal_ckpt.1.gz")), r"terminal_ckpt.1.gz is missing"),
        (DQN, lambda s: replace_by_a_dangling_link(one(s, "add_count_ckpt.1.gz")), r"add_count_ckpt.1.gz is missing"),
        (DQN, lambda s: replace_by_a_folder(one(s, "*observation_ckpt.1.gz")), r"observation_ckpt.1.gz is damaged .*dir"),
        (DQN, lambda s: one(s, "*observation_ckpt.0.gz").unlink(), r"source lacks shard 0; --shards"),
        (DQN, lambda s: shutil.copy(one(s, "*reward_ckpt.1.gz"), one(s, "*reward_ckpt.0.gz")), r"ckpt.0.gz holds uint8"),
    ],
)
def test_damaged_sources_are_named_and_nothing_is_left(tmp_path, source, damage, sentence):
    shutil.copytree(source, tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(InputError, match=sentence) as error:
        convert(breakout(tmp_path / "new", tmp_path / "source"))
    assert str(tmp_path / "source") in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("$store$_action", lambda x: x.astype(np.float32), r"action_ckpt.0.gz holds float32 \(20,\), not a column of int32"),
        ("$store$_action", lambda x: x.astype(np.int64), r"action_ckpt.0.gz holds int64 \(20,\), not a column of int32"),
        ("$store$_action", lambda x: x[0], r"action_ckpt.0.gz holds int32 \(\), not a column"),
        ("$store$_action", lambda x: x[:, None], r"action_ckpt.0.gz holds int32 \(20, 1\), not a column"),
        ("$store$_reward", lambda x: x.astype(np.float64), r"reward_ckpt.0.gz holds float64 \(20,\), not .* float32"),
        (
            "$store$_reward",
            lambda x: x * np.where(x.cumsum() == 7, np.nan, 1).astype(x.dtype),
            r"row 0: rewards are not finite",
        ),
        ("$store$_terminal", lambda x: x.astype(bool), r"terminal_ckpt.0.gz holds bool \(20,\), not a column of uint8"),
        ("$store$_terminal", lambda x: x * 255, r"terminal_ckpt.0.gz holds 255, but terminal is 0 or 1"),
        ("$store$_terminal", lambda x: x[:0], r"terminal_ckpt.0.gz holds uint8 \(0,\), not a column of uint8"),
        ("add_count", lambda x: np.int64(0), r"add_count_ckpt.0.gz holds int64 0, not one number of rows, from 1 on"),
        ("add_count", lambda x: np.int64(-20), r"add_count_ckpt.0.gz holds int64 -20, not one number"),
        ("add_count", lambda x: np.arange(2), r"add_count_ckpt.0.gz holds int64 \(2,\), not one number"),
        ("add_count", lambda x: np.array("20"), r"add_count_ckpt.0.gz holds <U2 '20', not one number"),
        ("add_count", lambda x: np.float64(20), r"add_count_ckpt.0.gz holds float64 20.0, not one number"),
    ],
)
def test_columns_of_other_things_are_refused(tmp_path, name, change, sentence):
    columns = replay_rows(20, [8])
    folder = write_checkpoint(tmp_path / "dqn", 0, *columns, add_count=20)
    path = folder / f"{name}_ckpt.0.gz"
    with gzip.open(path) as file:
        column = np.load(io.BytesIO(file.read()))
    with gzip.open(path, "wb") as file:
        np.save(file, change(column))
    with pytest.raises(InputError, match=sentence):
        convert(breakout(tmp_path / "new", folder))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["$store$_action", "$store$_terminal", "add_count"])
def test_arrays_that_no_memory_holds_are_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "dqn", 0, *replay_rows(20, [8]))
    with gzip.open(folder / f"{name}_ckpt.0.gz", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (2**50,)})
    with pytest.raises(InputError, match=r"_ckpt\.0\.gz is damaged or cut short"):
        convert(breakout(tmp_path / "new", folder))


def test_features_of_another_dtype_than_described_are_refused():
    tensors = {name: {"tensor": {"dtype": "bool", "shape": {}}} for name in ("is_first", "is_last", "is_terminal")}
    tensors["reward"] = {"tensor": {"dtype": "int32", "shape": {}}}
    example = {"steps/is_first": [1, 0], "steps/is_last": [0, 1], "steps/is_terminal": [0, 1], "steps/reward": [1.0, 0.5]}
    with pytest.raises(InputError, match=r"here: steps/reward is missing, or not as features\.json says: it is no int32"):
        step_arrays(example, ("reward",), tensors, "here")


def read_example(record):
    return example_pb2.Example.FromString(record)


def rewrite(path, change):
    """Writes the shard again after `change` has edited the example of its second episode, with true checksums."""
    with gzip.open(path.with_suffix(".new"), "wb") as file:
        for index, record in enumerate(read_records(path)):
            if index == 1:
                example = read_example(record)
                change(example.features.feature)
                record = example.SerializeToString()
            file.write(frame(record))
    path.with_suffix(".new").rename(path)


def png(shape, dtype=np.uint8):
    return cv2.imencode(".png", np.ones(shape, dtype))[1].tobytes()


def set_image(image):
    return lambda feature: feature["observations"].bytes_list.value.__setitem__(7, image)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_image(png((80, 84))), r"record 1, step 7: the observation is uint8 \(80, 84\), not a gray image of 84x84"),
        (set_image(png((84, 84, 3))), r"record 1, step 7: the observation is uint8 \(84, 84, 3\)"),
        (set_image(png((84, 84), np.uint16)), r"record 1, step 7: the observation is uint16"),
        (set_image(b"no image"), r"record 1, step 7: the observation is no image"),
        (set_image(b""), r"record 1, step 7: the observation is no image"),
        (
            lambda feature: feature["actions"].int64_list.value.__setitem__(5, 4),
            r"record 1: actions are from 0 to 3, but here is 4",
        ),
        (lambda feature: feature["actions"].int64_list.value.pop(), r"record 1: 10 observations, 9 actions"),
        (lambda feature: feature.pop("discounts"), r"record 1: the record is no episode of RL Unplugged"),
        (lambda feature: feature["discounts"].float_list.value.pop(), r"record 1: 10 observations and 9 discounts are no"),
        (
            lambda feature: feature["clipped_rewards"].bytes_list.value.extend([b"1"] * 10),
            r"record 1: 10 observations, 10 actions and 10 rewards are no episode",
        ),
        (
            lambda feature: feature["actions"].float_list.value.extend([1.0] * 10),
            r"record 1: actions are integers, not float32",
        ),
        (
            lambda feature: feature["clipped_rewards"].float_list.value.__setitem__(3, 4),
            r"record 1: reward 4 is not clipped",
        ),
        (
            lambda feature: feature["clipped_rewards"].float_list.value.__setitem__(3, -4),
            r"record 1: reward 4 is not clipped",
        ),
        (lambda feature: feature["clipped_rewards"].float_list.value.__setitem__(3, np.nan), r"record 1: .* not finite"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(tmp_path, change, sentence):
    shutil.copytree(RAW, tmp_path / "source")
    rewrite(one(tmp_path / "source", "run_1-00001*"), change)
    with pytest.raises(InputError, match=r"run_1-00001-of-00003, " + sentence):
        convert(breakout(tmp_path / "new", tmp_path / "source"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_episodes_without_a_step_are_passed_over(tmp_path):
    def shorten(feature):
        for name in ("observations", "actions", "clipped_rewards", "discounts"):
            values = getattr(feature[name], feature[name].WhichOneof("kind")).value
            del values[1:]

    shutil.copytree(RAW, tmp_path / "source")
    rewrite(one(tmp_path / "source", "run_1-00001*"), shorten)
    kept = [i for i in range(12) if i != 5]
    assert_equals(convert(breakout(tmp_path / "new", tmp_path / "source")), fixture_episodes(kept))


def test_another_games_actions_are_refused(tmp_path):
    shutil.copytree(DQN, tmp_path / "source")
    with pytest.raises(InputError, match=r"row 0: actions are from 0 to 2, but here is 3"):
        convert(Args("Freeway", source=(tmp_path / "source",), out=tmp_path / "new"))
    with pytest.raises(InputError, match="Breakout"):
        convert(Args("Brekout", source=(RAW,), out=tmp_path / "new"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"source": (Path("nowhere"),)}, "there is no nowhere"),
        ({"source": (FIXTURES / "rlu_breakout",)}, "several datasets"),
        ({"source": (RAW,), "format": "tfds"}, "no files of tfds"),
        ({"source": (RAW,), "run": 2}, "no files of a known format"),
        ({"source": (RAW,), "shards": ("3",)}, "Breakout lacks shard 3$"),
        ({"source": (DQN,), "shards": ("12",)}, "dqn_replay_breakout lacks shard 12$"),
        ({"source": (RAW,), "shards": ("2-1",)}, "numbers and ranges"),
        ({"source": (RAW,), "shards": ("all",)}, "numbers and ranges"),
        ({"source": (RAW,), "percentage": 0.0}, "above 0 and at most 100"),
        ({"source": (RAW,), "percentage": 100.1}, "above 0 and at most 100"),
        ({"source": (RAW,), "percentage": 1.0}, "no episode is left"),
        ({"source": (RAW,), "max_episodes": 0}, "at least 1"),
        ({}, "--source, or a run of RL Unplugged"),
    ],
)
def test_impossible_settings(tmp_path, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        convert(Args("Breakout", out=tmp_path / "new", **settings))
    assert list(tmp_path.iterdir()) == []
    assert parse_shards(("10-12", "3", "11")) == [3, 10, 11, 12] and parse_shards(("40-41", "8")) == [8, 40, 41]


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    with pytest.raises(InputError, match=r"needs about 0\.0075\d GB, and 0\.002 GB are free there: take less by --shards"):
        convert(breakout(tmp_path / "new", DQN))
    convert(breakout(tmp_path / "new", DQN, max_episodes=1))
    convert(breakout(tmp_path / "some", DQN, percentage=20.0))


def test_the_program(tmp_path):
    flags = ["--env-id", "Breakout", "--source", str(RAW), "--out", str(tmp_path / "new"), "--max-episodes", "2"]
    options = {"cwd": Path(__file__).parent.parent, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([sys.executable, "-m", "data.convert_atari", *flags], **options)
    assert result.returncode == 0 and "248 steps; returns: episodes 2, mean 1, min" in result.stdout


def test_a_killed_conversion_leaves_no_dataset_and_the_next_one_is_whole(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from data.convert_atari import Args, convert
        from data.dataset import DatasetWriter

        def add_episode(self, *arguments):
            if len(self.returns) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, *arguments)

        original, DatasetWriter.add_episode = DatasetWriter.add_episode, add_episode
        convert(Args("Breakout", source=(Path({str(RAW)!r}),), out=Path({str(tmp_path / "new")!r})))
    """)
    options = {"env": os.environ | {"PYTHONPATH": "."}, "capture_output": True, "timeout": 120}
    result = subprocess.run([sys.executable, "-c", program], **options)
    assert result.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".new.partial-")
    assert_equals(convert(breakout(tmp_path / "new", RAW)), fixture_episodes())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


class Bucket(http.server.BaseHTTPRequestHandler):
    """RL Unplugged's bucket with the fixture's shards; `drops` connections are closed after half of what they ask for."""

    protocol_version = "HTTP/1.1"
    ranges = True
    drops = 0
    gets: list[str]

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.gets.append(f"{self.path[-19:]} {self.headers['Range']}")
        self.answer(send=True)

    def answer(self, send):
        match = re.fullmatch(r"/bucket/atari_episodes_ordered/(Breakout)/(run_1-0000[012]-of)-00050", self.path)
        if not match:
            self.send_error(404)
            return
        assert self.headers["Accept-Encoding"] == "gzip"  # else the real bucket sends shards unpacked
        body = (RAW / match[1] / f"{match[2]}-00003").read_bytes()
        start = int(self.headers["Range"][6:-1]) if self.ranges and "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if send:
            whole = type(self).drops <= 0
            type(self).drops -= 1
            self.wfile.write(body[start:] if whole else body[start : (start + len(body)) // 2])
            self.close_connection = not whole

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(rl_unplugged, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(rl_unplugged, "SHARD_STEPS", 500)
    handler = type("Handler", (Bucket,), {"gets": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        handler.url = f"http://127.0.0.1:{server.server_port}/bucket"
        yield handler
        server.shutdown()


def download(tmp_path, bucket, **settings):
    settings = {"env_id": "Breakout", "run": 1, "shards": ("0-2",), "base_url": bucket.url} | settings
    return convert(Args(out=tmp_path / "new", download_dir=tmp_path / "downloads", **settings))


def downloaded(tmp_path):
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "downloads" / "Breakout").iterdir())}


WHOLE = {f"run_1-{i:05d}-of-00050": (RAW / "Breakout" / f"run_1-{i:05d}-of-00003").read_bytes() for i in range(3)}


@pytest.mark.parametrize(("ranges", "drops"), [(True, 0), (True, 6), (False, 2)])
def test_download(tmp_path, bucket, ranges, drops):
    bucket.ranges, bucket.drops = ranges, drops
    assert_equals(download(tmp_path, bucket, base_url=f"{bucket.url}/"), fixture_episodes())
    assert downloaded(tmp_path) == WHOLE and len(bucket.gets) == 3 + drops
    asked = [get for get in bucket.gets if not get.endswith("None")]
    assert len(asked) == drops and (not drops or "bytes=" in asked[0])
    shutil.rmtree(tmp_path / "new")
    download(tmp_path, bucket, shards=("1",))
    assert len(bucket.gets) == 3 + drops  # what is there is not downloaded again


def test_a_download_is_not_begun_without_room_for_the_dataset(tmp_path, bucket, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rl_unplugged, "SHARD_STEPS", 1_000_000)
    for free, settings, sentence in [
        (21e9, {}, r"new needs about 21\.2 GB, and 21 GB are free there: take less by --shards or --percentage"),
        (8e5, {"shards": ("1",), "percentage": 0.01}, r"new needs about 0\.000848 GB, .*free"),  # and the shard's own size
        (1e5, {"max_episodes": 1}, r"downloads needs about 0\.000486 GB, and 0\.0001 GB are free there"),
    ]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(InputError, match=sentence):
            download(tmp_path, bucket, **settings)
        assert bucket.gets == [] and list(tmp_path.iterdir()) == []
    for free, settings in [(15e9, {"percentage": 200 / 3}), (1e9, {"max_episodes": 1})]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        shutil.rmtree(download(tmp_path, bucket, **settings))
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="exists already"):
        download(tmp_path, bucket, shards=("0", "7"))


@pytest.mark.parametrize(("size", "asked"), [(50_000, "bytes=50000-"), (0, "None"), (10**6, "None")])
def test_a_broken_download_goes_on_where_it_stopped(tmp_path, bucket, size, asked):
    name = "run_1-00001-of-00050"
    folder = tmp_path / "downloads" / "Breakout"
    folder.mkdir(parents=True)
    (folder / f"{name}.partial").write_bytes((WHOLE[name] + bytes(10**6))[:size])
    (folder / name).write_bytes(b"something else")
    assert_equals(download(tmp_path, bucket, shards=("1",)), fixture_episodes(range(4, 8)))
    assert bucket.gets == [f"un_1-00001-of-00050 {asked}"] and downloaded(tmp_path) == {name: WHOLE[name]}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda self: self.connection.close(), ""),
        (lambda self: time.sleep(2), "timed out"),
    ],
)
def test_a_download_that_never_ends(tmp_path, bucket, monkeypatch, answer, reason):
    monkeypatch.setattr(rl_unplugged, "RETRIES", 2)
    monkeypatch.setattr(rl_unplugged, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(bucket, "do_GET", answer)
    with pytest.raises(InputError, match=rf"00000-of-00050 stopped at byte 0 of 201699: .*{reason}; the same command"):
        download(tmp_path, bucket)
    assert downloaded(tmp_path) == {"run_1-00000-of-00050.partial": b""} and not (tmp_path / "new").exists()


def test_a_full_disk_ends_a_download(tmp_path, bucket, monkeypatch):
    def open_url(url, method="GET", offset=0):
        if method == "GET":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(url, method, offset)

    original = rl_unplugged.open_url
    monkeypatch.setattr(rl_unplugged, "open_url", open_url)
    with pytest.raises(OSError, match="No space left"):
        download(tmp_path, bucket)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"run": 6}, r"run_6-00000-of-00050 cannot be had: .*404.*; check --env-id, --run and --shards"),
        ({"shards": ("0", "50")}, r"run_1-00050-of-00050 cannot be had: .*404"),
        ({"shards": ()}, r"run_1-00003-of-00050 cannot be had: .*404"),  # all are asked for; the fixture has three
        ({"base_url": "http://127.0.0.1:1"}, r"http://127.0.0.1:1/.* cannot be had: .*refused"),
        ({"base_url": "http://no.such.host.invalid"}, r"cannot be had"),
        ({"env_id": "Carnival", "shards": ()}, r"Carnival/run_1-00000-of-00049 cannot"),
        ({"env_id": "Gravitar", "shards": ()}, r"Gravitar/run_1-00000-of-00049 cannot"),
        ({"env_id": "StarGunner", "shards": ()}, r"StarGunner/run_1-00000-of-00049 cannot"),
        ({"env_id": "Brekout"}, "did you mean 'Breakout'"),
    ],
)
def test_nothing_to_download(tmp_path, bucket, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        download(tmp_path, bucket, **settings)
    assert list(tmp_path.iterdir()) == [] and bucket.gets == []
