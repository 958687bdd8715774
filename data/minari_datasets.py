"""Minari's datasets, read and written with the minari package: discrete actions, 84x84 frames or vectors."""

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.dataset import InputError, check_disk, open_dataset
from data.source import FRAME, Episode, Source

MAIN_FILE = re.compile(r"main_data\.hdf5")
REFERENCES = {"random": "ref_min_score", "online_dqn": "ref_max_score"}  # Minari's names for our reference_returns


def import_minari() -> Any:
    try:
        import h5py  # noqa: F401
        import minari
    except ImportError:
        raise InputError("Minari datasets need two more packages: pip install -e '.[formats]'") from None
    return minari


def minari_folder(name: Path | str) -> Path:
    """Where Minari keeps the dataset of this name."""
    return import_minari().storage.get_dataset_path(str(name))


def open_minari(files: list[Path]) -> Source:
    """Frames are single or stacked, of which the newest is taken; other observations become float32."""
    minari, folder = import_minari(), files[0].parent
    try:
        dataset = minari.MinariDataset(folder)
        shape, dtype = dataset.observation_space.shape, dataset.observation_space.dtype
        actions, start = int(dataset.action_space.n), int(dataset.action_space.start)
        steps, episodes = dataset.total_steps + dataset.total_episodes, dataset.total_episodes
        metadata = dataset.storage.metadata
        references = {name: metadata.get(score) for name, score in REFERENCES.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise InputError(f"{folder} is damaged, or no Minari dataset of arrays and discrete actions: {error}") from None
    frames = shape[-2:] == FRAME or shape[:2] == FRAME
    if start != 0 or (dtype == np.uint8) != frames or len(shape) > 3:
        raise InputError(f"{folder} holds {dtype} {shape} and actions from {start}, not 84x84 frames or vectors, from 0")

    def read(indices: Iterator[int]) -> Iterator[Episode]:
        index = 0
        try:
            for index in indices:
                (episode,) = dataset.iterate_episodes([index])
                observation = episode.observations if frames else episode.observations.astype(np.float32)
                if frames and len(shape) == 3:
                    observation = observation[:, -1] if shape[1:] == FRAME else observation[..., -1]
                terminal = bool(episode.terminations[-1])
                yield Episode(f"{files[0]}, episode {index}", observation, episode.actions, episode.rewards, terminal)
        except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"{files[0]} is damaged or cut short at episode {index}: {error}") from None

    meta: dict[str, Any] = {"source": f"Minari, {dataset.id}"}
    meta |= {} if None in references.values() else {"reference_returns": references}
    return Source(range(episodes), read, steps, steps / max(1, episodes), meta, FRAME if frames else shape, actions)


def export_minari(folder: Path, name: str) -> Path:
    """Makes the Minari dataset `name`, whole or not at all, of one of our folders, and returns its folder.

    Frames are stored as they are, not as JPEG. Raises InputError if it exists, for an impossible name, or a full disk.
    """
    minari = import_minari()
    from gymnasium.spaces import Box, Discrete
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    data = open_dataset(folder)
    if not re.fullmatch(r"(?:[-\w]+/)*[-\w]+-v\d+", name):
        raise InputError(f"Minari's names are such as atari/breakout/dqn-v0, not {name!r}")
    target = minari_folder(name)
    if target.exists():
        raise InputError(f"{target} exists already; remove it or name another dataset")
    print(check_disk(target, sum(array.nbytes for array in data[:6]), "remove something there"))
    edges = np.flatnonzero(np.append(data.is_first, True))

    def buffers() -> Iterator[EpisodeBuffer]:
        for start, end in tqdm(itertools.pairwise(edges), total=len(edges) - 1, unit="episode"):
            last = np.arange(start + 1, end) == end - 1
            terminal = data.is_terminal[end - 1]
            yield EpisodeBuffer(
                observations=data.observation[start:end],
                actions=data.action[start : end - 1],
                rewards=data.reward[start : end - 1],
                terminations=last & terminal,
                truncations=last & ~terminal,
            )

    shape, of_frames = data.observation.shape[1:], data.observation.dtype == np.uint8
    box = Box(0, 255, shape, np.uint8) if of_frames else Box(-np.inf, np.inf, shape, np.float32)
    if "/" in name and (namespace := name.rpartition("/")[0]) not in list_local_namespaces():
        create_namespace(namespace)
    part = target.with_name(f".{target.name}.partial")
    shutil.rmtree(part, ignore_errors=True)  # what a killed program left
    try:
        part.mkdir()
        spaces = {"observation_space": box, "action_space": Discrete(data.meta["num_actions"])}
        storage = MinariStorage.new(part / "data", **spaces, jpeg_encoding=False)
        about = {"dataset_id": name, "description": f"{data.meta['env_id']}: {data.meta.get('source', '')}"}
        references = {REFERENCES[key]: value for key, value in data.meta.get("reference_returns", {}).items()}
        storage.update_metadata({**about, **references, "minari_version": minari.__version__})
        storage.update_episodes(buffers())
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{target}: {data.meta['episodes']} episodes, {data.meta['steps'] - data.meta['episodes']} steps with actions")
    return target
