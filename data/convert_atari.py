"""Converts Atari datasets, without TensorFlow; downloads RL Unplugged's; turns one of ours into a Minari dataset.

    python -m data.convert_atari --env-id Breakout --run 1 --shards 0 10-19 --percentage 10    # downloads and converts
    python -m data.convert_atari --env-id Breakout --source DIR_OR_FILES
    python -m data.convert_atari --env-id Breakout --export-minari atari/breakout/dqn-v0

Formats, known by the names of their files:

    rl_unplugged   run_1-00000-of-00050: RL Unplugged's own shards (Gulcehre et al. 2020, arXiv 2006.13888)
    tfds           *.tfrecord-00000-of-00001 and features.json: the same as TensorFlow Datasets leaves it on disk
    dqn_replay     $store$_observation_ckpt.0.gz and its siblings: DQN Replay (Agarwal et al. 2020, arXiv 1907.04543)
    minari         main_data.hdf5: discrete actions, 84x84 frames (of a stack the newest) or vectors
"""

import errno
import gzip
import http.client
import io
import itertools
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from data.atari import default_folder, num_actions
from data.dataset import InputError, check_disk, on_disk, open_dataset, write_dataset
from data.runs import run_program

FORMATS = {
    "rl_unplugged": re.compile(r"run_(?P<run>\d+)-(?P<shard>\d{5})-of-(?P<count>\d{5})"),
    "tfds": re.compile(r".+?(?:-checkpoint_(?P<shard>\d+))?\.tfrecord-\d{5}-of-\d{5}"),
    "dqn_replay": re.compile(r"\$store\$_observation_ckpt\.(?P<shard>\d+)\.gz"),
    "minari": re.compile(r"main_data\.hdf5"),
}
FRAME = (84, 84)
FRAME_BYTES = FRAME[0] * FRAME[1]
SCALARS = 11  # bytes a step beside the observation
LONGEST = 60_000  # steps of an episode; half an hour of play is 27,000
IN_FLIGHT, CHUNK = 16_384, 128  # frames that are being decoded; those of one job
SHORT_GAMES = ("Carnival", "Gravitar", "StarGunner")  # RL Unplugged has 49 shards of these, 50 of the others
LESS = "take less by --shards, --percentage or --max-episodes"
RETRIES, RETRY_SECONDS, TIMEOUT_SECONDS = 5, 2.0, 60.0


@dataclass(frozen=True)
class Args:
    env_id: str  # the game that the data are of, such as Breakout
    source: tuple[Path, ...] = ()  # folder or files to convert; without it, RL Unplugged's shards of --run are downloaded
    format: Literal["auto", "rl_unplugged", "tfds", "dqn_replay", "minari"] = "auto"  # of the source
    run: int | None = None  # run of RL Unplugged, 1 to 5
    shards: tuple[str, ...] = ()  # numbers and ranges of shards or checkpoints, such as 0 10-19; by default all
    percentage: float = 100.0  # part of the episodes to take, evenly spaced
    max_episodes: int | None = None  # take at most so many
    out: Path | None = None  # folder to make; by default the place where the training scripts look for it
    download_dir: Path = Path("datasets/downloads/rl_unplugged")  # where downloaded shards stay
    base_url: str = "https://storage.googleapis.com/rl_unplugged"  # RL Unplugged's public bucket
    export_minari: str | None = None  # instead of converting, make this Minari dataset of a folder of ours (--source)


class Episode(NamedTuple):
    where: str  # file and record
    observation: Any  # L + 1 of them: uint8 [L + 1, 84, 84], float32 [L + 1, ...], or a list of PNG images
    action: NDArray  # [L]
    reward: NDArray  # [L]
    terminal: bool


class Source(NamedTuple):
    episodes: Generator[Episode]
    steps: float  # about how many there are
    length: float  # about how many an episode has
    meta: dict[str, Any]
    shape: tuple[int, ...] = FRAME  # of an observation: a uint8 frame, or a float32 vector
    num_actions: int = 0  # 0 if the data do not tell


