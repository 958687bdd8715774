"""rosmo_bsuite.py: windows and masks, acting, running, stopping, resuming, errors, and learning."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_bsuite as rosmo
from data.dataset import InputError, open_dataset
from data.record_bsuite import make_environment
from data.runs import Checkpoints
from tests import programs
from tests.programs import SMALL, assert_same_state, last_state, metrics

ARGS = rosmo.Args(unroll_steps=3, bootstrap_steps=2)


def windows(lengths: list[int], window: int) -> rosmo.Steps:
    """Every window of a dataset of episodes with these numbers of steps."""
    total, last = sum(lengths), np.cumsum(lengths) - 1
    random = np.random.default_rng(0)
    is_last = np.isin(np.arange(total), last)
    is_first = np.roll(is_last, 1)
    reward = np.where(is_last, 0, random.normal(size=total)).astype(np.float32)
    action = np.where(is_last, 0, random.integers(3, size=total)).astype(np.int32)
    index = np.arange(total - window + 1)[:, None] + np.arange(window)
    return rosmo.Steps(*(jnp.asarray(x[index]) for x in (np.zeros((total, 1, 1)), action, reward, is_first, is_last)))


def test_targets_at_episode_ends():
    """Against the definitions, written as loops over single steps (spec: absorbing after an episode's last step)."""
    k, n, gamma = ARGS.unroll_steps, ARGS.bootstrap_steps, ARGS.discount
    batch = windows([2, 3, 8, 4, 9], k + n + 1)
    random = np.random.default_rng(1)
    size = batch.action.shape
    labels = rosmo.Labels(
        *(jnp.asarray(random.normal(size=size), jnp.float32) for _ in range(2)),
        jnp.asarray(random.dirichlet(np.ones(3), size=size), jnp.float32),
    )
    targets = rosmo.make_targets(jax.random.PRNGKey(0), batch, labels, ARGS)
    drawn = rosmo.random_actions(jax.random.PRNGKey(0), (size[0], k), 3)
    for b in range(size[0]):
        first, last = np.asarray(batch.is_first[b]), np.asarray(batch.is_last[b])
        for t in range(k):
            over = first[1 : t + 2].any()
            assert targets.reward[b, t] == (0 if over else batch.reward[b, t])
            assert targets.action[b, t] == (drawn if over else batch.action)[b, t]
        for t in range(k + 1):
            if last[: t + 1].any():
                assert targets.value[b, t] == 0
                np.testing.assert_allclose(targets.policy[b, t], 1 / 3, rtol=1e-6)
            else:
                z, discount = 0.0, 1.0
                for i in range(n):
                    z += discount * float(batch.reward[b, t + i])
                    discount *= gamma * (1 - last[t + i + 1])
                z += discount * float(labels.value[b, t + n])
                np.testing.assert_allclose(targets.value[b, t], z, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(targets.policy[b, t], labels.policy[b, t])
            advantage = labels.reward[b, t + 1] + gamma * labels.value[b, t + 1] - labels.value[b, t]
            assert targets.behavior[b, t] == (advantage >= 0 and not first[1 : t + 2].any())


def test_behavior_filter_keeps_an_advantage_of_zero():
    """H(0) = 1, as in the paper (the authors' code has 0)."""
    batch = windows([20], 6)
    zeros = jnp.zeros(batch.action.shape)
    labels = rosmo.Labels(zeros, zeros, jnp.ones((*zeros.shape, 3)) / 3)
    assert rosmo.make_targets(jax.random.PRNGKey(0), batch, labels, ARGS).behavior.all()


def test_two_hot_at_the_edges():
    assert rosmo.support(20).tolist() == list(range(-9, 11))  # the last bin counts in the expectation, never as a target
    for x, bins in ((100.0, {18: 1.0}), (-100.0, {0: 1.0}), (0.0, {9: 1.0}), (2.25, {11: 0.75, 12: 0.25})):
        expected = np.zeros(20)
        expected[list(bins)] = list(bins.values())
        np.testing.assert_allclose(rosmo.two_hot(jnp.float32(x), 20), expected, atol=1e-6)


def test_windows_cover_the_dataset():
    args = dataclasses.replace(ARGS, batch_size=4096)
    index = np.asarray(rosmo.sample_windows(jax.random.PRNGKey(0), 20, args))
    assert index.shape == (4096, 6) and (np.diff(index, axis=1) == 1).all()
    assert sorted(set(index[:, 0])) == list(range(15))


def test_sampled_target_approaches_the_exact_one():
    """With many samples the sampled target has the exact one's shape (both are prior * exp(adv), up to a factor)."""
    args = rosmo.Args(sampling=True, num_simulations=20_000)
    model = rosmo.Model(3, args)
    params = rosmo.init_state((10, 5), model).params
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.PRNGKey(x.size), x.shape), params)
    net = model.bind(params)
    state = net.representation(jax.random.normal(jax.random.PRNGKey(1), (4, 10, 5)))
    prediction = net.prediction(state)
    sampled = rosmo.improve_policy(params, jax.random.PRNGKey(2), state, prediction, model)
    exact = rosmo.improve_policy(params, jax.random.PRNGKey(2), state, prediction, rosmo.Model(3, rosmo.Args()))
    np.testing.assert_allclose(sampled / sampled.sum(axis=-1, keepdims=True), exact, atol=0.02)


