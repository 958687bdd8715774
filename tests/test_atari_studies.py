"""benchmark/atari_studies.py: its settings, its tables and its figures, from runs that are made up."""

import csv

import numpy as np
import pytest

import muzero_unplugged_atari
import rosmo_atari
from benchmark import atari_studies, studies
from data.dataset import InputError, write_dataset
from data.record_atari import default_folder

SCRIPTS = {"rosmo_atari": rosmo_atari, "muzero_unplugged_atari": muzero_unplugged_atari}
GAMES = ("Breakout", "Pong")
FOUR = {"num_simulations": 4}
STUDIES = {  # method and x, the script, and what differs from its own settings at the CPU size
    "comparison": {
        ("ROSMO", None): ("rosmo_atari", {}),
        ("MuZero Unplugged", None): ("muzero_unplugged_atari", {}),
        ("filtered cloning", None): ("rosmo_atari", {"policy_coef": 0.0, "sampling": True}),
    },
    "budget": {
        ("ROSMO, sampled", 4): ("rosmo_atari", {"sampling": True}),  # 4 actions are ROSMO's default
        ("MuZero Unplugged", 4): ("muzero_unplugged_atari", FOUR),
        ("MZU-Q", 4): ("muzero_unplugged_atari", FOUR | {"policy_target": "mzu_q"}),
        ("Gumbel MuZero", 4): ("muzero_unplugged_atari", FOUR | {"policy_target": "gumbel"}),
    },
    "unroll": {
        (method, k): (script, {"unroll_steps": k} if k != 3 else {})
        for k in (1, 3, 5, 10)
        for method, script in (("ROSMO", "rosmo_atari"), ("MuZero Unplugged", "muzero_unplugged_atari"))
    },
}


def small_dataset(folder, env_id="Breakout", **meta):
    with write_dataset(folder, benchmark="atari", env_id=env_id, num_actions=4, **meta) as writer:
        writer.add_episode(np.zeros((3, 84, 84), np.uint8), np.zeros(2, int), np.zeros(2), terminal=True)
    return folder


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_of_a_study(study):
    """At the CPU size they differ from the script's --cpu-size in what the study is about, and in nothing else."""
    args = atari_studies.Args(study=study, size="cpu", eval_episodes=5, evaluations=4)
    found = {}
    for setting in atari_studies.settings_of(study, "cpu"):
        run = atari_studies.run_of(args, setting, "Pong", 2)
        assert run.columns == {"study": study, "method": setting.method, "x": setting.x, "task": "Pong", "seed": 2}
        assert (run.updates, run.evaluations) == (10_000, 4)
        flags = {name.replace("-", "_"): value for name, value in run.flags.items()}
        own = {"env_id": "Pong", "seed": 2, "eval_episodes": 5, "cpu_size": True}
        assert flags.items() >= own.items()
        default = SCRIPTS[run.script].Args(**SCRIPTS[run.script].CPU_SIZE | own)
        changed = vars(SCRIPTS[run.script].Args(**SCRIPTS[run.script].CPU_SIZE | flags)).items() - vars(default).items()
        found[setting.method, setting.x] = (run.script, dict(changed))
    assert found == STUDIES[study]


def test_sizes():
    (setting,) = (each for each in atari_studies.settings_of("unroll", "paper") if each[:2] == ("ROSMO", 5))
    run = atari_studies.run_of(atari_studies.Args(study="unroll"), setting, "Pong", 0)
    assert run.flags == {"env-id": "Pong", "seed": 0, "eval-episodes": 32} and run[3:] == (200_000, 10)
    args = atari_studies.Args(study="unroll", updates=70, evaluations=7)
    assert atari_studies.run_of(args, setting, "Pong", 0)[3:] == (70, 7)


@pytest.mark.parametrize("size", ["paper", "cpu"])
def test_unroll_shares_the_runs_of_the_comparison(size):
    for script in SCRIPTS.values():
        own = script.Args.unroll_steps if size == "paper" else script.CPU_SIZE["unroll_steps"]
        assert [setting.flags for setting in atari_studies.settings_of("unroll", size) if setting.x == own] == [{}, {}]


