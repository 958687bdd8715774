"""Minari's datasets: read from each of its storages, and recorded as data/README.md says."""

import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple

from data import convert_atari, convert_bsuite, minari_datasets
from data.convert_atari import Args
from data.dataset import InputError, open_dataset
from tests.test_convert_atari import cut, edit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari asks for authors
README = Path(__file__).parent.parent / "data" / "README.md"
VECTOR, THREE = Box(-np.inf, np.inf, (7,), np.float64), Discrete(3)
ARROW, PARQUET = {"data_format": "arrow"}, {"data_format": "parquet"}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Minari's own store of datasets, beside which the programs run."""
    for package in ("minari", "h5py", "pyarrow"):
        pytest.importorskip(package)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "minari"


def make_minari(name, space, episodes=2, steps=5, actions=THREE, terminal=True, **settings):
    """A dataset of random observations, their values [episodes, steps + 1, ...], and its scores in the metadata."""
    import minari
    from minari.data_collector import EpisodeBuffer

    def draw(space):
        if isinstance(space, Dict):
            return {key: draw(part) for key, part in space.items()}
        if isinstance(space, Tuple):
            return tuple(map(draw, space))
        if space.dtype.kind == "f":
            return random.normal(size=(steps + 1, *space.shape)).astype(space.dtype)
        high = 3 if isinstance(space, Discrete) else 256 if space.dtype == np.uint8 else 2
        return random.integers(high, size=(steps + 1, *space.shape)).astype(space.dtype)

    random, last = np.random.default_rng(0), np.arange(1, steps + 1) == steps
    observations = [draw(space) for _ in range(episodes)]
    buffers = [
        EpisodeBuffer(
            observations=observation,
            actions=np.arange(steps) % 3 if isinstance(actions, Discrete) else [actions.sample() for _ in range(steps)],
            rewards=np.ones(steps),
            terminations=last & terminal,
            truncations=last & (not terminal),
        )
        for observation in observations
    ]
    scores = {key: settings.pop(key) for key in ("ref_min_score", "ref_max_score") if key in settings}
    dataset = minari.create_dataset_from_buffers(
        name, buffers, observation_space=space, action_space=actions, **{"jpeg_encoding": False, **settings}
    )
    dataset.storage.update_metadata(scores)
    return np.array(observations) if isinstance(space, Box | MultiBinary) else observations


# ------------------------------------------------------------------------------------------------- Vectors and matrices