def test_dataset_labels_equal_labels_of_windows(catch_dataset):
    """Labels of the whole dataset, made once per interval of target parameters, are what each window would get."""
    model = rosmo.Model(3, rosmo.Args())
    state = rosmo.init_state((10, 5), model)
    state = state._replace(target_params=jax.tree.map(lambda x: x + 0.1, state.target_params))
    observation = jnp.asarray(open_dataset(catch_dataset).observation)
    labels = rosmo.label_dataset(state, observation, model)
    index = jnp.arange(1990, 2000)
    parts = rosmo.make_labels(state.target_params, state.key, observation[index], model)
    for whole, part in zip(labels, parts, strict=True):
        np.testing.assert_allclose(whole[index], part, rtol=2e-5, atol=1e-6)


def test_evaluation_counts_every_environment_alike(monkeypatch):
    """5 episodes over 2 environments: one plays 3, the other 2, however long they last."""
    played = []

    class Counting:
        def __init__(self, env_id, seed, noise):
            self.number, self.length, self.episodes = len(played), 0, -1
            played.append(self)

        def reset(self):
            self.episodes, self.length = self.episodes + 1, 0
            return make_environment("catch", 0).reset()

        def step(self, action):
            self.length += 1
            done = self.length == (2 if self.number == 0 else 50)
            kind = dm_env.StepType.LAST if done else dm_env.StepType.MID
            return make_environment("catch", 0).reset()._replace(reward=float(self.number), step_type=kind)

    monkeypatch.setattr(rosmo, "make_environment", Counting)
    args = rosmo.Args(eval_episodes=5, eval_envs=2)
    model = rosmo.Model(3, args)
    scores = rosmo.evaluate(rosmo.init_state((10, 5), model), model)
    assert [environment.episodes for environment in played] == [3, 2]
    assert scores["eval/episodes"] == 5 and scores["eval/return_max"] == 50 and scores["eval/return_min"] == 0
    assert scores["eval/return_mean"] == 20 and scores["eval/length_mean"] == (3 * 2 + 2 * 50) / 5


# --------------------------------------------------------------------------------------------------------------- Runs


run = functools.partial(programs.run, rosmo)
program = functools.partial(programs.program, rosmo)
parameters = functools.partial(last_state, rosmo)


