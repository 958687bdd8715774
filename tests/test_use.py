"""From logs to a policy that is used: own environments, held-out losses, one command that goes on, other programs."""

import json
import re
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import rosmo_bsuite
from data.dataset import open_dataset, write_dataset
from tests.programs import SMALL, metrics, run, scores

ROOT = Path(__file__).parent.parent
FLAGS = [*SMALL, "--total-steps", "20", "--log-interval", "20", "--eval-interval", "20"]
MODULE = """
import gymnasium, numpy as np

class Walk(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32), gymnasium.spaces.Discrete(2)

    def __init__(self, length=12):
        self.length = int(length)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.float32([np.sin(self.t), action]), 1.0, self.t == self.length, False, {}

gymnasium.register("Walk-v0", Walk)
gymnasium.register("Broken-v0", Walk, kwargs={"length": "no number"})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to be in, with a module of environments."""
    monkeypatch.chdir(tmp_path)
    Path("my_walks.py").write_text(MODULE)
    return tmp_path


def write_logs(path, env_id, episodes=20, **meta):
    random = np.random.default_rng(0)
    with write_dataset(path, env_id=env_id, num_actions=2, benchmark="bsuite", **meta) as dataset:
        for _ in range(episodes):
            action = random.integers(2, size=12)
            dataset.add_episode(random.normal(size=(13, 2)), action, action * 1.0, terminal=True)
    return path


