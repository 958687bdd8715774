"""benchmark/studies.py and the programs on BSuite: their runs, tables, estimates and figures, from runs that are made up."""

import csv
import dataclasses
import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import muzero_unplugged_bsuite
import rosmo_bsuite
from benchmark import (
    behavior_filter,
    bsuite_studies,
    greedy_search,
    model_error,
    studies,
    throughput,
    window_labels,
)
from benchmark.studies import Run
from data.dataset import InputError
from tests import programs, test_algorithms
from tests.programs import small_flags
from tests.test_data_loading import write

SCRIPTS = {
    "rosmo_bsuite": rosmo_bsuite, "muzero_unplugged_bsuite": muzero_unplugged_bsuite,
    "benchmark.behavior_filter": behavior_filter, "benchmark.window_labels": muzero_unplugged_bsuite,
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path / "dataset", reference_returns={"random": 0.0, "online_dqn": 1.0})


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn = []
    monkeypatch.setattr(studies.plt, "close", drawn.append)
    return drawn


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------- One run


@pytest.mark.parametrize("study", bsuite_studies.STUDIES)
def test_the_runs_of_a_study(study):
    """Their scripts take their flags; a row of the study's table is of one of them, by the run's name."""
    runs = {run.name(): run for run in bsuite_studies.runs_of(bsuite_studies.Args(study=study, seeds=range(10)))}
    length = {"scores": (200_000, 20), "labels": (30_000, 30)}.get(study, (50_000, 20))
    for run in runs.values():
        flags = {name.replace("-", "_"): value for name, value in run.flags.items()}
        assert SCRIPTS[run.script].Args(**flags) and (run.updates, run.evaluations) == length
        assert run.columns["method"] in studies.STYLES
        assert run.columns["x"] is None or run.columns["x"] in {*flags.values(), bsuite_studies.STUDIES[study].own}
    table = studies.ROOT / "benchmark" / "results" / f"bsuite_{study}.csv"
    for row in read(table) if table.exists() else []:
        columns = runs[row["run"]].columns
        found = {name: type(value)(row[name]) if value is not None else None for name, value in columns.items()}
        assert found == columns


def test_a_part_of_a_study():
    (run,) = bsuite_studies.runs_of(bsuite_studies.Args(study="scores", methods=("ROSMO",), tasks=("catch",), seeds=(5,)))
    assert run.columns["seed"] == 5
    with pytest.raises(InputError, match="--methods of budget are of MuZero Unplugged, MZU-Q, Gumbel MuZero, not ROSMO"):
        bsuite_studies.runs_of(bsuite_studies.Args(study="budget", methods=("ROSMO",)))
    with pytest.raises(InputError, match="budget has none of these --methods at these --xs"):
        bsuite_studies.runs_of(bsuite_studies.Args(study="budget", methods=("MZU-Q",), xs=(16,)))
    # A method of the study is no level to compare with.
    for study, methods in (("coverage", {"MuZero Unplugged"}), ("budget", {"MuZero Unplugged", "ROSMO"})):
        runs = bsuite_studies.runs_of(bsuite_studies.Args(study=study, methods=("MuZero Unplugged",)))
        assert {run.columns["method"] for run in runs} == methods


def test_a_whole_run():
    run = Run({}, "rosmo_bsuite", {}, updates=10, evaluations=3)
    assert run.is_whole([{"step": 3}, {"step": 6}, {"step": 9}, {"step": 10}])
    for steps in ([], [3, 6, 9], [3, 9, 10], [10], [3, 6, 6, 9, 10], [3, 6, 9, 10, 12]):
        assert not run.is_whole([{"step": step} for step in steps])


