"""Converts a BSuite dataset that TensorFlow Datasets prepared, such as the paper's own (RLDS), without TensorFlow.

    python -m data.convert_bsuite --source DIR --env-id catch --noise 0.1
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from data.dataset import InputError, write_dataset
from data.record_bsuite import default_folder, make_environment
from data.runs import run_program


@dataclass(frozen=True)
class Args:
    source: Path  # folder with features.json and *.tfrecord-* files
    env_id: str  # the task that the data are of: catch, cartpole or mountain_car
    noise: float = 0.0  # probability with which the environment replaced an action when the data were recorded
    out: Path | None = None  # folder to make; by default the place where the training scripts look for it


def convert(source: Path, env_id: str, noise: float = 0.0, out: Path | None = None) -> Path:
    """Converts, with progress on stderr and a summary on stdout, and returns the new folder.

    Raises InputError for damaged files and for data that are not of this task; then nothing is left behind.
    """
    from data.tfrecords import find_prepared, read_example, read_records, step_array

    environment = make_environment(env_id, seed=0, noise=noise)
    shape, num_actions = environment.observation_spec().shape, environment.action_spec().num_values
    features, files = find_prepared(source)
    out = default_folder(env_id, noise) if out is None else out
    meta = {"benchmark": "bsuite", "env_id": env_id, "num_actions": num_actions, "noise": noise}
    meta["source"] = f"TensorFlow Datasets, {len(files)} files of {files[0].parent.parent.name}"
    episodes: list[tuple[int, int, dict[str, NDArray]]] = []
    for file in tqdm(files, unit="file", desc=f"reading {source}"):
        for index, record in enumerate(read_records(file)):
            where = f"{file}, episode {index}"
            example = read_example(record, where)
            names = ("observation", "action", "reward", "is_first", "is_last", "is_terminal")
            steps = {name: step_array(example, name, features, where) for name in names}
            length = len(steps["action"])
            if steps["observation"].shape != (length, *shape) or {len(array) for array in steps.values()} != {length}:
                raise InputError(f"{where}: observations {steps['observation'].shape} are not those of {env_id}")
            flags = [np.flatnonzero(steps[name]).tolist() for name in ("is_first", "is_last")]
            if length < 2 or flags != [[0], [length - 1]]:
                raise InputError(f"{where}: is_first and is_last do not mark one whole episode")
            if steps["action"].min() < 0 or steps["action"].max() >= num_actions:
                raise InputError(f"{where}: an action is outside 0 to {num_actions - 1}")
            try:
                time = int(example["episode_id"][0])  # a number, or its digits
            except (KeyError, ValueError):
                time = len(episodes)
            episodes.append((time, len(episodes), steps))
    with write_dataset(out, **meta) as writer:
        # TensorFlow Datasets shuffles episodes on disk; episode_id has their order in time.
        for _, _, steps in sorted(episodes, key=lambda episode: episode[:2]):
            observation = steps["observation"].astype(np.float32)
            terminal = bool(steps["is_terminal"][-1])
            writer.add_episode(observation, steps["action"][:-1], steps["reward"][:-1], terminal)
    print(writer.summary(out))
    return out


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    run_program(lambda: int(convert(args.source, args.env_id, args.noise, args.out) is None))