def test_the_policy_in_another_program_and_of_a_copy(catch_dataset, folder, monkeypatch):
    """README's six lines."""
    flags = [*FLAGS, "--eval-episodes", "0", "--run-dir", "runs/a"]
    run(rosmo_bsuite, ["--env-id", "catch", "--data-dir", catch_dataset, *flags])
    lines = re.search(r"<!-- use the policy -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len(lines.splitlines()) == 6
    for observations in (np.zeros((3, 10, 5), np.float32), np.zeros((3, 50), np.float32)):
        names = {"observations": observations}
        exec(lines, names)
        assert names["actions"].shape == (3,) and set(np.asarray(names["actions"])) <= {0, 1, 2}
    shutil.copy(rosmo_bsuite.__file__, "my_copy.py")
    monkeypatch.syspath_prepend(folder)
    exec(lines.replace("rosmo_bsuite as script", "my_copy as script"), names := {"observations": observations})
    assert names["script"].__name__ == "my_copy" and names["actions"].shape == (3,)


def test_the_same_command_goes_on(catch_dataset, folder):
    command = ["--env-id", "catch", "--data-dir", catch_dataset, *FLAGS, "--eval-episodes", "0", "--run-dir", "runs/a"]
    Path("runs/a").mkdir(parents=True)  # with nothing of a run in it
    run(rosmo_bsuite, command, stopped_by=[])
    before, settings = metrics(Path("runs/a")), Path("runs/a/args.json").read_text()
    run(rosmo_bsuite, command)
    run(rosmo_bsuite, [*command[:2], *command[4:]])  # without --data-dir: with the same data, not the default ones
    assert Path("runs/a/args.json").read_text() == settings
    assert metrics(Path("runs/a")) == before and [line["step"] for line in before] == [20]
    for flags, sentence in (
        ([*command, "--discount", "0.5"], "has a run with other settings"),
        ([*command, "--data-dir", "elsewhere"], "has a run with other settings"),
        (["--resume", "runs/a", "--seed", "3"], "--seed cannot be changed"),
        (["--resume", "runs/a", "--total-steps", "19"], "has made 20 updates"),
        (["--resume", "runs/a", "--eval-only"], "--eval-only needs --resume and --eval-episodes"),
        ([*command[:-1], "gs://bucket/run"], "not a URL"),
    ):
        with pytest.raises(rosmo_bsuite.InputError, match=sentence):
            run(rosmo_bsuite, flags)
    assert json.loads(Path("runs/a/args.json").read_text())["args"]["total_steps"] == 20


def test_held_out_episodes(folder):
    """Of logs under any name, without an environment."""
    logs = write_logs(folder / "logs", "plant")
    flags = ["--env-id", "plant", "--data-dir", logs, "--eval-fraction", "0.1", "--eval-episodes", "0"]
    args = rosmo_bsuite.parse_args(list(map(str, flags)))
    train, held_out, _ = rosmo_bsuite.load_dataset(logs, args)
    every = open_dataset(logs).observation
    assert len(held_out.action) == 2 * 13 and len(train.action) == 18 * 13
    assert {*map(bytes, train.observation)} | {*map(bytes, held_out.observation)} == {*map(bytes, every)}
    run(rosmo_bsuite, [*FLAGS, *flags, "--run-dir", "run"])
    (line,) = metrics(Path("run"))
    assert scores([line]) == [] and line["eval/total_loss"] > 0 and line["eval/value_loss"] != line["train/value_loss"]
    with pytest.raises(rosmo_bsuite.InputError, match="no episode taken of"):
        rosmo_bsuite.load_dataset(write_logs(folder / "one", "plant", episodes=1), args)


def test_the_lines_for_flat_logs(folder):
    """data/README.md's, on a log as D4RL's: two episodes end, two are truncated; one observation has no action."""
    text = (ROOT / "data" / "README.md").read_text()
    lines = re.search(r"```python\n(import numpy as np\n\nterminals.*?)```", text, re.S)[1]
    time = np.arange(40)
    log = {"observations": time[:, None] * 1.0, "actions": time % 3, "rewards": time * 1.0}
    log |= {"terminals": time % 20 == 9, "timeouts": (time % 20 == 19) | (time == 20)}
    with write_dataset("flat", env_id="plant", num_actions=3, benchmark="bsuite") as dataset:
        exec(lines, {"log": log, "dataset": dataset})
    data = open_dataset(Path("flat"))
    assert data.observation[:12, 0].tolist() == [*range(10), 9, 10]
    assert np.flatnonzero(data.is_last).tolist() == [10, 20, 30, 40]
    assert np.flatnonzero(data.is_terminal).tolist() == [10, 30] and data.reward.sum() == time.sum() - 19 - 20 - 39


def test_environments_of_ones_own(folder):
    """Of a name, or with the arguments that the data name; an episode that does not end is cut."""
    logs = write_logs(folder / "logs", "my_walks:Walk-v0")
    flags = [*FLAGS, "--data-dir", logs, "--env-id", "my_walks:Walk-v0"]
    run(rosmo_bsuite, [*flags, "--run-dir", "run"])
    (line,) = metrics(Path("run"))
    assert line["eval/return_mean"] == 12 and "eval/cut_episodes" not in line
    spec = gymnasium.envs.registration.EnvSpec("my_walks:Walk-v0", "my_walks:Walk", kwargs={"length": 10**9}).to_json()
    unknown = write_logs(folder / "unknown", "my_walks:Walk-v0", env_spec="{}")
    with pytest.raises(rosmo_bsuite.InputError, match="cannot be made"):
        run(rosmo_bsuite, [*FLAGS, "--data-dir", unknown, "--env-id", "my_walks:Walk-v0"])
    flags[flags.index(logs)] = write_logs(folder / "endless", "my_walks:Walk-v0", env_spec=spec)
    run(rosmo_bsuite, [*flags, "--eval-max-steps", "30", "--run-dir", "endless_run"])
    (line,) = metrics(Path("endless_run"))
    assert line["eval/return_mean"] == 30 and line["eval/cut_episodes"] == 4


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("my_walks:Broken-v0", "invalid literal for int"),
        ("no_such_module:Walk-v0", "No module named 'no_such_module'"),
        ("plant", "`plant` doesn't exist"),
        ("Acrobot-v1", r"Discrete\(3\) and \(6,\), the dataset Discrete\(2\) and \(2,\)"),
    ],
)
def test_environments_that_cannot_be_used(folder, env_id, reason):
    logs = write_logs(folder / "logs", env_id)
    with pytest.raises(rosmo_bsuite.InputError, match=reason):
        run(rosmo_bsuite, [*FLAGS, "--data-dir", logs, "--env-id", env_id, "--run-dir", "run"])
    assert not Path("run").exists()