def test_seconds_of_updates(tmp_path):
    """10 updates at 2 a second, 20 at 10, 5 at 1: 5, 2 and 5 seconds; evaluations lie between the lines, and among them."""
    lines = [{"step": step, "train/updates_per_second": speed} for step, speed in ((10, 2.0), (30, 10.0), (35, 1.0))]
    lines[0] |= {"eval/return_mean": 1.5, "eval/normalized_score": 0.25}
    lines[1:1] = [{"step": 20, "eval/return_mean": 2.5}]
    lines[3] |= {"eval/return_mean": 3.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "eval/retu')
    assert studies.evaluations_of(tmp_path) == [
        {"step": 10, "return_mean": 1.5, "normalized_score": 0.25, "update_seconds": 5.0},
        {"step": 20, "return_mean": 2.5, "update_seconds": 6.0},
        {"step": 35, "return_mean": 3.5, "update_seconds": 12.0},
    ]
    assert studies.evaluations_of(tmp_path / "nothing") == []


def test_a_run_is_made_once_and_a_stopped_one_resumed(monkeypatch, tmp_path):
    """Calls for 20 updates: the first dies at once, the second is stopped after 10, the third goes on, the last reads."""
    called = []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def program(command, **options):
        called.append(command[1:])
        assert options["env"]["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path.absolute() / "compiled")
        run_dir = tmp_path / run.name()
        run_dir.mkdir(exist_ok=True)
        if len(called) > 1:
            (run_dir / "args.json").write_text("{}")
            step = 10 * (len(called) - 1)
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {step}, "train/updates_per_second": 4.0}}\n')
                file.write(f'{{"step": {step}, "eval/return_mean": 2.0}}\n')
        return subprocess.CompletedProcess(command, 1 if len(called) == 1 else 0, "", "out of luck")

    run = Run({}, "rosmo_atari", {"env-id": "Pong", "cpu-size": True}, updates=20, evaluations=2)
    monkeypatch.setattr(studies.subprocess, "run", program)
    for code in (1, 0):
        with pytest.raises(InputError, match=rf"rosmo_atari__cpu-size=True.* stopped with exit code {code}: out of luck"):
            studies.make(run, tmp_path)
    for _ in range(2):
        evaluations = studies.make(run, tmp_path)
        assert [(line["step"], line["update_seconds"]) for line in evaluations] == [(10, 2.5), (20, 5.0)]
    start = ["-m", "rosmo_atari", "--env-id", "Pong", "--cpu-size", "--total-steps", "20"]
    start += ["--eval-interval", "10", "--run-dir", str(tmp_path / run.name()), "--checkpoint-interval", "10"]
    assert called == [start, start, [*start[:2], "--resume", str(tmp_path / run.name())]]


def test_programs_side_by_side_make_a_run_once(monkeypatch, tmp_path):
    called = []

    def program(command, **_):
        called.append(command)
        time.sleep(0.2)
        (tmp_path / run.name() / "metrics.jsonl").write_text('{"step": 20, "eval/return_mean": 2.0}\n')
        return subprocess.CompletedProcess(command, 0, "", "")

    run = Run({}, "rosmo_atari", {}, updates=20, evaluations=1)
    monkeypatch.setattr(studies.subprocess, "run", program)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: studies.make(run, tmp_path), range(2))
    assert one == two and one[0]["step"] == 20
    assert len(called) == 1


# --------------------------------------------------------------------------------------------------------- Many runs


def runs_on_catch(seeds, **flags):
    args = {"env-id": "catch"} | flags
    return [Run({"task": "catch", "seed": seed}, "rosmo_bsuite", args | {"seed": seed}, 20, 2) for seed in seeds]


def made_up(run, folder):
    common = {"episodes": 32, "update_seconds": 1.5}
    return [{"step": step, "normalized_score": step / 10 + run.flags["seed"], **common} for step in (10, 20)]


