"""Minari's datasets, read with the minari package: discrete actions; frames, vectors or matrices."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from numpy.typing import NDArray

from data.dataset import FRAME, Episode, InputError, Source, optional

DATA = re.compile(r"main_data\.hdf5|data/metadata\.json")  # files that stand for a dataset, in its folder data
REFERENCES = {"random": "ref_min_score", "online_dqn": "ref_max_score"}  # Minari's names for our reference_returns
SIDE = 32  # what is at least so high and so wide is an image, as for Minari


def find_source(path: Path) -> Path:
    """The path, or the folder of the dataset of this name in Minari's own store. Raises InputError if there is neither."""
    if path.exists():
        return path
    store = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    if not (found := Path(store, path)).exists():
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


def read_dataset(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Minari's dataset, and of meta.json env_id and env_spec: the environment as the dataset says to evaluate in it.

    Prints a sentence where that cannot be made again: scores are then of the plain env_id.
    """
    (minari,) = optional("minari")
    storage, spec, fault = minari.dataset.minari_storage.MinariStorage.read(folder), None, None
    try:
        dataset = minari.MinariDataset(storage)
        spec = dataset._eval_env_spec or dataset.env_spec
        if spec is not None:
            gymnasium.make(spec).close()
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DependencyNotInstalled, ModuleNotFoundError):
        pass  # where the agent is scored, the environment may be installed
    except Exception as error:  # of a user's wrapper; or of a spec that another version of Gymnasium wrote
        fault = error
        if spec is None:  # then the data may be whole: without the spec they are read, or damaged

            class Plain(type(storage)):  # type: ignore[misc]
                metadata = property(lambda self: super().metadata | {"env_spec": None, "eval_env_spec": None})

            storage.__class__ = Plain
            dataset = minari.MinariDataset(storage)
    if fault is not None:
        print(f"{folder}: its environment cannot be made again as the data say ({fault}); scores will be of the plain one")
    meta = {"env_id": dataset.env_spec.id} if dataset.env_spec else {}
    return dataset, meta | ({"env_spec": spec.to_json()} if spec is not None and fault is None else {})


def open_minari(folder: Path, key: str | None = None) -> Source:
    """Opens a dataset by its folder data. Images become gray frames of 84x84, other observations float32.

    key: which of the observations to take where they are Dict. The meta has num_actions, and env_id if the dataset names it.
    Raises InputError for damaged files, and for observations or actions of another kind.
    """
    optional("minari", "h5py", "pyarrow")
    try:
        dataset, meta = read_dataset(folder)
        space, actions = dataset.observation_space, dataset.action_space
        steps, episodes = dataset.total_steps + dataset.total_episodes, dataset.total_episodes
        scores = [dataset.storage.metadata.get(score) for score in REFERENCES.values()]
        meta |= {"source": f"Minari, {dataset.id}"}
        if None not in scores and np.ptp(scores) > 0:
            meta["reference_returns"] = dict(zip(REFERENCES, scores, strict=True))
    except Exception as error:  # each of Minari's readers has its own
        raise InputError(f"{folder} is damaged, or no Minari dataset: {error!r}") from None
    keys: list[Any] = list(space.spaces) if isinstance(space, Dict) else [None]
    if key not in keys:
        found = "no Dict observations: leave out" if keys == [None] else f"observations {', '.join(keys)}: choose one by"
        raise InputError(f"{folder} has {found} --observation-key")
    space = space if key is None else space[key]
    shape: tuple[int, ...] = space.shape if isinstance(space, Box | MultiBinary) else ()
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

    def read(index: int) -> Episode:
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
            terminal = bool(episode.terminations[-1])  # else truncated: a time limit or the end of the recording
        except Exception as error:
            raise InputError(f"{where} is damaged or cut short: {error!r}") from None
        return Episode(where, observation, episode.actions, episode.rewards, terminal)

    meta["num_actions"] = int(actions.n)
    reads = (functools.partial(read, index) for index in range(episodes))
    return Source(reads, steps, meta, FRAME if image else shape)
