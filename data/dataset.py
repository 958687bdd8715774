"""The one dataset format that the scripts train from, which data/README.md describes: it is written, opened and made from
other formats here. A dataset is a folder of NumPy files, steps in time order.
"""

import errno
import fcntl
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from tqdm import tqdm

FORMAT_VERSION = 1
DTYPES = {"action": np.int32, "reward": np.float32, "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_}
FIELDS = ("observation", *DTYPES)
FRAME = (84, 84)  # of Atari
STEP_BYTES = math.prod(FRAME) + 11  # of Atari: a frame; action, reward and flags
AHEAD = 4  # episodes of another format that are read while one is written


class InputError(Exception):
    """Something that the person at the keyboard can put right, in one sentence: programs print it and exit with 2."""


class Dataset(NamedTuple):
    """N steps in time order; the arrays are memory-mapped."""

    observation: NDArray  # [N, ...] float32, or uint8 [N, 84, 84]
    action: NDArray  # [N] int32
    reward: NDArray  # [N] float32
    is_first: NDArray  # [N] bool
    is_last: NDArray  # [N] bool
    is_terminal: NDArray  # [N] bool, ends where the value is 0; other ends are truncated
    meta: dict[str, Any]
    path: Path  # its folder


# ------------------------------------------------------------------------------------------------------------- Writing


def as_numbers(name: str, values: ArrayLike) -> NDArray:
    """An array [L, ...] of integers or floats; observations may be booleans. Raises InputError for anything else."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        raise InputError(f"{name} have no common shape, or are no numbers") from None
    array = array.astype(np.float32) if array.dtype == bool and name == "observations" else array
    if array.dtype.kind not in "iuf" or array.ndim == 0:
        raise InputError(f"{name} must be an array of numbers, one row a step, not {array.dtype} {array.shape}")
    return array


def cast(name: str, values: NDArray, dtype: DTypeLike) -> NDArray:
    """The numbers as float32, rounded, or as uint8. Raises InputError where they do not fit."""
    with np.errstate(over="ignore", invalid="ignore"):
        new = values.astype(dtype, copy=False)
    if (new != values if new.dtype == np.uint8 else ~np.isfinite(new)).any():
        raise InputError(f"{name} are {values.dtype}, and do not fit into {new.dtype}, or are not finite")
    return new


def summarize(returns: Sequence[float]) -> dict[str, float]:
    """How many episodes there are, and their returns: mean, range, and the means of the first and of the last tenth."""
    if not returns:
        return {"episodes": 0}
    tenth = max(1, len(returns) // 10)
    first, last = float(np.mean(returns[:tenth])), float(np.mean(returns[-tenth:]))
    summary = {"episodes": len(returns), "mean": float(np.mean(returns)), "min": min(returns), "max": max(returns)}
    return summary | {"mean_first_tenth": first, "mean_last_tenth": last}


def describe(returns: Sequence[float]) -> str:
    """The same in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in summarize(returns).items())