def test_a_study_goes_on_from_its_table(monkeypatch, tmp_path, dataset):
    """Only runs are made whose rows are not there, are not whole, or are of other settings; other rows stay."""
    made, datasets = [], []
    monkeypatch.setattr(studies, "make", lambda run, folder: made.append(run.name()) or made_up(run, folder))
    args, table = studies.Args(results=tmp_path / "results"), tmp_path / "results" / "a.csv"

    def make_all(runs):
        made.clear()
        return studies.make_all(runs, args, table, lambda *which: datasets.append(which) or dataset)

    first = runs_on_catch([0, 1])
    rows = make_all(first)
    assert made == [run.name() for run in first] and datasets == [("catch", 0.0)]
    expected = [(seed, step, step / 10 + seed, first[seed].name()) for seed in (0, 1) for step in (10, 20)]
    assert [(row["seed"], row["step"], row["normalized_score"], row["run"]) for row in rows] == expected
    assert list(rows[0]) == ["task", "seed", "step", "normalized_score", "episodes", "update_seconds", "run"]
    text = table.read_text()
    assert make_all(first) == rows and not made and table.read_text() == text and len(datasets) == 1
    other = runs_on_catch([1, 2], noise=0.3)
    assert [row["seed"] for row in make_all(other)] == [1, 1, 2, 2] and made == [run.name() for run in other]
    assert datasets[1:] == [("catch", 0.3)]
    assert [(row["run"], row["step"]) for row in read(table)] == [
        (run.name(), s) for run in first + other for s in ("10", "20")
    ]
    table.rename(table.with_name("b.csv"))  # another study's table in the same folder
    lines = table.with_name("b.csv").read_text().splitlines(keepends=True)
    table.with_name("b.csv").write_text("".join(lines[:1] + lines[2:]))  # seed 0 has lost its first row
    table.with_name("c.csv").write_text("game,step\nPong,10\n")  # tables of other kinds
    table.with_name("d.csv").write_text(f"task,score,run\ncatch,1.0,{first[0].name()}\n")
    assert make_all(first) == rows and made == [first[0].name()] and table.read_text() == text


def test_what_is_whole_is_in_the_table_when_a_run_fails(monkeypatch, tmp_path, dataset):
    table = tmp_path / "results" / "a.csv"

    def make(run, folder):
        if run.flags["seed"] == 2:
            while not (table.exists() and any(row["seed"] == "1" for row in read(table))):
                time.sleep(0.01)
            raise InputError("seed 2 failed")
        return made_up(run, folder)

    monkeypatch.setattr(studies, "make", make)
    with pytest.raises(InputError, match="seed 2 failed"):
        studies.make_all(runs_on_catch(range(4)), studies.Args(results=table.parent), table, lambda *which: dataset)
    assert [(row["seed"], row["step"]) for row in read(table)][:4] == [("0", "10"), ("0", "20"), ("1", "10"), ("1", "20")]
    assert "2" not in {row["seed"] for row in read(table)}


def test_a_dataset_without_reference_returns(tmp_path):
    folder = write(tmp_path / "old")
    with pytest.raises(InputError, match="no reference_returns"):
        studies.make_all(runs_on_catch([0]), studies.Args(results=tmp_path), tmp_path / "a.csv", lambda *which: folder)


# ---------------------------------------------------------------------------------------------------------- Estimates


def test_scores(monkeypatch):
    rows = [{"task": task, "seed": seed, "step": step, "normalized_score": score}
            for task, seed, scores in (("a", 1, (9, 9, 9, 5, 1)), ("b", 1, (7, 8)), ("a", 0, (4,)), ("b", 0, (0, 0, 2, 6)))
            for step, score in enumerate(scores)]  # fmt: skip
    assert studies.scores_of(rows[::-1], ("a", "b")).tolist() == [[4, 4], [3, 8]]  # the last 2 of 5, 1 of 2, 1, 2 of 4
    assert studies.scores_of(rows, ("b",), len).tolist() == [[4], [2]]
    monkeypatch.setattr(studies, "BOOTSTRAPS", 200)
    scores = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0], [3.0, 100.0]])
    estimates = studies.interval_estimates({"all": scores, "alone": scores[:, :1]})
    assert estimates["all"][0] == pytest.approx((2 + 3 + 10 + 11) / 4) and estimates["alone"][0] == pytest.approx(1.5)
    for middle, low, high in estimates.values():
        assert low < middle < high
    few, many = np.array([[1.0], [2.0], [6.0]]), np.arange(9.0).reshape(3, 3)
    assert studies.spread(few) == (3, 1, 6) and studies.spread(few.repeat(2, axis=1)) == (3, 1, 6)
    assert studies.spread(many) == studies.interval_estimates({"": many})[""]
    assert [studies.name_of_spread(n) for n in (8, 9)] == ["range of the seeds", "95 % interval"]
    assert estimates == studies.interval_estimates({"all": scores, "alone": scores[:, :1]})


