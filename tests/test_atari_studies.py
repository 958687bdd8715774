"""benchmark/atari_studies.py: its settings, its tables and its figures, from runs that are made up."""

import csv
import sys

import pytest

sys.path.insert(0, "benchmark")

import atari_studies
import studies

from data.atari import prior_scores
from data.dataset import InputError

GAMES = ("Breakout", "Pong")


@pytest.mark.parametrize(
    ("study", "methods", "settings"),
    [("comparison", (), 3), ("budget", (), 4), ("unroll", (), 8), ("unroll", ("ROSMO",), 4)],
)
def test_settings_table_and_figure(monkeypatch, tmp_path, capsys, study, methods, settings):
    import muzero_unplugged_atari
    import rosmo_atari

    scripts = {"rosmo_atari": rosmo_atari, "muzero_unplugged_atari": muzero_unplugged_atari}
    made = []

    def make(run, folder):
        scripts[run.script].Args(**{name.replace("-", "_"): value for name, value in run.flags.items()})
        made.append(run.folder(folder))
        score = 0.1 * run.flags["seed"] + (run.script == "rosmo_atari")
        common = {"eval/return_mean": 5.0, "update_seconds": 7200.0}
        return [{"step": 1000 * i, "eval/normalized_score": score * (i > 1), **common} for i in range(1, 5)]

    monkeypatch.setattr(studies, "make", make)
    monkeypatch.setattr(studies, "BOOTSTRAPS", 50)
    monkeypatch.setattr(atari_studies, "record_if_missing", lambda game: None)
    monkeypatch.setattr(atari_studies, "recorded_mean", lambda game: None)
    args = atari_studies.Args(study=study, size="cpu", games=GAMES, methods=methods, results=tmp_path)
    assert atari_studies.main(args) == 0
    assert len(set(made)) == len(made) == settings * 2 * 3
    with (tmp_path / f"atari_{study}_cpu.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * len(made)
    assert (tmp_path / f"atari_{study}_cpu.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert sum(line.startswith(("| ROSMO", "| M", "| G", "| filtered")) for line in out.splitlines()) == settings
    assert "| 1.100 [" in out and "| 2.00 |" in out


def test_reference_lines(monkeypatch):
    means = {"Breakout": 17.9, "Pong": None, "Freeway": 14.1}
    monkeypatch.setattr(atari_studies, "recorded_mean", means.get)
    assert list(atari_studies.reference_lines(("Pong",))) == [
        f"{name}, RL Unplugged's data" for name in prior_scores("Pong")
    ]
    assert atari_studies.reference_lines(("Breakout", "Freeway")) == {
        "mean of the data": {"Breakout": 17.9, "Freeway": 14.1}
    }
    assert atari_studies.reference_lines(("Breakout", "Pong")) == {}


@pytest.mark.parametrize("size", ["paper", "cpu"])
def test_unroll_shares_the_runs_of_the_comparison(size):
    from rosmo_atari import Args

    own = Args.unroll_steps if size == "paper" else Args.PRESETS["cpu_size"]["unroll_steps"]
    assert [setting.flags for setting in atari_studies.settings_of("unroll", size) if setting.x == own] == [{}, {}]


def test_unknown_methods_are_refused():
    with pytest.raises(InputError, match="budget has no method BC: it has ROSMO, sampled, MuZero Unplugged, MZU-Q, Gumbel"):
        atari_studies.main(atari_studies.Args(study="budget", methods=("BC",)))


def test_games_without_scores_are_refused():
    with pytest.raises(InputError, match="no scores to normalise by for Tennis"):
        atari_studies.main(atari_studies.Args(study="budget", games=("Tennis",)))
