"""The paper's explanation, measured: does the learned model err more, the deeper a search looks and the fewer the data?

    python -m benchmark.model_error

MuZero Unplugged after 50,000 updates at batch 512 on 5 % and on all of the episodes. Start states are steps of the whole
dataset, the same for all runs of a task. From each the model is unrolled along the data's own actions (observed), and, for
each depth, along the actions to the node of that depth that a search visits most (searched). The real task is put into the
same state and takes the same actions. After the end of an episode rewards and values are 0, as in training.

Writes benchmark/results/bsuite_model_error.csv, a row for each run, kind of actions and depth:

    sequences, ended   how many there are, and how many of them reach the end of their episode
    reward_error       root mean square error of the model's reward on the way into its state
    value_error        of the value of the model's state; the true one is the mean return of the agent, playing on from there
    real_state_error   of the value of the real observation there, by the same network
    dynamics_error     of the value of the model's state, against that of the real observation
    value_bias         mean of the value of the model's state, less the true one
    true_value, data_value    means of the true value, and of the return that the data have from there (observed actions)

Prints the same, of all seeds together, and draws the errors. Runs that the table has are not measured again.
"""

import csv
import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mctx
import numpy as np
import orbax.checkpoint as ocp
import tyro
from bsuite.environments import cartpole
from tqdm import tqdm

import muzero_unplugged_bsuite as script
from benchmark import studies
from data.dataset import open_dataset, run_program
from data.record_bsuite import record_if_missing

DEPTHS = (0, 1, 2, 4, 8, 16)
STARTS, PLAYS = 64, 8  # states to start from, and plays of the agent from where a sequence has led
FEWEST = 0.2  # of the sequences that there could be must be there for an error to be shown


@dataclass(frozen=True, kw_only=True)
class Args:
    tasks: tuple[str, ...] = ("catch", "cartpole", "mountain_car")
    fractions: tuple[float, ...] = (0.05, 1.0)  # of the episodes
    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = Path("runs/bsuite_studies")  # where the runs are kept
    results: Path = studies.ROOT / "benchmark" / "results"  # where table and figure go; what is there is not measured again


def load_run(run_dir: Path) -> tuple[script.Model, script.TrainState]:
    """The model and the last checkpoint of a run."""
    run = json.loads((run_dir / "args.json").read_text())
    model = script.Model(run["dataset"]["num_actions"], script.Args(**run["args"]))
    state = script.init_state((math.prod(run["dataset"]["observation_shape"]),), model)
    checkpoints = ocp.CheckpointManager((run_dir / "checkpoints").absolute())
    return model, checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(state))


def set_state(task: Any, observation: np.ndarray) -> None:
    """Puts a task of bsuite into the state of an observation [rows, columns] that is not an episode's last."""
    task._reset_next_step = False
    if hasattr(task, "_ball_x"):
        (task._ball_y, task._ball_x), (_, task._paddle_x) = np.argwhere(observation)  # the ball is above the paddle
    elif hasattr(task, "_cartpole_config"):
        x, x_dot, sin, cos, theta_dot, time = observation[0].astype(float) * (3, 3, 1, 1, 1, 10)
        task._state = cartpole.CartpoleState(x, x_dot, np.arctan2(sin, cos), theta_dot, round(time, 2))
    else:
        task._position, task._velocity = observation[0, :2].astype(float)
        task._timestep = round(float(observation[0, 2]) * 1000)


def searched_actions(params: Any, key: jax.Array, observation: np.ndarray, model: script.Model) -> np.ndarray:
    """For each root and depth the actions to the most visited node of that depth: [roots, depths, 16], -1 where none are."""
    net, args = model.bind(params), model.args
    state = net.representation(jnp.asarray(observation).reshape(len(observation), -1))
    prediction = net.prediction(state)
    root = mctx.RootFnOutput(
        prior_logits=prediction.policy_logits, value=script.to_scalar(prediction.value_logits), embedding=state
    )
    step = functools.partial(script.expand, model=model)
    tree = jax.device_get(mctx.muzero_policy(params, key, root, step, args.num_simulations).search_tree)
    actions = np.full((len(observation), len(DEPTHS), max(DEPTHS)), -1)
    for i in range(len(observation)):
        paths = list[list[int]]([[]])
        for node in range(1, args.num_simulations + 1):
            paths.append([*paths[tree.parents[i, node]], int(tree.action_from_parent[i, node])])
        for j, depth in enumerate(DEPTHS[1:], start=1):
            if nodes := [node for node, path in enumerate(paths) if len(path) == depth]:
                best = max(nodes, key=lambda node: tree.node_visits[i, node])
                actions[i, j, :depth] = paths[best]
    return actions


