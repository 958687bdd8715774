"""RL Unplugged's Atari data (Gulcehre et al. 2020, arXiv 2006.13888): its own shards, and those of TensorFlow Datasets.

46 games, 5 runs each. A run has 50 shards, each of the episodes of a million steps of the DQN that played. Both formats
are TFRecord files with PNG images; rewards are clipped to [-1, 1]. The last action and reward of an episode lead to no
observation and are dropped.
"""

import functools
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.dataset import FRAME, STEP_BYTES, Episode, InputError, Source, check_disk, optional
from data.tfrecords import find_prepared, read_example, read_records, step_arrays

BUCKET = "https://storage.googleapis.com/rl_unplugged"
SHARDS = re.compile(r"run_(?P<run>\d+)-(?P<shard>\d{5})-of-(?P<count>\d{5})")
PREPARED = re.compile(r".+?(?:-checkpoint_(?P<shard>\d+))?\.tfrecord-\d{5}-of-\d{5}")
META = {"source": "RL Unplugged, recorded while a DQN learns", "sticky_actions": 0.25, "rewards_clipped": True}
SHORT_GAMES = ("Carnival", "Gravitar", "StarGunner")  # 49 shards a run
SHARD_STEPS = 1_000_000
RETRIES = 5  # of a download that breaks


def download(env_id: str, run: int, shards: list[int], folder: Path, out: Path, share: float) -> list[Path]:
    """Downloads shards of one run, all if none is named, into `folder`, and returns the files; those there are kept.

    Nothing is downloaded if the shards do not fit on the disk, or the dataset: a `share` of their steps, in `out`.
    Raises InputError for that, for an unknown run or shard, and where the network fails.
    """
    pooch, requests = optional("pooch", "requests")
    count = 49 if env_id in SHORT_GAMES else 50
    names = [f"run_{run}-{shard:05d}-of-{count:05d}" for shard in shards or range(count)]
    url, place = f"{BUCKET}/atari_episodes_ordered/{env_id}/", folder / env_id
    packed = {"Accept-Encoding": "gzip"}  # as they are stored, with their length; read_records reads unpacked ones too
    missing = 0
    try:
        for name in names:
            if not (place / name).exists():
                answer = requests.head(url + name, headers=packed, timeout=60)
                answer.raise_for_status()
                missing += int(answer.headers.get("Content-Length", 0))
        check_disk(folder, missing, "take less by --shards")
        check_disk(out, share * SHARD_STEPS * len(names) * STEP_BYTES, "take less by --shards or --percentage")
        files = pooch.create(place, url, registry=dict.fromkeys(names), retry_if_failed=RETRIES)
        get = pooch.HTTPDownloader(progressbar=True, chunk_size=2**20, headers=packed, timeout=60)
        return [Path(files.fetch(name, downloader=get)) for name in names]
    except requests.RequestException as error:
        hint = "check --run and --shards, or give the same command again: it keeps the shards that are whole"
        raise InputError(f"the download stopped: {error}; {hint}") from None


# ------------------------------------------------------------------------------------------------------------- Reading

Columns = tuple[list[bytes], NDArray, NDArray, bool]  # L + 1 images, actions and rewards [L + 1], terminal
Parse = Callable[[dict[str, Any], str], Columns]


def read_episode(parse: Parse, where: str, record: bytes) -> Episode:
    """Raises InputError, naming `where`, for a record that is no episode, and for images other than gray ones of 84x84."""
    images, action, reward, terminal = parse(read_example(record, where), where)
    if not 0 < len(images) == len(action) == len(reward) or isinstance(reward, list):  # a list: of bytes
        lengths = f"{len(images)} observations, {len(action)} actions and {len(reward)} rewards"
        raise InputError(f"{where}: {lengths} are no episode")
    if (largest := np.abs(reward).max()) > 1:
        raise InputError(f"{where}: reward {largest:g} is not clipped, as those of RL Unplugged are")
    frames = np.empty((len(images), *FRAME), np.uint8)
    for i, image in enumerate(images):
        frame = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED) if image else None
        if frame is None or frame.shape != FRAME or frame.dtype != np.uint8:
            found = "no image" if frame is None else f"{frame.dtype} {frame.shape}"
            raise InputError(f"{where}, step {i}: the observation is {found}, not a gray image of 84x84")
        frames[i] = frame
    return Episode(where, frames, action[:-1], reward[:-1], terminal)


def open_records(files: list[Path], actions: str, parse: Parse) -> Source:
    """TFRecord files of episodes, which `parse` knows; `actions`: the name of that feature. Raises InputError for damage."""

    def episodes() -> Iterator[Callable[[], Episode]]:
        for file in files:
            for index, record in enumerate(read_records(file)):
                yield functools.partial(read_episode, parse, f"{file}, record {index}", record)

    record = next(read_records(files[0]))
    length = len(read_example(record, f"{files[0]}, record 0").get(actions, ()))
    with files[0].open("rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    size = sum(file.stat().st_size for file in files) / len(zlib.compress(record) if compressed else record)
    return Source(episodes(), size * length, META)


def open_shards(files: list[Path]) -> Source:
    """RL Unplugged's shards: GZIP TFRecords, one example an episode. A last discount of 0 means a terminal end."""
    returns: list[tuple[float, float]] = []  # of the rewards that are kept, and as the record says

    def parse(example: dict[str, Any], where: str) -> Columns:
        try:
            if "o_t" in example:
                raise InputError(
                    f"{where}: these are RL Unplugged's single transitions, shuffled (its folder atari, 100 files a run). "
                    f"The episodes in order are needed (its folder atari_episodes_ordered, 50 files)"
                )
            reward, terminal = example["clipped_rewards"], bool(example["discounts"][-1] == 0)
            if isinstance(reward, np.ndarray):
                returns.append((float(np.sum(reward[:-1])), float(example["clipped_episode_return"][0])))
            return example["observations"], example["actions"], reward, terminal
        except (KeyError, IndexError) as error:
            raise InputError(f"{where}: the record is no episode of RL Unplugged: {error!r}") from None

    def finish() -> None:
        others = sum(abs(kept - said) > 1e-3 for kept, said in returns)
        print(f"{others} of {len(returns)} episodes have another clipped_episode_return than the rewards that are kept")

    return open_records(files, "actions", parse)._replace(finish=finish)


def open_prepared(files: list[Path]) -> Source:
    """The files that TensorFlow Datasets leaves on disk: RLDS episodes."""
    features, _ = find_prepared(files[0].parent)
    image = features.get("observation", {}).get("image")
    encoding = image.get("encodingFormat") if isinstance(image, dict) else None
    if encoding != "png":
        raise InputError(f"{files[0].parent / 'features.json'}: the observations are not PNG images, but {encoding}")

    def parse(example: dict[str, Any], where: str) -> Columns:
        steps = step_arrays(example, ("action", "reward"), features, where)
        return example.get("steps/observation", []), steps["action"], steps["reward"], bool(steps["is_terminal"][-1])

    return open_records(files, "steps/action", parse)
