"""The one dataset format that the scripts train from: a folder of NumPy files, steps in time order.

    observation.npy   float32 [N, ...] or uint8 [N, 84, 84]
    action.npy        int32 [N]
    reward.npy        float32 [N]
    is_first.npy  is_last.npy  is_terminal.npy      bool [N]
    meta.json         format version, environment, number of actions, where the steps come from, their count and returns

RLDS convention: action[t] and reward[t] follow observation[t]; an episode's last step has only an observation, and its
action and reward are 0. is_terminal marks the ends where the value is 0, as opposed to episodes that were cut off.
"""

import errno
import fcntl
import json
import operator
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

FORMAT_VERSION = 1
DTYPES = {"action": np.int32, "reward": np.float32, "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_}
FIELDS = ("observation", *DTYPES)
FRAME = (84, 84)  # of Atari


class InputError(Exception):
    """Something that the person at the keyboard can put right, in one sentence: programs print it and exit with 2."""


class Dataset(NamedTuple):
    """N steps in time order; the arrays are memory-mapped."""

    observation: NDArray  # [N, ...] float32 or uint8
    action: NDArray  # [N] int32
    reward: NDArray  # [N] float32
    is_first: NDArray  # [N] bool
    is_last: NDArray  # [N] bool
    is_terminal: NDArray  # [N] bool
    meta: dict[str, Any]
    path: Path  # its folder


def meta_fault(meta: dict[str, Any]) -> str | None:
    """What the programs cannot use in a meta.json, if anything."""
    references = meta.get("reference_returns") or {"random": 0, "online_dqn": 1}
    try:
        scale = references["online_dqn"] - references["random"]
    except (TypeError, KeyError):
        scale = 0
    for wrong, fault in (
        (not isinstance(meta.get("env_id"), str), "meta.json names no env_id"),
        (not isinstance(meta.get("noise", 0.0), int | float), f"its noise is {meta.get('noise')!r}, which is no number"),
        (scale == 0, f"its reference_returns are {references!r}, not two numbers: random and, unlike it, online_dqn"),
    ):
        if wrong:
            return fault
    return None


# ------------------------------------------------------------------------------------------------------------- Writing


def as_json(name: str, value: Any) -> Any:
    """An entry of meta.json as it is read again; NumPy's become Python's. Raises InputError for what JSON cannot hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        raise TypeError(f"JSON has no {type(value).__name__}")

    try:
        return json.loads(json.dumps(value, default=plain, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"meta.json cannot hold {name}: {error}") from None


def as_numbers(name: str, values: ArrayLike) -> NDArray:
    """An array [L, ...] of integers or floats. Raises InputError for anything else."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        raise InputError(f"{name} have no common shape, or are no numbers") from None
    if array.dtype.kind not in "iuf" or array.ndim == 0:
        raise InputError(f"{name} must be an array of numbers, one row a step, not {array.dtype} {array.shape}")
    return array


def cast(name: str, values: NDArray, dtype: DTypeLike) -> NDArray:
    """The numbers as float32, rounded if they are floats, or as uint8. Raises InputError where they do not fit."""
    with np.errstate(over="ignore", invalid="ignore"):
        new = values.astype(dtype, copy=False)
        exact = new.dtype == values.dtype or values.dtype.kind == "f" or (new.astype(values.dtype) == values).all()
    if not exact or (values.dtype.kind == "f" and new.dtype.kind != "f"):
        raise InputError(f"{name} are {values.dtype}, and cannot be stored as {new.dtype} without loss")
    if new.dtype.kind == "f" and not np.isfinite(new).all():
        raise InputError(f"{name} are not finite, or beyond the range of {new.dtype}")
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

    def __init__(self, folder: Path, num_actions: int, frames: bool):
        self.returns: list[float] = []
        self.steps = 0
        self.meta: dict[str, Any] = {}  # for meta.json too, if known only at the end; never refused
        self._num_actions = num_actions
        self._frames = frames  # whether the observations must be Atari's
        self._files = {field: (folder / f"{field}.npy").open("wb") for field in FIELDS}
        self._observation_type: tuple[np.dtype, tuple[int, ...]] | None = None

    def add_episode(self, observation: ArrayLike, action: ArrayLike, reward: ArrayLike, terminal: bool) -> None:
        """Appends one episode of L + 1 observations [L + 1, ...], L >= 1 actions [L] and L rewards [L].

        Observations other than frames, uint8 [L + 1, 84, 84], and rewards become float32. Actions are integers.
        terminal: whether the value after the last observation is 0 (otherwise the episode was cut off).
        Raises InputError, and adds nothing, where the lengths do not fit each other or the observations those of earlier
        episodes, where an action is out of range or no integer, where a number is not finite in float32, an integer not
        exact in it, and for arrays of anything but numbers.
        """
        observation, action = as_numbers("observations", observation), as_numbers("actions", action)
        reward, length, end = as_numbers("rewards", reward), len(action), np.asarray(terminal)
        if length < 1 or len(observation) != length + 1 or len(reward) != length:
            raise InputError(
                f"an episode needs one observation more than actions and rewards, "
                f"but it has {len(observation)}, {length} and {len(reward)}"
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
            raise InputError("there is no episode to write")
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
            file.close()


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
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


@contextmanager
def write_dataset(path: Path | str, *, env_id: str, num_actions: int, **meta: Any) -> Iterator[DatasetWriter]:
    """Makes the dataset folder `path`, whole when the block ends, or not at all.

    The files are written beside `path` and renamed at the end. What a killed program left there is removed first.
    meta: benchmark, reference_returns where they are known, {"random": ..., "online_dqn": ...}, and whatever tells where
    the steps come from; what is None is left out. steps, episodes, returns and observation_shape are added. Raises
    InputError at once if `path` exists or cannot be made, if num_actions is no count or meta no JSON or of no use to the
    programs; later if nothing was added or the disk is full.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise InputError(f"{path} exists already; remove it or name another folder")
    try:
        actions = operator.index(num_actions)
    except TypeError:
        actions = 0
    if not 1 <= actions <= 2**31:
        raise InputError(f"num_actions is an integer of at least 1, not {num_actions!r:.60}")
    meta = {"format_version": FORMAT_VERSION, "env_id": env_id, "num_actions": actions, **meta}
    meta = {name: as_json(name, value) for name, value in meta.items() if value is not None}
    meta["format_version"] = FORMAT_VERSION
    if fault := meta_fault(meta):
        raise InputError(f"{path} is not written: {fault}")
    prefix = f".{path.name}.partial-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            for leftover in path.parent.glob(f"{prefix}*"):
                # It blocks: a living program writes there. Not found: that program has just finished. No locks: who knows.
                with suppress(OSError), _locked(leftover, fcntl.LOCK_NB):
                    shutil.rmtree(leftover)
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent.absolute()))
            lock = ExitStack()
            lock.enter_context(_locked(folder))
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.filename}: {error.strerror}") from None
    writer = DatasetWriter(folder, actions, frames=meta.get("benchmark") == "atari")
    try:
        yield writer
        found, late = writer.finish(), {}
        for name, value in writer.meta.items():  # too late to refuse anything
            try:
                value = as_json(name, value)
            except InputError:
                value = repr(value)
            if value is not None and name != "benchmark" and meta_fault({**meta, name: value}) is None:
                late[name] = value
        (folder / "meta.json").write_text(json.dumps(meta | late | meta | found, indent=2) + "\n")
        folder.chmod(0o755)
        folder.rename(folder.with_name(path.name))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk is full: {path} needs more than is free there") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise InputError(f"{path} appeared while this program was writing it; it was left as it is") from error
        raise
    finally:
        with suppress(OSError):  # a full disk again: the error is under way already
            writer.close()
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- Reading


def open_dataset(path: Path) -> Dataset:
    """Opens a dataset folder, memory-mapped, and checks lengths, dtypes, ranges and flags.

    Raises InputError, naming the file, where something is missing, damaged or does not fit the format.
    """
    path, arrays = Path(path), {}
    if not path.is_dir():
        raise InputError(f"there is no dataset folder {path}")
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text())
        steps, episodes, num_actions = (operator.index(meta[name]) for name in ("steps", "episodes", "num_actions"))
        frames = (np.uint8,) if meta.get("benchmark") == "atari" else (np.float32, np.uint8)
        for field in FIELDS:
            file = path / f"{field}.npy"
            x = arrays[field] = np.load(file, mmap_mode="r")
            dtypes = (DTYPES[field],) if field in DTYPES else frames
            if x.dtype not in dtypes or not 0 < len(x) == steps or (field in DTYPES) != (x.ndim == 1):
                raise ValueError(f"it holds {x.dtype} {x.shape}, and meta.json says {steps} steps")
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is missing, damaged or cut short: {error!r}") from None
    data = Dataset(**arrays, meta=meta, path=path)
    is_first, is_last, shape = data.is_first, data.is_last, list(data.observation.shape[1:])
    floats = [data.reward] + ([data.observation] if data.observation.dtype == np.float32 else [])
    for wrong, fault in (
        (meta.get("format_version") != FORMAT_VERSION, f"its format version is not {FORMAT_VERSION}"),
        (meta_fault(meta) is not None, meta_fault(meta)),
        (meta.get("observation_shape", shape) != shape, f"observations are {shape}, and meta.json says otherwise"),
        (not is_first[0] or (is_first != np.roll(is_last, 1)).any(), "is_first and is_last do not mark whole episodes"),
        (is_first.sum() != episodes, f"is_first does not mark {episodes} episodes, as meta.json says"),
        ((data.is_terminal & ~is_last).any(), "is_terminal marks a step that is not an episode's last"),
        (data.action.min() < 0 or data.action.max() >= num_actions, f"an action is outside 0 to {num_actions - 1}"),
        (data.action[is_last].any() or data.reward[is_last].any(), "an episode's last step has an action or a reward"),
        (not all(np.isfinite(x).all() for x in floats), "a reward or an observation is not finite"),
    ):
        if wrong:
            raise InputError(f"{path} is damaged: {fault}")
    return data


# -------------------------------------------------------------------------------------------------------------- Programs


def on_disk(folder: Path) -> Path:
    """The innermost of a folder's parents that exists, or the folder itself."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_disk(folder: Path, need: float, hint: str) -> str:
    """One line on what is needed and what is free.

    Raises InputError, ending in `hint`, if `need` bytes do not fit into `folder`, which need not exist.
    """
    free = shutil.disk_usage(on_disk(folder)).free
    sizes = f"about {need / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there"
    if need > free:
        raise InputError(f"{folder} needs {sizes}: {hint}")
    return f"{folder} needs {sizes}"


def run_program(program: Callable[[], object]) -> None:
    """Runs a program to its end; what its user can put right becomes one sentence and exit code 2.

    Ctrl-C and SIGTERM end it with 128 + signal, after what is half written has been removed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        program()
        return
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except InputError as error:
        sentence = str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sentence = "the disk is full; what was whole before is still there"
        elif error.filename is not None:  # no right, no folder, a read-only file system
            sentence = f"{error.filename}: {error.strerror}"
        else:
            raise
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
