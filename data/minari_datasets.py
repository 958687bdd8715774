"""Minari's datasets, read and written with the minari package: discrete actions; frames, vectors or matrices."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from numpy.typing import NDArray
from tqdm import tqdm

from data.dataset import InputError, check_disk, open_dataset
from data.source import FRAME, Episode, Source

DATA = re.compile(r"main_data\.hdf5|data/metadata\.json")  # files that stand for a dataset, in its folder data
REFERENCES = {"random": "ref_min_score", "online_dqn": "ref_max_score"}  # Minari's names for our reference_returns
SIDE = 32  # what is at least so high and so wide is an image, as for Minari
MISSING = "Minari datasets need more packages: pip install -e '.[formats]'"


def import_minari() -> Any:
    try:
        import h5py  # noqa: F401
        import minari
    except ImportError:
        raise InputError(MISSING) from None
    return minari


def minari_folder(name: Path | str) -> Path:
    """Where Minari keeps the dataset of this name."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets", name)


def find_source(path: Path) -> Path:
    """The path, or the folder of the Minari dataset of this name. Raises InputError if there is neither."""
    found = path if path.exists() else minari_folder(path)
    if not found.exists():
        raise InputError(f"there is no {path}, and Minari keeps no dataset of this name")
    return found


def to_frame(image: NDArray) -> NDArray | None:
    """A gray frame [84, 84] of a picture, or of the newest one of a stack; None for what is neither.

    image: uint8 [H, W], [H, W, 1], of colours [H, W, 3], or a stack [k, H, W], [k, H, W, 3] or [84, 84, k].
    """
    if image.shape[0] < SIDE and (image.ndim == 4 or image.shape[0] != 3):  # 3 may be colours
        image = image[-1]
    if image.ndim == 3 and (image.shape[2] == 1 or (image.shape[:2] == FRAME and image.shape[2] != 3)):
        image = image[..., -1]
    if image.ndim == 3 and image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if image.ndim != 2:
        return None
    return cv2.resize(image, FRAME, interpolation=cv2.INTER_AREA)


def open_minari(folder: Path, key: str | None = None) -> Source:
    """Opens a dataset by its folder data. Images become gray frames of 84x84, other observations float32.

    key: which of the observations to take where they are Dict. env_id is in the source's meta if the dataset names it.
    Raises InputError for damaged files, and for observations or actions of another kind.
    """
    minari = import_minari()
    try:
        dataset = minari.MinariDataset(folder)
        space, actions = dataset.observation_space, dataset.action_space
        steps, episodes = dataset.total_steps + dataset.total_episodes, dataset.total_episodes
        scores = [dataset.storage.metadata.get(score) for score in REFERENCES.values()]
        meta: dict[str, Any] = {"source": f"Minari, {dataset.id}"}
        meta |= {"env_id": dataset.env_spec.id} if dataset.env_spec else {}
        if None not in scores and np.ptp(scores) > 0:
            meta["reference_returns"] = dict(zip(REFERENCES, scores, strict=True))
    except ImportError:
        raise InputError(MISSING) from None
    except Exception as error:  # each of Minari's readers has its own
        raise InputError(f"{folder} is damaged, or no Minari dataset: {error!r}") from None
    keys: list[Any] = list(space.spaces) if isinstance(space, Dict) else [None]
    if key not in keys:
        found = "no Dict observations: leave out" if keys == [None] else f"observations {', '.join(keys)}: choose one by"
        raise InputError(f"{folder} has {found} --observation-key")
    space = space if key is None else space[key]
    shape: tuple[int, ...] = space.shape if isinstance(space, Box) else ()
    image = sum(size >= SIDE for size in shape) > 1
    a_frame = image and 0 not in shape and space.dtype == np.uint8 and to_frame(np.zeros(shape, np.uint8)) is not None
    if not (a_frame if image else 1 <= len(shape) <= 3):
        found = f"{space.dtype} {shape}" if shape else type(space).__name__
        raise InputError(
            f"{folder} has observations of {found}: wanted is a Box of vectors or matrices, or of uint8 images, which are "
            f"[H, W], [H, W, 3], or a stack [k, H, W] or [84, 84, k]"
        )
    if not isinstance(actions, Discrete) or actions.start != 0:
        found = str(actions) if isinstance(actions, Discrete) else type(actions).__name__
        raise InputError(f"{folder} has actions of {found}: wanted is Discrete, from 0")

    def read(indices: Iterator[int]) -> Iterator[Episode]:
        for index in indices:
            where = f"{folder}, episode {index}"
            try:
                (episode,) = dataset.iterate_episodes([index])
                (about,) = dataset.storage.get_episode_metadata([index])
                observation = np.asarray(episode.observations if key is None else episode.observations[key])
                found = f"{observation.dtype} {observation.shape[1:]}"
                if observation.shape[1:] != shape or (image and observation.dtype != np.uint8):
                    raise ValueError(f"observations are {found}, not {space.dtype} {shape}")
                if len(episode.rewards) != about["total_steps"]:
                    raise ValueError(f"{len(episode.rewards)} steps were read, not {about['total_steps']}")
                observation = np.array([to_frame(each) for each in observation]) if image else observation
                terminal = bool(episode.terminations[-1])  # else a time limit or the end of the recording
            except Exception as error:
                raise InputError(f"{where} is damaged or cut short: {error!r}") from None
            yield Episode(where, observation, episode.actions, episode.rewards, terminal)

    return Source(range(episodes), read, steps, steps / max(1, episodes), meta, FRAME if image else shape, int(actions.n))


def export_minari(folder: Path, name: str) -> Path:
    """Makes the Minari dataset `name`, whole or not at all, of one of our folders, and returns its folder.

    Frames are stored as they are, not as JPEG. Raises InputError if it exists, for an impossible name, or a full disk.
    """
    minari = import_minari()
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    data = open_dataset(folder)
    if len(name) > 200 or not re.fullmatch(r"(?:(?!data/)[-\w]{2,}/)*[-\w]+-v\d+", name, re.ASCII):
        hint = "a folder has two letters or more, and is not called data"
        raise InputError(f"Minari's names are such as atari/breakout/dqn-v0 ({hint}), not {name!r}")
    target = minari_folder(name)
    for parent in target.parents:
        if parent.is_file() or (parent / "data" / "metadata.json").exists():
            raise InputError(f"{parent} is in the way of {name}: it is no folder, or a dataset itself")
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
        part.mkdir(parents=True)
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
