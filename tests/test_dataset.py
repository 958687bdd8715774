"""The dataset format: whole or absent, and checked when opened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from data.dataset import FIELDS, InputError, check_fit, keep_fraction, open_dataset, write_dataset

META = {"benchmark": "bsuite", "env_id": "catch", "num_actions": 3}


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
    assert data.meta["episodes"] == 3 and data.meta["return_max"] == 10 and data.meta["return_mean"] == pytest.approx(17 / 3)
    assert [path.name for path in tmp_path.iterdir()] == ["catch"]


def test_an_error_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(np.zeros((3, 10, 5), np.float32), np.zeros(2), np.zeros(2), terminal=True)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lengths", [(0, 0, 0), (3, 1, 2), (2, 2, 2)])
def test_lengths_that_do_not_fit(tmp_path, lengths):
    observations, actions, rewards = lengths
    with pytest.raises(InputError, match="one observation more"), write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(np.zeros((observations, 2), np.float32), np.zeros(actions), np.zeros(rewards), terminal=True)


def test_no_episode(tmp_path):
    with pytest.raises(InputError, match="no episode"), write_dataset(tmp_path / "catch", **META):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_dataset_and_is_cleaned_up(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal, numpy as np
        from data.dataset import write_dataset
        with write_dataset({str(tmp_path / "catch")!r}, env_id="catch", num_actions=3) as writer:
            writer.add_episode(np.zeros((3, 10, 5), np.float32), np.zeros(2), np.zeros(2), terminal=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    result = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."})
    assert result.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="no dataset folder"):
        open_dataset(tmp_path / "catch")
    assert len(list(tmp_path.iterdir())) == 1  # what the killed program left, hidden
    write(tmp_path / "catch")
    assert [path.name for path in tmp_path.iterdir()] == ["catch"]


def test_writers_side_by_side_do_not_clean_each_other_up(tmp_path):
    with write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(np.zeros((3, 10, 5), np.float32), np.zeros(2), np.zeros(2), terminal=True)
        write(tmp_path / "catch_2")
        with pytest.raises(InputError, match="appeared"), write_dataset(tmp_path / "catch_3", **META) as late:
            write(tmp_path / "catch_3")
            late.add_episode(np.zeros((3, 10, 5), np.float32), np.zeros(2), np.zeros(2), terminal=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catch", "catch_2", "catch_3"]


def test_numbers_that_are_not_finite_are_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="not finite"), write_dataset(tmp_path / "catch", **META) as writer:
        writer.add_episode(np.zeros((3, 2), np.float32), np.zeros(2), np.array([0, np.nan]), terminal=True)
    assert list(tmp_path.iterdir()) == []


def test_a_neighbour_with_a_similar_name_is_left_alone(tmp_path):
    (tmp_path / ".catch.mine").mkdir()
    write(tmp_path / "catch")
    assert (tmp_path / ".catch.mine").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="exists already"), write_dataset(tmp_path, **META):
        pass


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


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no dataset folder"),
        (lambda folder: (folder / "meta.json").unlink(), "has no meta.json"),
        (lambda folder: (folder / "meta.json").write_text('{"steps"'), "meta.json is damaged"),
        (edit_meta(format_version=9), "format version 9"),
        (edit_meta(num_actions="3"), "meta.json is damaged"),
        (edit_meta(steps=20), "meta.json says 20 steps"),
        (edit_meta(episodes=4), "as many episodes"),
        (lambda folder: (folder / "reward.npy").unlink(), "has no reward.npy"),
        *((lambda folder, f=f: truncate(folder / f"{f}.npy"), f"{f}.npy is damaged or cut short") for f in FIELDS),
        (lambda folder: (folder / "action.npy").write_bytes(b""), "action.npy is damaged or cut short"),
        (lambda folder: np.save(folder / "action.npy", np.zeros(19, np.int64)), "holds int64, not int32"),
        (lambda folder: np.save(folder / "observation.npy", np.zeros((18, 2), np.float32)), "meta.json says 19 steps"),
        (change("is_first", 3, True), "do not mark whole episodes"),
        (change("is_last", 18, False), "do not mark whole episodes"),
        (change("is_terminal", 3, True), "not an episode's last"),
        (change("action", 0, 3), "outside 0 to 2"),
        (change("action", 0, -1), "outside 0 to 2"),
        (change("reward", 4, 1), "not 0 at an episode's last step"),
        (change("reward", 0, np.nan), "not finite"),
        (change("observation", (0, 0, 0), np.inf), "not finite"),
    ],
)
def test_damage_is_named(tmp_path, damage, sentence):
    folder = write(tmp_path / "catch")
    damage(folder)
    with pytest.raises(InputError, match=sentence):
        open_dataset(folder)


def test_fraction_is_evenly_spaced_and_chosen_by_seed(tmp_path):
    data = open_dataset(write(tmp_path / "catch", lengths=[2] * 100))
    first, second = (keep_fraction(data, 0.1, seed) for seed in (0, 1))
    first_numbers = (kept.observation[kept.is_first, 0, 0] for kept in (first, second))
    starts = [np.flatnonzero(np.isin(data.observation[:, 0, 0], numbers)) for numbers in first_numbers]
    for start in starts:
        assert (start // 3 // 10).tolist() == list(range(10))  # one of every ten episodes
    assert not np.array_equal(*starts)
    assert first.is_first.sum() == 10 and first.is_last.sum() == 10 and len(first.action) == 30
    for fraction in (0.3, 0.7, 0.9, 0.99):
        assert keep_fraction(data, fraction, 0).is_first.sum() == round(100 * fraction)
    with pytest.raises(InputError, match=r"0.001 leaves none of the 100 episodes"):
        keep_fraction(data, 0.001, 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("cartpole", 3, (10, 5), 4, 8), "is of catch .* not of cartpole"),
        (("catch", 4, (10, 5), 4, 8), "3 actions"),
        (("catch", 3, (1, 6), 4, 8), "observations"),
        (("catch", 3, (10, 5), 9, 8), "longer than every episode"),
        (("catch", 3, (10, 5), 8, 100), "more than the 12 windows"),
    ],
)
def test_misfit(tmp_path, arguments, sentence):
    data = open_dataset(write(tmp_path / "catch"))
    check_fit(data, "catch", 3, (10, 5), 8, 12)
    with pytest.raises(InputError, match=sentence):
        check_fit(data, *arguments)