class Subset:
    """Takes a percentage of the episodes, evenly spaced, and at most max_episodes. Raises InputError for no such part."""

    def __init__(self, percentage: float, max_episodes: int | None):
        if not 0 < percentage <= 100:
            raise InputError(f"--percentage must be above 0 and at most 100, not {percentage:g}")
        if max_episodes is not None and max_episodes < 1:
            raise InputError(f"--max-episodes must be at least 1, not {max_episodes}")
        self.percentage, self.max_episodes = percentage, max_episodes
        self.seen = self.taken = 0

    def take(self) -> bool:
        """Whether to take the next episode."""
        self.seen += 1
        before, now = (int(seen * self.percentage / 100) for seen in (self.seen - 1, self.seen))
        self.taken += now - before
        return now > before

    @property
    def full(self) -> bool:
        return self.max_episodes is not None and self.taken >= self.max_episodes

    def steps(self, steps: float, length: float) -> float:
        """About how many of `steps` it takes, if an episode has about `length`."""
        steps *= self.percentage / 100
        return steps if self.max_episodes is None else min(steps, self.max_episodes * length)


def parse_shards(texts: tuple[str, ...]) -> list[int]:
    """0 10-12 -> [0, 10, 11, 12]. Raises InputError for anything else."""
    numbers: set[int] = set()
    for text in texts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise InputError(f"--shards takes numbers and ranges such as 0 10-19, not {text!r}")
        numbers.update(span)
    return sorted(numbers)


def check_name(path: Path, env_id: str) -> None:
    """Raises InputError if the folders around `path`, or TensorFlow Datasets' description, name another game."""
    games = []
    for name in (*path.absolute().parent.parts, str(dataset_info(path.parent).get("configName"))):
        game = re.sub(r"_run_\d+$", "", name)
        with suppress(InputError):
            num_actions(game)
            games.append(game)
    if games and games[-1] != env_id:
        raise InputError(f"{path} is of {games[-1]}, not of {env_id}")


# Downloading


def open_url(url: str, method: str = "GET", offset: int = 0) -> http.client.HTTPResponse:
    headers = {"Accept-Encoding": "gzip"}  # the bytes as they are stored
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=TIMEOUT_SECONDS)