@pytest.mark.parametrize("storage", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("terminal", [True, False])
def test_vectors_from_every_storage(tmp_path, store, storage, terminal, capsys):
    scores = {"ref_min_score": -3.5, "ref_max_score": 20.0 if terminal else -3.5}
    vectors = make_minari("my/vectors-v0", VECTOR, data_format=storage, terminal=terminal, **scores)
    made = [
        convert_bsuite.convert(store / "my" / "vectors-v0" / "data", "anything"),
        convert_bsuite.convert(Path("my/vectors-v0"), "other"),
    ]
    with pytest.raises(InputError, match=r"has no images: python -m data.convert_bsuite converts it"):
        convert_atari.convert(Args("Breakout", source=(Path("my/vectors-v0"),)))
    assert list(map(str, made)) == ["datasets/bsuite/anything", "datasets/bsuite/other"]  # where the scripts look
    assert f"needs about {12 * (7 * 4 + 11) / 1e9:.3g} GB" in capsys.readouterr().out
    for path in made:
        data = open_dataset(path)
        assert np.array_equal(data.observation, vectors.reshape(12, 7).astype(np.float32))
        assert data.action.tolist() == [0, 1, 2, 0, 1, 0] * 2 and data.reward.tolist() == [1, 1, 1, 1, 1, 0] * 2
        assert np.flatnonzero(data.is_last).tolist() == [5, 11]
        assert np.flatnonzero(data.is_terminal).tolist() == ([5, 11] if terminal else [])  # a time limit is not
        assert {
            **{"num_actions": 3, "env_id": path.name, "benchmark": "bsuite", "noise": 0.0, "observation_shape": [7]},
            **{"source": "Minari, my/vectors-v0"},
        }.items() <= data.meta.items()
        references = {"random": -3.5, "online_dqn": 20.0} if terminal else None  # by equal ones nothing is normalised
        assert data.meta.get("reference_returns") == references


def test_the_environment_of_the_data(tmp_path, store):
    make_minari("named-v0", Box(-9, 9, (4,)), env="CartPole-v1")
    assert open_dataset(convert_bsuite.convert(Path("named-v0"))).path == Path("datasets/bsuite/CartPole-v1")
    assert open_dataset(convert_bsuite.convert(Path("named-v0"), "Mine-v1")).meta["env_id"] == "Mine-v1"
    make_minari("nameless-v0", VECTOR)
    for source, settings, sentence in (
        ("nameless-v0", {}, "names no environment: name it by --env-id"),
        ("named-v0", {}, "exists already"),
        ("named-v0", {"noise": 1.5, "env_id": "new"}, "from 0 to 1"),
        ("no-v0", {}, "there is no no-v0"),
        (str(tmp_path), {}, "is no dataset of these formats"),
    ):
        with pytest.raises(InputError, match=sentence):
            convert_bsuite.convert(Path(source), **settings)


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_dict_observations(tmp_path, store, storage):
    space = Dict(goal=Box(-9, 9, (2,)), image=Box(0, 255, (84, 84), np.uint8), parts=Dict(a=VECTOR))
    values = make_minari("dict-v0", space, data_format=storage)
    data = open_dataset(convert_bsuite.convert(Path("dict-v0"), "Mine", observation_key="goal"))
    assert np.array_equal(data.observation, np.concatenate([value["goal"] for value in values]))
    args = Args("Freeway", source=(Path("dict-v0"),), observation_key="image")
    data = open_dataset(convert_atari.convert(args))
    assert np.array_equal(data.observation, np.concatenate([value["image"] for value in values]))
    make_minari("plain-v0", VECTOR)
    for source, key, sentence in (
        ("dict-v0", None, r"has observations goal, image, parts: choose one by --observation-key"),
        ("plain-v0", "goal", r"has no Dict observations: leave out --observation-key"),
    ):
        with pytest.raises(InputError, match=sentence):
            convert_bsuite.convert(Path(source), "new", observation_key=key)


# --------------------------------------------------------------------------------------------------------------- Images


def gray(images):
    return images @ np.array([0.299, 0.587, 0.114])


def halved(images):
    return images.reshape(*images.shape[:-2], 84, 2, 84, 2).mean((-3, -1))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((84, 84), lambda x: x),
        ((168, 168, 1), lambda x: halved(x[..., 0])),
        ((4, 84, 84), lambda x: x[:, :, -1]),
        ((84, 84, 4), lambda x: x[..., -1]),
        ((3, 84, 84, 3), lambda x: gray(x[:, :, -1])),
        ((168, 168, 3), lambda x: halved(gray(x))),
    ],
)
def test_images_become_frames(tmp_path, store, shape, expected):
    images = make_minari("images-v0", Box(0, 255, shape, np.uint8))
    data = open_dataset(convert_atari.convert(Args("Freeway", source=(Path("images-v0"),))))
    assert data.path == Path("datasets/atari/Freeway") and data.is_terminal.sum() == 2
    frames = expected(images).reshape(12, 84, 84)
    assert data.observation.dtype == np.uint8
    assert np.abs(data.observation - frames.astype(float)).max() <= (0 if frames.dtype == np.uint8 else 1)
    assert data.meta["reference_returns"] == {"random": 0.0, "online_dqn": 26.76}  # RL Unplugged's, without Minari's


def test_ataris_own_size_as_jpeg(tmp_path, store):
    images = make_minari(
        "images-v0", Box(0, 255, (210, 160, 3), np.uint8), jpeg_encoding=True, ref_min_score=1.5, ref_max_score=2
    )
    data = open_dataset(convert_atari.convert(Args("Freeway", source=(Path("images-v0"),))))
    assert np.abs(data.observation.mean() - gray(images).mean()) < 2 and data.observation.std() < gray(images).std()
    assert data.meta["reference_returns"] == {"random": 1.5, "online_dqn": 2.0}


def test_resizing():
    """Gray first, then the mean over areas: of half a pixel too."""
    image = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    fine = gray(image).repeat(2, axis=0).repeat(21, axis=1)  # [420, 3360], which 84 divides
    areas = fine.reshape(84, 5, 84, 40).mean((1, 3))
    assert np.abs(minari_datasets.to_frame(image) - areas).max() <= 1
    first_gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    assert np.array_equal(minari_datasets.to_frame(image), cv2.resize(first_gray, (84, 84), interpolation=cv2.INTER_AREA))


def test_images_begin_at_32_pixels(store):
    for side in (31, 32):
        make_minari(f"square{side}-v0", Box(0, 255, (side, side), np.uint8))
    made = convert_atari.convert(Args("Freeway", source=(Path("square32-v0"),)))
    matrices = convert_bsuite.convert(Path("square31-v0"), "squares")
    assert open_dataset(made).observation.shape[1:] == (84, 84) and open_dataset(matrices).observation.shape[1:] == (31, 31)


