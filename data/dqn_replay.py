"""DQN Replay (Agarwal et al. 2020, arXiv 1907.04543): the replay buffers that Dopamine saved, gzipped NumPy arrays."""

import functools
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.dataset import FRAME, Episode, InputError, Source

OBSERVATIONS = re.compile(r"\$store\$_observation_ckpt\.(?P<shard>\d+)\.gz")

COLUMNS = {"action": np.int32, "reward": np.float32, "terminal": np.uint8}


def beside(observations: Path, name: str) -> Path:
    """The file of another column of the same checkpoint."""
    return observations.with_name(observations.name.replace("$store$_observation", name))


def read_array(path: Path) -> NDArray:
    """A gzipped .npy file. Raises InputError if it is missing or damaged."""
    try:
        return np.lib.format.read_array(io.BytesIO(gzip.decompress(path.read_bytes())), allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:
        raise InputError(f"{path} is damaged or cut short: {error}") from None


def read_column(observations: Path, name: str) -> NDArray:
    """A column [rows] of the checkpoint with these observations.

    Raises InputError if it is missing, damaged, without rows, or of another dtype.
    """
    path = beside(observations, f"$store$_{name}")
    column = read_array(path)
    if column.dtype != COLUMNS[name] or column.ndim != 1 or len(column) == 0:
        wanted = f"a column of {np.dtype(COLUMNS[name])} with a row or more"
        raise InputError(f"{path} holds {column.dtype} {column.shape}, not {wanted}")
    return column


def read_count(observations: Path, rows: int) -> int:
    """How many rows were ever added to the buffer (add_count), or `rows` if no file tells. Raises InputError for others."""
    path = beside(observations, "add_count")
    if not os.path.lexists(path):
        return rows
    count = read_array(path)
    if count.shape or count.dtype.kind not in "iu" or count < 1:
        raise InputError(f"{path} holds {count.dtype} {count.shape or count.item()!r}, not one number of rows, from 1 on")
    return int(count)


def read_episodes(files: list[Path]) -> Iterator[Callable[[], Episode]]:
    """The episodes of the checkpoints, in order. Raises InputError for damaged files.

    Every episode starts with three blank rows, which are dropped. A terminal row ends it; there is no observation after
    it, so its own is repeated. The buffer's edges truncate an episode, and so does the place where the buffer was written
    (add_count): the rows after that are of an earlier lap. DQN Replay's buffers were saved one row before a lap's end
    (batch_rl's logged_replay_buffer.py), which makes their last row such a rest; on its own it holds no step.
    """
    for file in files:
        action, reward, terminal = (read_column(file, name) for name in COLUMNS)
        rows = len(action)
        count = read_count(file, rows)
        ends = {*(np.flatnonzero(terminal) + 1).tolist(), min(count, rows), count % rows}
        start = 0
        try:
            with gzip.open(file) as stream:
                header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, fortran_order, dtype = header[np.lib.format.read_magic(stream)[0]](stream)
                fits = len(reward) == len(terminal) == rows and (shape, dtype) == ((rows, *FRAME), np.uint8)
                if not fits or fortran_order:
                    raise InputError(f"{file} holds {dtype} {shape}, not {rows} frames uint8 84x84 for as many actions")
                for end in sorted(end for end in ends if 0 < end <= min(count, rows)):
                    frames = np.frombuffer(stream.read((end - start) * math.prod(FRAME)), np.uint8).reshape(-1, *FRAME)
                    if len(frames) < end - start:
                        raise EOFError("it ends there")
                    blank = 0
                    while start + blank < end and blank < 3 and not (frames[blank].any() or action[start + blank]):
                        blank += 1
                    ended = bool(terminal[end - 1])
                    steps = slice(start + blank, end if ended else end - 1)
                    if steps.start < steps.stop:
                        observation = np.append(frames[blank:], frames[-1:], axis=0) if ended else frames[blank:]
                        where = f"{file}, row {start}"
                        yield functools.partial(Episode, where, observation, action[steps], reward[steps], ended)
                    start = end
                while stream.read(2**20):  # up to the checksum
                    pass
        except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
            raise InputError(f"{file} is damaged or cut short in the episode from row {start}: {error}") from None


def open_checkpoints(files: list[Path]) -> Source:
    """The checkpoints of one run; files: those of the observations. Raises InputError for damaged files."""
    steps = sum(len(read_column(file, "terminal")) for file in files)
    meta = {"source": "DQN Replay, recorded while a DQN learns", "sticky_actions": 0.25}
    return Source(read_episodes(files), steps, meta)
