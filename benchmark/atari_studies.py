"""The Atari benchmark: ROSMO, MuZero Unplugged and behaviour cloning compared, and the paper's two ablations.

    python -m benchmark.atari_studies comparison                           # scores against updates and against time
    python -m benchmark.atari_studies budget                               # policy targets with 4 simulations each
    python -m benchmark.atari_studies unroll                               # steps that the model is unrolled
    python -m benchmark.atari_studies comparison --size cpu --games Breakout Pong --workers 2
    python -m benchmark.atari_studies unroll --methods ROSMO               # the runs of one method
    sbatch benchmark/studies.slurm atari_studies comparison                # on a cluster; afterwards once more as above

Each writes benchmark/results/atari_STUDY.csv (atari_STUDY_cpu.csv with --size cpu), one line per evaluation, and draws its
figure: the interquartile mean of normalised scores over runs and games with 95 % stratified bootstrap intervals (Agarwal
et al. 2021). In the ablations a run's score is the mean of the evaluations in its second half. A stopped study goes on where
it was, and studies share the runs that they have in common: those that are whole in a table of --results or in
runs/atari_studies/ are read, others made or resumed.

The games' datasets lie where data/convert_atari.py or data/record_atari.py put them; a missing one is recorded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmark import studies
from benchmark.studies import Run, Setting
from data.dataset import InputError, open_dataset, run_program
from data.record_atari import PRIOR_METHODS, SCORES, default_folder, record_if_missing, reference_returns


@dataclass(frozen=True, kw_only=True)
class Args(studies.Args):
    study: tyro.conf.Positional[Literal["comparison", "budget", "unroll"]]  # which one
    size: Literal["paper", "cpu"] = "paper"  # the paper's networks and batch, or those of --cpu-size
    games: tuple[str, ...] = ("Breakout", "Pong", "Seaquest", "Qbert", "MsPacman", "Amidar")  # to train on
    methods: tuple[str, ...] = ()  # only these of the study's methods, by the names in its figure; none for all
    updates: int = 0  # of each run; 0 for 200,000, with --size cpu 10,000
    evaluations: int = 10  # of each run
    eval_episodes: int = 32  # of each evaluation
    runs: Path = Path("runs/atari_studies")  # where the runs are kept


def settings_of(study: str, size: str) -> list[Setting]:
    """The settings of a study. Filtered behaviour cloning is ROSMO without the policy loss: the advantage filter and the
    value stay. It acts as its policy says (--sampling acts from the prior, and its target counts for nothing)."""
    rosmo, mzu = "rosmo_atari", "muzero_unplugged_atari"
    if study == "comparison":
        return [
            Setting("ROSMO", None, rosmo, {}),
            Setting("MuZero Unplugged", None, mzu, {}),
            Setting("filtered cloning", None, rosmo, {"policy-coef": 0.0, "sampling": True}),
        ]
    if study == "budget":
        return [
            Setting("ROSMO, sampled", 4, rosmo, {"sampling": True, "num-simulations": 4}),
            Setting("MuZero Unplugged", 4, mzu, {"num-simulations": 4}),
            Setting("MZU-Q", 4, mzu, {"num-simulations": 4, "policy-target": "mzu_q"}),
            Setting("Gumbel MuZero", 4, mzu, {"num-simulations": 4, "policy-target": "gumbel"}),
        ]
    own = {"paper": 5, "cpu": 3}[size]  # what the size has without a flag, so that studies share its runs
    lengths: dict[int, dict[str, Any]] = {x: {"unroll-steps": x} if x != own else {} for x in (1, 3, 5, 10)}
    return [
        Setting(method, x, script, flags)
        for x, flags in lengths.items()
        for method, script in (("ROSMO", rosmo), ("MuZero Unplugged", mzu))
    ]


def run_of(args: Args, setting: Setting, game: str, seed: int) -> Run:
    """The run of one setting on one game."""
    columns = {"study": args.study, "method": setting.method, "x": setting.x, "task": game, "seed": seed}
    flags: dict[str, Any] = {"env-id": game, "seed": seed, "eval-episodes": args.eval_episodes}
    flags |= {"cpu-size": True} if args.size == "cpu" else {}
    updates = args.updates or {"paper": 200_000, "cpu": 10_000}[args.size]
    return Run(columns, setting.script, flags | setting.flags, updates, args.evaluations)


def estimate(scores: np.ndarray) -> tuple[float, float, float]:
    """Interquartile mean and interval of scores [runs, games]."""
    return studies.interval_estimates({"": scores})[""]


def normalized(game: str, score: float) -> float:
    """0 is random play, 1 RL Unplugged's online DQN."""
    reference = reference_returns(game) or {}
    return (score - reference["random"]) / (reference["online_dqn"] - reference["random"])