@pytest.fixture(scope="module")
def flags(catch_dataset):
    return ["--data-dir", str(catch_dataset), *SMALL]


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    """A run of 430 updates that is never stopped."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    settings = ["--total-steps", "430", "--eval-interval", "200", "--checkpoint-interval", "400"]
    assert run([*flags, *settings, "--run-dir", str(run_dir)]) == 0
    return run_dir


def test_files_of_a_run(whole_run, catch_dataset):
    settings = json.loads((whole_run / "args.json").read_text())
    assert settings["script"] == "rosmo_bsuite" and settings["args"]["batch_size"] == 16
    assert settings["dataset"] == open_dataset(catch_dataset).meta
    assert {"jax", "flax", "optax", "numpy", "bsuite"} <= settings["versions"].keys() and settings["devices"]
    lines = metrics(whole_run)
    training = [line for line in lines if "train/total_loss" in line]
    assert [line["step"] for line in training] == list(range(10, 431, 10))
    losses = ("total_loss", "reward_loss", "value_loss", "policy_loss", "behavior_loss")
    for name in (*losses, "grad_norm", "updates_per_second"):
        assert all(np.isfinite(line[f"train/{name}"]) for line in training)
    scores = [line for line in lines if "eval/return_mean" in line]
    assert [line["step"] for line in scores] == [200, 400, 430]
    for name in ("return_mean", "return_std", "return_min", "return_max", "length_mean", "normalized_score", "episodes"):
        assert f"eval/{name}" in scores[0]
    assert scores[0]["eval/episodes"] == 4 and scores[0]["eval/length_mean"] == 9


def test_resumed_run_is_the_same_bit_for_bit(whole_run, flags, tmp_path):
    """Stopped at a step that is no multiple of any interval, the target interval included."""
    run_dir = tmp_path / "resumed"
    assert run([*flags, "--total-steps", "317", "--eval-interval", "200", "--run-dir", str(run_dir)]) == 0
    assert run(["--resume", str(run_dir), "--total-steps", "430"]) == 0
    assert_same_state(parameters(run_dir), parameters(whole_run))
    common = [line for line in metrics(run_dir) if line["step"] not in (317, 320)]
    expected = [line for line in metrics(whole_run) if line["step"] != 320]
    for ours, theirs in zip(common, expected, strict=True):
        for name in theirs:
            if "second" not in name and "time/" not in name:
                assert ours[name] == theirs[name], (ours["step"], name)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_writes_a_checkpoint_to_go_on_from(flags, tmp_path, signum):
    run_dir = tmp_path / "stopped"
    process = program(*flags, "--total-steps", 10**6, "--eval-interval", 10**6, "--run-dir", run_dir)
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 5:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "Traceback" not in err
    step = int(re.search(r"stopped after (\d+) updates; go on with --resume", out)[1])
    assert int(parameters(run_dir).step) == step
    total = ["--total-steps", str(step + 30)]
    assert run(["--resume", str(run_dir), *total]) == 0
    assert run([*flags, *total, "--eval-interval", "1000000", "--run-dir", str(tmp_path / "whole")]) == 0
    assert_same_state(parameters(run_dir), parameters(tmp_path / "whole"))


def test_kill_at_any_moment_leaves_a_whole_checkpoint(flags, tmp_path):
    """kill -9 while a checkpoint is written every 10 updates."""
    run_dir = tmp_path / "killed"
    arguments = [*flags, "--eval-interval", 10**6, "--checkpoint-interval", 10, "--total-steps", 10**6, "--run-dir", run_dir]
    steps = []
    for i in range(2):
        process = program(*arguments)
        done = steps[-1] if steps else 0
        while not any(int(path.name) > done for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()):
            time.sleep(0.01)
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.2 + 0.13 * i)
        process.kill()
        process.wait()
        steps.append(int(parameters(run_dir).step))
        assert steps[-1] > done and steps[-1] % 10 == 0
        arguments = ["--resume", run_dir]
    total = ["--total-steps", str(steps[-1] + 10)]
    assert run(["--resume", str(run_dir), *total]) == 0
    assert run([*flags, *total, "--eval-interval", "1000000", "--run-dir", str(tmp_path / "whole")]) == 0
    assert_same_state(parameters(run_dir), parameters(tmp_path / "whole"))
    recorded = [line["step"] for line in metrics(run_dir) if "train/total_loss" in line]
    assert recorded == list(range(10, steps[-1] + 11, 10))  # nothing twice, nothing left out


def test_signal_in_an_evaluation(whole_run, tmp_path, monkeypatch, capsys):
    """The updates before it are kept, the evaluation is left undone, and --resume makes it, also the last one."""
    run_dir = programs.rewound(whole_run, tmp_path / "stopped", step=400)
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in metrics(run_dir) if line["step"] < 430)
    )
    act, calls = rosmo.act, []

    def act_then_signal(*arguments):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return act(*arguments)

    monkeypatch.setattr(rosmo, "act", act_then_signal)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    assert run(["--resume", str(run_dir)]) == 128 + signal.SIGTERM
    assert len(calls) == 1 and "stopped after 430 updates; go on with --resume" in capsys.readouterr().out
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    monkeypatch.setattr(rosmo, "act", act)
    assert int(parameters(run_dir).step) == 430 and "eval/return_mean" not in metrics(run_dir)[-1]
    assert run(["--resume", str(run_dir)]) == 0
    ours, theirs = metrics(run_dir)[-1], metrics(whole_run)[-1]
    assert ours == theirs and metrics(run_dir)[-2]["time/update"] > metrics(run_dir)[-3]["time/update"]
    with pytest.raises(InputError, match="has made 430 updates already"):
        run(["--resume", str(run_dir)])


def test_only_one_program_trains_in_a_folder(flags, tmp_path):
    run_dir = tmp_path / "run"
    process = program(*flags, "--total-steps", 10**6, "--eval-interval", 10**6, "--run-dir", run_dir)
    while not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    with pytest.raises(InputError, match=f"another program is training in {run_dir}"):
        run(["--resume", str(run_dir)])
    process.kill()
    process.wait()
    assert run(["--resume", str(run_dir), "--eval-only"]) == 0


def test_a_run_without_a_checkpoint_is_begun_anew(flags, tmp_path, monkeypatch):
    settings = [*flags, "--total-steps", "10", "--run-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(InputError, match="the disk is full"):
            run(settings)
    assert run(settings) == 0
    with pytest.raises(InputError, match="exists already"):
        run(settings)


def test_eval_only(whole_run, capsys):
    before = metrics(whole_run)
    assert run(["--resume", str(whole_run), "--eval-only", "--eval-episodes", "7"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["step"] == 430 and scores["eval/episodes"] == 7
    assert metrics(whole_run) == before


def test_one_device_and_two_train_alike(whole_run, flags, tmp_path):
    process = program(*flags, "--total-steps", 40, "--cpu-devices", 1, "--run-dir", tmp_path / "one")
    assert process.wait(120) == 0, process.stderr.read()
    assert len(json.loads((tmp_path / "one" / "args.json").read_text())["devices"]) == 1
    assert len(json.loads((whole_run / "args.json").read_text())["devices"]) == 2
    for one, two in zip(metrics(tmp_path / "one")[:4], metrics(whole_run)[:4], strict=True):
        for name in ("train/total_loss", "train/grad_norm"):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-4)


@pytest.mark.parametrize(
    "extra",
    [
        ["--sampling", "--num-simulations", "2"],
        ["--behavior-coef", "0"],
        ["--compute-dtype", "bfloat16"],
        ["--data-fraction", "0.1"],
        ["--unroll-steps", "1", "--bootstrap-steps", "5", "--dynamics-width", "8"],
    ],
)
def test_variants_run_and_differ(whole_run, flags, tmp_path, extra):
    assert run([*flags, *extra, "--total-steps", "20", "--run-dir", str(tmp_path / "run")]) == 0
    ours, default = (metrics(folder)[1] for folder in (tmp_path / "run", whole_run))
    assert np.isfinite(ours["train/total_loss"])
    assert any(ours[f"train/{name}"] != default[f"train/{name}"] for name in ("total_loss", "policy_loss", "grad_norm"))


def test_tracking_offline(flags, tmp_path):
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    process = program(*flags, "--total-steps", 20, "--track", "--run-dir", tmp_path / "run", env=environment)
    assert process.wait(120) == 0, process.stderr.read()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_loss_that_is_not_finite_stops_the_run(flags, tmp_path):
    run_dir = tmp_path / "run"
    settings = [*flags, "--checkpoint-interval", "10", "--warmup-steps", "0", "--learning-rate", "1e30"]
    settings += ["--run-dir", str(run_dir)]
    with pytest.raises(SystemExit, match="not finite"):
        run([*settings, "--total-steps", "1000"])
    assert [path.name for path in (run_dir / "checkpoints").glob("[0-9]*")] == ["0"]


# ------------------------------------------------------------------------------------------------------------- Errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--env-id", "cach"], "no BSuite task 'cach' here; did you mean 'catch'"),
        (["--env-id", "cartpole"], "is of catch"),
        (["--noise", "0.1"], "has noise 0.0, not 0.1"),
        (["--data-fraction", "0.001"], "leaves none of the 200 episodes"),
        (["--data-fraction", "1.5"], "--data-fraction must be at most 1"),
        (["--data-fraction", "nan"], "--data-fraction must be above 0"),
        (["--learning-rate", "inf"], "--learning-rate must be above 0"),
        (["--seed", "4294967296"], "a seed is from 0 to 4294967295"),
        (["--resume", "x", "--run-dir", "README.md/run"], "x is not the folder of a run"),
        (["--run-dir", "README.md/run"], "a file is in its way"),
        (["--batch-size", "4000"], "--batch-size 4000 is more than the 1994 windows"),
        (["--batch-size", "0"], "--batch-size must be above 0"),
        (["--batch-size", "15"], "--batch-size 15 cannot be shared by 2 devices"),
        (["--unroll-steps", "8"], "windows of 12 steps are longer than every episode"),
        (["--num-bins", "2"], "--num-bins must be at least 3"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0"),
        (["--eval-only"], "--eval-only needs --resume"),
        (["--num-simulations", "8"], "--num-simulations has no part in the exact target: name --sampling too"),
        (["--data-dir", "nowhere"], "there is no dataset folder nowhere"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
    ],
)
def test_what_a_user_gets_wrong(flags, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        run([*flags, "--run-dir", str(tmp_path / "run"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_sentence_and_exit_code_2(catch_dataset, tmp_path):
    """As a user sees them: a truncated observation.npy, and a dataset folder that does not exist."""
    shutil.copytree(catch_dataset, tmp_path / "catch")
    with (tmp_path / "catch" / "observation.npy").open("r+b") as file:
        file.truncate(1000)
    for folder, sentence in (("catch", "observation.npy is damaged or cut short"), ("catsh", "there is no dataset folder")):
        process = program("--data-dir", tmp_path / folder, "--run-dir", tmp_path / "run")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2 and out == ""
        assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["catch"]


def test_checkpoint_of_other_settings(whole_run, catch_dataset, tmp_path):
    resume = ["--resume", str(whole_run)]
    with pytest.raises(InputError, match="made with --batch-size 16, not 32"):
        run([*resume, "--batch-size", "32"])
    with pytest.raises(InputError, match="made with --seed 0, not 1"):
        run([*resume, "--seed", "1"])
    with pytest.raises(InputError, match="has made 430 updates already"):
        run(resume)
    other = shutil.copytree(whole_run, tmp_path / "other")
    settings = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(json.dumps(settings | {"script": "muzero_unplugged_bsuite"}))
    with pytest.raises(InputError, match=r"is a run of muzero_unplugged_bsuite\.py"):
        run(["--resume", str(other)])
    settings["args"]["dynamics_width"] = 16
    (other / "args.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="cannot be read"):
        run(["--resume", str(other), "--total-steps", "440"])
    settings["args"]["dynamics_width"], settings["dataset"]["steps"] = 32, 1
    (other / "args.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="not the one that"):
        run(["--resume", str(other), "--total-steps", "440"])
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(InputError, match="holds no checkpoint"):
        run(["--resume", str(other), "--eval-only"])


def test_a_run_folder_is_not_overwritten(whole_run, flags):
    with pytest.raises(InputError, match="exists already"):
        run([*flags, "--run-dir", str(whole_run)])


def test_full_disk(flags, tmp_path, monkeypatch):
    """Room for nothing after the first checkpoint, of step 0: one sentence, and that checkpoint stays."""
    save, full = Checkpoints.save, shutil.disk_usage(tmp_path)._replace(free=1000)

    def save_then_fill(self, step, state):
        save(self, step, state)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)

    monkeypatch.setattr(Checkpoints, "save", save_then_fill)
    arguments = [*flags, "--checkpoint-interval", "10", "--total-steps", "40", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="the disk is full: a checkpoint of"):
        run(arguments)
    assert int(parameters(tmp_path / "run").step) == 0


def test_importing_does_nothing():
    check = "import sys, rosmo_bsuite, jax; assert not jax._src.xla_bridge._backends; print('nothing')"
    environment = os.environ | {"PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment)
    assert result.stdout == "nothing\n" and result.stderr == ""


# ----------------------------------------------------------------------------------------------------------- Learning


def test_learns_catch(tmp_path, monkeypatch, capsys):
    """From nothing, as in README: records the standard dataset, trains, and beats random play and the data."""
    monkeypatch.chdir(tmp_path)
    assert run(["--total-steps", "15000", "--eval-interval", "15000", "--run-dir", "run"]) == 0
    assert "There is no dataset datasets/bsuite/catch: recording" in capsys.readouterr().out
    data_return = open_dataset(Path("datasets/bsuite/catch")).meta["return_mean"]
    score = metrics(Path("run"))[-1]["eval/return_mean"]
    assert -0.667 < data_return < 0.9 < 0.95 <= score  # -0.667: random play


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["cartpole", "mountain_car"])
def test_learns_the_longer_tasks(tmp_path, monkeypatch, env_id):
    """A normalised score of 0.9 or more after 20,000 updates (five minutes with the recording of cartpole)."""
    monkeypatch.chdir(tmp_path)
    assert run(["--env-id", env_id, "--total-steps", "20000", "--eval-interval", "20000", "--run-dir", "run"]) == 0
    assert metrics(Path("run"))[-1]["eval/normalized_score"] >= 0.9
