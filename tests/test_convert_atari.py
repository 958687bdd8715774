"""The converter of Atari datasets, against what TensorFlow Datasets and Dopamine themselves wrote and read."""

import gzip
import http.server
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from tfrecord import example_pb2

from data import rl_unplugged
from data.convert_atari import FILES, OPEN, Args, convert, parse_shards
from data.dataset import FIELDS, InputError, open_dataset
from data.tfrecords import masked_crc, read_records

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
    data = assert_equals(convert(breakout(tmp_path / "new", source)), fixture_episodes())
    assert data.is_terminal.sum() < data.is_last.sum()  # the fixture has truncated episodes
    files = sorted(file for file in source.rglob("*") if file.is_file() and file.suffix != ".json")
    assert {
        **{"benchmark": "atari", "env_id": "Breakout", "num_actions": 4, "sticky_actions": 0.25, "rewards_clipped": True},
        **{"source": "RL Unplugged, recorded while a DQN learns", "files": [file.name for file in files]},
        **{"percentage": 100.0, "observation_shape": [84, 84]},
        **{"reference_returns": {"random": 1.33, "online_dqn": 157.86}},
    }.items() <= data.meta.items()
    name = "tfds" if source == TFDS else "rl_unplugged"
    estimate = OPEN[name]([file for file in files if FILES[name].fullmatch(file.name)])
    assert estimate.steps == pytest.approx(len(data.action), rel=0.1)


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
        ({"shards": ("0", "2-2")}, [*range(4), *range(8, 12)]),
        ({"percentage": 25.0}, [3, 7, 11]),
        ({"percentage": 50.0, "shards": ("0",)}, [1, 3]),
    ],
)
@pytest.mark.parametrize("source", [RAW, TFDS])
def test_a_part_of_the_data(tmp_path, source, settings, kept):
    assert_equals(convert(breakout(tmp_path / "new", source, **settings)), fixture_episodes(kept))


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


def test_a_checkpoints_edge_truncates_an_episode(tmp_path):
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


@pytest.mark.parametrize(
    ("add_count", "rows"),
    [(20, [*range(20)]), (12, [*range(12)]), (39, [*range(19)]), (47, [*range(7), *range(7, 20)])],
)
def test_the_place_where_a_replay_buffer_was_written_truncates_an_episode(tmp_path, add_count, rows):
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


def drop_a_frame(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[: -84 * 84]))


def one(folder, pattern):
    (path,) = folder.rglob(pattern)
    return path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("source", "damage", "sentence"),
    [
        (RAW, lambda s: flip_a_bit(one(s, "*01-of*"), 90_000), r"run_1-00001-of-00003 is damaged .* at record \d"),
        (RAW, lambda s: flip_a_bit(one(s, "*01-of*"), -3), r"run_1-00001-of-00003 is damaged .* at record 4"),
        (RAW, lambda s: cut(one(s, "*02-of*"), 0), r"run_1-00002-of-00003 is damaged or cut short: it holds no episode"),
        (RAW, lambda s: one(s, "*02-of*").unlink(), r"Breakout lacks shard 2; --shards converts a part"),
        (RAW, lambda s: (s / "Breakout").rename(s / "Pong"), r"run_1-00000-of-00003 is of Pong, not of Breakout"),
        (TFDS, lambda s: flip_a_bit(one(s, "*_01.tf*"), 1), r"checkpoint_01\.tf\S* is damaged .* record 0: its length"),
        (TFDS, lambda s: edit(one(s, "features.json"), '"float32"', '"float99"'), r"record 0: steps/reward is .*float99"),
        (TFDS, lambda s: edit(one(s, "features.json"), '"image": {', '"picture": {'), r"not PNG images, but None"),
        (TFDS, lambda s: edit(one(s, "features.json"), '"png"', '"jpeg"'), r"not PNG images, but jpeg"),
        (TFDS, lambda s: edit(one(s, "dataset_info.json"), "Breakout_run", "Pong_run"), r"is of Pong, not of Breakout"),
        (TFDS, lambda s: edit(one(s, "dataset_info.json"), '"splits"', "splits"), r"dataset_info.json is damaged"),
        (DQN, lambda s: cut(one(s, "*observation_ckpt.1.gz"), 9_000), r"observation_ckpt.1.gz is damaged .* from row \d+"),
        (DQN, lambda s: drop_a_frame(one(s, "*observation_ckpt.1.gz")), r"observation_ckpt.1.gz is damaged .*: it ends"),
        (DQN, lambda s: flip_a_bit(one(s, "*observation_ckpt.0.gz"), -6), r"observation_ckpt.0.gz is damaged"),
        (DQN, lambda s: one(s, "*reward_ckpt.1.gz").unlink(), r"reward_ckpt.1.gz is missing"),
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


def set_value(name, kind, index, value):
    return lambda feature: getattr(feature[name], kind).value.__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_image(png((80, 84))), r", step 7: the observation is uint8 \(80, 84\), not a gray image of 84x84"),
        (set_image(b"no image"), r", step 7: the observation is no image"),
        (set_value("actions", "int64_list", 5, 4), r": actions are from 0 to 3, but here is 4"),
        (lambda feature: feature["actions"].int64_list.value.pop(), r": 10 observations, 9 actions"),
        (lambda feature: feature.pop("discounts"), r": the record is no episode of RL Unplugged"),
        (lambda feature: feature["clipped_rewards"].bytes_list.value.extend([b"1"] * 10), r": 10 obs.* are no episode"),
        (lambda feature: feature["actions"].float_list.value.extend([1.0] * 10), r": actions are integers, not float32"),
        (set_value("clipped_rewards", "float_list", 3, -4), r": reward 4 is not clipped"),
        (set_value("clipped_rewards", "float_list", 3, np.nan), r": .* not finite"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(tmp_path, change, sentence):
    shutil.copytree(RAW, tmp_path / "source")
    rewrite(one(tmp_path / "source", "run_1-00001*"), change)
    with pytest.raises(InputError, match=r"run_1-00001-of-00003, record 1" + sentence):
        convert(breakout(tmp_path / "new", tmp_path / "source"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"source": (Path("nowhere"),)}, "there is no nowhere"),
        ({"source": (FIXTURES / "rlu_breakout",)}, "several datasets"),
        ({"source": (RAW,), "run": 2}, "no files of a known format"),
        ({"source": (RAW,), "shards": ("3",)}, "Breakout lacks shard 3$"),
        ({"source": (RAW,), "shards": ("2-1",)}, "numbers and ranges"),
        ({"source": (RAW,), "percentage": 0.0}, "above 0 and at most 100"),
        ({"source": (RAW,), "percentage": 1.0}, "there is no episode to write"),
        ({}, "--source, or a run of RL Unplugged"),
    ],
)
def test_impossible_settings(tmp_path, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        convert(Args("Breakout", out=tmp_path / "new", **settings))
    assert list(tmp_path.iterdir()) == []
    assert parse_shards(("10-12", "3", "11")) == [3, 10, 11, 12] and parse_shards(("40-41", "8")) == [8, 40, 41]


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage, left = shutil.disk_usage(tmp_path), tmp_path / ".some.partial-of_a_killed_program"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0 if left.exists() else 2_000_000))
    with pytest.raises(InputError, match=r"needs about 0\.0075\d GB, and 0\.002 GB are free there: take less of the data"):
        convert(breakout(tmp_path / "new", DQN))
    left.mkdir()
    convert(breakout(tmp_path / "some", DQN, percentage=20.0))


