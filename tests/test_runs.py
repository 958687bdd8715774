"""What a script leaves behind and how it stops: run folder, metrics, checkpoints, signals, resuming, errors.

rosmo_bsuite.py stands for both scripts of its benchmark, and rosmo_atari.py too: test_in_step.py holds their text equal.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import gymnasium
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import muzero_unplugged_bsuite
import rosmo_atari
import rosmo_bsuite
from data.dataset import write_dataset
from tests.programs import (
    SMALL,
    TINY_FLAGS,
    assert_same_state,
    last_state,
    metrics,
    program,
    rewound,
    run,
    scores,
    small_flags,
    training,
    wait_for,
)  # fmt: skip

BSUITE = ["--total-steps", 437, "--eval-interval", 200, "--checkpoint-interval", 200]
ATARI = ["--total-steps", 23, "--eval-interval", 10, "--checkpoint-interval", 13, "--capture-video"]


@pytest.fixture(scope="session")
def flags(catch_dataset):
    return ["--data-dir", catch_dataset, *SMALL]


@pytest.fixture(scope="session")
def atari_flags(breakout_dataset):
    return ["--data-dir", breakout_dataset, *TINY_FLAGS]


@pytest.fixture(scope="session")
def bsuite_run(flags, tmp_path_factory):
    """A run of rosmo_bsuite.py that is never stopped."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(rosmo_bsuite, [*flags, *BSUITE, "--run-dir", run_dir]) == 0
    return run_dir