class DatasetWriter:
    """Appends episodes to a folder that write_dataset made; memory holds one episode at a time."""

    def __init__(self, folder: Path, meta: dict[str, Any]):
        self.returns: list[float] = []
        self.steps = 0
        self.meta = meta  # meta.json is made of it at the end
        self._num_actions = meta["num_actions"]
        self._frames = meta.get("benchmark") == "atari"  # whether the observations must be Atari's
        self._files = {field: (folder / f"{field}.npy").open("wb") for field in FIELDS}
        self._observation_type: tuple[np.dtype, tuple[int, ...]] | None = None

    def add_episode(self, observation: ArrayLike, action: ArrayLike, reward: ArrayLike, terminal: bool) -> None:
        """Appends one episode of L + 1 observations [L + 1, ...], L >= 1 actions [L] and L rewards [L].

        Observations other than frames, uint8 [L + 1, 84, 84], and rewards become float32. Actions are integers.
        terminal: whether the value after the last observation is 0 (otherwise the episode is truncated).
        Raises InputError, and adds nothing, where the lengths do not fit each other or the observations those of earlier
        episodes, where an action is out of range or no integer, where a number is not finite in float32, and for arrays of
        anything but numbers.
        """
        observation, action = as_numbers("observations", observation), as_numbers("actions", action)
        reward, length, end = as_numbers("rewards", reward), len(action), np.asarray(terminal)
        if length < 1 or len(observation) != length + 1 or len(reward) != length:
            flat = "; data/README.md says what to do with logs that have none after the last action"
            raise InputError(
                f"an episode needs one observation more than actions and rewards, but it has {len(observation)}, {length} "
                f"and {len(reward)}{flat if len(observation) == length else ''}"
            )
        for name, array in (("actions", action), ("rewards", reward)):
            if array.ndim != 1:
                raise InputError(f"{name} are one number a step, not an array {array.shape}")
        if action.dtype.kind == "f":
            raise InputError(f"actions are integers, not {action.dtype}")
        if np.min(action) < 0 or np.max(action) >= self._num_actions:
            wrong = np.min(action) if np.min(action) < 0 else np.max(action)
            raise InputError(f"actions are from 0 to {self._num_actions - 1}, but here is {wrong}")
        if end.shape or end.dtype.kind not in "biu" or end not in (0, 1):
            raise InputError(f"terminal is True or False, not {end.dtype} {end.shape or end}")
        shape = observation.shape[1:]
        if not shape or 0 in shape or (self._frames and shape != FRAME):
            wanted = "Atari's are single frames of 84x84" if self._frames else "they are arrays of one axis or more"
            raise InputError(f"an observation has the shape {shape}, but {wanted}")
        is_frames = self._frames or (observation.dtype == np.uint8 and shape == FRAME)
        observation = cast("observations", observation, np.uint8 if is_frames else np.float32)
        reward = cast("rewards", reward, np.float32)
        observation_type = (observation.dtype, shape)
        if self._observation_type is None:
            self._observation_type = observation_type
            for field in FIELDS:
                self._write_header(field)
        if observation_type != self._observation_type:
            raise InputError(f"observations change from {self._observation_type} to {observation_type}")
        steps = {
            "observation": observation,
            "action": np.append(action, 0),
            "reward": np.append(reward, 0),
            "is_first": np.arange(length + 1) == 0,
            "is_last": np.arange(length + 1) == length,
            "is_terminal": (np.arange(length + 1) == length) & bool(end),
        }
        for field, values in steps.items():
            self._files[field].write(np.ascontiguousarray(values, dtype=DTYPES.get(field)).data)
        self.returns.append(float(np.sum(reward, dtype=np.float64)))
        self.steps += length + 1

    def _write_header(self, field: str) -> None:
        """Writes the .npy header; its size is the same for any number of steps, so that finish can write it again."""
        assert self._observation_type is not None
        dtype, shape = self._observation_type if field == "observation" else (np.dtype(DTYPES[field]), ())
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.steps, *shape)}
        np.lib.format.write_array_header_1_0(self._files[field], header)

    def finish(self) -> dict[str, Any]:
        """Writes the true lengths, forces every file to disk, and returns what meta.json says of them.

        Raises InputError if there is no episode.
        """
        if self._observation_type is None:
            raise InputError("there is no episode to write, or none with a step")
        for field, file in self._files.items():
            file.seek(0)
            self._write_header(field)
            file.flush()
            os.fsync(file.fileno())
        returns = summarize(self.returns)
        found = {"observation_shape": list(self._observation_type[1]), "steps": self.steps}
        return found | {"episodes": returns.pop("episodes"), **{f"return_{name}": value for name, value in returns.items()}}

    def summary(self, path: Path) -> str:
        """One line on what was written."""
        return f"{path}: {self.steps} steps; returns: {describe(self.returns)}"

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # the disk is full: that error is under way already
                file.close()


@contextmanager
def locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Holds the advisory lock of a folder; the system drops it when the program ends, however it ends.

    A file system may have no such locks (NFS): then only flags LOCK_NB, which must know, raises its OSError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        except OSError:
            if flags & fcntl.LOCK_NB:
                raise
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Removes what killed programs left of the dataset folder `path`."""
    with suppress(FileNotFoundError), locked(path.parent):
        for leftover in path.parent.glob(f".{path.name}.partial-*"):
            # It blocks: a living program writes there. Not found: that program has just finished. No locks: who knows.
            with suppress(OSError), locked(leftover, fcntl.LOCK_NB):
                shutil.rmtree(leftover)


@contextmanager
def write_dataset(path: Path | str, *, env_id: str, num_actions: int, **meta: Any) -> Iterator[DatasetWriter]:
    """Makes the dataset folder `path`, whole when the block ends, or not at all.

    The files are written beside `path` and renamed at the end. What a killed program left there is removed first.
    meta: more of meta.json, see data/README.md; what is None is left out. steps, episodes, returns and observation_shape
    are added. Raises InputError at once if `path` exists, or if meta is no JSON or of no use to the programs; at the end
    if nothing was added, or if `path` has appeared meanwhile.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise InputError(f"{path} exists already; remove it or name another folder")
    meta = {"env_id": env_id, "num_actions": num_actions, **meta, "format_version": FORMAT_VERSION}
    meta = {name: value for name, value in meta.items() if value is not None}
    try:
        meta = json.loads(json.dumps(meta, default=lambda value: value.tolist(), allow_nan=False))  # of NumPy's too
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not written: its meta.json cannot be: {error}") from None
    references = meta.get("reference_returns", {"random": 0, "online_dqn": 1})
    try:
        scale = references["online_dqn"] - references["random"]
    except (TypeError, KeyError):
        scale = 0
    for wrong, fault in (
        (not isinstance(meta.get("env_id"), str), "env_id is a name"),
        (not isinstance(actions := meta.get("num_actions"), int) or actions < 1, "num_actions is an integer from 1 on"),
        (not isinstance(meta.get("noise", 0.0), int | float), "noise is a number"),
        (scale == 0, "reference_returns are two numbers: random and, unlike it, online_dqn"),
    ):
        if wrong:
            raise InputError(f"{path} is not written: {fault}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with ExitStack() as stack:
        with locked(path.parent):
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent.absolute()))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(locked(folder))
        writer = stack.enter_context(closing(DatasetWriter(folder, meta)))
        yield writer
        found = writer.finish()
        (folder / "meta.json").write_text(json.dumps(writer.meta | found, indent=2) + "\n")
        folder.chmod(0o755)
        try:
            folder.rename(folder.with_name(path.name))
        except OSError as error:
            raise InputError(f"{path} could not be put in its place, or appeared meanwhile: {error.strerror}") from error


