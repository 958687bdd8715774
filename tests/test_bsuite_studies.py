"""benchmark/bsuite_studies.py: its settings, its table and its figure, from runs that are made up."""

import csv
import dataclasses
import sys

import numpy as np
import pytest

sys.path.insert(0, "benchmark")

import bsuite_studies as studies

ARGS = studies.scaled(studies.Args(study="coverage"))


@pytest.mark.parametrize("study", studies.LABELS)
def test_every_setting_is_one_that_the_scripts_take(study):
    import muzero_unplugged_bsuite
    import rosmo_bsuite

    scripts = {"rosmo_bsuite": rosmo_bsuite, "muzero_unplugged_bsuite": muzero_unplugged_bsuite}
    points = studies.points_of(study)
    assert len({(point.method, point.x) for point in points}) == len(points)
    for point in points:
        scripts[point.script].Args(**{name.replace("-", "_"): value for name, value in point.flags.items()})


def test_table_and_figure(monkeypatch, tmp_path, capsys):
    """Scores that grow with coverage, by task and seed: the interquartile mean of the last two evaluations of four."""
    trained = []

    def train(args, point, task, seed):
        trained.append((point.method, point.x, task, seed))
        values = {"catch": 0.0, "cartpole": 0.1, "mountain_car": 0.5}
        last = point.x + values[task] + 0.01 * seed
        scores = (-9.0, -9.0, last, last + 0.2)
        common = {"eval/return_mean": 0.0, "update_seconds": 1.0}
        return [{"step": step, "eval/normalized_score": score, **common} for step, score in enumerate(scores)]

    monkeypatch.setattr(studies, "train", train)
    monkeypatch.setattr(studies, "record_if_missing", lambda task, noise: None)
    assert studies.main(dataclasses.replace(ARGS, results=tmp_path)) == 0
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
    monkeypatch.setattr(studies, "train", lambda args, *job: trained.append(str(job)))
    monkeypatch.setattr(studies, "record_if_missing", lambda task, noise: None)
    for part in range(4):
        assert studies.main(dataclasses.replace(ARGS, part=part, parts=4, results=tmp_path)) == 0
    assert len(set(trained)) == len(trained) == 7 * 3 * 3 * 3 and not list(tmp_path.iterdir())
    with pytest.raises(studies.InputError, match="from 0 to --parts - 1"):
        studies.main(dataclasses.replace(ARGS, part=4, parts=4))


def test_settings_that_do_not_fit_together():
    with pytest.raises(studies.InputError, match="one number for each of the 3 tasks"):
        studies.scaled(studies.Args(study="coverage", updates=(10,)))
    with pytest.raises(studies.InputError, match="--updates is needed for cartpole"):
        studies.scaled(studies.Args(study="noise", tasks=("cartpole",)))
    assert studies.scaled(studies.Args(study="noise", tasks=("catch",))).updates == (30_000,)
