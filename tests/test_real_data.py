"""What real data need: old ROMs, frames read from the disk in stretches, environments as Minari says."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import ale_py
import envpool
import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, MultiBinary

import rosmo_atari
from data import convert_atari, convert_bsuite
from data.convert_atari import Args, convert
from data.dataset import InputError, open_dataset
from data.record_atari import OTHER_ROMS, SCORES, environment_seeds, first_step, make_environments, next_step, num_actions
from tests.programs import TINY
from tests.test_atari_environments import ROMS, Dopamine
from tests.test_convert_atari import RAW, breakout, rewrite
from tests.test_minari import make_minari, store  # noqa: F401


@pytest.fixture(scope="session")
def old_roms(tmp_path_factory):
    """The ROMs of atari-py 0.2.5, as README says; skips where the package index does not have it."""
    folder = tmp_path_factory.mktemp("roms")
    command = [sys.executable, "-m", "pip", "download", "atari-py==0.2.5", "--no-deps", "--no-binary", ":all:", "-d", folder]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"atari-py 0.2.5 could not be downloaded: {error}")
    with tarfile.open(folder / "atari-py-0.2.5.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    (folder / "atari").mkdir()
    (folder / "atari-py-0.2.5" / "atari_py" / "atari_roms").rename(folder / "atari" / "roms")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "name", "lines"), [("Amidar", "amidar", 250), ("BattleZone", "battle_zone", 210)])
def test_a_game_of_an_old_rom(old_roms, monkeypatch, env_id, name, lines):
    """EnvPool, pixel by pixel as ale-py plays the same file; but of a screen with 250 lines EnvPool shows the first 210."""
    monkeypatch.setattr(ale_py.roms, "get_rom_path", lambda _: old_roms / "atari" / "roms" / f"{name}.bin")
    monkeypatch.setitem(ROMS, env_id, name)
    monkeypatch.setattr(Dopamine, "_resize", lambda self, screen, resize=Dopamine._resize: resize(self, screen[:210]))
    seed = environment_seeds(0, 1)
    environments, dopamine = make_environments(env_id, 1, seed=0, rom_dir=old_roms), Dopamine(env_id, seed[0], 0.25)
    first = first_step(environments).observation
    assert np.array_equal(first[0, -1], dopamine.reset())
    assert np.array_equal(rosmo_atari.make_environments(env_id, seed, old_roms).reset()[0], first)  # the scripts' own
    for action in np.random.default_rng(0).integers(num_actions(env_id), size=50):
        step = next_step(environments, np.array([action]))
        assert np.array_equal(step.observation[0, -1], dopamine.step(action)[0])
    assert len(dopamine._ale.getScreenGrayscale()) == lines


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_roms_of_every_game(old_roms):
    """data/README.md's table: which of the 46 games EnvPool plays from other bytes, and how many frames are equal."""
    folder, equal = Path(envpool.__file__).parent.parent / "envpool_assets" / "atari" / "roms", {}
    for env_id in SCORES:
        name = "_".join(re.findall("[A-Z][a-z]*", env_id)).lower()
        if (folder / f"{name}.bin").read_bytes() == (old_roms / "atari" / "roms" / f"{name}.bin").read_bytes():
            continue
        both, random = (
            [make_environments(env_id, 8, 0, rom_dir=rom_dir) for rom_dir in (None, old_roms)],
            np.random.default_rng(1),
        )
        steps, same = [first_step(each) for each in both], []
        for _ in range(1500):
            ours, theirs = (step.observation[:, -1] for step in steps)
            same.append((ours == theirs).all((1, 2)).mean())
            action = random.integers(num_actions(env_id), size=8)
            steps = [next_step(each, action) for each in both]
        equal[env_id] = np.mean(same)
    print({env_id: f"{fraction:.0%}" for env_id, fraction in equal.items()})
    assert len(equal) == 23 and {env_id for env_id, fraction in equal.items() if fraction < 1} == {*OTHER_ROMS}, equal


