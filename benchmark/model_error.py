"""The paper's explanation, measured: does the learned model err more, the deeper a search looks and the fewer the data?

    python -m benchmark.model_error

MuZero Unplugged after 50,000 updates at batch 512 on 5 % and on all of the episodes. Start states are steps of the whole
dataset, the same for both. From each the model is unrolled along the data's own actions, and along the actions to the most
visited node of each depth of a search. The real task is put into the same state and takes the same actions; where an episode
ends on the way, the sequence is left out. The true value of where it has led is the mean discounted return of the agent,
playing on from there. (The value head learns n-step returns of the data's actions, which is not quite the same.)

Writes benchmark/results/bsuite_model_error.csv, root mean square errors for each run, kind of actions and depth, with the
mean of the model's value less the true one (value_bias), and draws the errors. Runs that the table has are not made again;
those in --runs are read.
"""

import csv
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mctx
import numpy as np
import tyro
from bsuite.environments import cartpole
from tqdm import tqdm

import muzero_unplugged_bsuite as script
from benchmark import studies
from data.dataset import open_dataset, run_program
from data.record_bsuite import record_if_missing

DEPTHS = (0, 1, 2, 4, 8, 16)
STARTS, PLAYS = 64, 8  # states to start from, and plays of the agent from where a sequence has led
FEWEST = 0.2  # of the sequences of all seeds together must have got to a depth for its error to be shown


@dataclass(frozen=True, kw_only=True)
class Args:
    tasks: tuple[str, ...] = ("catch", "cartpole", "mountain_car")
    fractions: tuple[float, ...] = (0.05, 1.0)  # of the episodes
    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = Path("runs/bsuite_studies")  # where the runs are kept
    results: Path = studies.ROOT / "benchmark" / "results"  # where table and figure go; what is there is not measured again


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
    state = net.representation(jnp.asarray(observation))
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
    """The real task from states [N, rows, columns] along actions [N, 16], until -1.

    Returns the tasks, the last rewards [N] and observations, and whether [N] they go on (1), end just here (0) or have
    ended before (-1).
    """
    tasks, rewards, reached, going = [], np.zeros(len(start)), np.array(start), np.ones(len(start), int)
    for i, observation in enumerate(start):
        tasks.append(task := script.BSuite.TASKS[env_id](seed=i))
        task.reset()
        set_state(task, observation)
        for action in actions[i][actions[i] >= 0]:
            timestep = task.step(int(action))
            rewards[i], reached[i] = timestep.reward or 0, timestep.observation
            going[i] = -1 if going[i] < 1 else 1 - timestep.last()
    return tasks, rewards, reached, going


def play(
    params: Any, key: jax.Array, tasks: list[Any], start: np.ndarray, going: np.ndarray, model: script.Model
) -> np.ndarray:
    """Discounted returns [N] of the agent in the tasks, which are at observations [N, rows, columns]."""
    observation, alive, returns = np.array(start), going == 1, np.zeros(len(tasks))
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
    states = [net.representation(observation)]
    for i in range(actions.shape[1]):
        states.append(net.dynamics(states[-1], actions[:, i]))
    prediction = net.prediction(jnp.stack(states, axis=1))
    return script.to_scalar(prediction.reward_logits), script.to_scalar(prediction.value_logits)


def measure(run_dir: Path) -> list[dict]:
    """The errors of a run's last checkpoint, a row for each kind of actions and depth."""
    args = script.parse_args(["--resume", str(run_dir)])
    data = open_dataset(Path(args.data_dir or ""))
    model = script.Model(data.meta["num_actions"], args)
    state = script.init_state(data.observation.shape[1:], model)
    state = script.restore(script.open_checkpoints(run_dir, read_only=True), state)
    params, key = jax.tree.map(lambda x: x.addressable_data(0), (state.params, state.key))
    places = np.flatnonzero(~data.is_last[: -max(DEPTHS)])
    starts = np.random.default_rng(0).choice(places, STARTS, replace=False)  # the same for all runs of a task
    observed = np.full((STARTS, len(DEPTHS), max(DEPTHS)), -1)
    for j, depth in enumerate(DEPTHS):
        observed[:, j, :depth] = data.action[starts[:, None] + np.arange(depth)]
    searched = searched_actions(params, key, data.observation[starts], model)
    start = np.repeat(data.observation[starts], len(DEPTHS), axis=0)
    depths, all_rows = np.tile(DEPTHS, STARTS), np.arange(len(start))
    rows = list[dict]()
    for kind, actions in ("observed", observed.reshape(len(start), -1)), ("searched", searched.reshape(len(start), -1)):
        rewards, values = map(np.asarray, unroll(params, start, np.maximum(actions, 0), model))
        plays = list[np.ndarray]()
        for i in range(PLAYS):
            tasks, true_reward, reached, going = follow(args.env_id, start, actions)
            plays.append(play(params, jax.random.fold_in(key, i), tasks, reached, going, model))
        # (value - one half's mean) (value - the other's) has the mean of the squared error, without the spread of the plays.
        one, other = np.mean(plays[::2], axis=0), np.mean(plays[1::2], axis=0)
        value = values[all_rows, depths]
        of_real_state = np.asarray(unroll(params, reached, actions[:, :0], model)[1])[:, 0]
        squares = {
            "reward_error": (rewards[all_rows, depths] - true_reward) ** 2,
            "value_error": (value - one) * (value - other),
            "value_error_of_the_real_state": (of_real_state - one) * (of_real_state - other),
        }
        for depth in DEPTHS:
            some = (depths == depth) & (going >= 0) & ((actions >= 0).sum(axis=1) == depth)
            row = {"actions": kind, "depth": depth, "sequences": int(some.sum())}
            for name, x in squares.items():
                known = some.any() and (depth or name != "reward_error")  # no reward leads to where a sequence begins
                row[name] = float(np.sqrt(max(0, x[some].mean()))) if known else None
            row["value_bias"] = float((value - np.mean(plays, axis=0))[some].mean()) if some.any() else None
            row["true_value"] = float(np.mean(plays, axis=0)[some].mean()) if some.any() else None
            rows.append(row)
    return rows


