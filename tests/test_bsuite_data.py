"""The BSuite recorder and the converter of what TensorFlow Datasets prepared."""

import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from data import convert_bsuite, record_atari, record_bsuite
from data.convert_bsuite import convert
from data.dataset import InputError, open_dataset
from data.record_bsuite import DQN, Settings, default_folder, make_environment, record
from data.tfrecords import read_example, step_arrays
from tests.test_convert_atari import flip_a_bit, frame

FIXTURES = Path(__file__).parent / "fixtures" / "bsuite_tfds"  # written by TensorFlow Datasets' own RLDS builder


def test_recording(catch_dataset):
    data = open_dataset(catch_dataset)
    assert data.observation.shape == (2000, 10, 5)  # 200 episodes of 9 steps and a last observation
    assert np.flatnonzero(data.is_last).tolist() == list(range(9, 2000, 10))
    assert np.array_equal(data.is_last, data.is_terminal)
    assert set(data.reward[data.reward != 0]) <= {-1.0, 1.0} and set(data.action) == {0, 1, 2}
    assert_replays(data, 30)
    assert {
        **{"benchmark": "bsuite", "env_id": "catch", "num_actions": 3, "noise": 0.0, "seed": 0},
        **{"observation_shape": [10, 5], "reference_returns": {"random": -0.667, "online_dqn": 1.0}},
    }.items() <= data.meta.items()
    assert data.meta["return_mean_last_tenth"] > data.meta["return_mean_first_tenth"] + 0.5  # the DQN learns


def assert_replays(data, steps):
    """Replaying the recorded actions in the real environment gives the recorded steps."""
    environment = make_environment("catch", seed=data.meta["seed"], noise=data.meta["noise"])
    for i in range(steps):
        timestep = environment.reset() if data.is_first[i] else environment.step(int(data.action[i - 1]))
        assert np.array_equal(timestep.observation, data.observation[i])
        assert data.is_first[i] or (timestep.reward or 0) == data.reward[i - 1]


def test_recording_with_noise_is_the_same_for_the_same_seed(tmp_path):
    first, second, third = (
        open_dataset(record("catch", noise=0.3, episodes=20, seed=seed, out=tmp_path / str(i)))
        for i, seed in enumerate((5, 5, 6))
    )
    assert np.array_equal(first.action, second.action) and np.array_equal(first.observation, second.observation)
    assert not np.array_equal(first.action, third.action)
    assert_replays(first, 200)  # the actions are the agent's; the environment replaces the same ones again
    assert first.meta["noise"] == 0.3 and first.meta["seed"] == 5


def test_dqn_explores_and_draws_from_what_it_has_seen():
    agent, drawn = DQN((2,), 3, seed=0), []
    agent._step = lambda state, transition, count, indices: drawn.append((count, indices)) or (state, np.int32(2))
    actions = np.array([agent.learn(None) for _ in range(12_000)])
    assert np.mean(actions != 2) == pytest.approx(0.05 * 2 / 3, rel=0.2) and set(actions) == {0, 1, 2}
    assert [count for count, _ in drawn] == list(range(12_000)) and {len(indices) for _, indices in drawn} == {32}
    for count, indices in drawn[:100] + drawn[-100:]:
        assert indices.max() <= min(count, 9_999)
    assert np.concatenate([indices for _, indices in drawn[-100:]]).max() > 9_900
    first, second = DQN((2,), 3, seed=1), DQN((2,), 3, seed=2)
    assert first._random.random() != second._random.random()
    assert not jax.tree.all(jax.tree.map(np.array_equal, first._state[0], second._state[0]))


def test_constants():
    assert record_bsuite.EPISODES == {"catch": 2000, "cartpole": 1000, "mountain_car": 500}
    assert record_bsuite.REFERENCE_RETURNS == {
        "catch": {"random": -0.667, "online_dqn": 1.0},
        "cartpole": {"random": 64.833, "online_dqn": 1001.0},
        "mountain_car": {"random": -1000.0, "online_dqn": -102.167},
    }
    assert tuple(Settings()) == ((64, 64), 1e-3, 32, 0.99, 10_000, 100, 4, 0.05)
    assert str(default_folder("catch", 0.0)) == "datasets/bsuite/catch"


@pytest.mark.parametrize(
    ("recorder", "which", "asked", "said"),
    [
        (record_bsuite, ("catch", 0.3), ("catch", 0.3), "all that a DQN sees while it learns catch"),
        (record_atari, ("Pong",), (record_atari.Args("Pong", "scripted", 100_000),), "100,000 steps of a simple program"),
        (
            record_atari,
            ("Qbert",),
            (record_atari.Args("Qbert", "random", 100_000),),
            "100,000 steps of uniformly random play",
        ),
    ],
)
def test_missing_dataset_is_recorded_and_announced(tmp_path, monkeypatch, capsys, recorder, which, asked, said):
    calls, folder = [], recorder.default_folder(*which)

    def come_second(*settings):
        calls.append(settings)
        folder.mkdir(parents=True)
        raise InputError("another program has recorded it meanwhile")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorder, "record", come_second)
    for _ in range(2):
        assert recorder.record_if_missing(*which) == folder
    output = capsys.readouterr().out
    assert calls == [asked] and output.startswith(f"There is no dataset {folder}: recording {said}")
    assert output.count("There is no dataset") == output.count("data/README.md") == 1


def test_noise_replaces_actions_at_its_rate():
    """By every action alike."""
    played, task = [], make_environment("catch", seed=0)
    noisy = record_bsuite.NoisyActions(types.SimpleNamespace(action_spec=task.action_spec, step=played.append), 0.3, seed=0)
    for _ in range(10_000):
        noisy.step(1)
    assert np.bincount(played) / 10_000 == pytest.approx(np.array([0.1, 0.8, 0.1]), abs=0.015)