def test_data_of_other_roms_say_so(tmp_path, monkeypatch, capsys):
    assert len(set(OTHER_ROMS)) == 17 and not {"Breakout", "Pong", "Freeway"} & {*OTHER_ROMS}
    assert "notice" not in open_dataset(convert(breakout(tmp_path / "same", RAW))).meta
    assert "0 of 12 episodes have another clipped_episode_return" in capsys.readouterr().out
    monkeypatch.setattr(convert_atari, "OTHER_ROMS", ("Breakout",))
    assert "other pictures of Breakout" in open_dataset(convert(breakout(tmp_path / "other", RAW))).meta["notice"]


def test_records_of_single_transitions(tmp_path):
    def transition(features):
        features["o_t"].bytes_list.value.append(b"")

    path = Path(shutil.copy(RAW / "Breakout" / "run_1-00000-of-00003", tmp_path))
    rewrite(path, transition)
    with pytest.raises(InputError, match=r"single transitions.*atari_episodes_ordered"):
        convert(Args("Breakout", source=(path,), out=tmp_path / "out"))


# -------------------------------------------------------------------------------------------------------- From the disk


def test_frames_from_the_disk(breakout_dataset):
    """Any rows, with stretches that lie side by side, repeated rows and gaps."""
    data, _, _ = rosmo_atari.load_dataset(breakout_dataset, rosmo_atari.Args(**TINY))
    for rows in ([[0, 0, 0, 1, 2], [5, 6, 9, 10, 11]], [[7, 8, 9, 10, 11]], [3], [[1511, 0], [0, 1511]]):
        index = np.array(rows, np.int32)
        assert np.array_equal(rosmo_atari.read_frames(data.observation, index), data.observation[index])


# ---------------------------------------------------------------------------------------------------------- Of Minari


def test_the_environment_that_minari_names(store, capsys):  # noqa: F811
    """Arguments and limits are kept; a wrapper of the user's, or a spec that cannot be read, is a sentence."""
    space = Box(-9, 9, (4,))
    spec = gymnasium.make("CartPole-v1", max_episode_steps=50, sutton_barto_reward=True).spec
    make_minari("plain-v0", space, env="CartPole-v1")
    make_minari("own-v0", space, env="CartPole-v1", eval_env=spec)
    meta = open_dataset(convert_bsuite.convert(Path("own-v0"))).meta
    kept = gymnasium.envs.registration.EnvSpec.from_json(meta["env_spec"])
    assert kept.max_episode_steps == 50 and kept.kwargs == {"sutton_barto_reward": True} and meta["env_id"] == "CartPole-v1"
    assert "env_spec" not in open_dataset(convert_bsuite.convert(Path("own-v0"), "Other-v0")).meta
    assert "cannot be made again" not in capsys.readouterr().out

    file = store / "plain-v0" / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    spec = json.loads(metadata["env_spec"])
    wrapper = {"name": "Mine", "entry_point": "nowhere:Mine", "kwargs": None}
    for i, change in enumerate(({"additional_wrappers": [wrapper]}, {"of_a_later_gymnasium": 1})):
        file.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec | change)}))
        meta = open_dataset(convert_bsuite.convert(Path("plain-v0"), "CartPole-v1", out=Path(str(i)))).meta
        assert "env_spec" not in meta and meta["env_id"] == "CartPole-v1"
        assert "its environment cannot be made again as the data say" in capsys.readouterr().out


@pytest.mark.parametrize("space", [MultiBinary(5), Box(0, 1, (5,), bool)])
def test_booleans_are_numbers(store, space):  # noqa: F811
    flags = make_minari("flags-v0", space)
    data = open_dataset(convert_bsuite.convert(Path("flags-v0"), "flags"))
    assert data.observation.dtype == np.float32 and np.array_equal(data.observation, flags.reshape(12, 5))