# --------------------------------------------------------------------------------------------------------------- Reading


def open_dataset(path: Path) -> Dataset:
    """Opens a dataset folder, memory-mapped. What its steps hold is checked where they are used, by the training scripts.

    Raises InputError, naming the file, where one is missing, cut short, or of another type or length than the format's.
    """
    path, arrays = Path(path), {}
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text())
        for field in FIELDS:
            file = path / f"{field}.npy"
            x = arrays[field] = np.load(file, mmap_mode="r")
            dtypes = (DTYPES[field],) if field in DTYPES else (np.float32, np.uint8)
            if x.dtype not in dtypes or not 0 < len(x) == meta["steps"] or (field in DTYPES) != (x.ndim == 1):
                raise ValueError(f"it holds {x.dtype} {x.shape}, and meta.json says {meta['steps']} steps")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise InputError(f"{file} is missing, damaged or cut short: {error!r}") from None
    return Dataset(**arrays, meta=meta, path=path)


# ------------------------------------------------------------------------------------------------------------ Converting


class Episode(NamedTuple):
    where: str  # file and record
    observation: NDArray  # [L + 1, 84, 84] uint8 or [L + 1, ...] float32
    action: NDArray  # [L]
    reward: NDArray  # [L]
    terminal: bool


class Source(NamedTuple):
    """A dataset of another format."""

    episodes: Iterable[Callable[[], Episode]]  # in order of time; a call may be made in a thread, or left out
    steps: float  # about how many there are
    meta: dict[str, Any]  # for meta.json
    shape: tuple[int, ...] = FRAME  # of an observation
    finish: Callable[[], None] = lambda: None  # called when the last episode is written


def optional(*names: str) -> list[Any]:
    """Imports packages of the extra `formats`. Raises InputError if one is not installed."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        missing = "reading other formats of datasets needs more packages: python -m pip install -e '.[formats]'"
        raise InputError(f"{missing} ({error})") from None


def check_disk(folder: Path, need: float, hint: str) -> None:
    """Prints what is needed and free; raises InputError, ending in `hint`, if `need` bytes do not fit into `folder`."""
    remove_leftovers(folder)  # they take room
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    sizes = f"about {need / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there"
    if need > free:
        raise InputError(f"{folder} needs {sizes}: {hint}")
    print(f"{folder} needs {sizes}")


def subset(items: Iterable[Any], percentage: float) -> Iterator[Any]:
    """A percentage of the items, evenly spaced."""
    edges = (int(i * percentage / 100) for i in itertools.count())
    return (item for item, (before, after) in zip(items, itertools.pairwise(edges), strict=False) if after > before)


def read_ahead(episodes: Iterable[Callable[[], Episode]]) -> Iterator[Episode]:
    """Makes the calls in threads, and yields what they return, in order."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future[Episode]] = deque()
        for episode in episodes:
            waiting.append(pool.submit(episode))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def convert_source(source: Source, out: Path, percentage: float = 100.0) -> Path:
    """Makes a dataset of a part of the episodes, with progress on stderr and a summary on stdout, and returns its folder.

    Raises InputError, naming the place, for an episode that does not fit, and if none is left or the disk is too small.
    """
    steps = source.steps * percentage / 100
    step_bytes = STEP_BYTES if source.shape == FRAME else 4 * math.prod(source.shape) + 11
    check_disk(out, steps * step_bytes, "take less of the data, or name another --out")
    bar = tqdm(total=round(steps), unit="step", unit_scale=True, desc=f"converting {source.meta['env_id']}")
    with bar, write_dataset(out, **source.meta) as writer:
        for where, observation, action, reward, terminal in read_ahead(subset(source.episodes, percentage)):
            if len(action) == 0:
                continue
            try:
                writer.add_episode(observation, action, reward, terminal)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            bar.update(len(observation))
    print(writer.summary(out))
    source.finish()
    return out


# -------------------------------------------------------------------------------------------------------------- Programs


def record_default(folder: Path, program: Callable[[], object]) -> None:
    """Records a script's default dataset; what its user can put right becomes one sentence and exit code 2."""
    try:
        program()
    except InputError as error:
        if not folder.exists():  # else another program has recorded it meanwhile
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def run_program(program: Callable[[], object]) -> None:
    """Runs a program to its end; what its user can put right becomes one sentence and exit code 2.

    Ctrl-C and SIGTERM end it with 128 + signal, after what is half written has been removed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        program()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}", file=sys.stderr)  # of a file: no right, no folder, a read-only file system
        sys.exit(2)
