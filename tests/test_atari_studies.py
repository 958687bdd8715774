"""benchmark/atari_studies.py: its runs, its rows and its table, from runs that are made up."""

import csv

import numpy as np
import pytest

import muzero_unplugged_atari
import rosmo_atari
from benchmark import atari_studies, studies
from data.dataset import InputError, write_dataset

SCRIPTS = {"rosmo_atari": rosmo_atari, "muzero_unplugged_atari": muzero_unplugged_atari}
DIFFERENT = {  # what a method's runs have otherwise than the script, beside what all have
    "ROSMO": {}, "one-step, no regularisation": {"behavior_coef": 0.0},
    "filtered cloning": {"policy_coef": 0.0, "sampling": True}, "MuZero Unplugged": {"num_simulations": 10},
    "MZU-Q": {"num_simulations": 10, "policy_target": "mzu_q"},
}  # fmt: skip


def test_settings():
    """The same for all methods: the networks, the windows and the optimiser of --cpu-size, and one target interval."""
    runs = atari_studies.runs_of(atari_studies.Args())
    assert len(runs) == 5 * 3 * 3 and {run[3:] for run in runs} == {(10_000, 5)}
    common = rosmo_atari.CPU_SIZE | {"target_update_interval": 200, "cpu_size": True, "eval_episodes": 32}
    for run in runs:
        script, flags = SCRIPTS[run.script], {name.replace("-", "_"): value for name, value in run.flags.items()}
        columns = {"env_id": run.columns["task"], "seed": run.columns["seed"]}
        args = script.Args(**script.CPU_SIZE | flags)
        assert args == script.Args(**common | columns | DIFFERENT[run.columns["method"]])
        assert getattr(args, "sampling", True) or args.num_simulations == script.Args.num_simulations


def test_the_table(monkeypatch, tmp_path, capsys):
    """Every run is made once; a score is the mean of the last three evaluations of five."""
    made = []

    def make(run, folder):
        made.append(run.name())
        better = 10 * list(atari_studies.METHODS).index(run.columns["method"])
        return [
            {"step": 2000 * (i + 1), "return_mean": score + better + run.columns["seed"], "update_seconds": 60.0 * i}
            for i, score in enumerate((-99, -99, 1, 2, 6))
        ]

    folder = tmp_path / "data"
    meta = {"policy": "scripted", "game_return": {"mean": -3.25}, "reference_returns": {"random": -20.7, "online_dqn": 10.5}}
    with write_dataset(folder, benchmark="atari", env_id="Pong", num_actions=6, **meta) as writer:
        writer.add_episode(np.zeros((3, 84, 84), np.uint8), np.zeros(2, int), np.zeros(2), terminal=True)
    monkeypatch.setattr(studies, "make", make)
    monkeypatch.setattr(atari_studies, "record_if_missing", lambda game: folder)
    monkeypatch.setattr(atari_studies, "best_level", lambda game: {"Pong": 12.34, "Freeway": 20.0}[game])
    args = atari_studies.Args(games=("Pong", "Freeway"), results=tmp_path)
    for _ in range(2):
        atari_studies.main(args)
        _, *lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "| method | Pong | Freeway | minutes of updates (median) |" and len(made) == 5 * 2 * 3
        assert lines[2:4] == ["| mean of the data | -3.2 | -3.2 |  |", "| best level of the data | 12.3 | 20.0 |  |"]
        assert lines[4] == "| ROSMO | 4.0 [3.0, 5.0] | 4.0 [3.0, 5.0] | 4 |"
        assert lines[-1] == "| MZU-Q | 44.0 [43.0, 45.0] | 44.0 [43.0, 45.0] | 4 |"
    atari_studies.main(atari_studies.Args(games=("Pong", "Freeway"), methods=("MZU-Q",), results=tmp_path))
    assert capsys.readouterr().out.splitlines()[5:] == lines[-1:] and len(made) == 5 * 2 * 3
    with pytest.raises(InputError, match="there is no method MCTS: --methods are of ROSMO, "):
        atari_studies.main(atari_studies.Args(methods=("ROSMO", "MCTS")))
    with pytest.raises(InputError, match="Seaquest has no scripted player: --games are of "):
        atari_studies.main(atari_studies.Args(games=("Pong", "Seaquest")))
    with (tmp_path / "atari.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows[::5]] == [run.name() for run in atari_studies.runs_of(args)]
    assert (rows[-1]["step"], rows[-1]["return_mean"], rows[-1]["update_seconds"]) == ("10000", "48", "240.0")


def test_best_level():
    """On Freeway the scripted player scores most without noise."""
    assert atari_studies.best_level("Freeway", episodes=1) == pytest.approx(32, abs=1)