def test_table_and_figure(monkeypatch, tmp_path, capsys, dataset, figures):
    """Scores that grow with coverage, by method, task and seed, in the last ten evaluations of twenty."""
    base = {"ROSMO": 0.0, "one-step, no regularisation": 1.0, "MuZero Unplugged": 2.0}
    tasks = {"catch": 0.0, "cartpole": 0.1, "mountain_car": 0.5}

    def make(run, folder):
        assert folder == tmp_path / "runs"
        last = (
            base[run.columns["method"]] + tasks[run.flags["env-id"]] + run.flags["data-fraction"] + 0.01 * run.flags["seed"]
        )
        scores = (-9.0,) * 10 + (last, last + 0.2) * 5
        steps = np.arange(1, 21) * (run.updates // 20)
        seconds = steps / run.updates * 80  # of training, 80 a run
        return [
            {"step": int(step), "normalized_score": score, "update_seconds": second}
            for step, score, second in zip(steps, scores, seconds, strict=True)
        ]

    monkeypatch.setattr(studies, "make", make)
    monkeypatch.setattr(studies, "BOOTSTRAPS", 50)
    monkeypatch.setattr(bsuite_studies, "record_if_missing", lambda task, noise: dataset)
    args = bsuite_studies.Args(study="coverage", results=tmp_path, runs=tmp_path / "runs")
    bsuite_studies.main(args)
    assert len(read(tmp_path / "bsuite_coverage.csv")) == 5 * 3 * 3 * 3 * 20
    assert (tmp_path / "bsuite_coverage.png").stat().st_size > 10_000
    # 9 scores above method and coverage: 0, .01, .02, .1, .11, .12, .5, .51, .52; their middle half is .02 to .5.
    middle = np.mean([0.02, 0.1, 0.11, 0.12, 0.5])
    xs, lines = [0.01, 0.05, 0.2, 0.5, 1.0], capsys.readouterr().out.splitlines()
    assert "| task | fraction of the episodes | 0.01 | 0.05 | 0.2 | 0.5 | 1 |" in lines
    assert lines[-1].startswith("135 runs of 50,000 updates: ")
    (line,) = (line for line in lines if line.startswith("| cartpole | MuZero Unplugged |"))
    assert line.split(" | ")[4] == "2.41 [2.40, 2.42]: 2.40, 2.41, 2.42"  # 2 + 0.1 + 0.2, the mean's 0.1, 0.01 a seed
    panels = {axis.get_title().split(" (")[0]: axis for axis in figures[0].axes}
    assert list(panels) == ["all", *tasks]
    spreads = [axis.get_title().split(" (")[1] for axis in figures[0].axes]
    assert spreads == ["95 % interval)"] + ["range of the seeds)"] * 3
    for title, above in {"all": middle, "catch": 0.01, "cartpole": 0.11, "mountain_car": 0.51}.items():
        for method, value in base.items():
            (line,) = (line for line in lines if line.startswith(f"| {title} | {method} |"))
            means = [float(cell.split("[")[0]) for cell in line.split("|")[3:-1]]
            np.testing.assert_allclose(means, value + np.array(xs) + 0.1 + above, atol=0.006)
        drawn = {bars.get_label(): bars.lines[0].get_xydata() for bars in panels[title].containers}
        assert list(drawn) == list(base)
        for method, value in base.items():
            np.testing.assert_allclose(drawn[method][:, 0], xs, rtol=0.04)
            np.testing.assert_allclose(drawn[method][:, 1], value + np.array(xs) + 0.1 + above)
    bsuite_studies.main(dataclasses.replace(args, xs=(1.0, 0.05)))  # some places, from the table
    assert "| task | fraction of the episodes | 0.05 | 1 |" in capsys.readouterr().out.splitlines()
    assert len(read(tmp_path / "bsuite_coverage.csv")) == 5 * 3 * 3 * 3 * 20
    with pytest.raises(InputError, match=r"--xs of coverage are of 0.01, 0.05, 0.2, 0.5, 1.0, not 0.3"):
        bsuite_studies.main(dataclasses.replace(args, xs=(0.05, 0.3)))


def test_a_level_to_compare_with(tmp_path, figures):
    """With the range of three seeds; a method has one colour in all figures."""
    some = [("ROSMO", None, 9), ("MZU-Q", 0.0, 0), ("MZU-Q", 4.0, 4)]
    rows = [
        {"method": method, "x": x, "task": "a", "seed": seed, "step": 1, "normalized_score": base + seed}
        for method, x, base in some
        for seed in (0, 1, 5)
    ]
    drawn = studies.draw(rows, ("a",), "x", tmp_path / "a.png")
    assert drawn == {("a", "ROSMO"): {None: (11, 9, 14)}, ("a", "MZU-Q"): {0.0: (2, 0, 5), 4.0: (6, 4, 9)}}
    axis = figures[0].axes[0]
    assert axis.lines[0].get_ydata() == [11, 11] and axis.get_xlabel() == "x" and axis.get_xscale() == "linear"
    line = axis.containers[0].lines
    assert line[0].get_xydata().tolist() == [[0, 2], [pytest.approx(4, rel=0.03), 6]]
    assert [bar[:, 1].tolist() for bar in line[2][0].get_segments()] == [[0, 5], [4, 9]]
    equal = [row | {"normalized_score": 0.75125} for row in rows]  # their mean is rounded to another number
    assert np.mean([0.75125] * 3) != 0.75125 and studies.draw(equal, ("a",), "x", tmp_path / "a.png")
    studies.draw_curves([row for row in rows if row["x"] == 4.0], ("a", "a"), tmp_path / "b.png")
    assert {line[0].get_color(), *(each.get_color() for each in figures[2].axes[1].lines)} == {studies.STYLES["MZU-Q"][0]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_coverage_of_intervals(capsys):
    """How often a 95 % interval of normal scores holds their mean: less often than it says, of few runs."""
    random, found = np.random.default_rng(0), {}
    for seeds, tasks in ((3, 1), (3, 3), (10, 1), (10, 3)):
        scores = {str(i): x for i, x in enumerate(random.normal(size=(400, seeds, tasks)))}
        found[seeds, tasks] = np.mean([low <= 0 <= high for _, low, high in studies.interval_estimates(scores).values()])
    with capsys.disabled():
        print("\n", {f"{seeds} seeds, {tasks} tasks": f"{100 * x:.0f} %" for (seeds, tasks), x in found.items()})
    assert 0.68 < found[3, 1] < 0.82 < found[3, 3] < 0.93 and min(found[10, 1], found[10, 3]) > 0.86


# ---------------------------------------------------------------------------------------------------------- Programs


def test_scores_of_methods(monkeypatch, tmp_path, capsys, dataset, figures):
    """Learning curves of two methods on two tasks, three seeds and four evaluations, of which the last two count."""
    curves = {0: (0.1, 0.2, 0.9, 0.5), 1: (0.2, 0.2, 0.3, 1.0), 2: (0.3, 0.3, 0.4, 0.8)}

    def make(run, folder):
        gain = 10.0 * (run.flags["env-id"] == "cartpole") + (run.columns["method"] == "filtered cloning")
        return [
            {"step": 100 * i, "return_mean": 7.0, "normalized_score": score + gain, "update_seconds": i}
            for i, score in enumerate(curves[run.flags["seed"]], start=1)
        ]

    monkeypatch.setattr(studies, "make", make)
    monkeypatch.setattr(studies, "BOOTSTRAPS", 50)
    monkeypatch.setattr(bsuite_studies, "record_if_missing", lambda task, noise: dataset)
    short = bsuite_studies.STUDIES["scores"]._replace(updates=400, evaluations=4)
    monkeypatch.setitem(bsuite_studies.STUDIES, "scores", short)
    methods, tasks = ("filtered cloning", "MuZero Unplugged"), ("catch", "cartpole")
    args = bsuite_studies.Args(study="scores", methods=methods, tasks=tasks, results=tmp_path)
    for _ in range(2):  # made, and read from the table
        bsuite_studies.main(args)
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
        (line,) = (cells for cells in lines if cells[:2] == ["catch", "MuZero Unplugged"])
        assert line[2:] == ["0.65 [0.60, 0.70]", "0.70, 0.65, 0.60", "1.00", "300, 400, never"]
        middle = {cells[1]: float(cells[2].split("[")[0]) for cells in lines if cells and cells[0] == "all"}
        assert middle == {"MuZero Unplugged": 5.65, "filtered cloning": 6.65}
        monkeypatch.setattr(studies, "make", None)
    assert len(read(tmp_path / "bsuite_scores.csv")) == 2 * 2 * 3 * 4
    panels = {axis.get_title().split(" (")[0]: axis for axis in figures[0].axes}
    assert list(panels) == ["all", "catch", "cartpole"]
    *seeds, mean = panels["catch"].lines[4:]
    assert [line.get_ydata().tolist() for line in seeds] == [list(curve) for curve in curves.values()]
    assert mean.get_xdata().tolist() == [100, 200, 300, 400]
    np.testing.assert_allclose(mean.get_ydata(), np.mean(list(curves.values()), axis=0))


def test_greedy_search(monkeypatch, tmp_path, capsys):
    """Of the runs that are whole; a second call reads the table."""
    run, other, *_ = bsuite_studies.runs_of(bsuite_studies.Args(study="seeds", methods=("MuZero Unplugged",)))
    for each, steps in ((run, range(2500, 50_001, 2500)), (other, [2500])):
        (tmp_path / each.name()).mkdir()
        lines = [json.dumps({"step": step, "eval/return_mean": 0.0}) + "\n" for step in steps]
        (tmp_path / each.name() / "metrics.jsonl").write_text("".join(lines))
    called = []

    def program(command, **_):
        called.append(command[2:])
        return subprocess.CompletedProcess(command, 0, f'a line\n{{"eval/normalized_score": 0.{len(called)}}}\n', "")

    monkeypatch.setattr(greedy_search.subprocess, "run", program)
    for _ in range(2):
        greedy_search.main(greedy_search.Args(runs=tmp_path, results=tmp_path, episodes=9))
        assert "| catch | 0 | 0.10 [0.10, 0.10] | 0.10 | 0.20 [0.20, 0.20] | 0.20 |" in capsys.readouterr().out
    common = ["--resume", str(tmp_path / run.name()), "--eval-only", "--eval-episodes", "9"]
    assert called == [common, [*common, "--temperature", "0", "--dirichlet-fraction", "0"]]
    greedy_search.main(greedy_search.Args(runs=tmp_path, results=tmp_path, episodes=8))  # other scores
    assert "| catch | 0 | 0.30 [0.30, 0.30] | 0.30 | 0.40 " in capsys.readouterr().out
    assert [row["episodes"] for row in read(tmp_path / "bsuite_greedy.csv")] == ["9", "8"]  # the first ones stay


def test_labels_of_every_window(monkeypatch):
    """A step that two windows hold has two searches. Without noise they are one, and the update is the script's."""
    script, key, seen = muzero_unplugged_bsuite, jax.random.PRNGKey(0), []
    monkeypatch.setattr(window_labels, "shared_labels_update", lambda *arguments: seen.append(arguments))
    data, index = test_algorithms.dataset(script, [60]), np.arange(5)[:, None] + np.arange(7)
    batch = jax.tree.map(lambda x: x[index], data)
    for noise in (0.25, 0.0):
        model = test_algorithms.small_model(script, dirichlet_fraction=noise, num_simulations=8)
        state = test_algorithms.train_state(script, model)
        window_labels.update(state, key, batch, None, model)
    (*_, noisy, _), (_, _, seen_batch, labels, _) = seen
    every = script.make_labels(state.target_params, jax.random.PRNGKey(9), data, model)
    assert seen_batch is batch and (noisy.policy[0, 1:] != noisy.policy[1, :-1]).any()  # the same steps in two windows
    np.testing.assert_array_equal(labels.policy, every.policy[index])
    np.testing.assert_allclose(labels.value, every.value[index], rtol=1e-5)
    empty = window_labels.label_nothing(state, data, model)
    assert empty.value.shape == (60,) and empty.policy.shape == (60, 3)


@pytest.mark.parametrize("which", ["authors", "recorded"])
def test_other_behaviour_filters(which):
    """r + gamma v(s') - v(s), s' the encoding of the observed next state; all other labels are the script's."""
    args = behavior_filter.Args(filter=which, **test_algorithms.BSUITE | {"batch_size": 64})
    data, model = test_algorithms.dataset(rosmo_bsuite, [40] * 50), rosmo_bsuite.Model(3, args)
    state = test_algorithms.train_state(rosmo_bsuite, model)
    ours, own = (module.label_dataset(state, data, model) for module in (behavior_filter, rosmo_bsuite))
    np.testing.assert_allclose(ours.policy, own.policy, rtol=1e-5)
    np.testing.assert_allclose(ours.value, own.value, rtol=1e-5)
    net = model.bind(state.target_params)
    prediction = net.prediction(net.representation(data.observation))
    reward, value = (rosmo_bsuite.to_scalar(x) for x in (prediction.reward_logits, prediction.value_logits))
    expected = (reward[1:] if which == "authors" else data.reward[:-1]) + args.discount * value[1:] - value[:-1]
    read = np.asarray((own.value[:-1] != 0) & (own.value[1:] != 0))
    assert read.sum() > 1000
    np.testing.assert_allclose(ours.advantage[:-1][read], expected[read], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", ["catch", "cartpole", "mountain_car"])
def test_a_real_task_goes_on_from_an_observation(task):
    """Model errors are measured against the real task, which is put into the state of any observation."""
    environment, random = muzero_unplugged_bsuite.BSuite(task), np.random.default_rng(0)
    environment.reset(seed=1)
    starts, actions, after, ended = [], [], [], True
    for step in range(1200):
        if ended:
            observation, _ = environment.reset()
        # cartpole: upright to the time limit, by a rule
        angle, speed = (observation[0, 2], observation[0, 4]) if task == "cartpole" else (0, 0)
        actions.append(1 + int(np.sign(angle + 0.3 * speed)) if step >= 200 and task == "cartpole" else random.integers(3))
        starts.append(observation)
        observation, reward, ended, _, _ = environment.step(actions[-1])
        after.append((observation, reward, ended))
    _, rewards, reached, alive = model_error.follow(task, np.array(starts), np.array(actions)[:, None])
    np.testing.assert_array_equal(rewards, [reward for _, reward, _ in after])
    np.testing.assert_allclose(reached, [observation for observation, _, _ in after], atol=1e-5)
    np.testing.assert_array_equal(alive, [not ended for _, _, ended in after])
    _, rewards, _, alive = model_error.follow(task, np.array(starts[-1:]), np.ones((1, 2000), int))
    assert alive.tolist() == [False] and rewards.tolist() == [0]  # no episode has so many steps


def test_model_errors(monkeypatch, tmp_path, catch_dataset, capsys, figures):
    """Of a run that is made: at depth 0 the model's state is the real state's."""
    monkeypatch.setattr(model_error, "STARTS", 12)
    monkeypatch.setattr(model_error, "PLAYS", 2)
    monkeypatch.setattr(model_error, "record_if_missing", lambda *which: None)

    def make(run, folder):
        assert run.flags == {"env-id": "catch", "seed": 4, "batch-size": 512, "data-fraction": 0.5}
        shared = bsuite_studies.runs_of(bsuite_studies.Args(study="coverage", seeds=(4,)))
        assert run.name() in [each.name() for each in shared]
        flags = ["--data-dir", catch_dataset, *small_flags(muzero_unplugged_bsuite), "--eval-episodes", 0]
        programs.run(muzero_unplugged_bsuite, ["--run-dir", folder / run.name(), "--total-steps", 3, *flags])

    monkeypatch.setattr(studies, "make", make)
    args = model_error.Args(tasks=("catch",), fractions=(0.5,), seeds=(4,), runs=tmp_path, results=tmp_path)
    for _ in range(2):  # measured, and read from the table
        model_error.main(args)
        rows = read(tmp_path / "bsuite_model_error.csv")
        assert [(row["actions"], row["depth"]) for row in rows] == [
            (actions, str(depth)) for actions in ("observed", "searched") for depth in (0, 1, 2, 4, 8, 16)
        ]
        for row in rows:
            names = ["reward_error", "value_error", "real_state_error", "dynamics_error", "value_bias", "true_value"]
            known = [row[name] for name in names + ["data_value"] * (row["actions"] == "observed")]
            assert all(known) if int(row["sequences"]) else not any(known)
            assert row["actions"] == "searched" or row["sequences"] == "12"
            if row["depth"] == "0":
                assert row["sequences"] == "12" and row["ended"] == "0" and float(row["dynamics_error"]) < 1e-4
                assert float(row["value_error"]) == pytest.approx(float(row["real_state_error"]), rel=1e-4)
            if (row["actions"], row["depth"]) == ("observed", "16"):  # longer than any episode
                assert row["ended"] == "12" and float(row["real_state_error"]) == float(row["true_value"]) == 0
                assert float(row["value_error"]) == pytest.approx(float(row["dynamics_error"])) != 0
        printed, error = capsys.readouterr().out.splitlines(), f"{float(rows[6]['value_error']):.2f}"
        (line,) = (line for line in printed if line.startswith("| catch | 50% | searched | 0 |"))
        assert line.split(" | ")[6:9] == ["0.00", error, error] and len(figures[-1].axes) == 3
        monkeypatch.setattr(studies, "make", None)


def test_throughput(monkeypatch, capsys, catch_dataset):
    monkeypatch.setattr(throughput, "REPEATS", 1)
    monkeypatch.setattr(throughput, "BSUITE_UPDATES", 4)
    flags = ["--data-dir", str(catch_dataset), *small_flags(rosmo_bsuite)]
    throughput.main("rosmo_bsuite", flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"rosmo_bsuite {' '.join(flags)}" and lines[1].startswith("batch 16, float32")
    found = {line[:20].strip(): line[20:].split()[0] for line in lines[2:]}
    assert found["steps of data"] == "2000" and float(found["updates per second"]) > 1
    assert float(found["one update"]) == pytest.approx(1e3 / float(found["updates per second"]), rel=0.02)
    for name, more, sentence in (
        ("x", [], "there is no script x"),
        ("rosmo_bsuite", ["--eval-episodes", "0"], "--eval-episodes is 1 or more"),
        ("rosmo_bsuite", ["--batch-size", "15"], "the number of devices must divide --batch-size"),
    ):
        with pytest.raises(InputError, match=sentence):
            throughput.main(name, [*flags, *more])