def follow(env_id: str, start: np.ndarray, actions: np.ndarray) -> tuple[list[Any], np.ndarray, np.ndarray, np.ndarray]:
    """The real task from states [N, rows, columns] along actions [N, 16], until -1 or the end of the episode.

    Returns the tasks, the last rewards [N] (0 after the end) and observations, and whether the episodes go on [N].
    """
    tasks, rewards, reached, alive = [], np.zeros(len(start)), np.array(start), np.ones(len(start), bool)
    for i, observation in enumerate(start):
        tasks.append(task := script.BSuite(env_id).make(seed=i))
        task.reset()
        set_state(task, observation)
        for action in actions[i][actions[i] >= 0]:
            if not alive[i]:
                rewards[i] = 0
                break
            timestep = task.step(int(action))
            rewards[i], reached[i], alive[i] = timestep.reward or 0, timestep.observation, not timestep.last()
    return tasks, rewards, reached, alive


def play(
    params: Any, key: jax.Array, tasks: list[Any], start: np.ndarray, alive: np.ndarray, model: script.Model
) -> np.ndarray:
    """Discounted returns [N] of the agent in the tasks that are alive, which are at observations [N, rows, columns]."""
    observation, alive, returns = np.array(start), alive.copy(), np.zeros(len(tasks))
    for step in itertools.count():
        if not alive.any():
            break
        action = np.asarray(script.act(params, jax.random.fold_in(key, step), observation, model))
        for i in np.flatnonzero(alive):
            timestep = tasks[i].step(int(action[i]))
            returns[i] += model.args.discount**step * timestep.reward
            observation[i], alive[i] = timestep.observation, not timestep.last()
    return returns


@functools.partial(jax.jit, static_argnames="model")
def unroll(params: Any, observation: jax.Array, actions: jax.Array, model: script.Model) -> tuple[jax.Array, jax.Array]:
    """The model's rewards and values [N, D + 1] from states along actions [N, D]."""
    net = model.bind(params)
    states = [net.representation(observation.reshape(len(observation), -1))]
    for i in range(actions.shape[1]):
        states.append(net.dynamics(states[-1], actions[:, i]))
    prediction = net.prediction(jnp.stack(states, axis=1))
    return script.to_scalar(prediction.reward_logits), script.to_scalar(prediction.value_logits)


def returns_of(data: Any, places: np.ndarray, discount: float) -> np.ndarray:
    """Discounted returns [N] of the data from steps [N] to the end of their episodes."""
    ends = np.flatnonzero(data.is_last)
    rewards = (data.reward[place : ends[np.searchsorted(ends, place)]] for place in places)
    return np.array([discount ** np.arange(len(reward)) @ reward for reward in rewards])


def measure(run_dir: Path) -> list[dict]:
    """The errors of a run's last checkpoint, a row for each kind of actions and depth."""
    model, state = load_run(run_dir)
    args, data, params, key = model.args, open_dataset(Path(model.args.data_dir or "")), state.params, state.key
    places = np.flatnonzero(~data.is_last[: -max(DEPTHS)])
    starts = np.random.default_rng(0).choice(places, STARTS, replace=False)  # the same for all runs of a task
    observed = np.full((STARTS, len(DEPTHS), max(DEPTHS)), -1)
    for j, depth in enumerate(DEPTHS):
        observed[:, j, :depth] = data.action[starts[:, None] + np.arange(depth)]
    searched = searched_actions(params, key, data.observation[starts], model)
    start = np.repeat(data.observation[starts], len(DEPTHS), axis=0)
    depths, all_rows = np.tile(DEPTHS, STARTS), np.arange(len(start))
    data_value = returns_of(data, np.repeat(starts, len(DEPTHS)) + depths, args.discount)
    rows = list[dict]()
    for kind, actions in ("observed", observed.reshape(len(start), -1)), ("searched", searched.reshape(len(start), -1)):
        rewards, values = map(np.asarray, unroll(params, start, np.maximum(actions, 0), model))
        plays = list[np.ndarray]()
        for i in range(PLAYS):
            tasks, true_reward, reached, alive = follow(args.env_id, start, actions)
            plays.append(play(params, jax.random.fold_in(key, i), tasks, reached, alive, model))
        # (value - one half's mean) (value - the other's) has the mean of the squared error, without the spread of the plays.
        one, other = np.mean(plays[::2], axis=0), np.mean(plays[1::2], axis=0)
        value, true_value = values[all_rows, depths], np.mean(plays, axis=0)
        of_real_state = np.where(alive, np.asarray(unroll(params, reached, actions[:, :0], model)[1])[:, 0], 0)
        squares = {
            "reward_error": np.where(depths > 0, (rewards[all_rows, depths] - true_reward) ** 2, 0),  # none leads to a root
            "value_error": (value - one) * (value - other),
            "real_state_error": (of_real_state - one) * (of_real_state - other),
            "dynamics_error": (value - of_real_state) ** 2,
        }
        means = {"value_bias": value - true_value, "true_value": true_value}
        means |= {"data_value": np.where(alive, data_value, 0)} if kind == "observed" else {}
        for depth in DEPTHS:
            some = (depths == depth) & ((actions >= 0).sum(axis=1) == depth)
            row = {"actions": kind, "depth": depth, "sequences": int(some.sum()), "ended": int((some & ~alive).sum())}
            if some.any():
                row |= {name: float(np.sqrt(max(0, x[some].mean()))) for name, x in squares.items()}
                row |= {name: float(x[some].mean()) for name, x in means.items()}
            rows.append(row)
    return rows