def errors_of(rows: list[dict], task: str, fraction: float, actions: str, name: str) -> dict[int, list[float]]:
    """The seeds' errors of one kind by depth, where there are enough."""
    some = [row for row in rows if (row["task"], float(row["fraction"]), row["actions"]) == (task, fraction, actions)]
    errors = dict[int, list[float]]()
    for depth in DEPTHS:
        mine = [row for row in some if int(row["depth"]) == depth]
        known = [float(row[name]) for row in mine if row[name] != ""]
        if known and sum(int(row["sequences"]) for row in mine) >= FEWEST * STARTS * len(mine):
            errors[depth] = known
    return errors


def draw(rows: list[dict], args: Args, path: Path) -> None:
    """A row of panels for each task: root mean square errors against depth, mean and range of the seeds."""
    panels = {
        "reward_error": "reward of the model",
        "value_error": "value of the model's state",
        "value_error_of_the_real_state": "value of the real state there",
    }
    figure, axes = plt.subplots(len(args.tasks), 3, figsize=(12, 3 * len(args.tasks)), layout="constrained", squeeze=False)
    for line, task in zip(axes, args.tasks, strict=True):
        line[0].set_ylabel("root mean square error")
        line[2].sharey(line[1])
        for axis, (name, title) in zip(line, panels.items(), strict=True):
            for i, fraction in enumerate(args.fractions):
                for actions, style in ("observed", "--"), ("searched", "-"):
                    found = errors_of(rows, task, fraction, actions, name)
                    depths, errors = list(found), list(found.values())
                    label = f"{actions} actions, {fraction:.0%} of the data"
                    axis.plot(depths, list(map(np.mean, errors)), style, color=f"C{i}", marker="o", label=label)
                    low, high = list(map(min, errors)), list(map(max, errors))
                    axis.fill_between(depths, low, high, color=f"C{i}", alpha=0.1)
            axis.set_title(f"{task}: {title}")
            axis.set_xlabel("depth")
            axis.set_xscale("symlog", base=2, linthresh=1)
            axis.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> None:
    table = args.results / "bsuite_model_error.csv"
    args.results.mkdir(parents=True, exist_ok=True)
    rows = list[dict]()
    if table.exists():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
    wanted = [(task, fraction, seed) for seed in args.seeds for task in args.tasks for fraction in args.fractions]
    done = {(row["task"], float(row["fraction"]), int(row["seed"])) for row in rows}
    for task, fraction, seed in tqdm([key for key in wanted if key not in done], unit="model", disable=None):
        record_if_missing(task, 0.0)
        flags = {"env-id": task, "seed": seed, "batch-size": 512, "data-fraction": fraction}
        run = studies.Run({}, script.__name__, flags, updates=50_000, evaluations=20)
        studies.make(run, args.runs)
        new = [{"task": task, "fraction": fraction, "seed": seed} | row for row in measure(args.runs / run.name())]
        rows += [row | {name: "" for name, value in row.items() if value is None} for row in new]
        with table.with_suffix(".new").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        table.with_suffix(".new").rename(table)
    rows = [row for row in rows if int(row["seed"]) in args.seeds]
    draw(rows, args, table.with_suffix(".png"))
    print("Mean of the seeds: error of the reward (not at depth 0) / the value / the real state's value, bias of the value")
    print(f"| task | data | actions |{''.join(f' depth {depth} |' for depth in DEPTHS)}\n|{' --- |' * (3 + len(DEPTHS))}")
    for task, fraction, actions in itertools.product(args.tasks, args.fractions, ("observed", "searched")):
        names = ("reward_error", "value_error", "value_error_of_the_real_state", "value_bias")
        kinds = [errors_of(rows, task, fraction, actions, name) for name in names]
        cells = (" / ".join(f"{np.mean(x[depth]):.2f}" for x in kinds if depth in x) for depth in DEPTHS)
        print(f"| {task} | {fraction:.0%} | {actions} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
