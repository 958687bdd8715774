"""What a script leaves behind and how it stops: run folder, metrics, checkpoints, signals, resuming, errors.

rosmo_bsuite.py stands for both scripts of its benchmark, and rosmo_atari.py too: test_in_step.py holds their text equal.
"""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from pydantic import ValidationError

import muzero_unplugged_bsuite
import rosmo_atari
import rosmo_bsuite
from tests.programs import (
    SMALL,
    TINY_FLAGS,
    assert_same_state,
    checkpoint_steps,
    last_state,
    metrics,
    program,
    run,
    scores,
    small_flags,
    wait_for,
)

BSUITE = ["--total-steps", 437, "--eval-interval", 175, "--checkpoint-interval", 200]
ATARI = ["--total-steps", 23, "--eval-interval", 9, "--checkpoint-interval", 10, "--capture-video"]
NEVER = ["--eval-interval", 10**6, "--checkpoint-interval", 10**6]


@pytest.fixture(scope="session")
def flags(catch_dataset):
    return ["--data-dir", catch_dataset, *SMALL, *BSUITE]


@pytest.fixture(scope="session")
def atari_flags(breakout_dataset):
    return ["--data-dir", breakout_dataset, *TINY_FLAGS, *ATARI]


@pytest.fixture(scope="session")
def bsuite_run(flags, tmp_path_factory):
    """A run of rosmo_bsuite.py that is never stopped."""
    run(rosmo_bsuite, [*flags, "--run-dir", run_dir := tmp_path_factory.mktemp("runs") / "whole"])
    return run_dir


@pytest.fixture(scope="session")
def atari_run(atari_flags, tmp_path_factory):
    """A run of rosmo_atari.py that is never stopped."""
    run(rosmo_atari, [*atari_flags, "--run-dir", run_dir := tmp_path_factory.mktemp("runs") / "whole"])
    return run_dir


def whole(script, request):
    """The run that is never stopped, and its flags."""
    names = ("atari_run", "atari_flags") if script is rosmo_atari else ("bsuite_run", "flags")
    return map(request.getfixturevalue, names)


both = pytest.mark.parametrize("script", [rosmo_bsuite, rosmo_atari], ids=lambda script: script.__name__)


def without(lines, step):
    """Lines of metrics, but for the training of one step: a run that began between two lines has fewer updates in it."""
    return [scores([line]) if line["step"] == step else line for line in lines]


# ------------------------------------------------------------------------------------------------------ Files of a run


@both
def test_files_of_a_run(script, request):
    run_dir, _ = whole(script, request)
    atari = script is rosmo_atari
    dataset = request.getfixturevalue("breakout_dataset" if atari else "catch_dataset")
    settings = json.loads((run_dir / "args.json").read_text())
    assert settings["args"]["batch_size"] == (4 if atari else 16) and settings["args"]["data_dir"] == str(dataset)
    assert settings["args"].keys() == {field.name for field in dataclasses.fields(script.Args)}
    assert settings["dataset"].items() >= json.loads((dataset / "meta.json").read_text()).items()
    assert {"jax", "flax", "optax", "numpy"} < settings["versions"].keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(script.__file__).parent)
    assert settings["git_commit"] == head.stdout.strip()

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/total_loss" in line]
    assert [line["step"] for line in train] == ([5, 10, 15, 20, 23] if atari else [*range(10, 431, 10), 437])
    assert [line["step"] for line in scores(lines)] == ([9, 18, 23] if atari else [175, 350, 437])
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))  # one line a step
    names = ("total_loss", "reward_loss", "value_loss", "policy_loss", "behavior_loss", "grad_norm", "updates_per_second")
    assert all(np.isfinite(line[f"train/{name}"]) for line in train for name in names)
    names = ("return_mean", "return_std", "return_min", "return_max", "normalized_score")
    assert all({f"eval/{name}" for name in names} <= line.keys() for line in scores(lines))
    # The last line is of fewer updates than the others: its mean is over those.
    assert train[-1]["train/param_norm"] == pytest.approx(train[-2]["train/param_norm"], rel=0.1)
    assert train[-1]["train/value_loss"] == pytest.approx(train[-2]["train/value_loss"], rel=0.25)
    if atari:
        assert sorted(path.name for path in (run_dir / "videos").iterdir()) == ["18.webm", "23.webm", "9.webm"]
    assert checkpoint_steps(run_dir) == ([20, 23] if atari else [400, 437])


