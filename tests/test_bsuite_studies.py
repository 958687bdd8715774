"""benchmark/bsuite_studies.py: its settings, its table and its figure, from runs that are made up."""

import csv
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

sys.path.insert(0, "benchmark")

import bsuite_studies
import studies

from data.dataset import InputError

ARGS = bsuite_studies.scaled(bsuite_studies.Args(study="coverage"))


@pytest.mark.parametrize("study", bsuite_studies.LABELS)
def test_every_setting_is_one_that_the_scripts_take(study):
    import muzero_unplugged_bsuite
    import rosmo_bsuite

    scripts = {"rosmo_bsuite": rosmo_bsuite, "muzero_unplugged_bsuite": muzero_unplugged_bsuite}
    points = bsuite_studies.points_of(study)
    assert len({(point.method, point.x) for point in points}) == len(points)
    for point in points:
        scripts[point.script].Args(**{name.replace("-", "_"): value for name, value in point.flags.items()})


def test_table_and_figure(monkeypatch, tmp_path, capsys):
    """Scores that grow with coverage, by task and seed: the interquartile mean of the last two evaluations of four."""
    trained = []

    def make(run, folder):
        trained.append(run.folder(folder))
        values = {"catch": 0.0, "cartpole": 0.1, "mountain_car": 0.5}
        last = run.flags["data-fraction"] + values[run.flags["env-id"]] + 0.01 * run.flags["seed"]
        scores = (-9.0, -9.0, last, last + 0.2)
        common = {"eval/return_mean": 0.0, "update_seconds": 1.0}
        return [{"step": step, "eval/normalized_score": score, **common} for step, score in enumerate(scores)]

    monkeypatch.setattr(studies, "make", make)
    monkeypatch.setattr(studies, "BOOTSTRAPS", 50)
    monkeypatch.setattr(bsuite_studies, "record_if_missing", lambda task, noise: None)
    assert bsuite_studies.main(dataclasses.replace(ARGS, results=tmp_path)) == 0
    assert len(set(trained)) == len(trained) == 7 * 3 * 3 * 3
    with (tmp_path / "bsuite_coverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(trained)
    assert {row["method"] for row in rows} == {"ROSMO", "one-step, no regularisation", "MuZero Unplugged"}
    assert (tmp_path / "bsuite_coverage.png").stat().st_size > 10_000
    # 9 scores at coverage 0.1, sorted: .20 .21 .22 .30 .31 .32 .70 .71 .72; their middle half is .22 to .70.
    values = np.sort(np.add.outer([0.0, 0.1, 0.5], [0.0, 0.01, 0.02]).ravel() + 0.1 + 0.1)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| ROSMO"))
    assert f"{values[2:7].mean():.2f} [" in line.split("|")[5]


def test_parts_cover_every_run_once(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(studies, "make", lambda run, folder: trained.append(run.folder(folder)))
    monkeypatch.setattr(bsuite_studies, "record_if_missing", lambda task, noise: None)
    for part in range(4):
        assert bsuite_studies.main(dataclasses.replace(ARGS, part=part, parts=4, results=tmp_path)) == 0
    assert len(set(trained)) == len(trained) == 7 * 3 * 3 * 3 and not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="from 0 to --parts - 1"):
        bsuite_studies.main(dataclasses.replace(ARGS, part=4, parts=4))


def test_settings_that_do_not_fit_together():
    with pytest.raises(InputError, match="one number for each of the 3 tasks"):
        bsuite_studies.scaled(bsuite_studies.Args(study="coverage", updates=(10,)))
    with pytest.raises(InputError, match="--updates is needed for cartpole"):
        bsuite_studies.scaled(bsuite_studies.Args(study="noise", tasks=("cartpole",)))
    assert bsuite_studies.scaled(bsuite_studies.Args(study="noise", tasks=("catch",))).updates == (30_000,)


def test_a_run_is_made_once_and_a_stopped_one_resumed(monkeypatch, tmp_path):
    """Three calls for a run of 20 updates: the first fails after 10, the second goes on, the third only reads."""
    called = []

    def program(command, **options):
        called.append(command[2:])
        run_dir = run.folder(tmp_path)
        run_dir.mkdir(exist_ok=True)
        with (run_dir / "metrics.jsonl").open("a") as file:
            step = 10 * len(called)
            file.write(f'{{"step": {step}, "eval/return_mean": 2.0}}\n{{"step": {step + 2}, "time/update": {step}.5}}\n')
            (run_dir / "checkpoints" / "10").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 1 if len(called) == 1 else 0, "", "out of luck")

    run = studies.Run("rosmo_atari", {"env-id": "Pong", "cpu-size": True}, updates=20, evaluations=2)
    monkeypatch.setattr(studies.subprocess, "run", program)
    with pytest.raises(InputError, match=r"rosmo_atari__cpu-size=True.* stopped with exit code 1: out of luck"):
        studies.make(run, tmp_path)
    assert called[0][:3] == ["--env-id", "Pong", "--cpu-size"] and called[0][3] == "--total-steps"
    for _ in range(2):
        evaluations = studies.make_all([run], tmp_path, workers=1, title="one")[0]
        assert [line["step"] for line in evaluations] == [10, 20] and evaluations[0]["update_seconds"] == 8.75
    assert called[1:] == [["--resume", str(run.folder(tmp_path))]]
