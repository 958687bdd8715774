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
from numpy.typing import NDArray

FORMAT_VERSION = 1
DTYPES = {"action": np.int32, "reward": np.float32, "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_}
FIELDS = ("observation", *DTYPES)


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


# ------------------------------------------------------------------------------------------------------------- Writing


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

    def __init__(self, folder: Path, num_actions: int):
        self.returns: list[float] = []
        self.steps = 0
        self.meta: dict[str, Any] = {}  # what else meta.json has to say, if it is known only at the end
        self._num_actions = num_actions
        self._files = {field: (folder / f"{field}.npy").open("wb") for field in FIELDS}
        self._observation_type: tuple[np.dtype, tuple[int, ...]] | None = None

    def add_episode(self, observation: NDArray, action: NDArray, reward: NDArray, terminal: bool) -> None:
        """Appends one episode of L + 1 observations [L + 1, ...], L >= 1 actions [L] and L rewards [L].

        terminal: whether the value after the last observation is 0 (otherwise the episode was cut off).
        Raises InputError where the lengths do not fit each other or the observations those of earlier episodes, where an
        action is out of range, or a number not finite.
        """
        length = len(action)
        if length < 1 or len(observation) != length + 1 or len(reward) != length:
            raise InputError(
                f"an episode needs one observation more than actions and rewards, "
                f"but it has {len(observation)}, {length} and {len(reward)}"
            )
        if np.min(action) < 0 or np.max(action) >= self._num_actions:
            wrong = np.min(action) if np.min(action) < 0 else np.max(action)
            raise InputError(f"actions are from 0 to {self._num_actions - 1}, but here is {wrong}")
        if not np.isfinite(reward).all() or (observation.dtype == np.float32 and not np.isfinite(observation).all()):
            raise InputError("a reward or an observation is not finite")
        observation_type = (observation.dtype, observation.shape[1:])
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
            "is_terminal": (np.arange(length + 1) == length) & terminal,
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

    def finish(self) -> None:
        """Writes the true lengths and forces every file to disk. Raises InputError if there is no episode."""
        if self._observation_type is None:
            raise InputError("there is no episode to write")
        for field, file in self._files.items():
            file.seek(0)
            self._write_header(field)
            file.flush()
            os.fsync(file.fileno())
        returns = summarize(self.returns)
        self.meta |= {"observation_shape": list(self._observation_type[1]), "steps": self.steps}
        self.meta |= {"episodes": returns.pop("episodes"), **{f"return_{name}": value for name, value in returns.items()}}

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
def write_dataset(path: Path, *, env_id: str, num_actions: int, **meta: Any) -> Iterator[DatasetWriter]:
    """Makes the dataset folder `path`, whole when the block ends, or not at all.

    The files are written beside `path` and renamed at the end. What a killed program left there is removed first.
    meta: benchmark, reference_returns where they are known, {"random": ..., "online_dqn": ...}, and whatever tells where
    the steps come from; what is None is left out. steps, episodes, returns and observation_shape are added. Raises
    InputError if `path` exists, nothing was added, or the disk is full.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists already; remove it or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    with _locked(path.parent):
        for leftover in path.parent.glob(f"{prefix}*"):
            # It blocks: a living program writes there. It is not found: that program has just finished. No locks: who knows.
            with suppress(OSError), _locked(leftover, fcntl.LOCK_NB):
                shutil.rmtree(leftover)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        lock = ExitStack()
        lock.enter_context(_locked(folder))
    writer = DatasetWriter(folder, num_actions)
    try:
        yield writer
        writer.finish()
        meta = {"format_version": FORMAT_VERSION, "env_id": env_id, "num_actions": num_actions, **meta, **writer.meta}
        meta = {name: value for name, value in meta.items() if value is not None}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        folder.chmod(0o755)
        folder.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk is full: {path} needs more than is free there") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
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
            if x.dtype not in dtypes or not 0 < len(x) == steps or (field in DTYPES and x.ndim > 1):
                raise ValueError(f"it holds {x.dtype} {x.shape}, and meta.json says {steps} steps")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise InputError(f"{file} is missing, damaged or cut short: {error!r}") from None
    data = Dataset(**arrays, meta=meta, path=path)
    is_first, is_last, shape = data.is_first, data.is_last, list(data.observation.shape[1:])
    floats = [data.reward] + ([data.observation] if data.observation.dtype == np.float32 else [])
    for wrong, fault in (
        (meta.get("format_version") != FORMAT_VERSION, f"its format version is not {FORMAT_VERSION}"),
        (not isinstance(meta.get("env_id"), str), "meta.json names no env_id"),
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
        elif isinstance(error, PermissionError) and error.filename is not None:
            sentence = f"{error.filename}: {error.strerror}"
        else:
            raise
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