def test_sources_of_frames(tmp_path, store):
    frames = make_minari("atari/breakout/dqn-v0", Box(0, 255, (84, 84), np.uint8), episodes=3, actions=Discrete(4))
    folder = store / "atari" / "breakout" / "dqn-v0"
    sources = (folder, folder.parent, folder / "data" / "main_data.hdf5", Path("atari/breakout/dqn-v0"))
    for i, source in enumerate(sources):
        data = open_dataset(convert_atari.convert(Args("Breakout", source=(source,), out=tmp_path / str(i))))
        assert np.array_equal(data.observation, frames.reshape(18, 84, 84))
        assert data.meta["source"] == "Minari, atari/breakout/dqn-v0" and data.meta["benchmark"] == "atari"
        assert data.meta["reference_returns"] == {"random": 1.33, "online_dqn": 157.86} and "noise" not in data.meta
    part = Args("Breakout", source=(folder,), out=tmp_path / "part", percentage=50.0)
    assert np.array_equal(open_dataset(convert_atari.convert(part)).observation, frames[1])
    for settings, sentence in (
        ({"shards": ("0",)}, "lacks shard 0"),
        ({"env_id": "Pong", "source": (shutil.copytree(folder, tmp_path / "copy"),)}, "4 actions, but Pong has 6"),
        ({"source": (Path("atari/breakout/no-v0"),)}, "there is no atari/breakout/no-v0, and Minari keeps"),
    ):
        with pytest.raises(InputError, match=sentence):
            convert_atari.convert(Args(**{"env_id": "Breakout", "source": (folder,), "out": tmp_path / "new"} | settings))
    with pytest.raises(InputError, match=r"has images: python -m data\.convert_atari"):
        convert_bsuite.convert(folder, "Breakout", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------------- Wrong inputs


@pytest.mark.parametrize(
    ("made", "damage", "sentence"),
    [
        ({"space": Box(0, 1, (84, 84), np.float32)}, None, r"observations of float32 \(84, 84\): wanted is .* uint8 images"),
        ({"space": Box(0, 255, (3, 84, 84), np.uint8)}, None, r"observations of uint8 \(3, 84, 84\)"),  # colours, or a stack
        ({"actions": Discrete(3, start=1)}, None, r"actions of Discrete\(3, start=1\): wanted is Discrete, from 0"),
        ({"actions": Box(-9, 9, (2,))}, None, r"actions of Box.*: wanted is Discrete, from 0"),
        ({"actions": Discrete(2)}, None, r"episode 0: actions are from 0 to 1, but here is 2"),
        ({}, lambda data: cut(data / "main_data.hdf5", 9_000), "data, episode 0 is damaged or cut short: OSError"),
        (ARROW, lambda data: cut(data / "1" / "part-0.arrow", 500), "data, episode 1 is damaged or cut short"),
        (PARQUET, lambda data: cut(data / "1" / "part-0.parquet", 500), "data, episode 1 is damaged or cut short"),
        ({}, lambda data: edit(data / "metadata.json", '"Box', '"Bag'), r"damaged, or no Minari dataset"),
        ({}, lambda data: edit(data / "metadata.json", "20.0", '"high"'), r"damaged, or no Minari dataset"),
        ({}, lambda data: edit(data / "metadata.json", '"0.5.', '"9.5.'), r"does not support"),
        (ARROW, lambda data: edit(data / "1" / "metadata.json", '"total_steps": 5', '"total_steps": 6'), "were read, not 6"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_left(tmp_path, store, made, damage, sentence):
    make_minari("wrong-v0", **{"space": VECTOR, "ref_min_score": 0.0, "ref_max_score": 20.0} | made)
    if damage:
        damage(store / "wrong-v0" / "data")
    with pytest.raises(InputError, match=sentence) as error:
        convert_bsuite.convert(Path("wrong-v0"), "new")
    assert "wrong-v0" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("new"))


# -------------------------------------------------------------------------------------------------------------- README


def test_the_example_of_the_readme(tmp_path, store):
    section = re.search(r"^## Minari\n(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    converting, training = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()
    exec(code, {})
    assert shlex.split(converting)[:3] == ["python", "-m", "data.convert_bsuite"]
    folder = tyro.cli(convert_bsuite.convert, args=shlex.split(converting)[3:])
    data = open_dataset(folder)
    assert shlex.split(training) == ["python", "rosmo_bsuite.py", "--env-id", folder.name]
    assert folder == Path("datasets/bsuite/CartPole-v1") and data.meta["env_id"] == "CartPole-v1"
    assert data.meta["episodes"] == 100 and data.observation.shape[1:] == (4,) and data.meta["num_actions"] == 2
    assert 100 < data.meta["return_mean"] < 450 and data.meta["return_max"] == 500
    references = data.meta["reference_returns"]
    assert 15 < references["random"] < 30 and references["online_dqn"] == 500
    lengths = np.diff(np.flatnonzero(np.append(data.is_first, True))) - 1
    assert np.array_equal(lengths < 500, data.is_terminal[data.is_last])  # CartPole's time limit is 500