def test_the_program(tmp_path):
    flags = ["--env-id", "Breakout", "--source", str(RAW), "--out", str(tmp_path / "new"), "--shards", "0"]
    options = {"cwd": Path(__file__).parent.parent, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([sys.executable, "-m", "data.convert_atari", *flags], **options)
    assert result.returncode == 0 and "591 steps; returns: episodes 4, mean" in result.stdout


class Bucket(http.server.BaseHTTPRequestHandler):
    """RL Unplugged's bucket with the fixture's shards; `drops` connections are closed half way."""

    protocol_version = "HTTP/1.1"
    drops = 0
    gets: list[str]

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.gets.append(self.path[-14:])
        self.answer(send=True)

    def answer(self, send):
        match = re.fullmatch(r"/atari_episodes_ordered/(Breakout)/(run_1-0000[012]-of)-00050", self.path)
        if not match:
            self.send_error(404)
            return
        assert self.headers["Accept-Encoding"] == "gzip"  # else the real bucket sends shards unpacked
        body = (RAW / match[1] / f"{match[2]}-00003").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send:
            self.close_connection = self.drops > 0
            self.wfile.write(body[: len(body) // 2] if self.close_connection else body)
            type(self).drops -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch):
    handler = type("Handler", (Bucket,), {"gets": []})
    monkeypatch.setattr("time.sleep", lambda _: None)  # pooch waits longer and longer
    monkeypatch.setattr(rl_unplugged, "SHARD_STEPS", 500)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(rl_unplugged, "BUCKET", f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()


def download(tmp_path, **settings):
    settings = {"env_id": "Breakout", "run": 1, "shards": ("0-2",)} | settings
    return convert(Args(out=tmp_path / "new", download_dir=tmp_path / "downloads", **settings))


def downloaded(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "downloads" / "Breakout").iterdir()}


WHOLE = {f"run_1-{i:05d}-of-00050": (RAW / "Breakout" / f"run_1-{i:05d}-of-00003").read_bytes() for i in range(3)}


@pytest.mark.parametrize("drops", [0, 4])
def test_download(tmp_path, bucket, drops):
    """Broken downloads begin again; what is there is not downloaded again."""
    bucket.drops = drops
    assert_equals(download(tmp_path), fixture_episodes())
    assert downloaded(tmp_path) == WHOLE and len(bucket.gets) == 3 + drops
    shutil.rmtree(tmp_path / "new")
    assert_equals(download(tmp_path, shards=("1",)), fixture_episodes(range(4, 8)))
    assert len(bucket.gets) == 3 + drops


def test_a_download_that_never_ends_leaves_whole_files_only(tmp_path, bucket):
    download(tmp_path, shards=("0",))
    shutil.rmtree(tmp_path / "new")
    bucket.drops = 99
    with pytest.raises(InputError, match=r"the download stopped: .*; check .* or give the same command again"):
        download(tmp_path)
    assert list(downloaded(tmp_path)) == ["run_1-00000-of-00050"] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"run": 6}, r"404.*run_6-00000-of-00050; check --run and --shards"),
        ({"shards": ()}, r"404.*run_1-00003-of-00050"),  # all are asked for; the fixture has three
        *(({"env_id": game, "shards": ()}, rf"404.*{game}/run_1-00000-of-00049") for game in rl_unplugged.SHORT_GAMES),
    ],
)
def test_nothing_to_download(tmp_path, bucket, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        download(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == [] and bucket.gets == []