@pytest.fixture(scope="session")
def atari_run(atari_flags, tmp_path_factory):
    """A run of rosmo_atari.py that is never stopped."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(rosmo_atari, [*atari_flags, *ATARI, "--run-dir", run_dir]) == 0
    return run_dir


def checkpoint_steps(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())


def whole(script, request):
    """The run that is never stopped, its flags, and the step of a checkpoint within it."""
    if script is rosmo_atari:
        return request.getfixturevalue("atari_run"), [*request.getfixturevalue("atari_flags"), *ATARI], 20
    return request.getfixturevalue("bsuite_run"), [*request.getfixturevalue("flags"), *BSUITE], 400


both = pytest.mark.parametrize("script", [rosmo_bsuite, rosmo_atari], ids=lambda script: script.__name__)


# ------------------------------------------------------------------------------------------------------ Files of a run


@both
def test_files_of_a_run(script, request):
    run_dir, _, _ = whole(script, request)
    atari = script is rosmo_atari
    dataset = request.getfixturevalue("breakout_dataset" if atari else "catch_dataset")
    settings = json.loads((run_dir / "args.json").read_text())
    assert settings["script"] == script.__name__ and settings["args"]["batch_size"] == (4 if atari else 16)
    assert settings["args"]["data_dir"] == str(dataset) and settings["args"]["run_dir"] == str(run_dir)
    assert settings["args"].keys() == {field.name for field in dataclasses.fields(script.Args)}
    assert settings["dataset"] == json.loads((dataset / "meta.json").read_text())
    assert {"jax", "flax", "optax", "numpy", "python"} <= settings["versions"].keys() and len(settings["devices"]) == 2
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(script.__file__).parent)
    assert settings["git_commit"] == (head.stdout.strip() or None)

    lines, logged = metrics(run_dir), [*range(5, 21, 5), 23] if atari else [*range(10, 431, 10), 437]
    assert [line["step"] for line in training(lines)] == logged
    assert [line["step"] for line in scores(lines)] == ([10, 20, 23] if atari else [200, 400, 437])
    assert lines == sorted(lines, key=lambda line: line["step"])
    names = ("total_loss", "reward_loss", "value_loss", "policy_loss", "behavior_loss", "grad_norm", "updates_per_second")
    for line in [line for line in lines if "train/total_loss" in line]:
        assert all(np.isfinite(line[f"train/{name}"]) for name in names)
    names = ("return_mean", "return_std", "return_min", "return_max", "length_mean", "normalized_score", "episodes")
    assert all({f"eval/{name}" for name in names} <= line.keys() for line in scores(lines))
    assert scores(lines)[0]["eval/episodes"] == (3 if atari else 4)
    # The last line is of fewer updates than the others: its mean is over those.
    before, last = training(lines)[-2:]
    assert last["train/param_norm"] == pytest.approx(before["train/param_norm"], rel=0.1)
    assert last["train/value_loss"] == pytest.approx(before["train/value_loss"], rel=0.25)
    if atari:
        assert sorted(path.name for path in (run_dir / "videos").iterdir()) == ["10.mp4", "20.mp4", "23.mp4"]
    assert checkpoint_steps(run_dir) == ([20, 23] if atari else [400, 437])


@both
def test_a_resumed_run_is_the_same_bit_for_bit(script, request, tmp_path):
    """Killed after a checkpoint and in the middle of writing a line; on Atari, the frames are elsewhere afterwards."""
    run_dir, _, step = whole(script, request)
    copy = rewound(run_dir, tmp_path / "copy", step)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert run(script, ["--resume", copy, *(["--data-place", "device"] if script is rosmo_atari else [])]) == 0
    assert_same_state(last_state(script, copy), last_state(script, run_dir))
    assert training(metrics(copy)) == training(metrics(run_dir)) and scores(metrics(copy)) == scores(metrics(run_dir))


def test_a_run_stopped_between_all_intervals_goes_on_bit_for_bit(bsuite_run, flags, tmp_path):
    run_dir = tmp_path / "resumed"
    assert run(rosmo_bsuite, [*flags, *BSUITE, "--total-steps", 317, "--run-dir", run_dir]) == 0
    assert run(rosmo_bsuite, ["--resume", run_dir, "--total-steps", 437]) == 0
    assert_same_state(last_state(rosmo_bsuite, run_dir), last_state(rosmo_bsuite, bsuite_run))
    lines, expected = ([x for x in training(metrics(d)) if x["step"] not in (317, 320)] for d in (run_dir, bsuite_run))
    assert lines == expected


@both
def test_eval_only_prints_the_scores_of_the_last_checkpoint(script, request, capsys):
    run_dir, _, _ = whole(script, request)
    before = metrics(run_dir)
    assert run(script, ["--resume", run_dir, "--eval-only"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == scores(before)[-1]
    assert run(script, ["--resume", run_dir, "--eval-only", "--eval-episodes", 5]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval/episodes"] == 5
    assert metrics(run_dir) == before


def test_what_the_command_line_names_beside_resume_is_used_and_recorded(bsuite_run, tmp_path, capsys):
    copy = shutil.copytree(bsuite_run, tmp_path / "copy")
    assert run(rosmo_bsuite, ["--resume", copy, "--total-steps", 447, "--value-coef", 0.0]) == 0
    settings = json.loads((copy / "args.json").read_text())
    assert settings["args"]["value_coef"] == 0 and settings["args"]["total_steps"] == 447
    assert (
        settings["args"]["batch_size"] == 16 and settings["id"] == json.loads((bsuite_run / "args.json").read_text())["id"]
    )
    line, before = training(metrics(copy))[-1], training(metrics(bsuite_run))[-1]
    for each, coefficient in ((line, 0), (before, 0.25)):
        parts = each["train/reward_loss"] + each["train/policy_loss"] + 0.2 * each["train/behavior_loss"]
        assert each["train/total_loss"] == pytest.approx(parts + coefficient * each["train/value_loss"], rel=1e-4)


def test_runs_of_other_versions(bsuite_run, tmp_path, capsys):
    """A setting that args.json lacks takes its default; one that the script lacks is reported and ignored."""
    copy = shutil.copytree(bsuite_run, tmp_path / "copy")
    settings = json.loads((copy / "args.json").read_text())
    del settings["args"]["distributed"]
    settings["args"]["old_flag"] = 3
    (copy / "args.json").write_text(json.dumps(settings))
    assert rosmo_bsuite.parse_args(["--resume", str(copy)]).distributed is False
    assert f"{copy} has settings that this program lacks: old_flag" in capsys.readouterr().err


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(catch_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rosmo_bsuite.time, "strftime", lambda _: "20260101-000000")
    args = rosmo_bsuite.Args(data_dir=catch_dataset)
    folders = [str(rosmo_bsuite.open_run(args, {})["args"]["run_dir"]) for _ in range(3)]
    assert folders == [f"runs/catch__rosmo_bsuite__0__20260101-000000{suffix}" for suffix in ("", "_2", "_3")]
    args = dataclasses.replace(args, env_id="ALE/Pong-ram-v5")
    assert str(rosmo_bsuite.open_run(args, {})["args"]["run_dir"]).startswith("runs/ALE_Pong-ram-v5__")


def test_tracking(bsuite_run, flags, tmp_path, monkeypatch):
    """All that Weights & Biases is told, and what it says of a name that it does not take."""
    calls, logged = [], []

    class WandbError(Exception):
        __module__ = "wandb.errors"

    def init(**settings):
        calls.append(settings)
        if settings["project"] == "no/such":
            raise WandbError("the project is not valid")
        return types.SimpleNamespace(log=lambda metrics, step: logged.append({"step": step, **metrics}))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run_dir = tmp_path / "run"
    track = ["--track", "--wandb-project", "p", "--wandb-entity", "e"]
    assert run(rosmo_bsuite, [*flags, *track, "--total-steps", 20, "--run-dir", run_dir]) == 0
    assert run(rosmo_bsuite, ["--resume", run_dir, "--total-steps", 30]) == 0
    run_id = json.loads((run_dir / "args.json").read_text())["id"]
    for call, total_steps in zip(calls, (20, 30), strict=True):
        assert call.pop("config")["total_steps"] == total_steps
        assert call == {"project": "p", "entity": "e", "name": "run", "id": run_id, "dir": str(run_dir), "resume": "allow"}
    assert logged == metrics(run_dir) and len(logged) == 5
    with pytest.raises(WandbError):
        run(rosmo_bsuite, ["--resume", run_dir, "--total-steps", 40, "--wandb-project", "no/such"])


def test_one_device_and_two_train_alike(bsuite_run, flags, tmp_path):
    process = program(rosmo_bsuite, *flags, "--total-steps", 40, "--cpu-devices", 1, "--run-dir", tmp_path / "one")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert len(json.loads((tmp_path / "one" / "args.json").read_text())["devices"]) == 1
    for one, two in zip(training(metrics(tmp_path / "one")), training(metrics(bsuite_run)), strict=False):
        for name in ("train/total_loss", "train/grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)


@pytest.mark.parametrize(
    ("cores", "settings", "devices"),
    [(4, {}, 4), (16, {}, 8), (3, {}, 2), (4, {"cpu_devices": 1}, 1), (4, {"batch_size": 5}, 1)],
)
def test_a_batch_is_split_over_the_cores(cores, settings, devices, monkeypatch):
    """Over as many as can share it, at most 8."""
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *setting: chosen.append(setting))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rosmo_bsuite.use_devices(rosmo_bsuite.Args(**settings))
    assert chosen == [("jax_num_cpu_devices", devices)]


def random_play(folder, env_id, terminal=None):
    """Thirty episodes of random play of CartPole-v1 under this name; terminal: what to write instead of the truth."""
    environment, random = gymnasium.make("CartPole-v1", max_episode_steps=20), np.random.default_rng(0)
    with write_dataset(folder, benchmark="bsuite", env_id=env_id, num_actions=2) as writer:
        for episode in range(30):
            observations, actions, is_over = [environment.reset(seed=episode)[0]], [], False
            while not is_over:
                actions.append(random.integers(2))
                observation, _, terminated, truncated, _ = environment.step(actions[-1])
                observations, is_over = [*observations, observation], terminated or truncated
            ended = terminated if terminal is None else terminal
            writer.add_episode(np.stack(observations), np.array(actions), np.ones(len(actions)), bool(ended))
    return folder


@pytest.mark.parametrize("script", [rosmo_bsuite, muzero_unplugged_bsuite])
def test_a_run_in_an_environment_of_gymnasium(script, tmp_path):
    """Datasets are looked for by its name; its time limits end episodes of the evaluation too."""
    folder = random_play(tmp_path / "data", "CartPole-v1")
    flags = [*small_flags(script), "--env-id", "CartPole-v1", "--data-dir", folder, "--total-steps", 20]
    assert run(script, [*flags, "--run-dir", tmp_path / "run"]) == 0
    (last,) = scores(metrics(tmp_path / "run"))
    assert last["eval/return_mean"] == last["eval/length_mean"] > 5 and "eval/normalized_score" not in last
    with pytest.raises(script.InputError, match="there is no dataset datasets/bsuite/CartPole-v1: name the folder"):
        run(script, [*small_flags(script), "--env-id", "CartPole-v1"])


@both
def test_a_run_without_an_environment(script, tmp_path, breakout_dataset):
    """Of logs alone, under any name: it trains and scores nothing."""
    if script is rosmo_atari:
        folder = shutil.copytree(breakout_dataset, tmp_path / "data")
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"env_id": "plant"}))
    else:
        folder = random_play(tmp_path / "data", "plant")
    flags = [*small_flags(script), "--env-id", "plant", "--data-dir", folder, "--total-steps", 20]
    with pytest.raises(script.InputError, match=r"there is no (task|game) 'plant'"):
        run(script, [*flags, "--run-dir", tmp_path / "run"])
    flags = [*flags, "--run-dir", tmp_path / "run", "--eval-episodes", 0, "--eval-interval", 10]
    assert run(script, flags) == 0
    lines = metrics(tmp_path / "run")
    assert lines == [line for line in lines if "train/total_loss" in line] and lines[-1]["step"] == 20
    with pytest.raises(script.InputError, match="has made 20 updates already"):
        run(script, ["--resume", tmp_path / "run"])
    with pytest.raises(script.InputError, match="--eval-only needs --resume RUN_DIR, and --eval-episodes above 0"):
        run(script, ["--resume", tmp_path / "run", "--eval-only"])


def test_cut_off_episodes_are_not_terminal(tmp_path):
    """The same play, with every end terminal and with every end a time limit."""
    flags = [*SMALL, "--env-id", "plant", "--total-steps", 20, "--eval-episodes", 0]
    lines = []
    for terminal in (True, False):
        folder = random_play(tmp_path / f"data_{terminal}", "plant", terminal)
        assert run(rosmo_bsuite, [*flags, "--data-dir", folder, "--run-dir", tmp_path / f"run_{terminal}"]) == 0
        lines.append(training(metrics(tmp_path / f"run_{terminal}"))[0])
    assert all(lines[0][name] != lines[1][name] for name in lines[0] if name.endswith("_loss"))


# ----------------------------------------------------------------------------------------------------------- Stopping


@pytest.mark.parametrize(("script", "signum"), [(rosmo_bsuite, signal.SIGINT), (rosmo_atari, signal.SIGTERM)])
def test_a_signal_writes_a_checkpoint_to_go_on_from(script, signum, request, tmp_path):
    flags, run_dir = whole(script, request)[1], tmp_path / "stopped"
    endless = ["--total-steps", 10**6, "--eval-interval", 10**6, "--checkpoint-interval", 10**6]
    process = program(script, *flags, *endless, "--run-dir", run_dir)
    wait_for(lambda: len(metrics(run_dir)) >= 3, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signum and "Traceback" not in err
    step = int(re.search(r"stopped after (\d+) updates; go on with --resume", out)[1])
    assert int(last_state(script, run_dir).step) == step
    total = ["--total-steps", step + 10, "--eval-episodes", 1]
    assert run(script, ["--resume", run_dir, *total]) == 0
    assert run(script, [*flags, *endless, *total, "--run-dir", tmp_path / "whole"]) == 0
    assert_same_state(last_state(script, run_dir), last_state(script, tmp_path / "whole"))


@pytest.mark.parametrize(
    ("script", "signum"),
    [
        *((rosmo_bsuite, s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)),
        (rosmo_atari, signal.SIGUSR1),
    ],
)
def test_a_signal_in_an_evaluation(script, signum, request, tmp_path, monkeypatch, capsys):
    """The updates before it are kept, the evaluation is left undone, and --resume makes it, also the last one."""
    run_dir, _, step = whole(script, request)
    copy = rewound(run_dir, tmp_path / "stopped", step)
    act, calls, last = script.act, [], metrics(run_dir)[-1]["step"]

    def act_then_signal(*arguments):
        calls.append(os.kill(os.getpid(), signum))
        return act(*arguments)

    monkeypatch.setattr(script, "act", act_then_signal)
    assert run(script, ["--resume", copy, "--eval-interval", 1000]) == 128 + signum
    assert len(calls) == 1 and f"stopped after {last} updates; go on with --resume" in capsys.readouterr().out
    monkeypatch.setattr(script, "act", act)
    assert int(last_state(script, copy).step) == last and "train/total_loss" in metrics(copy)[-1]
    assert run(script, ["--resume", copy]) == 0
    assert metrics(copy)[-1] == metrics(run_dir)[-1]
    with pytest.raises(script.InputError, match=f"has made {last} updates already"):
        run(script, ["--resume", copy])


def test_kill_at_any_moment_leaves_a_whole_checkpoint(flags, tmp_path):
    """kill -9 while a checkpoint is written every 10 updates."""
    run_dir = tmp_path / "killed"
    endless = [*flags, "--eval-interval", 10**6, "--checkpoint-interval", 10, "--total-steps", 10**6]
    arguments, steps = [*endless, "--run-dir", run_dir], [0]
    for i in range(2):
        process = program(rosmo_bsuite, *arguments)
        wait_for(lambda: max(checkpoint_steps(run_dir), default=0) > steps[-1], process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2 + 0.13 * i)
        process.kill()
        process.communicate()
        steps.append(int(last_state(rosmo_bsuite, run_dir).step))
        assert steps[-1] > steps[-2] and steps[-1] % 10 == 0
        arguments = ["--resume", run_dir]
    total = ["--total-steps", steps[-1] + 10]
    assert run(rosmo_bsuite, ["--resume", run_dir, *total]) == 0
    assert run(rosmo_bsuite, [*endless, *total, "--checkpoint-interval", 10**6, "--run-dir", tmp_path / "whole"]) == 0
    assert_same_state(last_state(rosmo_bsuite, run_dir), last_state(rosmo_bsuite, tmp_path / "whole"))
    assert [line["step"] for line in training(metrics(run_dir))] == list(range(10, steps[-1] + 11, 10))


@both
def test_a_loss_that_is_not_finite_stops_the_run(script, request, tmp_path):
    flags = whole(script, request)[1]
    settings = ["--warmup-steps", 0, "--learning-rate", 1e30, "--checkpoint-interval", 1, "--total-steps", 1000]
    with pytest.raises(SystemExit, match=r"not finite after \d+ updates"):
        run(script, [*flags, *settings, "--eval-interval", 1000, "--log-interval", 1, "--run-dir", tmp_path / "run"])
    state = last_state(script, tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.optimizer_state)))
    assert all(np.isfinite(list(line.values())).all() for line in metrics(tmp_path / "run"))


def test_only_one_program_trains_in_a_folder(flags, tmp_path):
    run_dir = tmp_path / "run"
    process = program(rosmo_bsuite, *flags, "--total-steps", 10**6, "--eval-interval", 10**6, "--run-dir", run_dir)
    wait_for(lambda: metrics(run_dir), process)
    with pytest.raises(rosmo_bsuite.InputError, match=f"another program is training in {run_dir}"):
        run(rosmo_bsuite, ["--resume", run_dir])
    process.kill()
    process.communicate()
    assert run(rosmo_bsuite, ["--resume", run_dir, "--eval-only"]) == 0


def test_a_full_disk(flags, tmp_path, monkeypatch):
    """The first checkpoint cannot be written: an error, and once there is room the same folder goes on from the start."""
    save = ocp.CheckpointManager.save

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(rosmo_bsuite, [*flags, "--total-steps", 10, "--run-dir", tmp_path / "run"])
    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(rosmo_bsuite.InputError, match="exists already: name another --run-dir, or go on with --resume"):
        run(rosmo_bsuite, [*flags, "--total-steps", 10, "--run-dir", tmp_path / "run"])
    assert run(rosmo_bsuite, ["--resume", tmp_path / "run"]) == 0 and metrics(tmp_path / "run")[-1]["step"] == 10


# ------------------------------------------------------------------------------------------------------------- Errors


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        (rosmo_bsuite, ["--env-id", "cach"], "no task 'cach'; did you mean 'catch'"),
        (rosmo_bsuite, ["--env-id", "cartpole"], "the dataset has ('catch', 3, (10, 5), 'float32'), not"),
        (rosmo_bsuite, ["--noise", 0.1], "has noise 0.0, not 0.1"),
        (rosmo_bsuite, ["--data-fraction", 1.5], "--data-fraction must be above 0 and at most 1, not 1.5"),
        (rosmo_bsuite, ["--data-fraction", "nan"], "--data-fraction must be above 0"),
        (rosmo_bsuite, ["--learning-rate", "inf"], "--learning-rate must be above 0, not inf"),
        (rosmo_bsuite, ["--seed", 2**32], "--seed must be at least 0 and at most 4294967295"),
        (rosmo_bsuite, ["--batch-size", 0], "--batch-size must be above 0"),
        (rosmo_bsuite, ["--batch-size", 15], "--batch-size 15 cannot be shared by 2 devices"),
        (rosmo_bsuite, ["--unroll-steps", 8], "windows of 12 steps are longer than every episode of the data (at most 10"),
        (rosmo_bsuite, ["--num-bins", 2], "--num-bins must be at least 3"),
        (rosmo_bsuite, ["--weight-decay", -1], "--weight-decay must be at least 0"),
        (rosmo_bsuite, ["--eval-only"], "--eval-only needs --resume"),
        (rosmo_bsuite, ["--num-simulations", 8], "--num-simulations has no part in the exact target: name --sampling too"),
        (rosmo_bsuite, ["--data-dir", "nowhere"], "nowhere/meta.json is missing"),
        (rosmo_bsuite, ["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (rosmo_atari, ["--env-id", "Breakuot"], "did you mean 'Breakout'"),
        (rosmo_atari, ["--env-id", "ALE/MsPacman-v5"], "did you mean 'MsPacman'"),
        (rosmo_atari, ["--env-id", "Pong"], "the dataset has ('Breakout', 4, (84, 84), 'uint8'), not"),
        (rosmo_atari, ["--bootstrap-steps", 100000], "are longer than every episode of the data"),
        (rosmo_atari, ["--channels", 1], "--channels must be at least 2"),
        (muzero_unplugged_bsuite, ["--search-depth", 5], "3 simulations cannot grow a tree of depth 5"),
        (muzero_unplugged_bsuite, ["--search-depth", 0], "--search-depth must be above 0"),
        (muzero_unplugged_bsuite, ["--dirichlet-fraction", 1.1], "--dirichlet-fraction must be at least 0 and at most 1"),
        (muzero_unplugged_bsuite, ["--temperature", -1], "--temperature must be at least 0"),
        (muzero_unplugged_bsuite, ["--tau", 0.5], "--tau has no part in --policy-target visit_counts"),
        (muzero_unplugged_bsuite, ["--policy-target", "mzu_q", "--tau", 0], "--tau must be above 0"),
        (muzero_unplugged_bsuite, ["--policy-target", "mzu_q", "--temperature", 2], "--temperature has no part in"),
        (muzero_unplugged_bsuite, ["--policy-target", "gumbel", "--dirichlet-fraction", 0], "--dirichlet-fraction has no"),
        (
            muzero_unplugged_bsuite,
            ["--policy-target", "gumbel", "--tau", 0.5],
            "--tau has no part in --policy-target gumbel",
        ),
    ],
)
def test_what_a_user_gets_wrong(request, tmp_path, script, arguments, sentence):
    dataset = request.getfixturevalue("breakout_dataset" if script is rosmo_atari else "catch_dataset")
    run_dir = [] if "--resume" in arguments else ["--run-dir", tmp_path / "run"]
    with pytest.raises(script.InputError, match=re.escape(sentence)):
        run(script, ["--data-dir", dataset, *small_flags(script), *run_dir, *arguments])
    assert list(tmp_path.iterdir()) == []


def test_resuming_what_cannot_be_resumed(bsuite_run, catch_dataset, tmp_path):
    copy = shutil.copytree(bsuite_run, tmp_path / "copy")
    before = (copy / "args.json").read_text(), metrics(copy)
    resume, more = ["--resume", copy], ["--total-steps", 447]
    for arguments, sentence in (
        ([], "has made 437 updates already: name more with --total-steps"),
        ([*more, "--dynamics-width", 16], r"checkpoints/437 cannot be read \(.*shape.*before it there is .*checkpoints/400"),
        ([*more, "--run-dir", tmp_path / "other"], "there is no --run-dir beside it"),
    ):
        with pytest.raises(rosmo_bsuite.InputError, match=sentence):
            run(rosmo_bsuite, [*resume, *arguments])
        assert ((copy / "args.json").read_text(), metrics(copy)) == before
    with pytest.raises(muzero_unplugged_bsuite.InputError, match=r"is a run of rosmo_bsuite\.py, not of muzero_unplugged_b"):
        run(muzero_unplugged_bsuite, resume)
    settings = json.loads(before[0])
    settings["dataset"]["steps"] = 1
    (copy / "args.json").write_text(json.dumps(settings))
    with pytest.raises(rosmo_bsuite.InputError, match="is no longer the dataset that"):
        run(rosmo_bsuite, [*resume, *more])
    (copy / "args.json").write_text(before[0])
    for file in (copy / "checkpoints" / "437" / "default" / "d").iterdir():
        os.truncate(file, 100)
    with pytest.raises(
        rosmo_bsuite.InputError, match=r"437 cannot be read \(.*local file.*checkpoints/437.*before it there is .*/400"
    ):
        run(rosmo_bsuite, [*resume, *more])
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(rosmo_bsuite.InputError, match="holds no checkpoint"):
        run(rosmo_bsuite, [*resume, "--eval-only"])


def test_restore_is_quiet(bsuite_run, monkeypatch):
    """What the threads of a failing restore raise is not printed, neither before it returns nor later."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    raises = type("Raises", (), {"__del__": lambda self: 1 / 0})

    def fail(*_, **__):
        raises()
        raise ValueError("damaged")

    checkpoints = rosmo_bsuite.open_checkpoints(bsuite_run, read_only=True)
    monkeypatch.setattr(checkpoints, "restore", lambda *_, **__: 1)
    assert rosmo_bsuite.restore(checkpoints, None) == 1 and sys.unraisablehook == seen.append
    monkeypatch.setattr(checkpoints, "restore", fail)
    with pytest.raises(rosmo_bsuite.InputError, match=r"437 cannot be read \(damaged\)"):
        rosmo_bsuite.restore(checkpoints, None)
    raises()
    assert seen == []