def together(rows: list[dict], name: str) -> tuple[float, float, float]:
    """A column for all sequences of the seeds together, and its smallest and largest value of a seed; NaN where too few are
    there. rows: one for each seed, of one kind of actions and depth."""
    known = [row for row in rows if row.get(name, "") != ""]
    weights, values = np.array([(int(row["sequences"]), float(row[name])) for row in known]).reshape(-1, 2).T
    if not known or weights.sum() < FEWEST * STARTS * len(rows):
        return (np.nan,) * 3
    power = 2 if name.endswith("_error") else 1
    return float(np.average(values**power, weights=weights) ** (1 / power)), values.min(), values.max()


def draw(groups: dict[tuple, list[dict]], args: Args, path: Path) -> None:
    """A row of panels for each task: root mean square errors against depth, all seeds together and the range of seeds."""
    panels = {"reward_error": "reward", "value_error": "value", "dynamics_error": "value, dynamics alone"}
    figure, axes = plt.subplots(len(args.tasks), 3, figsize=(12, 3 * len(args.tasks)), layout="constrained", squeeze=False)
    for line, task in zip(axes, args.tasks, strict=True):
        line[0].set_ylabel("root mean square error")
        line[2].sharey(line[1])
        for axis, (name, title) in zip(line, panels.items(), strict=True):
            for (i, fraction), actions in itertools.product(enumerate(args.fractions), ("observed", "searched")):
                some = [together(groups[task, fraction, actions, depth], name) for depth in DEPTHS[1:]]
                error, low, high = np.array(some).T
                label, style = f"{actions} actions, {fraction:.0%} of the data", "--" if actions == "observed" else "-"
                axis.plot(DEPTHS[1:], error, style, color=f"C{i}", marker="o", label=label)
                axis.fill_between(DEPTHS[1:], low, high, color=f"C{i}", alpha=0.1)
                if name == "value_error" and actions == "searched":
                    root = together(groups[task, fraction, "observed", 0], name)[0]
                    axis.axhline(root, color=f"C{i}", linestyle=":", label=f"at the root, {fraction:.0%} of the data")
            axis.set_title(f"{task}: {title}")
            axis.set_xlabel("depth")
            axis.set_xscale("log", base=2)
            axis.set_xticks(DEPTHS[1:], [str(depth) for depth in DEPTHS[1:]])
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> None:
    table = args.results / "bsuite_model_error.csv"
    rows: list[dict] = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    wanted = itertools.product(args.seeds, args.tasks, args.fractions)
    done = {(int(row["seed"]), row["task"], float(row["fraction"])) for row in rows}
    for seed, task, fraction in tqdm([key for key in wanted if key not in done], unit="model", disable=None):
        record_if_missing(task, 0.0)
        flags = {"env-id": task, "seed": seed, "batch-size": 512, "data-fraction": fraction}
        run = studies.Run({}, script.__name__, flags, updates=50_000, evaluations=20)
        studies.make(run, args.runs)
        with jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], ("batch",))):
            rows += [{"task": task, "fraction": fraction, "seed": seed} | row for row in measure(args.runs / run.name())]
        studies.write_rows(table, rows)
    groups = dict[tuple, list[dict]]()
    for row in rows:
        key = row["task"], float(row["fraction"]), row["actions"], int(row["depth"])
        if int(row["seed"]) in args.seeds:
            groups.setdefault(key, []).append(row)
    draw(groups, args, table.with_suffix(".png"))
    names = list(rows[0])[list(rows[0]).index("ended") + 1 :]
    lines = [["task", "data", "actions", "depth", "sequences", "ended", *names]]
    for task, fraction, actions, depth in itertools.product(args.tasks, args.fractions, ("observed", "searched"), DEPTHS):
        some = groups[task, fraction, actions, depth]
        counts = (str(sum(int(row[name]) for row in some)) for name in ("sequences", "ended"))
        cells = (f"{together(some, name)[0]:.2f}".replace("nan", "") for name in names)
        lines.append([task, f"{fraction:.0%}", actions, str(depth), *counts, *cells])
    studies.print_table(lines)


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
