"""RL Unplugged's Atari data (Gulcehre et al. 2020, arXiv 2006.13888): its own shards, and those of TensorFlow Datasets.

46 games, 5 runs each. A run has 50 shards, each of the episodes of a million steps of the DQN that played. Both formats
are TFRecord files with PNG images; rewards are clipped to [-1, 1]. The last action and reward of an episode lead to no
observation and are dropped.
"""

import errno
import functools
import http.client
import itertools
import json
import os
import re
import time
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.dataset import InputError, check_disk, on_disk
from data.games import STEP_BYTES
from data.source import FRAME, LONGEST, Episode, Source, refuse_copies

SHARDS = re.compile(r"run_(?P<run>\d+)-(?P<shard>\d{5})-of-(?P<count>\d{5})")
PREPARED = re.compile(r".+?(?:-checkpoint_(?P<shard>\d+))?\.tfrecord-\d{5}-of-\d{5}")
META = {"source": "RL Unplugged, recorded while a DQN learns", "sticky_actions": 0.25, "rewards_clipped": True}
SHORT_GAMES = ("Carnival", "Gravitar", "StarGunner")  # 49 shards a run
SHARD_STEPS = 1_000_000
RETRIES, RETRY_SECONDS, TIMEOUT_SECONDS = 5, 2.0, 60.0
AHEAD, CHUNK = 2, 128  # episodes that are decoded while one is written; images of one job


# --------------------------------------------------------------------------------------------------------- Downloading


def open_url(url: str, method: str = "GET", offset: int = 0) -> http.client.HTTPResponse:
    headers = {"Accept-Encoding": "gzip"}  # the bytes as they are stored
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=TIMEOUT_SECONDS)


def size_of(url: str) -> int:
    """Raises InputError if there is no such file, or no network."""
    try:
        with open_url(url, "HEAD") as response:
            return int(response.headers["Content-Length"])
    except (OSError, http.client.HTTPException, TypeError) as error:
        hint = "; check --env-id, --run and --shards" if getattr(error, "code", None) == 404 else ""
        raise InputError(f"{url} cannot be had: {error}{hint}") from None


def fetch(url: str, path: Path, size: int, bar: tqdm) -> None:
    """Downloads a file of `size` bytes, going on where an earlier call stopped; `path` appears when it is whole.

    Raises InputError when the connection breaks RETRIES times without a byte more.
    """
    part, failures = path.with_name(f"{path.name}.partial"), 0
    part.touch()
    bar.update(part.stat().st_size)
    while (have := part.stat().st_size) != size:
        reason: object = "the connection was closed"
        try:
            with (
                open_url(url, offset=have if have < size else 0) as response,
                part.open("ab" if response.status == 206 else "wb") as file,  # 206: the server sends what is missing
            ):
                bar.update(file.tell() - have)
                while piece := response.read(2**20):
                    file.write(piece)
                    bar.update(len(piece))
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = error
        failures = 0 if part.stat().st_size > have else failures + 1
        if failures == RETRIES:
            raise InputError(f"{url} stopped at byte {have} of {size}: {reason}; the same command goes on from there")
        if part.stat().st_size != size:
            time.sleep(RETRY_SECONDS)
    part.rename(path)


def download(env_id: str, run: int, shards: list[int], folder: Path, base_url: str, out: Path, share: float) -> list[Path]:
    """Downloads shards of one run, all if none is named, into `folder`, and returns the files.

    Nothing is downloaded that does not fit on the disk together with the dataset: a `share` of the shards' steps, in `out`.
    Raises InputError for that, for an unknown run or shard, and without a network.
    """
    count = 49 if env_id in SHORT_GAMES else 50
    names = [f"run_{run}-{shard:05d}-of-{count:05d}" for shard in shards or range(count)]
    urls = [f"{base_url.rstrip('/')}/atari_episodes_ordered/{env_id}/{name}" for name in names]
    files = [folder / env_id / name for name in names]
    wanted = [(url, file, size_of(url)) for url, file in zip(urls, files, strict=True)]
    wanted = [(url, file, size) for url, file, size in wanted if not (file.exists() and file.stat().st_size == size)]
    missing = sum(size for _, _, size in wanted)
    if missing:
        print(check_disk(folder, missing, "take less by --shards"))
    shared = missing if on_disk(out).stat().st_dev == on_disk(folder).stat().st_dev else 0
    check_disk(out, share * SHARD_STEPS * len(files) * STEP_BYTES + shared, "take less by --shards or --percentage")
    with tqdm(total=missing, unit="B", unit_scale=True, desc=f"downloading {env_id}") as bar:
        for url, file, size in wanted:
            file.parent.mkdir(parents=True, exist_ok=True)
            fetch(url, file, size, bar)
    return files


# ------------------------------------------------------------------------------------------------------------- Reading

Record = tuple[str, bytes]  # where it is, and what it holds
Columns = tuple[list[bytes], NDArray, NDArray, bool]  # L + 1 images, actions and rewards [L + 1], terminal


