"""Converts vector data: BSuite's that TensorFlow Datasets prepared, such as the paper's own (RLDS), and Minari's.

    python -m data.convert_bsuite --source DIR --env-id catch --noise 0.1
    python -m data.convert_bsuite --source cartpole/noisy-v0    # a Minari dataset, by name or folder

TensorFlow Datasets shuffles episodes on disk; their order in time is that of episode_id. TensorFlow is not needed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from data.convert_atari import write
from data.dataset import InputError, run_program, write_dataset
from data.minari_datasets import find_source, open_minari
from data.record_bsuite import REFERENCE_RETURNS, default_folder, make_environment
from data.source import FRAME, Episode


@dataclass(frozen=True)
class Args:
    source: Path  # folder with features.json and *.tfrecord-* files; or a Minari dataset's folder or name
    env_id: str | None = None  # the task that the data are of, such as catch; Minari's data often name it
    noise: float = 0.0  # probability with which the environment replaced an action when the data were recorded
    out: Path | None = None  # folder to make; by default the place where the training scripts look for it
    observation_key: str | None = None  # which of a Minari dataset's Dict observations to take


def convert_minari(folder: Path, env_id: str | None, noise: float, out: Path | None, observation_key: str | None) -> Path:
    """Converts a Minari dataset by its folder data; else as convert()."""
    source = open_minari(folder, observation_key)
    if source.shape == FRAME:
        raise InputError(f"{folder} has images: python -m data.convert_atari converts them")
    if not 0 <= noise <= 1:
        raise InputError(f"noise is a probability, from 0 to 1, not {noise}")
    env_id = env_id or source.meta.get("env_id")
    if env_id is None:
        raise InputError(f"{folder} names no environment: name it by --env-id")
    meta = {"benchmark": "bsuite", **source.meta, "env_id": env_id, "num_actions": source.num_actions, "noise": noise}
    return write(source._replace(meta=meta), out or default_folder(env_id, noise))


def convert(
    source: Path,
    env_id: str | None = None,
    noise: float = 0.0,
    out: Path | None = None,
    observation_key: str | None = None,
) -> Path:
    """Converts, with progress on stderr and a summary on stdout, and returns the new folder.

    Raises InputError for damaged files and for data that are not of this task; then nothing is left behind.
    """
    source = find_source(source).absolute()
    minari = source if source.name == "data" else source / "data"
    if (minari / "metadata.json").exists():
        return convert_minari(minari, env_id, noise, out, observation_key)
    if env_id is None:
        raise InputError("name the task that the data are of by --env-id")
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