@both
def test_a_stopped_run_goes_on_bit_for_bit(script, request, tmp_path, monkeypatch):
    """A signal comes in the first evaluation, between all other intervals; on Atari, the frames are elsewhere afterwards.

    Then its metrics look like those of a run that was killed: a step after the checkpoint, and half a line."""
    run_dir, flags = whole(script, request)
    act, stopped_by, (step, after) = script.act, [], (9, 10) if script is rosmo_atari else (175, 180)
    monkeypatch.setattr(script, "act", lambda *arguments: stopped_by.append(2) or act(*arguments))
    run(script, [*flags, "--run-dir", tmp_path / "stopped"], stopped_by)
    monkeypatch.undo()
    assert checkpoint_steps(tmp_path / "stopped") == [step] and metrics(tmp_path / "stopped")[-1]["step"] == step
    copy = (tmp_path / "stopped").rename(tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step + 1, "train/total_loss": 1.0}) + '\n{"step": 4')
    run(script, ["--resume", copy, *(["--data-place", "device"] if script is rosmo_atari else [])])
    assert_same_state(last_state(script, copy), last_state(script, run_dir))
    assert without(metrics(copy), after) == without(metrics(run_dir), after) and len(stopped_by) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_eval_only_scores_the_last_checkpoint(bsuite_run, atari_run, capsys):
    """Wherever the dataset is."""
    for script, run_dir in ((rosmo_bsuite, bsuite_run), (rosmo_atari, atari_run)):
        before = metrics(run_dir)
        run(script, ["--resume", run_dir, "--eval-only", "--data-dir", "nowhere", "--batch-size", 15])  # no batch to share
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found == {name: value for name, value in scores(before)[-1].items() if name != "eval/seconds"}
        assert metrics(run_dir) == before


