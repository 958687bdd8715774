"""The BSuite recorder and the converter of what TensorFlow Datasets prepared."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from data.convert_bsuite import convert
from data.dataset import InputError, open_dataset
from data.record_bsuite import make_environment, record
from data.tfrecords import masked_crc

FIXTURES = Path(__file__).parent / "fixtures" / "bsuite_tfds"  # written by TensorFlow Datasets' own RLDS builder


def test_recording(catch_dataset):
    data = open_dataset(catch_dataset)
    assert data.observation.shape == (2000, 10, 5)  # 200 episodes of 9 steps and a last observation
    assert np.flatnonzero(data.is_last).tolist() == list(range(9, 2000, 10))
    assert np.array_equal(data.is_last, data.is_terminal)
    assert set(data.reward[data.reward != 0]) <= {-1.0, 1.0} and set(data.action) == {0, 1, 2}
    # Replaying the recorded actions in the real environment gives the recorded steps.
    environment = make_environment("catch", seed=0)
    for i in range(30):
        timestep = environment.reset() if data.is_first[i] else environment.step(int(data.action[i - 1]))
        assert np.array_equal(timestep.observation, data.observation[i])
        assert data.is_first[i] or (timestep.reward or 0) == data.reward[i - 1]


def test_recording_is_the_same_for_the_same_seed(tmp_path):
    first, second, third = (
        open_dataset(record("catch", episodes=30, seed=seed, out=tmp_path / str(i))) for i, seed in enumerate((5, 5, 6))
    )
    assert np.array_equal(first.action, second.action) and np.array_equal(first.observation, second.observation)
    assert not np.array_equal(first.action, third.action)


def test_noise_replaces_actions_at_its_rate():
    quiet, noisy = make_environment("catch", seed=0), make_environment("catch", seed=0, noise=0.3)
    replaced, steps = 0, 0
    for _ in range(1000):
        quiet.reset(), noisy.reset()
        before = 2
        for _ in range(8):
            step = noisy.step(1)  # 1 keeps the paddle where it is
            after = int(np.flatnonzero(step.observation[9])[0])
            replaced, steps, before = replaced + (after != before), steps + 1, after
    # Of the replaced actions a third stay, and some moves are stopped by the walls.
    assert 0.12 < replaced / steps < 0.2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"env_id": "cartpol"}, "did you mean 'cartpole'"),
        ({"env_id": "catch", "noise": 1.5}, "from 0 to 1"),
        ({"env_id": "catch", "episodes": 0}, "at least 1"),
    ],
)
def test_recorder_errors(tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        record(**arguments, out=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env_id", ["catch", "cartpole", "mountain_car"])
def test_conversion_equals_what_tensorflow_datasets_reads(tmp_path, env_id):
    truth = np.load(FIXTURES / "truth.npz")
    data = open_dataset(convert(FIXTURES / f"bsuite_{env_id}", env_id, out=tmp_path / env_id))
    # TensorFlow Datasets shuffles the episodes on disk; the converter puts them back in the order of their ids.
    order = np.argsort(truth[f"{env_id}|episode_id"])
    ends = np.cumsum(truth[f"{env_id}|length"])
    steps = np.concatenate([np.arange(ends[i] - truth[f"{env_id}|length"][i], ends[i]) for i in order])
    for field in ("observation", "action", "reward", "is_first", "is_last", "is_terminal"):
        assert np.array_equal(getattr(data, field), truth[f"{env_id}|{field}"][steps]), field
    if env_id != "catch":
        assert data.is_terminal.sum() < data.is_last.sum()  # the fixture has episodes that are cut off


@pytest.fixture
def prepared(tmp_path):
    shutil.copytree(FIXTURES / "bsuite_catch", tmp_path / "source")
    return tmp_path / "source"


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda file: flip_a_bit(file, 5000), r"tfrecord-00000-of-00001 is damaged or cut short at record 2"),
        (lambda file: flip_a_bit(file, 0), r"at record 0"),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), r"at record 11"),
        (lambda file: file.write_bytes(b""), r"no episode"),
        (lambda file: file.unlink(), r"holds no record files"),
        (lambda file: file.rename(file.with_name(file.name.replace("of-00001", "of-00002"))), r"00001-of-00002 is missing"),
        (lambda file: (file.parent / "features.json").write_text("{"), r"does not describe"),
        (lambda file: (file.parent / "features.json").unlink(), r"holds 0 datasets"),
    ],
)
def test_damaged_sources_are_named_and_nothing_is_left(tmp_path, prepared, damage, sentence):
    damage(next(prepared.rglob("*.tfrecord*")))
    with pytest.raises(InputError, match=sentence):
        convert(prepared, "catch", out=tmp_path / "catch")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_records_that_are_no_examples_are_refused(tmp_path, prepared):
    """Whole by their checksums, but not episodes."""
    record = b"not a protocol buffer"
    length = struct.pack("<Q", len(record))
    framed = length + struct.pack("<I", masked_crc(length)) + record + struct.pack("<I", masked_crc(record))
    next(prepared.rglob("*.tfrecord*")).write_bytes(framed)
    with pytest.raises(InputError, match=r"episode 0: the record is not a tf\.train\.Example"):
        convert(prepared, "catch", out=tmp_path / "new")


def test_another_task_is_refused(tmp_path, prepared):
    with pytest.raises(InputError, match="not those of cartpole"):
        convert(prepared, "cartpole", out=tmp_path / "new")


def test_an_encoded_feature_is_refused(tmp_path, prepared):
    path = next(prepared.rglob("features.json"))
    features = json.loads(path.read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["reward"]["tensor"]["encoding"] = "zlib"
    path.write_text(json.dumps(features))
    with pytest.raises(InputError, match="encoded as zlib"):
        convert(prepared, "catch", out=tmp_path / "new")
