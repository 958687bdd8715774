"""Converts a BSuite dataset that TensorFlow Datasets prepared, such as the paper's own (RLDS), without TensorFlow.

    python -m data.convert_bsuite --source DIR --env-id catch --noise 0.1

TensorFlow Datasets shuffles episodes on disk; their order in time is that of episode_id.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from data.dataset import InputError, run_program, write_dataset
from data.record_bsuite import REFERENCE_RETURNS, default_folder, make_environment
from data.source import Episode


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
    from data.tfrecords import find_prepared, read_example, read_records, step_arrays

    environment = make_environment(env_id, seed=0, noise=noise)
    features, files = find_prepared(source)
    out = default_folder(env_id, noise) if out is None else out
    episodes: list[tuple[int, Episode]] = []
    for file in tqdm(files, unit="file", desc=f"reading {source}"):
        for index, record in enumerate(read_records(file)):
            where = f"{file}, episode {index}"
            example = read_example(record, where)
            steps = step_arrays(example, ("observation", "action", "reward"), features, where)
            if steps["observation"].shape[1:] != environment.observation_spec().shape:
                raise InputError(f"{where}: observations {steps['observation'].shape} are not those of {env_id}")
            try:
                time = int(example["episode_id"][0])  # a number, or its digits
            except (KeyError, ValueError):
                time = len(episodes)
            observation, terminal = steps["observation"].astype(np.float32), bool(steps["is_terminal"][-1])
            episode = Episode(where, observation, steps["action"][:-1], steps["reward"][:-1], terminal)
            episodes.append((time, episode))
    with write_dataset(
        out, benchmark="bsuite", env_id=env_id, num_actions=environment.action_spec().num_values, noise=noise,
        source=f"TensorFlow Datasets, {len(files)} files of {files[0].parent.parent.name}",
        reference_returns=REFERENCE_RETURNS[env_id],
    ) as writer:  # fmt: skip
        for _, episode in sorted(episodes, key=lambda each: each[0]):
            episode.add_to(writer)
    print(writer.summary(out))
    return out


if __name__ == "__main__":
    run_program(lambda: convert(**vars(tyro.cli(Args, description=__doc__))))