def test_errors_are_one_sentence_and_exit_code_2(catch_dataset, bsuite_run, tmp_path):
    """As a user sees them: a damaged dataset, a damaged checkpoint, a file where folders are to be made."""
    data = shutil.copytree(catch_dataset, tmp_path / "catch")
    os.truncate(data / "observation.npy", 1000)
    copy = shutil.copytree(bsuite_run, tmp_path / "copy")
    for file in (copy / "checkpoints" / "437" / "default" / "d").iterdir():
        os.truncate(file, 100)
    (tmp_path / "runs").write_text("")
    for arguments, sentence in (
        (["--data-dir", data], "observation.npy is missing, damaged or cut short"),
        (["--resume", copy, "--total-steps", 447], "checkpoints/437 cannot be read"),
        (["--data-dir", catch_dataset, *SMALL], "Not a directory: 'runs/catch__rosmo_bsuite"),
    ):
        out, err = program(rosmo_bsuite, *arguments, cwd=tmp_path).communicate(timeout=200)
        assert out == "" and err.startswith("error: ") and sentence in err and err.count("\n") == 1, err
        assert "tensorstore" not in err  # its specification takes pages
    for environment, arguments, sentence in (
        ({}, ["--eval-only"], "--eval-only needs --resume RUN_DIR, and --eval-episodes above 0"),
        ({"JAX_PLATFORMS": "cuda"}, ["--data-dir", catch_dataset], "JAX has no device for JAX_PLATFORMS=cuda"),
    ):
        process = program(rosmo_bsuite, *arguments, cwd=tmp_path, env=os.environ | environment)
        out, err = process.communicate(timeout=100)
        assert out == "" and err.splitlines()[-1].startswith(f"error: {sentence}") and process.returncode == 2, err


