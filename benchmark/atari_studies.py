"""The Atari benchmark: ROSMO, MuZero Unplugged and behaviour cloning compared, and the paper's two ablations.

    python benchmark/atari_studies.py comparison                           # scores against updates and against time
    python benchmark/atari_studies.py budget                               # policy targets with 4 simulations each
    python benchmark/atari_studies.py unroll                               # steps that the model is unrolled
    python benchmark/atari_studies.py comparison --size cpu --games Breakout Pong --workers 2
    python benchmark/atari_studies.py unroll --methods ROSMO               # the runs of one method
    sbatch benchmark/studies.slurm atari_studies comparison                # on a cluster; afterwards once more as above

Each writes benchmark/results/atari_STUDY.csv (atari_STUDY_cpu.csv with --size cpu), one line per evaluation, and draws its
figure: the interquartile mean of normalised scores over runs and games with 95 % stratified bootstrap intervals (Agarwal
et al. 2021). In the ablations a run's score is the mean of the evaluations in its second half. A stopped study goes on where
it was, and studies share the runs that they have in common: runs/atari_studies/ keeps them.

The games' datasets lie where data/convert_atari.py or data/record_atari.py put them; a missing one is recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import studies
import tyro
from studies import Run

from data.atari import default_folder, normalized_score, prior_scores
from data.dataset import InputError, open_dataset
from data.record_atari import record_if_missing
from data.runs import run_program


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    study: tyro.conf.Positional[Literal["comparison", "budget", "unroll"]]  # which one
    size: Literal["paper", "cpu"] = "paper"  # the paper's networks and batch, or those of --cpu-size
    games: tuple[str, ...] = ("Breakout", "Pong", "Seaquest", "Qbert", "MsPacman", "Amidar")  # to train on
    methods: tuple[str, ...] = ()  # only these of the study's methods, by the names in its figure; none for all
    updates: int = 0  # of each run; 0 for 200,000, with --size cpu 10,000
    evaluations: int = 10  # of each run
    eval_episodes: int = 32  # of each evaluation
    workers: int = 1  # runs side by side on this machine, each on cores of its own
    runs: Path = Path("runs/atari_studies")  # where the runs are kept


class Setting(NamedTuple):
    """A line or a bar of the figure; x: its place on the axis, where there is one."""

    method: str
    x: int | None
    script: str
    flags: dict[str, object]


SAMPLED: dict[str, object] = {"sampling": True, "num-simulations": 4}


def settings_of(study: str, size: str) -> list[Setting]:
    """The settings of a study. Filtered behaviour cloning is ROSMO without the policy loss: the advantage filter and the
    value stay. It acts as its policy says (--sampling acts from the prior, and its target counts for nothing)."""
    rosmo, mzu = "rosmo_atari", "muzero_unplugged_atari"
    if study == "comparison":
        return [
            Setting("ROSMO", None, rosmo, {}),
            Setting("MuZero Unplugged", None, mzu, {}),
            Setting("filtered behaviour cloning", None, rosmo, {"policy-coef": 0.0, "sampling": True}),
        ]
    if study == "budget":
        return [
            Setting("ROSMO, sampled", 4, rosmo, SAMPLED),
            Setting("MuZero Unplugged", 4, mzu, {"num-simulations": 4}),
            Setting("MZU-Q", 4, mzu, {"num-simulations": 4, "policy-target": "mzu_q"}),
            Setting("Gumbel MuZero", 4, mzu, {"num-simulations": 4, "policy-target": "gumbel"}),
        ]
    own = {"paper": 5, "cpu": 3}[size]  # what the size has without a flag, so that studies share its runs
    lengths: dict[int, dict[str, object]] = {x: {"unroll-steps": x} if x != own else {} for x in (1, 3, 5, 10)}
    return [
        Setting(method, x, script, flags)
        for x, flags in lengths.items()
        for method, script in (("ROSMO", rosmo), ("MuZero Unplugged", mzu))
    ]


def run_of(args: Args, setting: Setting, game: str, seed: int) -> Run:
    """The run of one setting on one game."""
    flags: dict[str, object] = {"env-id": game, "seed": seed, "eval-episodes": args.eval_episodes}
    flags |= {"cpu-size": True} if args.size == "cpu" else {}
    updates = args.updates or {"paper": 200_000, "cpu": 10_000}[args.size]
    return Run(setting.script, flags | setting.flags, updates, args.evaluations)


def estimate(rows: list[dict], games: tuple[str, ...], value: Callable[[list[dict]], float]) -> tuple[float, float, float]:
    """Interquartile mean and interval of one number a run, over the runs in the rows."""
    runs = studies.runs_of(rows, lambda row: True)
    seeds = sorted({seed for _, seed in runs})
    return studies.interval_estimates({"": np.array([[value(runs[game, seed]) for game in games] for seed in seeds])})[""]


def recorded_mean(game: str) -> float | None:
    """Mean return of the game's dataset if it was recorded here, None if it is RL Unplugged's."""
    meta = open_dataset(default_folder(game)).meta
    return meta["game_return"]["mean"] if "record_atari" in meta.get("source", "") else None


def reference_lines(games: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Returns by game to compare with: published scores on RL Unplugged's data, which are no measure of what can be learned
    from a recorded dataset; on recorded data their own mean; none where the games have both kinds."""
    means = {game: recorded_mean(game) for game in games}
    recorded = {game: mean for game, mean in means.items() if mean is not None}
    if recorded:
        return {"mean of the data": recorded} if len(recorded) == len(games) else {}
    return {
        f"{method}, RL Unplugged's data": {game: prior_scores(game)[method] for game in games}
        for method in prior_scores(games[0])
    }


