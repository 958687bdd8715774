"""Converts vector data: BSuite's that TensorFlow Datasets prepared, such as the paper's own (RLDS), and Minari's.

    python -m data.convert_bsuite --source DIR --env-id catch --noise 0.1
    python -m data.convert_bsuite --source cartpole/noisy-v0    # a Minari dataset, by name or folder

TensorFlow Datasets shuffles episodes on disk; their order in time is that of episode_id. TensorFlow is not needed.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from data.dataset import FRAME, Episode, InputError, Source, convert_source, run_program
from data.minari_datasets import find_source, open_minari
from data.record_bsuite import REFERENCE_RETURNS, default_folder, make_environment
from data.tfrecords import find_prepared, read_example, read_records, step_arrays


def open_prepared(folder: Path, env_id: str, noise: float) -> Source:
    """What TensorFlow Datasets prepared; memory holds all. Raises InputError for damage and for data of another task."""
    environment = make_environment(env_id, seed=0, noise=noise)
    shape, num_actions = environment.observation_spec().shape, environment.action_spec().num_values
    features, files = find_prepared(folder)
    episodes, total = list[tuple[int, Callable[[], Episode]]](), 0
    for file in tqdm(files, unit="file", desc=f"reading {folder}"):
        for index, record in enumerate(read_records(file)):
            where = f"{file}, episode {index}"
            example = read_example(record, where)
            steps = step_arrays(example, ("observation", "action", "reward"), features, where)
            observation, terminal = steps["observation"].astype(np.float32), bool(steps["is_terminal"][-1])
            if observation.shape[1:] != shape:
                raise InputError(f"{where}: observations {observation.shape} are not those of {env_id}")
            try:
                time = int(example["episode_id"][0])  # a number, or its digits
            except (KeyError, ValueError):
                time = len(episodes)
            episode = functools.partial(Episode, where, observation, steps["action"][:-1], steps["reward"][:-1], terminal)
            episodes.append((time, episode))
            total += len(observation)
    source = f"TensorFlow Datasets, {len(files)} files of {files[0].parent.parent.name}"
    meta = {"num_actions": num_actions, "source": source, "reference_returns": REFERENCE_RETURNS[env_id]}
    in_order = [episode for _, episode in sorted(episodes, key=lambda each: each[0])]
    return Source(in_order, total, meta, shape)


def convert(
    source: Path,
    env_id: str | None = None,
    noise: float = 0.0,
    out: Path | None = None,
    observation_key: str | None = None,
) -> Path:
    """Converts, with progress on stderr and a summary on stdout, and returns the new folder.

    Raises InputError for damaged files and for data that are not of this task; then nothing is left behind.

    Args:
        source: folder with features.json and *.tfrecord-* files; or a Minari dataset's folder or name
        env_id: the task that the data are of, such as catch; Minari's data often name it
        noise: probability with which the environment replaced an action when the data were recorded
        out: folder to make; by default the place where the training scripts look for it
        observation_key: which of a Minari dataset's Dict observations to take
    """
    if not 0 <= noise <= 1:
        raise InputError(f"noise is a probability, from 0 to 1, not {noise}")
    folder = find_source(source).absolute()
    minari = folder if folder.name == "data" else folder / "data"
    if (minari / "metadata.json").exists():
        found = open_minari(minari, observation_key)
        if found.shape == FRAME:
            raise InputError(f"{folder} has images: python -m data.convert_atari converts them")
    elif not any(folder.rglob("features.json")):
        formats = "Minari's, or BSuite's as TensorFlow Datasets prepared it (features.json)"
        raise InputError(
            f"{source} is no dataset of these formats: {formats}. For other logs see data/README.md, your own data"
        )
    elif env_id is None:
        raise InputError("name the task that the data are of by --env-id")
    else:
        found = open_prepared(folder, env_id, noise)
    if env_id not in (None, found.meta.get("env_id")):
        found.meta.pop("env_spec", None)
    env_id = env_id or found.meta.get("env_id")
    if env_id is None:
        raise InputError(f"{folder} names no environment: name it by --env-id")
    meta = {"benchmark": "bsuite", **found.meta, "env_id": env_id, "noise": noise}
    return convert_source(found._replace(meta=meta), out or default_folder(env_id, noise))


if __name__ == "__main__":
    run_program(lambda: tyro.cli(convert, description=__doc__))