def decode(images: list[bytes], frames: NDArray, where: str, start: int) -> None:
    """CHUNK of the PNG images, from `start` on, into uint8 frames [L + 1, 84, 84]. Raises InputError for other images."""
    for i, image in enumerate(images[start : start + CHUNK], start):
        frame = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED) if image else None
        if frame is None or frame.shape != FRAME or frame.dtype != np.uint8:
            found = "no image" if frame is None else f"{frame.dtype} {frame.shape}"
            raise InputError(f"{where}, step {i}: the observation is {found}, not a gray image of 84x84")
        frames[i] = frame


def open_records(files: list[Path], actions: str, parse: Callable[[dict[str, Any], str], Columns]) -> Source:
    """TFRecord files of episodes, which `parse` knows; `actions`: the name of that feature. Raises InputError for damage."""
    from data.tfrecords import read_example, read_records

    def first_records() -> Iterator[tuple[Path, bytes]]:
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is no file, or a link to nothing")
            first = next(read_records(file), None)
            if first is None:
                raise InputError(f"{file} holds no episode")
            yield file, first

    def records() -> Iterator[Record]:
        for file in files:
            for index, record in enumerate(read_records(file)):
                yield f"{file}, record {index}", record

    def begin(records: Iterator[Record], pool: ThreadPoolExecutor) -> Iterator[tuple[Episode, Iterator[None]]]:
        """Episodes, and the jobs that fill in their frames."""
        for where, record in records:
            images, action, reward, terminal = parse(read_example(record, where), where)
            whole = len(images) == len(action) == len(reward) and 1 <= len(action) <= LONGEST
            if not whole or isinstance(reward, list):  # a list: of bytes
                lengths = f"{len(images)} observations, {len(action)} actions and {len(reward)} rewards"
                raise InputError(f"{where}: {lengths} are no episode")
            if (largest := np.abs(reward).max()) > 1:
                raise InputError(f"{where}: reward {largest:g} is not clipped, as those of RL Unplugged are")
            frames = np.empty((len(images), *FRAME), np.uint8)
            jobs = pool.map(functools.partial(decode, images, frames, where), range(0, len(images), CHUNK))
            yield Episode(where, frames, action[:-1], reward[:-1], terminal), jobs

    def read(records: Iterator[Record]) -> Iterator[Episode]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: OpenCV decodes outside Python's lock
            begun = begin(records, pool)
            waiting = deque(itertools.islice(begun, AHEAD))
            while waiting:
                waiting.extend(itertools.islice(begun, 1))
                episode, jobs = waiting.popleft()
                list(jobs)  # an error of theirs comes out here
                yield episode

    refuse_copies(first_records())
    record = next(read_records(files[0]))
    length = len(read_example(record, f"{files[0]}, record 0").get(actions, ()))
    with files[0].open("rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    size = sum(file.stat().st_size for file in files) / len(zlib.compress(record) if compressed else record)
    return Source(records(), read, size * length, length, META)


def open_shards(files: list[Path]) -> Source:
    """RL Unplugged's shards: GZIP TFRecords, one example an episode. A last discount of 0 means a terminal end."""

    def parse(example: dict[str, Any], where: str) -> Columns:
        try:
            images, discounts = example["observations"], example["discounts"]
            if isinstance(discounts, list) or len(discounts) != len(images):
                raise InputError(f"{where}: {len(images)} observations and {len(discounts)} discounts are no episode")
            return images, example["actions"], example["clipped_rewards"], bool(discounts[-1] == 0)
        except (KeyError, IndexError) as error:
            raise InputError(f"{where}: the record is no episode of RL Unplugged: {error!r}") from None

    return open_records(files, "actions", parse)


def dataset_info(folder: Path) -> dict[str, Any]:
    """What TensorFlow Datasets says of a folder of its own; empty for others. Raises InputError if it is damaged."""
    try:
        info = dict(json.loads((folder / "dataset_info.json").read_text()))
        return info | {"splits": [dict(split) for split in info.get("splits", ())]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / 'dataset_info.json'} is damaged: {error}") from None


def open_prepared(files: list[Path]) -> Source:
    """The files that TensorFlow Datasets leaves on disk: RLDS episodes."""
    from data.tfrecords import find_prepared, step_arrays

    features, _ = find_prepared(files[0].parent)
    image = features.get("observation", {}).get("image")
    encoding = image.get("encodingFormat") if isinstance(image, dict) else None
    if encoding != "png":
        raise InputError(f"{files[0].parent / 'features.json'}: the observations are not PNG images, but {encoding}")

    def parse(example: dict[str, Any], where: str) -> Columns:
        steps = step_arrays(example, ("action", "reward"), features, where)
        return example.get("steps/observation", []), steps["action"], steps["reward"], bool(steps["is_terminal"][-1])

    return open_records(files, "steps/action", parse)