def test_noise_has_not_the_agents_stream():
    environment, agent = make_environment("catch", seed=3, noise=0.5), DQN((2,), 3, seed=3)
    assert environment._random.random() != agent._random.random()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"env_id": "cartpol"}, "no BSuite task 'cartpol' here, only catch, cartpole, mountain_car"),
        ({"env_id": "catch", "noise": 1.5}, "from 0 to 1"),
        ({"env_id": "catch", "seed": 2**32}, "from 0 to 4294967295"),
        ({"env_id": "catch", "episodes": 0}, "there is no episode to write"),
    ],
)
def test_recorder_errors(tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        record(**arguments, out=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env_id", ["catch", "cartpole", "mountain_car"])
def test_conversion_equals_what_tensorflow_datasets_reads(tmp_path, env_id):
    truth = np.load(FIXTURES / "truth.npz")
    data = open_dataset(convert(FIXTURES / f"bsuite_{env_id}", env_id, noise=0.1, out=tmp_path / env_id))
    assert {
        **{"benchmark": "bsuite", "env_id": env_id, "num_actions": 3, "noise": 0.1},
        **{"reference_returns": record_bsuite.REFERENCE_RETURNS[env_id]},
    }.items() <= data.meta.items()
    # TensorFlow Datasets shuffles the episodes on disk; the converter puts them back in the order of their ids.
    order = np.argsort(truth[f"{env_id}|episode_id"])
    ends = np.cumsum(truth[f"{env_id}|length"])
    steps = np.concatenate([np.arange(ends[i] - truth[f"{env_id}|length"][i], ends[i]) for i in order])
    for field in ("observation", "action", "reward", "is_first", "is_last", "is_terminal"):
        assert np.array_equal(getattr(data, field), truth[f"{env_id}|{field}"][steps]), field
    if env_id != "catch":
        assert data.is_terminal.sum() < data.is_last.sum()  # the fixture has truncated episodes


@pytest.mark.parametrize("ids", ["digits", "names", "none"])
def test_order_of_episodes(tmp_path, monkeypatch, ids):
    """Digits give the order in time; without a number the order is that of the files."""
    count = iter(range(100))

    def read(record, where):
        example, i = read_example(record, where), next(count)
        del example["episode_id"]
        if ids != "none":
            example["episode_id"] = [f"{20 - i}".encode() if ids == "digits" else f"episode {20 - i}".encode()]
        return example

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert_bsuite, "read_example", read)
    folder = convert(FIXTURES / "bsuite_catch", "catch", noise=0.1)
    assert str(folder) == "datasets/bsuite/catch_noise_0.1"
    truth, data = np.load(FIXTURES / "truth.npz"), open_dataset(folder)
    first = truth["catch|observation"][truth["catch|is_first"]]
    assert np.array_equal(data.observation[data.is_first], first[::-1] if ids == "digits" else first)


@pytest.fixture
def prepared(tmp_path):
    shutil.copytree(FIXTURES / "bsuite_catch", tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda file: flip_a_bit(file, 5000), r"tfrecord-00000-of-00001 is damaged or cut short at record 2"),
        (lambda file: shutil.copytree(file.parent, file.parent.parent / "2.0.0"), r"holds 2 datasets"),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), r"at record 11"),
        (lambda file: file.write_bytes(frame(b"no protocol buffer")), r"episode 0: the record is not a tf\.train\.Example"),
        (lambda file: file.unlink(), r"holds no record files"),
        (lambda file: file.rename(file.with_name(file.name.replace("of-00001", "of-00002"))), r"00001-of-00002 is missing"),
        (lambda file: (file.parent / "features.json").write_text("{"), r"does not describe"),
    ],
)
def test_damaged_sources_are_named_and_nothing_is_left(tmp_path, prepared, damage, sentence):
    with pytest.raises(InputError, match="not those of cartpole"):
        convert(prepared, "cartpole", out=tmp_path / "catch")
    damage(next(prepared.rglob("*.tfrecord*")))
    with pytest.raises(InputError, match=sentence):
        convert(prepared, "catch", out=tmp_path / "catch")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_steps_that_are_no_whole_episode_are_refused():
    tensors = {name: {"tensor": {"dtype": "bool", "shape": {}}} for name in ("is_first", "is_last", "is_terminal")}
    tensors["observation"] = {"tensor": {"dtype": "float32", "shape": {"dimensions": ["2"]}}}
    whole = {"steps/is_first": [1, 0, 0], "steps/is_last": [0, 0, 1], "steps/is_terminal": [0, 0, 1]}
    whole["steps/observation"] = [1.0, 2, 3, 4, 5, 6]
    steps = step_arrays(whole, ("observation",), tensors, "here")
    assert steps["observation"].tolist() == [[1, 2], [3, 4], [5, 6]] and steps["is_last"].tolist() == [False, False, True]
    for changed, sentence in [
        ({"steps/is_first": [1, 1, 0]}, "here: is_first and is_last do not mark one whole episode"),
        ({"steps/observation": [1.0, 2]}, "do not mark one whole episode"),
        ({"steps/is_last": [0, 0, 2]}, "here: steps/is_last is missing, .*: it is no bool"),
    ]:
        with pytest.raises(InputError, match=sentence):
            step_arrays(whole | changed, ("observation",), tensors, "here")
    with pytest.raises(InputError, match="here: steps/reward is missing"):
        step_arrays(whole, ("reward",), tensors, "here")