def test_tracking_and_what_is_named_beside_resume(flags, tmp_path, monkeypatch):
    """All that Weights & Biases is told. What the command line names beside --resume is used and recorded."""
    calls, logged = [], []
    wandb = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings), log=lambda line, step: logged.append({"step": step, **line})
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(rosmo_bsuite, [*flags, "--track", "--wandb-project", "p", "--total-steps", 20, "--run-dir", tmp_path / "run"])
    run(rosmo_bsuite, ["--resume", tmp_path / "run", "--total-steps", 30, "--value-coef", 0.0])
    for call, total_steps in zip(calls, (20, 30), strict=True):
        assert call.pop("config")["total_steps"] == total_steps
        assert call == {"project": "p", "name": "run", "dir": tmp_path / "run", "resume": "auto"}
    for line in logged:
        del line["train/updates_per_second"]
    assert logged == metrics(tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert (settings["value_coef"], settings["total_steps"], settings["batch_size"]) == (0, 30, 16)
    for line, coefficient in zip(logged, (0.25, 0.25, 0), strict=True):
        parts = line["train/reward_loss"] + line["train/policy_loss"] + 0.2 * line["train/behavior_loss"]
        assert line["train/total_loss"] == pytest.approx(parts + coefficient * line["train/value_loss"], rel=1e-4)


def test_cpu_size_gives_way_to_other_flags():
    args = rosmo_atari.parse_args(["--cpu-size", "--channels", "24"])
    assert args.channels == 24 and args.cpu_size and (args.batch_size, args.total_steps, args.encoder) == (32, 20_000, "cnn")
    assert rosmo_atari.parse_args(["--channels", "24"]).batch_size == 512


# ----------------------------------------------------------------------------------------------------------- Stopping


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_a_program_with_a_checkpoint(signum, flags, bsuite_run, tmp_path):
    """This one has a single device: it trains as two do."""
    flags = [*flags, "--cpu-devices", 1, "--total-steps", 10**6, *NEVER]
    process = program(rosmo_bsuite, *flags, "--run-dir", tmp_path / "run")
    wait_for(lambda: len(metrics(tmp_path / "run")) >= 4, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and "Traceback" not in err and "1 x cpu" in out
    (step,) = checkpoint_steps(tmp_path / "run")
    assert step >= metrics(tmp_path / "run")[-1]["step"] >= 40
    for one, two in zip(metrics(tmp_path / "run")[:4], metrics(bsuite_run), strict=False):
        assert one == pytest.approx(two, rel=1e-4)


def as_program(script, monkeypatch, *arguments):
    """The exit code of the script, run in this process under the name __main__."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    try:
        runpy.run_path(script.__file__, run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def test_a_score_needs_no_cluster_and_ends_at_a_signal(bsuite_run, monkeypatch, capsys):
    """Of a run that was trained on one."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert as_program(rosmo_bsuite, monkeypatch, "--resume", bsuite_run, "--eval-only", "--distributed") == 0
    assert handlers == {} and "eval/return_mean" in capsys.readouterr().out


def test_a_second_signal_ends_the_program_itself(flags, tmp_path, monkeypatch):
    """After the first one the system's handler is back. The first one came before training: nothing is to be saved."""
    handlers, signum = {}, signal.SIGTERM
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    device_count = jax.device_count

    def signalled():
        assert handlers.keys() == {signal.SIGINT, signal.SIGTERM}
        if handlers[signum] is not signal.SIG_DFL:
            handlers[signum](signum, None)
        return device_count()

    monkeypatch.setattr(jax, "device_count", signalled)
    assert as_program(rosmo_bsuite, monkeypatch, *flags, "--run-dir", tmp_path / "run") == 0
    assert handlers[signum] is signal.SIG_DFL and checkpoint_steps(tmp_path / "run") == []
    monkeypatch.undo()
    run(rosmo_bsuite, ["--resume", tmp_path / "run", "--total-steps", 10])  # from the start, as there is no checkpoint
    assert [line["step"] for line in metrics(tmp_path / "run")] == checkpoint_steps(tmp_path / "run") == [10]


@pytest.mark.parametrize("script", [rosmo_bsuite, pytest.param(rosmo_atari, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run(script, request, tmp_path):
    """The first update has a learning rate of 0; the second one, whose loss is finite, spoils the parameters."""
    _, flags = whole(script, request)
    settings = ["--warmup-steps", 1, "--learning-rate", 1e30, "--checkpoint-interval", 1, "--total-steps", 100]
    settings += ["--eval-interval", 100, "--log-interval", 1, "--run-dir", tmp_path / "run"]
    with pytest.raises(SystemExit, match="not finite after 2 updates"):
        run(script, [*flags, *settings])
    assert checkpoint_steps(tmp_path / "run") == [1] and [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(last_state(script, tmp_path / "run")))


@pytest.mark.parametrize(
    ("cores", "flags", "devices"),
    [(4, [], 4), (16, [], 8), (3, [], 2), (4, ["--cpu-devices", 1], 1), (4, ["--batch-size", 5], 1)],
)
def test_a_batch_is_split_over_the_cores(cores, flags, devices, monkeypatch):
    """Over as many as can share it, at most 8."""
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *setting: chosen.append(setting) or (len(chosen) == 2 and sys.exit(3)))
    assert as_program(rosmo_bsuite, monkeypatch, *flags) == 3 and chosen[1] == ("jax_num_cpu_devices", devices)
    assert chosen[0] == ("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


# ------------------------------------------------------------------------------------------------------------- Errors


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        (rosmo_bsuite, ["--batch-size", 15], "the number of devices must divide --batch-size"),
        (rosmo_bsuite, ["--num-simulations", 8], "--num-simulations is used with --sampling only"),
        (rosmo_bsuite, ["--eval-only"], "--eval-only needs --resume"),
        (rosmo_bsuite, ["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (rosmo_bsuite, ["--resume", "x", "--run-dir", "y"], "name no --run-dir beside it"),
        (rosmo_bsuite, ["--distributed"], "--distributed needs --run-dir"),
        (rosmo_atari, ["--env-id", "Pong"], "is of Breakout, not of Pong"),
        (rosmo_atari, ["--rom-dir", "nowhere"], "nowhere has no atari/roms/breakout.bin"),
        (muzero_unplugged_bsuite, ["--search-depth", 5], "--search-depth is at most --num-simulations"),
        (muzero_unplugged_bsuite, ["--tau", 0.5], "--tau has no part in --policy-target visit_counts"),
        (muzero_unplugged_bsuite, ["--policy-target", "mzu_q", "--temperature", 2], "--temperature has no part in"),
        (muzero_unplugged_bsuite, ["--policy-target", "gumbel", "--dirichlet-fraction", 0], "--dirichlet-fraction has no"),
    ],
)
def test_what_a_user_gets_wrong(request, tmp_path, script, arguments, sentence):
    dataset = request.getfixturevalue("breakout_dataset" if script is rosmo_atari else "catch_dataset")
    run_dir = [] if {"--resume", "--distributed"} & set(arguments) else ["--run-dir", tmp_path / "run"]
    flags = ["--data-dir", dataset, *small_flags(script), "--total-steps", 10, *run_dir]
    with pytest.raises(script.InputError, match=re.escape(sentence)):
        run(script, [*flags, *arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "field", "values"),
    [
        (rosmo_bsuite, "data_fraction", (0, 1.5, float("nan"))),
        (rosmo_bsuite, "discount", (0, 1.01)),
        (rosmo_bsuite, "learning_rate", (0, float("inf"))),
        (rosmo_bsuite, "learning_rate_decay", (0, 1.1)),
        (rosmo_bsuite, "noise", (-0.1, 1.1)),
        (rosmo_bsuite, "seed", (-1, 2**32)),
        (rosmo_bsuite, "batch_size", (0,)),
        (rosmo_bsuite, "num_bins", (2,)),
        (rosmo_bsuite, "weight_decay", (-1,)),
        (rosmo_atari, "channels", (1,)),
        (muzero_unplugged_bsuite, "search_depth", (0,)),
        (muzero_unplugged_bsuite, "dirichlet_fraction", (-0.1, 1.1)),
        (muzero_unplugged_bsuite, "temperature", (-1,)),
        (muzero_unplugged_bsuite, "tau", (0,)),
    ],
)
def test_limits_of_settings(script, field, values, capsys):
    """tyro reports what is outside, with the exit code of a wrong command line; Args itself refuses it too."""
    for value in values:
        with pytest.raises(ValidationError, match=field):
            script.Args(**{field: value})
    with pytest.raises(SystemExit) as end:
        script.parse_args([f"--{field.replace('_', '-')}={values[-1]}"])
    assert end.value.code == 2 and field in capsys.readouterr().err.replace("-", "_")


def test_resuming_what_cannot_be_resumed(bsuite_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # takes it back
    copy = shutil.copytree(bsuite_run, tmp_path / "copy")
    before = (copy / "args.json").read_text(), metrics(copy)
    for more in ([], ["--eval-only"]):
        with pytest.raises(rosmo_bsuite.InputError, match=r"/copy has no checkpoint of this network, or a damaged .*shape"):
            run(rosmo_bsuite, ["--resume", copy, "--dynamics-width", 16, *more])
        assert ((copy / "args.json").read_text(), metrics(copy)) == before
    with pytest.raises(rosmo_bsuite.InputError, match="/copy is of catch, not of cartpole"):
        run(rosmo_bsuite, ["--resume", copy, "--eval-only", "--env-id", "cartpole"])
    run(rosmo_bsuite, ["--resume", copy])  # it has made all updates: nothing is left to do
    assert metrics(copy) == before[1] and checkpoint_steps(copy) == [400, 437]


def test_errors_are_one_sentence_and_exit_code_2(catch_dataset, bsuite_run, tmp_path, monkeypatch, capsys):
    """And an error in the code keeps its traceback."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    damaged = shutil.copytree(bsuite_run, tmp_path / "damaged")
    settings = json.loads((damaged / "args.json").read_text())
    (damaged / "args.json").write_text(json.dumps({"args": settings["args"] | {"old_flag": 3}}))
    for arguments, sentence in (
        (["--eval-only"], "--eval-only needs --resume"),
        (["--env-id", "cach", "--data-dir", catch_dataset], "not of ('cach', 0.0)"),
        (["--data-dir", catch_dataset, "--run-dir", damaged / "args.json", "--eval-episodes", 0], "File exists"),
        (["--resume", damaged], "old_flag"),
    ):
        assert as_program(rosmo_bsuite, monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and sentence in err and "Traceback" not in err
    monkeypatch.setattr(jax, "device_count", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        as_program(rosmo_bsuite, monkeypatch)


def test_a_damaged_checkpoint_is_one_sentence(bsuite_run, tmp_path):
    """A program of its own: the threads that read it would print tracebacks, also at the end."""
    copy = shutil.copytree(bsuite_run, tmp_path / "copy")
    for file in (copy / "checkpoints" / "437" / "default" / "d").iterdir():
        os.truncate(file, 100)
    process = program(rosmo_bsuite, "--resume", copy, "--total-steps", 447)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2 and out == ""
    assert err.startswith(f"error: {copy} has no checkpoint of this network, or a damaged one: ")
    assert "Traceback" not in err and len(err) < 600