def size_of(url: str) -> int:
    """Raises InputError if there is no such file, or no network."""
    try:
        with open_url(url, "HEAD") as response:
            return int(response.headers["Content-Length"])
    except urllib.error.HTTPError as error:
        hint = "; check --env-id, --run and --shards" if error.code == 404 else ""
        raise InputError(f"{url} cannot be had: {error.code} {error.reason}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from None
    except (ValueError, TypeError):
        raise InputError(f"{url} cannot be had: the server does not say how long it is") from None


def fetch(url: str, path: Path, size: int, bar: tqdm) -> None:
    """Downloads a file of `size` bytes, going on where an earlier call stopped; `path` appears when it is whole.

    Raises InputError when the connection breaks RETRIES times without a byte.
    """
    part = path.with_name(f"{path.name}.partial")
    part.touch()
    if part.stat().st_size > size:
        part.write_bytes(b"")
    bar.update(part.stat().st_size)
    failures = 0
    while (offset := part.stat().st_size) < size:
        reason: object = "the connection was closed"
        try:
            with open_url(url, offset=offset) as response, part.open("r+b") as file:
                if response.status != 206:  # the server sends all of it
                    bar.update(-offset)
                    offset = 0
                elif not response.headers["Content-Range"].startswith(f"bytes {offset}-"):
                    raise http.client.HTTPException(f"it sends {response.headers['Content-Range']}")
                file.seek(offset)
                file.truncate()
                while piece := response.read(2**20):
                    file.write(piece)
                    bar.update(len(piece))
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = error
        if part.stat().st_size > size:
            raise InputError(f"{url} sends more than the {size} bytes that it said; {part} was left as it is")
        failures = 0 if part.stat().st_size > offset else failures + 1
        if failures == RETRIES:
            raise InputError(f"{url} stopped at byte {offset} of {size}: {reason}; the same command goes on from there")
        if part.stat().st_size < size:
            time.sleep(RETRY_SECONDS)
    part.rename(path)


def is_whole(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size


def download(args: Args, shards: list[int], out: Path, subset: Subset) -> list[Path]:
    """Downloads RL Unplugged's shards of one run and returns the files; asks for no more than fits on the disk.

    Raises InputError for an unknown run or shard, without a network, and for a full disk.
    """
    if args.run is None:
        raise InputError("name what to convert by --source, or a run of RL Unplugged to download by --run 1 (to 5)")
    count = 49 if args.env_id in SHORT_GAMES else 50
    names = [f"run_{args.run}-{shard:05d}-of-{count:05d}" for shard in shards or range(count)]
    urls = [f"{args.base_url.rstrip('/')}/atari_episodes_ordered/{args.env_id}/{name}" for name in names]
    files = [args.download_dir / args.env_id / name for name in names]
    sizes = [size_of(url) for url in urls]
    missing = sum(size for file, size in zip(files, sizes, strict=True) if not is_whole(file, size))
    if missing:
        print(check_disk(args.download_dir, missing, LESS))
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=missing, unit="B", unit_scale=True, desc=f"downloading {args.env_id}") as bar:
        for url, file, size in zip(urls, files, sizes, strict=True):
            if not is_whole(file, size):
                fetch(url, file, size, bar)
            if file == files[0]:  # it tells what all of them need
                steps, length = count_steps(files[:1], sum(sizes), "actions")
                left = missing - bar.n if on_disk(out).stat().st_dev == file.stat().st_dev else 0
                check_disk(out, subset.steps(steps, length) * (FRAME_BYTES + SCALARS) + left, LESS)
    return files


# Reading


def dataset_info(folder: Path) -> dict[str, Any]:
    """What TensorFlow Datasets says of a folder of its own; empty for others."""
    try:
        return dict(json.loads((folder / "dataset_info.json").read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / 'dataset_info.json'} is damaged: {error}") from None


def find_source(args: Args, shards: list[int]) -> tuple[str, list[Path]]:
    """The format and, in order, its files (of DQN Replay those of the observations) that --shards names, or all.

    Raises InputError if there is no dataset, several, or if a shard of it is missing.
    """
    paths = [minari_folder(path) if args.format == "minari" and not path.exists() else path for path in args.source]
    found: dict[tuple[str, Path, str | None, str | None], dict[int, list[Path]]] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no {path}")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            for name, pattern in FORMATS.items():
                match = pattern.fullmatch(file.name) if args.format in ("auto", name) else None
                group = match.groupdict() if match else {}
                run, count, shard = group.get("run"), group.get("count"), int(group.get("shard") or 0)
                if match and (run is None or args.run in (None, int(run))):
                    found.setdefault((name, file.parent, run, count), {}).setdefault(shard, []).append(file)
    if len(found) != 1:
        source = ", ".join(map(str, args.source))
        if not found:
            raise InputError(f"{source} holds no files of {'a known format' if args.format == 'auto' else args.format}")
        kinds = ", ".join(f"{name} in {folder}" + (f" run {run}" if run else "") for name, folder, run, _ in found)
        raise InputError(f"{source} holds several datasets ({kinds}): choose one by --source, --run or --format")
    (name, folder, _, count), parts = found.popitem()
    some = parts[min(parts)][0].name
    match = FORMATS[name].fullmatch(some)
    assert match is not None
    if not match.groupdict().get("shard"):
        if shards:
            raise InputError(f"{folder / some} is of no shards with numbers: leave out --shards")
        return name, parts[0]
    last = int(count or len(dataset_info(folder).get("splits", ())) or max(parts) + 1)
    whole = range(last) if all(path.is_dir() for path in paths) else sorted(parts)
    for number in shards or whole:
        if number not in parts:
            start, end = match.span("shard")
            missing = some[:start] + str(number).zfill(1 if name == "dqn_replay" else end - start) + some[end:]
            raise InputError(f"{folder / missing} is missing" + ("" if shards else "; --shards converts a part"))
    return name, [file for number in shards or whole for file in parts[number]]


def count_steps(files: list[Path], size: int, actions: str) -> tuple[float, float]:
    """About how many steps `size` bytes of such files have, and their first episode. Raises InputError if there is none."""
    from data.tfrecords import read_example, read_records

    record = next(read_records(files[0]), None)
    if record is None:
        raise InputError(f"{files[0]} holds no episode")
    length = len(read_example(record, f"{files[0]}, record 0").get(actions, ()))
    with files[0].open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return size / len(zlib.compress(record) if compressed else record) * length, length


Columns = tuple[list[bytes], NDArray, NDArray, bool]  # L images, actions [L], rewards [L], terminal


def record_episodes(
    files: list[Path], subset: Subset, parse: Callable[[dict[str, Any], str], Columns]
) -> Generator[Episode]:
    """The episodes of TFRecord files; parse takes an example's columns. Raises InputError for damaged records."""
    from data.tfrecords import read_example, read_records

    for file in files:
        index = -1
        for index, record in enumerate(read_records(file)):
            if not subset.take():
                continue
            where = f"{file}, record {index}"
            images, action, reward, terminal = parse(read_example(record, where), where)
            if not len(images) == len(action) == len(reward) or not 1 <= len(action) <= LONGEST:
                lengths = f"{len(images)} observations, {len(action)} actions and {len(reward)} rewards"
                raise InputError(f"{where}: {lengths} are no episode")
            if np.abs(reward).max() > 1:
                raise InputError(f"{where}: reward {np.abs(reward).max():g} is not clipped, as those of RL Unplugged are")
            yield Episode(where, images, action[:-1], reward[:-1], terminal)
            if subset.full:
                return
        if index < 0:
            raise InputError(f"{file} holds no episode")


def open_rl_unplugged(files: list[Path], subset: Subset) -> Source:
    """RL Unplugged's shards: GZIP TFRecords, one example an episode, rewards clipped to [-1, 1].

    A last discount of 0 means a terminal end; the last action and reward lead to no observation and are dropped.
    """

    def parse(example: dict[str, Any], where: str) -> Columns:
        try:
            terminal = bool(example["discounts"][-1] == 0)
            return example["observations"], example["actions"], example["clipped_rewards"], terminal
        except (KeyError, IndexError) as error:
            raise InputError(f"{where}: the record is no episode of RL Unplugged: {error!r}") from None

    steps, length = count_steps(files, sum(file.stat().st_size for file in files), "actions")
    meta = {"source": "RL Unplugged, recorded while a DQN learns", "sticky_actions": 0.25, "rewards_clipped": True}
    return Source(record_episodes(files, subset, parse), steps, length, meta)


def open_tfds(files: list[Path], subset: Subset) -> Source:
    """RL Unplugged as TensorFlow Datasets leaves it on disk: RLDS episodes, whose last action and reward are dropped."""
    from data.tfrecords import find_prepared, step_array

    features, _ = find_prepared(files[0].parent)
    encoding = features.get("observation", {}).get("image", {}).get("encodingFormat")
    if encoding != "png":
        raise InputError(f"{files[0].parent / 'features.json'}: the observations are not PNG images, but {encoding}")

    def parse(example: dict[str, Any], where: str) -> Columns:
        names = ("action", "reward", "is_first", "is_last", "is_terminal")
        action, reward, *flags = (step_array(example, name, features, where) for name in names)
        if [np.flatnonzero(flag).tolist() for flag in flags[:2]] != [[0], [len(action) - 1]]:
            raise InputError(f"{where}: is_first and is_last do not mark one whole episode")
        return example.get("steps/observation", []), action, reward, bool(flags[2][-1])

    steps, length = count_steps(files, sum(file.stat().st_size for file in files), "steps/action")
    meta: dict[str, Any] = {"source": "RL Unplugged, recorded while a DQN learns, prepared by TensorFlow Datasets"}
    meta |= {"sticky_actions": 0.25, "rewards_clipped": True}
    return Source(record_episodes(files, subset, parse), steps, length, meta)


def read_column(path: Path) -> NDArray:
    """A gzipped .npy file. Raises InputError if it is missing or damaged."""
    try:
        return np.load(io.BytesIO(gzip.decompress(path.read_bytes())), allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is damaged or cut short: {error}") from None


def checkpoint_file(observations: Path, name: str) -> Path:
    return observations.with_name(observations.name.replace("$store$_observation", name))


def read_frames(stream: gzip.GzipFile, count: int) -> NDArray:
    """The next `count` frames and the last one again, uint8 [count + 1, 84, 84]. Raises EOFError where they end."""
    frames = np.empty((count + 1, *FRAME), np.uint8)
    view, position = frames[:count].data.cast("B"), 0
    while position < len(view):
        read = stream.readinto(view[position : position + 2**24])
        if not read:
            raise EOFError("it ends there")
        position += read
    frames[count] = frames[count - 1]
    return frames


def checkpoint_episodes(files: list[Path], subset: Subset) -> Generator[Episode]:
    """The episodes of Dopamine's replay buffers; files: those of the observations. Raises InputError for damaged ones.

    Every episode starts with three blank rows, which are dropped. A terminal row ends it; there is no observation after
    it, so its own is repeated. The buffer's edges cut an episode, and so does the place where the buffer was written
    (add_count): the rows after that are of an earlier lap. DQN Replay's buffers were saved one row before a lap's end
    (batch_rl's logged_replay_buffer.py), which makes their last row such a rest; on its own it holds no step.
    """
    for file in files:
        names = ("$store$_action", "$store$_reward", "$store$_terminal")
        action, reward, terminal = (read_column(checkpoint_file(file, name)) for name in names)
        rows, added = len(action), checkpoint_file(file, "add_count")
        count = int(read_column(added)) if added.exists() else rows
        ends = {*(np.flatnonzero(terminal) + 1).tolist(), min(count, rows), count % rows if rows else 0}
        start = 0
        try:
            with gzip.open(file) as stream:
                header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, fortran_order, dtype = header[np.lib.format.read_magic(stream)[0]](stream)
                fits = len(reward) == len(terminal) == rows and (shape, dtype) == ((rows, *FRAME), np.uint8)
                if not fits or fortran_order:
                    raise InputError(f"{file} holds {dtype} {shape}, not {rows} frames uint8 84x84 for as many actions")
                for end in sorted(end for end in ends if 0 < end <= min(count, rows)):
                    if end - start > LONGEST:
                        raise InputError(f"{file}: the episode from row {start} has more than {LONGEST} steps")
                    frames, ended = read_frames(stream, end - start), bool(terminal[end - 1])
                    blank = 0
                    while start + blank < end and blank < 3 and not (frames[blank].any() or action[start + blank]):
                        blank += 1
                    steps = slice(start + blank, end if ended else end - 1)
                    if steps.start < steps.stop and subset.take():
                        observation = frames[blank:] if ended else frames[blank:-1]
                        yield Episode(f"{file}, row {start}", observation, action[steps], reward[steps], ended)
                        if subset.full:
                            return
                    start = end
                while stream.read(2**20):  # up to the checksum
                    pass
        except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
            raise InputError(f"{file} is damaged or cut short in the episode from row {start}: {error}") from None


def open_dqn_replay(files: list[Path], subset: Subset) -> Source:
    """The checkpoints of one run of DQN Replay: Dopamine's replay buffer, gzipped NumPy arrays."""
    terminals = [read_column(checkpoint_file(file, "$store$_terminal")) for file in files]
    steps = sum(map(len, terminals))
    length = steps / max(1, sum(map(np.count_nonzero, terminals)))
    meta = {"source": "DQN Replay, recorded while a DQN learns", "sticky_actions": 0.25}
    return Source(checkpoint_episodes(files, subset), steps, length, meta)


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


def open_minari(files: list[Path], subset: Subset) -> Source:
    """A Minari dataset of discrete actions. Frames are 84x84, single or stacked; other observations become float32."""
    minari, folder = import_minari(), files[0].parent
    try:
        dataset = minari.MinariDataset(folder)
        shape, dtype = dataset.observation_space.shape, dataset.observation_space.dtype
        actions, start = int(dataset.action_space.n), int(dataset.action_space.start)
        steps, episodes = dataset.total_steps + dataset.total_episodes, dataset.total_episodes
    except (OSError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise InputError(f"{folder} is damaged, or no Minari dataset of arrays and discrete actions: {error}") from None
    frames = shape[-2:] == FRAME or shape[:2] == FRAME
    if start != 0 or (dtype == np.uint8) != frames or len(shape) > 3:
        raise InputError(f"{folder} holds {dtype} {shape} and actions from {start}, not 84x84 frames or vectors, from 0")

    def read() -> Generator[Episode]:
        index = 0
        try:
            for index in range(episodes):
                if subset.take():
                    (episode,) = dataset.iterate_episodes([index])
                    observation = episode.observations
                    if not frames:
                        observation = observation.astype(np.float32)
                    elif shape[-2:] == FRAME:
                        observation = observation.reshape(-1, *shape[:-2], *FRAME)
                        observation = observation[:, -1] if len(shape) == 3 else observation
                    else:
                        observation = observation[..., -1]
                    terminal = bool(episode.terminations[-1])
                    yield Episode(f"{files[0]}, episode {index}", observation, episode.actions, episode.rewards, terminal)
                if subset.full:
                    return
        except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"{files[0]} is damaged or cut short at episode {index}: {error}") from None

    meta = {"source": f"Minari, {dataset.id}"}
    return Source(read(), steps, steps / max(1, episodes), meta, FRAME if frames else shape, actions)


# Converting


def decode(images: list[bytes], frames: NDArray, where: str, first: int) -> None:
    """PNG images into uint8 frames [len(images), 84, 84]. Raises InputError for others; first: the first one's step."""
    import cv2

    for i, image in enumerate(images):
        frame = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED) if image else None
        if frame is None or frame.shape != FRAME or frame.dtype != np.uint8:
            found = "no image" if frame is None else f"{frame.dtype} {frame.shape}"
            raise InputError(f"{where}, step {first + i}: the observation is {found}, not a gray image of 84x84")
        frames[i] = frame


def decoded(episodes: Iterator[Episode]) -> Generator[Episode]:
    """The episodes in order, with their PNG images decoded on all cores; about IN_FLIGHT frames are under way.

    Threads do it, since OpenCV decodes outside Python's lock and processes would have to copy the frames.
    """
    try:
        import cv2  # noqa: F401
    except ImportError:
        raise InputError("reading PNG images needs one more package: pip install -e '.[formats]'") from None
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    waiting: deque[tuple[Episode, list[Future[None]]]] = deque()
    under_way = 0
    try:
        while True:
            episode = next(episodes, None)
            if episode is not None:
                images, length = episode.observation, len(episode.observation)
                frames = np.empty((length, *FRAME), np.uint8)
                chunks = [slice(start, start + CHUNK) for start in range(0, length, CHUNK)]
                jobs = [pool.submit(decode, images[chunk], frames[chunk], episode.where, chunk.start) for chunk in chunks]
                waiting.append((episode._replace(observation=frames), jobs))
                under_way += length
            while waiting and (under_way > IN_FLIGHT or episode is None):
                ready, jobs = waiting.popleft()
                for job in jobs:
                    job.result()
                under_way -= len(ready.observation)
                yield ready
            if episode is None:
                return
    finally:
        pool.shutdown(cancel_futures=True)


def convert(args: Args) -> Path:
    """Downloads if need be, converts, with progress on stderr and a summary on stdout, and returns the new folder.

    Raises InputError for damaged or missing files, data of another game, and a full disk; then nothing is left behind
    but what was downloaded.
    """
    subset, shards = Subset(args.percentage, args.max_episodes), parse_shards(args.shards)
    out = args.out or default_folder(args.env_id)
    if out.exists():
        raise InputError(f"{out} exists already; remove it or name another folder")
    if args.source:
        name, files = find_source(args, shards)
    else:
        num_actions(args.env_id)
        name, files = "rl_unplugged", download(args, shards, out, subset)
    source = OPEN[name](files, subset)
    benchmark, actions = "minari", source.num_actions
    if source.shape == FRAME:
        benchmark, actions = "atari", num_actions(args.env_id)
        check_name(files[0], args.env_id)
    if source.num_actions not in (0, actions):
        raise InputError(f"{files[0]} has {source.num_actions} actions, but {args.env_id} has {actions}")
    meta = {"benchmark": benchmark, "env_id": args.env_id, "num_actions": actions, **source.meta}
    meta |= {"files": [file.name for file in files], "percentage": args.percentage, "max_episodes": args.max_episodes}
    steps = subset.steps(source.steps, source.length)
    width = int(np.prod(source.shape)) * (1 if source.shape == FRAME else 4) + SCALARS
    print(check_disk(out, steps * width, LESS))
    episodes = decoded(source.episodes) if name in ("rl_unplugged", "tfds") else source.episodes
    bar = tqdm(total=round(steps), unit="step", unit_scale=True, desc=f"converting {name}")
    with bar, closing(episodes), write_dataset(out, **meta) as writer:
        for episode in episodes:
            if not len(episode.action):
                continue
            if episode.action.min() < 0 or episode.action.max() >= actions:
                action = episode.action.min() if episode.action.min() < 0 else episode.action.max()
                raise InputError(f"{episode.where}: {args.env_id} has actions 0 to {actions - 1}, but here is {action}")
            try:
                writer.add_episode(episode.observation, episode.action, episode.reward, episode.terminal)
            except InputError as error:
                raise InputError(f"{episode.where}: {error}") from None
            bar.update(len(episode.action) + 1)
        if not writer.returns:
            raise InputError(f"none of the {subset.seen} episodes is left, or none of them has a step")
    print(writer.summary(out))
    return out


OPEN = {"rl_unplugged": open_rl_unplugged, "tfds": open_tfds, "dqn_replay": open_dqn_replay, "minari": open_minari}


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
        storage.update_metadata({"dataset_id": name, "minari_version": minari.__version__})
        storage.update_metadata({"description": f"{data.meta['env_id']}: {data.meta.get('source', '')}"})
        storage.update_episodes(buffers())
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{target}: {data.meta['episodes']} episodes, {data.meta['steps'] - data.meta['episodes']} steps with actions")
    return target


def main(args: Args) -> int:
    if args.export_minari is None:
        convert(args)
    elif len(args.source) > 1:
        raise InputError("--export-minari takes one folder as --source")
    else:
        export_minari(args.source[0] if args.source else default_folder(args.env_id), args.export_minari)
    return 0


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    run_program(lambda: main(args))