def draw_comparison(args: Args, rows: list[dict], path: Path) -> None:
    """Scores of all games against updates and against the time of updates, and of every game against updates."""
    references = reference_lines(args.games)
    panels: list[tuple[str, tuple[str, ...], str]] = [("all games", args.games, "step"), ("all games", args.games, "hours")]
    panels += [(game, (game,), "step") for game in args.games]
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    size = (4 * columns, 3.4 * lines + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, games, unit) in zip(axes.flat, panels, strict=False):
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            mine = [row for row in rows if row["method"] == method and row["task"] in games]
            steps = sorted({row["step"] for row in mine})
            at = {step: [row for row in mine if row["step"] == step] for step in steps}
            estimates = [estimate(at[step], games, lambda run: run[0]["normalized_score"]) for step in steps]
            middle, low, high = np.array(estimates).T
            hours = [np.median([row["update_seconds"] for row in at[step]]) / 3600 for step in steps]
            xs = steps if unit == "step" else hours
            axis.plot(xs, middle, color=f"C{i}", marker="o", markersize=3, label=method)
            axis.fill_between(xs, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        for style, (name, returns) in zip(("-", "--", "-.", ":", (0, (1, 4))), references.items(), strict=False):
            scores = [normalized_score(game, returns[game]) for game in games]
            level = studies.interval_estimates({"": np.array([scores], float)})[""][0]
            axis.axhline(level, color="gray", linestyle=style, linewidth=1, label=name)
        axis.set_title(title)
        axis.set_xlabel("updates" if unit == "step" else "hours of updates (median of the runs)")
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("normalised score (IQM, 95 % interval)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_ablation(args: Args, rows: list[dict], path: Path) -> None:
    """A point for every setting, all games together and each apart."""
    panels = {"all games": args.games} | {game: (game,) for game in args.games}
    columns = len(panels)
    figure, axes = plt.subplots(1, columns, figsize=(3.6 * columns, 3.6), sharey=True, squeeze=False, layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    xs = sorted({row["x"] for row in rows})
    for axis, (title, games) in zip(axes[0], panels.items(), strict=True):
        for i, method in enumerate(methods):
            mine = [row for row in rows if row["method"] == method and row["task"] in games]
            at = [[row for row in mine if row["x"] == x] for x in xs]
            middle, low, high = np.array([estimate(some, games, studies.final_score) for some in at]).T
            places = [i] if len(xs) == 1 else np.arange(len(xs)) + 0.08 * i
            error = (middle - low, high - middle)
            axis.errorbar(places, middle, error, color=f"C{i}", marker="o", capsize=3, label=method)
        axis.set_xticks([] if len(xs) == 1 else range(len(xs)), [] if len(xs) == 1 else [str(x) for x in xs])
        axis.set_xlabel("4 simulations" if len(xs) == 1 else "unroll steps K")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("normalised score (IQM, 95 % interval)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> int:
    if unknown := [game for game in args.games if normalized_score(game, 0.0) is None]:
        raise InputError(f"there are no scores to normalise by for {', '.join(unknown)}: RL Unplugged has 46 games")
    settings = settings_of(args.study, args.size)
    names = list(dict.fromkeys(setting.method for setting in settings))
    if unknown := [method for method in args.methods if method not in names]:
        raise InputError(f"{args.study} has no method {', '.join(unknown)}: it has {', '.join(names)}")
    settings = [setting for setting in settings if setting.method in (args.methods or names)]
    chosen = [(setting, game, seed) for setting in settings for game in args.games for seed in args.seeds]
    chosen = studies.part_of(chosen, args)
    for game in sorted({game for _, game, _ in chosen}):
        record_if_missing(game)
    results = studies.make_all([run_of(args, *one) for one in chosen], args.runs, args.workers, args.study)
    if args.part is not None:
        return 0
    rows = []
    for (setting, game, seed), evaluations in zip(chosen, results, strict=True):
        for line in evaluations:
            values = {name.removeprefix("eval/"): value for name, value in line.items()}
            rows.append(
                {"study": args.study, "method": setting.method, "x": setting.x, "task": game, "seed": seed, **values}
            )
    table = args.results / f"atari_{args.study}{'_cpu' if args.size == 'cpu' else ''}.csv"
    studies.write_table(table, rows)
    print(f"| {args.study} | {' | '.join(('all games', *args.games))} | hours of updates |")
    print(f"| --- |{' --- |' * (len(args.games) + 2)}")
    for method, x in dict.fromkeys((row["method"], row["x"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["x"]) == (method, x)]
        cells = []
        for games in (args.games, *((game,) for game in args.games)):
            middle, low, high = estimate([row for row in mine if row["task"] in games], games, studies.final_score)
            cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        hours = np.median([max(row["update_seconds"] for row in run) for run in studies.runs_of(mine, bool).values()]) / 3600
        print(f"| {method}{'' if x is None else f', {x}'} | {' | '.join(cells)} | {hours:.2f} |")
    (draw_comparison if args.study == "comparison" else draw_ablation)(args, rows, table.with_suffix(".png"))
    print(f"\n{table} and its figure: {len(args.seeds)} seeds, {max(row['step'] for row in rows)} updates")
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    run_program(lambda: main(arguments))
