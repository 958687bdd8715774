"""rosmo_atari.py where it is not rosmo_bsuite.py: frames, batches, EnvPool, and that the whole program works with them."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_atari as rosmo
from data.dataset import InputError, keep_fraction, open_dataset
from data.runs import parse_args
from tests import programs
from tests.programs import TINY, TINY_FLAGS, assert_same_state, metrics

ARGS = rosmo.Args(**TINY)
run = functools.partial(programs.run, rosmo)


# ----------------------------------------------------------------------------------------------------- Frames and batches


def test_stacks_at_episode_starts():
    """Of every window of five episodes: the stack of step t holds the frames of t - 3 to t, none from before its episode."""
    lengths = [2, 3, 8, 5, 9]
    total = sum(lengths)
    starts = np.cumsum([0, *lengths])
    is_first = np.isin(np.arange(total), starts)
    frames = np.broadcast_to(np.arange(total, dtype=np.uint8)[:, None, None], (total, 84, 84))
    window = 5
    index = np.maximum(np.arange(total - window + 1)[:, None] + np.arange(-3, window), 0)
    zeros = np.zeros(total)
    steps = rosmo.Steps(*(jnp.asarray(x[index]) for x in (frames, zeros, zeros, is_first, np.roll(is_first, -1))))
    stacks = np.asarray(rosmo.stack_frames(steps).observation)
    assert stacks.shape == (total - window + 1, window, 84, 84, 4) and stacks.dtype == np.uint8
    for b in range(total - window + 1):
        for t in range(b, b + window):
            first = starts[starts <= t].max()
            assert stacks[b, t - b, 0, 0].tolist() == [max(t - 3 + i, first) for i in range(4)]
            assert (stacks[b, t - b] == stacks[b, t - b, :1, :1]).all()


def test_stacks_equal_envpools():
    """The stack after a reset is four times the first frame, as EnvPool gives it."""
    from data.atari import make_environments

    observation, _ = make_environments("Breakout", 1, seed=0).reset()
    assert (observation[0] == observation[0, :1]).all()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_batches_from_host_and_device_are_equal(breakout_dataset, fraction):
    data = (
        keep_fraction(open_dataset(breakout_dataset), fraction, seed=0) if fraction < 1 else open_dataset(breakout_dataset)
    )
    key = jax.random.PRNGKey(3)
    host, device = (rosmo.batches(data, key, 7, dataclasses.replace(ARGS, data_place=place)) for place in ("host", "device"))
    for _ in range(3):
        first, second = next(host), next(device)
        assert first.observation.shape == (4, 8, 84, 84) and first.observation.dtype == np.uint8
        assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    later = next(rosmo.batches(data, key, 9, dataclasses.replace(ARGS, data_place="host")))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, later))  # update 9's windows, wherever a run begins


def test_windows_cover_the_dataset():
    args = dataclasses.replace(ARGS, batch_size=4096)
    index = np.asarray(rosmo.sample_windows(jax.random.PRNGKey(0), 20, args))
    assert index.shape == (4096, 8) and sorted(set(index[:, 3])) == list(range(16))
    assert (np.diff(index[:, 3:], axis=1) == 1).all() and index.min() == 0


def test_evaluation_counts_every_environment_alike(monkeypatch, tmp_path):
    """5 episodes over 2 environments: one plays 3, the other 2, however long they last; steps that reset do not count."""

    class Environments:
        def __init__(self, env_id, num_envs, seed):
            self.length, self.time = np.array([2, 40]), np.zeros(2, int)

        def reset(self):
            return np.zeros((2, 4, 84, 84), np.uint8), {}

        def step(self, action):
            reset = self.time == self.length
            self.time = np.where(reset, 0, self.time + 1)
            over = self.time == self.length
            reward = np.where(reset, 1000.0, [1.0, 0.5])  # a resetting step's reward must not count
            return np.zeros((2, 4, 84, 84), np.uint8), reward, over & [True, False], over & [False, True], {}

    monkeypatch.setattr(rosmo, "make_environments", Environments)
    filmed = []
    monkeypatch.setattr(rosmo, "write_video", lambda path, frames: filmed.append((path, len(frames))))
    model = rosmo.Model(4, dataclasses.replace(ARGS, eval_episodes=5, eval_envs=2, capture_video=True))
    scores = rosmo.evaluate(rosmo.init_state((84, 84, 4), model), model, run_dir=tmp_path)
    assert scores["eval/episodes"] == 5 and scores["eval/return_min"] == 2 and scores["eval/return_max"] == 20
    assert scores["eval/return_mean"] == (3 * 2 + 2 * 20) / 5 and scores["eval/length_mean"] == (3 * 2 + 2 * 40) / 5
    assert filmed == [(tmp_path / "videos" / "0.mp4", 3)]


# --------------------------------------------------------------------------------------------------------------- Runs


last_state = functools.partial(programs.last_atari_state, rosmo)


@pytest.fixture(scope="module")
def flags(breakout_dataset):
    return ["--data-dir", str(breakout_dataset), *TINY_FLAGS]


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    settings = ["--total-steps", "20", "--eval-interval", "10", "--checkpoint-interval", "13", "--capture-video"]
    assert run([*flags, *settings, "--run-dir", str(run_dir)]) == 0
    return run_dir


def test_files_of_a_run(whole_run, breakout_dataset):
    settings = json.loads((whole_run / "args.json").read_text())
    assert settings["script"] == "rosmo_atari" and settings["dataset"] == open_dataset(breakout_dataset).meta
    assert {"envpool", "gymnasium"} <= settings["versions"].keys()
    lines = metrics(whole_run)
    training = [line for line in lines if "train/total_loss" in line]
    assert [line["step"] for line in training] == [5, 10, 15, 20]
    assert all(np.isfinite(value) for line in training for name, value in line.items())
    scores = [line for line in lines if "eval/return_mean" in line]
    assert [line["step"] for line in scores] == [10, 20] and scores[0]["eval/episodes"] == 3
    assert scores[0]["eval/normalized_score"] is not None
    assert sorted(path.name for path in (whole_run / "videos").iterdir()) == ["10.mp4", "20.mp4"]


def test_resumed_run_is_the_same_bit_for_bit(whole_run, tmp_path):
    """Also from the other place of the data."""
    run_dir = programs.rewound(whole_run, tmp_path / "resumed", step=13)
    assert int(last_state(run_dir).step) == 13
    assert run(["--resume", str(run_dir), "--data-place", "device"]) == 0
    assert_same_state(last_state(run_dir), last_state(whole_run))


def test_one_device_and_two_train_alike(whole_run, flags, tmp_path):
    flags = [*flags, "--total-steps", "10", "--eval-episodes", "1", "--cpu-devices", "1", "--run-dir", tmp_path / "one"]
    process = programs.program(rosmo, *flags)
    assert process.wait(300) == 0, process.stderr.read()
    assert len(json.loads((tmp_path / "one" / "args.json").read_text())["devices"]) == 1
    # Not the behaviour loss: at first every advantage is 0 up to rounding, and its sign decides.
    for one, two in zip(metrics(tmp_path / "one")[:2], metrics(whole_run)[:2], strict=True):
        for name in ("reward_loss", "value_loss", "policy_loss", "param_norm"):
            np.testing.assert_allclose(one[f"train/{name}"], two[f"train/{name}"], rtol=1e-5)


def test_eval_only(whole_run, capsys):
    assert run(["--resume", str(whole_run), "--eval-only", "--eval-episodes", "2"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["step"] == 20 and scores["eval/episodes"] == 2


@pytest.mark.parametrize(
    "extra", [["--sampling", "--num-simulations", "2"], ["--compute-dtype", "bfloat16", "--data-fraction", "0.5"]]
)
def test_variants_run_and_differ(whole_run, flags, tmp_path, extra):
    settings = ["--total-steps", "10", "--eval-episodes", "1", "--run-dir", str(tmp_path / "run")]
    assert run([*flags, *extra, *settings]) == 0
    ours, default = (metrics(folder)[1] for folder in (tmp_path / "run", whole_run))
    assert np.isfinite(ours["train/total_loss"]) and ours["train/grad_norm"] != default["train/grad_norm"]


def test_cpu_size_gives_way_to_other_flags():
    args = parse_args(rosmo.Args, programs.Path(rosmo.__file__), None, ["--cpu-size", "--channels", "24"])
    preset = rosmo.Args.PRESETS["cpu_size"]
    assert args.channels == 24 and args.batch_size == preset["batch_size"] and args.total_steps == preset["total_steps"]


def test_networks_of_the_cpu_size():
    """Zero blocks are the identity, and every part takes the shapes that the one before gives."""
    preset = {name: value for name, value in rosmo.Args.PRESETS["cpu_size"].items() if name in vars(ARGS)}
    model = rosmo.Model(4, rosmo.Args(**preset))
    shapes = jax.eval_shape(lambda: rosmo.init_state((84, 84, 4), model)).params
    net = model.bind(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    state = net.representation(jnp.zeros((2, 3, 84, 84, 4), jnp.uint8))
    assert state.shape == (2, 3, 11, 11, preset["channels"])
    after = net.prediction(net.dynamics(state, jnp.zeros((2, 3), int)))
    assert after.policy_logits.shape == (2, 3, 4) and after.value_logits.shape == (2, 3, preset["num_bins"])


def test_cheap_encoder_does_not_see_the_brightness_of_the_background():
    model = rosmo.Model(4, rosmo.Args(encoder="cnn", channels=4, num_bins=11, head_channels=2, head_width=8))
    net = model.bind(rosmo.init_state((84, 84, 4), model).params)
    frames = np.zeros((2, 84, 84, 4), np.uint8)
    frames[0, 10:20, 30:40] = 90
    frames[1, 50:60, 30:40, 3] = 90
    dark, bright = net.representation(jnp.asarray(frames)), net.representation(jnp.asarray(frames + 142))
    np.testing.assert_allclose(dark, bright, atol=1e-5)
    assert np.abs(dark[0] - dark[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--env-id", "Breakuot"], "did you mean 'Breakout'"),
        (["--env-id", "Pong"], "the dataset is of Breakout"),
        (["--data-dir", "nowhere"], "there is no dataset folder nowhere"),
        (["--bootstrap-steps", "100000"], "are longer than every episode of the data"),
        (["--batch-size", "4000"], "is more than the"),
        (["--channels", "1"], "--channels must be at least 2"),
        (["--seed", "4294967296"], "a seed is from 0 to 4294967295"),
    ],
)
def test_what_a_user_gets_wrong(flags, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        run([*flags, "--run-dir", str(tmp_path / "run"), *arguments])
    assert list(tmp_path.iterdir()) == []
