"""DQN Replay (Agarwal et al. 2020, arXiv 1907.04543): the replay buffers that Dopamine saved, gzipped NumPy arrays."""

import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.dataset import InputError
from data.source import FRAME, LONGEST, Episode, Source

OBSERVATIONS = re.compile(r"\$store\$_observation_ckpt\.(?P<shard>\d+)\.gz")


def beside(observations: Path, name: str) -> Path:
    """The file of another column of the same checkpoint."""
    return observations.with_name(observations.name.replace("$store$_observation", name))


def read_column(path: Path) -> NDArray:
    """A gzipped .npy file. Raises InputError if it is missing or damaged."""
    try:
        return np.load(io.BytesIO(gzip.decompress(path.read_bytes())), allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is damaged or cut short: {error}") from None


def read_episodes(files: list[Path]) -> Iterator[Episode]:
    """The episodes of the checkpoints, in order; memory holds one at a time. Raises InputError for damaged files.

    Every episode starts with three blank rows, which are dropped. A terminal row ends it; there is no observation after
    it, so its own is repeated. The buffer's edges cut an episode, and so does the place where the buffer was written
    (add_count): the rows after that are of an earlier lap. DQN Replay's buffers were saved one row before a lap's end
    (batch_rl's logged_replay_buffer.py), which makes their last row such a rest; on its own it holds no step.
    """
    for file in files:
        names = ("$store$_action", "$store$_reward", "$store$_terminal")
        action, reward, terminal = (read_column(beside(file, name)) for name in names)
        rows, added = len(action), beside(file, "add_count")
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
                        yield Episode(f"{file}, row {start}", observation, action[steps], reward[steps], ended)
                    start = end
                while stream.read(2**20):  # up to the checksum
                    pass
        except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
            raise InputError(f"{file} is damaged or cut short in the episode from row {start}: {error}") from None


def open_checkpoints(files: list[Path]) -> Source:
    """The checkpoints of one run; files: those of the observations."""
    terminals = [read_column(beside(file, "$store$_terminal")) for file in files]
    steps = sum(map(len, terminals))
    length = steps / max(1, sum(map(np.count_nonzero, terminals)))
    meta = {"source": "DQN Replay, recorded while a DQN learns", "sticky_actions": 0.25}
    return Source(read_episodes(files), iter, steps, length, meta)