@pytest.mark.parametrize(("study", "methods"), [("comparison", ()), ("budget", ()), ("unroll", ()), ("unroll", ("ROSMO",))])
def test_table_and_figure(monkeypatch, tmp_path, capsys, study, methods):
    """Scores by setting, game and seed in the second half of four evaluations, at 2, 4, 6 and 8 hours."""
    keys = [key for key in STUDIES[study] if not methods or key[0] in methods]
    base = {key: float(i) for i, key in enumerate(keys)}
    dataset = small_dataset(tmp_path / "dataset", reference_returns={"random": 0.0, "online_dqn": 1.0})
    asked, figures = set(), []

    def make(run, folder):
        last = (
            base[run.columns["method"], run.columns["x"]] + 0.01 * run.flags["seed"] + 0.5 * (run.flags["env-id"] == "Pong")
        )
        scores = (-9.0, -8.0, last, last + 0.2)
        return [
            {"step": 1000 * (i + 1), "normalized_score": score, "update_seconds": 7200.0 * (i + 1)}
            for i, score in enumerate(scores)
        ]

    monkeypatch.setattr(studies, "make", make)
    monkeypatch.setattr(studies, "BOOTSTRAPS", 50)
    monkeypatch.setattr(studies.plt, "close", figures.append)
    monkeypatch.setattr(atari_studies, "record_if_missing", lambda game: asked.add(game) or dataset)
    monkeypatch.setattr(atari_studies, "reference_lines", lambda games: {})
    args = atari_studies.Args(study=study, size="cpu", games=GAMES, methods=methods, updates=4000, evaluations=4,
                              results=tmp_path)  # fmt: skip
    atari_studies.main(args)
    assert asked == set(GAMES)
    with (tmp_path / f"atari_{study}_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(keys) * 2 * 3
    assert {(row["method"], row["x"]) for row in rows} == {(method, str(x or "")) for method, x in keys}
    assert (tmp_path / f"atari_{study}_cpu.png").stat().st_size > 10_000
    # 6 scores above the setting's: 0, .01, .02, .5, .51, .52; their middle half is .01 to .51.
    middle, lines = np.mean([0.01, 0.02, 0.5, 0.51]), capsys.readouterr().out.splitlines()
    assert f"| {study} | all games | Breakout | Pong | hours of updates |" in lines
    for (method, x), value in base.items():
        (line,) = (line for line in lines if line.startswith(f"| {method}{f', {x}' if x else ''} |"))
        cells = line.split("|")[2:-1]
        means = [float(cell.split("[")[0]) for cell in cells]
        np.testing.assert_allclose(means[:3], value + 0.1 + np.array([middle, 0.01, 0.51]), atol=0.001)
        assert means[3] == 8
    axes = figures[0].axes
    if study != "comparison":
        assert [axis.get_title().split(" (")[0] for axis in axes] == ["all", *GAMES]
        for axis, above in zip(axes, (middle, 0.01, 0.51), strict=True):
            drawn = {bars.get_label(): bars.lines[0].get_xydata() for bars in axis.containers}
            points = {method: [(x, base[name, x] + 0.1 + above) for name, x in keys if name == method] for method, _ in keys}
            assert drawn.keys() == points.keys()
            for method, expected in points.items():
                np.testing.assert_allclose(drawn[method], expected, rtol=0.05)
        return
    panels = [("all games", "updates", middle), ("all games", "hours", middle), ("Breakout", "updates", 0.01)]
    for axis, (title, unit, above) in zip(axes, [*panels, ("Pong", "updates", 0.51)], strict=True):
        assert axis.get_title() == title and axis.get_xlabel().startswith(unit)
        assert [line.get_label() for line in axis.lines] == [method for method, _ in keys]
        for line, value in zip(axis.lines, base.values(), strict=True):
            assert line.get_xdata().tolist() == ([1000, 2000, 3000, 4000] if unit == "updates" else [2, 4, 6, 8])
            np.testing.assert_allclose(line.get_ydata(), [-9, -8, value + above, value + above + 0.2])


def test_reference_lines(monkeypatch, tmp_path):
    """The data's own mean if all are recorded here, published scores if none are; none of both, or without the data."""
    monkeypatch.chdir(tmp_path)
    for game, mean in {"Breakout": 17.5, "Freeway": 0.0, "Pong": None}.items():
        meta = {} if mean is None else {"game_return": {"episodes": 3, "mean": mean}}
        small_dataset(default_folder(game), game, **meta)
    assert atari_studies.reference_lines(("Breakout", "Freeway")) == {"mean of the data": {"Breakout": 17.5, "Freeway": 0.0}}
    assert atari_studies.reference_lines(("Pong", "Freeway")) == atari_studies.reference_lines(("Pong", "Qbert")) == {}
    published = atari_studies.reference_lines(("Pong",))
    assert list(published) == [f"{name}, RL Unplugged's data" for name in ("BC", "BCQ", "DQN", "IQN", "REM")]
    assert published["DQN, RL Unplugged's data"]["Pong"] == 12.9


def test_normalized_score():
    """Random play of Breakout scores 1.33, RL Unplugged's online DQN 157.86."""
    assert [atari_studies.normalized("Breakout", score) for score in (1.33, 157.86)] == [0, 1]
    assert atari_studies.normalized("Breakout", (1.33 + 157.86) / 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("BC",)}, "budget has no method BC: it has ROSMO, sampled, MuZero Unplugged, MZU-Q, Gumbel"),
        ({"games": ("Tennis",)}, "no scores to normalise by for Tennis"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        atari_studies.main(atari_studies.Args(study="budget", **settings))