def reference_lines(games: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Returns by game to compare with: the mean of the data where all games' data were recorded here, published scores where
    none were, since these are no measure of what can be learned from a recorded dataset; else none."""
    folders = {game: default_folder(game) for game in games if default_folder(game).exists()}
    recorded = {game: open_dataset(folder).meta.get("game_return", {}).get("mean") for game, folder in folders.items()}
    if len(recorded) < len(games) or len({mean is None for mean in recorded.values()}) > 1:
        return {}
    if None not in recorded.values():
        return {"mean of the data": recorded}
    return {f"{name}, RL Unplugged's data": {game: SCORES[game][name] for game in games} for name in PRIOR_METHODS}


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
        for method in dict.fromkeys(row["method"] for row in rows):
            mine, color = [row for row in rows if row["method"] == method], studies.STYLES[method][0]
            steps = sorted({row["step"] for row in mine})
            at = {step: [row for row in mine if row["step"] == step] for step in steps}
            scores = [studies.scores_of(at[step], games, lambda run: run[0]["normalized_score"]) for step in steps]
            middle, low, high = np.array([estimate(each) for each in scores]).T
            hours = [np.median([row["update_seconds"] for row in at[step]]) / 3600 for step in steps]
            xs = steps if unit == "step" else hours
            axis.plot(xs, middle, color=color, marker="o", markersize=3, label=method)
            axis.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        for style, (name, returns) in zip(("-", "--", "-.", ":", (0, (1, 4))), references.items(), strict=False):
            level = estimate(np.array([[normalized(game, returns[game]) for game in games]]))[0]
            axis.axhline(level, color="gray", linestyle=style, linewidth=1, label=name)
        axis.set_title(title)
        axis.set_xlabel("updates" if unit == "step" else "hours of updates (median of the runs)")
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("normalised score (IQM, 95 % interval)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_scores(args: Args, rows: list[dict]) -> None:
    """A line for every setting: its score on all games and on each, and its hours."""
    panels = (args.games, *((game,) for game in args.games))
    print(f"| {args.study} | {' | '.join(('all games', *args.games))} | hours of updates |")
    print(f"| --- |{' --- |' * (len(args.games) + 2)}")
    for method, x in dict.fromkeys((row["method"], row["x"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["x"]) == (method, x)]
        estimates = [estimate(studies.scores_of(mine, games)) for games in panels]
        cells = [f"{middle:.3f} [{low:.3f}, {high:.3f}]" for middle, low, high in estimates]
        hours = np.median([max(row["update_seconds"] for row in run) for run in studies.runs_of(mine).values()]) / 3600
        print(f"| {method}{'' if x is None else f', {x}'} | {' | '.join(cells)} | {hours:.2f} |")


def main(args: Args) -> None:
    if unknown := [game for game in args.games if reference_returns(game) is None]:
        raise InputError(f"there are no scores to normalise by for {', '.join(unknown)}: RL Unplugged has 46 games")
    settings = settings_of(args.study, args.size)
    names = list(dict.fromkeys(setting.method for setting in settings))
    if unknown := [method for method in args.methods if method not in names]:
        raise InputError(f"{args.study} has no method {', '.join(unknown)}: it has {', '.join(names)}")
    settings = [setting for setting in settings if setting.method in (args.methods or names)]
    runs = [run_of(args, setting, game, seed) for setting in settings for game in args.games for seed in args.seeds]
    table = args.results / f"atari_{args.study}{'_cpu' if args.size == 'cpu' else ''}.csv"
    rows = studies.make_all(runs, args, table, lambda game, noise: record_if_missing(game))
    if args.part is None:
        print_scores(args, rows)
        if args.study == "comparison":
            draw_comparison(args, rows, table.with_suffix(".png"))
        else:
            label = {"budget": "simulations", "unroll": "unroll steps K"}[args.study]
            studies.draw(rows, args.games, label, table.with_suffix(".png"))
        print(f"\n{table} and its figure: {len(args.seeds)} seeds, {max(row['step'] for row in rows)} updates")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