def test_errors_of_the_libraries(tmp_path):
    """Programs of one line, in which main() fails: what a user can put right is a sentence, an error of ours a traceback."""
    source = Path(rosmo_bsuite.__file__).read_text()
    for raised, code, start in (
        ("OSError(28, 'No space left on device', 'x')", 2, "error: [Errno 28] No space left on device: 'x'\n"),
        ("ValueError('RESOURCE_EXHAUSTED: out of memory\\n more')", 2, "error: RESOURCE_EXHAUSTED: out of memory\n"),
        ("KeyboardInterrupt", 128 + signal.SIGINT, ""),
        ("ValueError('bug')", 1, "Traceback"),
    ):
        (tmp_path / "rosmo.py").write_text(source.replace("    use_devices(args)\n", f"    raise {raised}\n", 1))
        process = program(tmp_path / "rosmo.py")
        _, err = process.communicate(timeout=100)
        assert process.returncode == code and err.startswith(start)


def test_importing_does_nothing():
    names = "rosmo_bsuite, rosmo_atari, muzero_unplugged_bsuite, muzero_unplugged_atari"
    check = f"import sys, jax, {names}; assert not jax._src.xla_bridge._backends; assert 'data' not in sys.modules; print(1)"
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert result.stdout == "1\n" and result.stderr == ""


def test_cpu_size_gives_way_to_other_flags():
    args = rosmo_atari.parse_args(["--cpu-size", "--channels", "24"])
    assert args.channels == 24 and args.cpu_size and (args.batch_size, args.total_steps, args.encoder) == (32, 20_000, "cnn")
    assert rosmo_atari.parse_args(["--channels", "24"]).batch_size == 512
