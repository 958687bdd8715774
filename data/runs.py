"""The folder of a run: its settings, its metrics and its checkpoints, the same for all four scripts.

    args.json         every setting, the dataset's meta.json, versions of the packages, git commit, devices
    metrics.jsonl     one JSON object a line: {"step": ..., "train/total_loss": ..., ...}
    checkpoints/      Orbax; whole or absent, the last two are kept
    videos/           with --capture-video
"""

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax.experimental import multihost_utils
from tqdm import tqdm

from data.dataset import Dataset, InputError

ArgsT = TypeVar("ArgsT")
State = TypeVar("State")
Item = TypeVar("Item")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mctx", "numpy", "bsuite", "envpool", "gymnasium")
# Settings that --resume may change: to change any other would make another run of it.
CHANGEABLE = {
    *("total_steps", "resume", "run_dir", "data_dir", "checkpoint_interval", "eval_interval", "eval_episodes", "eval_envs"),
    *("eval_only", "log_interval", "track", "wandb_project", "wandb_entity", "updates_per_call", "cpu_devices"),
    *("data_place", "capture_video", "distributed"),
}


def flag(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def parse_args(args_type: type[ArgsT], script: Path, description: str | None, argv: list[str] | None = None) -> ArgsT:
    """Reads the command line; with --resume, what it does not name is as in the resumed run, and run_dir is its folder.

    Raises InputError for values that make no sense, if that is no run of this script, or if the command line names
    other settings than it was made with.
    """
    args: Any = tyro.cli(args_type, args=argv, description=description)
    check_args(args)
    if args.resume is None:
        for name, preset in getattr(args_type, "PRESETS", {}).items():  # a flag that changes several defaults at once
            if getattr(args, name):
                args = tyro.cli(args_type, args=argv, description=description, default=args_type(**{name: True}, **preset))
        check_args(args)
        return args
    try:
        run = json.loads((args.resume / "args.json").read_text())
        if run["script"] != script.stem:
            raise InputError(f"{args.resume} is a run of {run['script']}.py, not of {script.name}")
        saved = {field.name: run["args"][field.name] for field in dataclasses.fields(args_type)}  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{args.resume} is not the folder of a run that can be resumed: {error!r}") from None
    saved |= {"data_dir": saved["data_dir"] and Path(saved["data_dir"]), "resume": args.resume, "run_dir": args.resume}
    saved |= {"eval_only": False}
    args = tyro.cli(args_type, args=argv, description=description, default=args_type(**saved))
    if args.run_dir != args.resume:
        raise InputError("--resume goes on in the folder that it names: there is no --run-dir beside it")
    for name in sorted(saved.keys() - CHANGEABLE):
        if getattr(args, name) != saved[name]:
            raise InputError(f"the checkpoint was made with {flag(name)} {saved[name]}, not {getattr(args, name)}")
    check_args(args)
    return dataclasses.replace(args, run_dir=args.resume)


def check_args(args: Any) -> None:
    """Raises InputError for values that make no sense."""
    for name, value in dataclasses.asdict(args).items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        zero = name in ("cpu_devices", "seed", "noise", "warmup_steps", "dirichlet_fraction", "temperature")
        zero = zero or name.endswith(("_coef", "_scale", "weight_decay", "_blocks"))
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise InputError(f"{flag(name)} must be {'at least' if zero else 'above'} 0, not {value}")
        if name == "seed" and value >= 2**32:
            raise InputError(f"a seed is from 0 to {2**32 - 1}, not {value}")
        if name == "channels" and value < 2:
            raise InputError(f"--channels must be at least 2, not {value}")
        if name in ("data_fraction", "noise", "discount", "learning_rate_decay", "dirichlet_fraction") and value > 1:
            raise InputError(f"{flag(name)} must be at most 1, not {value}")
    if args.num_bins < 3:
        raise InputError(f"--num-bins must be at least 3, not {args.num_bins}")
    if args.distributed and args.run_dir is None and args.resume is None:
        raise InputError("--distributed needs --run-dir: all processes train in one folder")
    if args.eval_only and args.resume is None:
        raise InputError("--eval-only needs --resume RUN_DIR")


def has_checkpoint(run_dir: Path) -> bool:
    return any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))


_locks: dict[Path, IO[str]] = {}  # of the run folders that this program writes to, until it ends


def lock_run(run_dir: Path) -> None:
    """Raises InputError if another program writes to the folder. (On a file system without locks nobody is kept out.)"""
    if run_dir.resolve() not in _locks:
        file = (run_dir / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another program is training in {run_dir}") from None
        except OSError:
            pass
        _locks[run_dir.resolve()] = file


def open_run(args: Any, script: Path, dataset: Dataset) -> Path:
    """Makes the run's folder with its args.json, or returns that of a resumed run; nobody else can write to it then.

    Raises InputError if the folder exists and holds a checkpoint or something else than a run, if it cannot be made, if
    another program writes to it, or if a resumed run was trained on another dataset.
    """
    if args.resume is not None:
        if json.loads((args.resume / "args.json").read_text())["dataset"] != dataset.meta:
            raise InputError(f"the dataset is not the one that {args.resume} was trained on")
        if jax.process_index() == 0:
            lock_run(args.resume)
        return args.resume
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("the first process has made the folder")
        return args.run_dir
    name = f"{args.env_id}__{script.stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = args.run_dir or Path("runs") / name
    # A run that came to an end before its first checkpoint is begun anew.
    if run_dir.exists() and (has_checkpoint(run_dir) or not (run_dir / "args.json").exists()):
        raise InputError(f"{run_dir} exists already: name another --run-dir, or go on with it by --resume {run_dir}")
    commit = None
    with suppress(OSError):  # there may be no git
        git = subprocess.run(["git", "-C", script.parent, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # a benchmark's environments are not needed by the other
            versions[package] = importlib.metadata.version(package)
    settings = {
        "id": uuid.uuid4().hex[:8],
        "script": script.stem,
        "args": dataclasses.asdict(args) | {"data_dir": dataset.path.absolute()},
        "dataset": dataset.meta,
        "versions": {"python": sys.version.split()[0]} | versions,
        "git_commit": commit,
        "devices": [device.device_kind for device in jax.devices()],
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"the folder {run_dir} cannot be made: a file is in its way") from None
    lock_run(run_dir)
    (run_dir / "args.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the first process has made the folder")
    return run_dir


class Checkpoints:
    """The checkpoints of a run. save() returns when the checkpoint is whole; an error, a full disk say, is save()'s."""

    def __init__(self, run_dir: Path, read_only: bool = False):
        """read_only: leave the folder as it is; its run may be going on."""
        keep = {} if read_only else {"max_to_keep": 2, "cleanup_tmp_directories": True}
        options = ocp.CheckpointManagerOptions(**keep, read_only=read_only, enable_async_checkpointing=False)
        self._directory = run_dir / "checkpoints"
        self._manager = ocp.CheckpointManager(self._directory.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Raises InputError if the disk has no room for it."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if shutil.disk_usage(self._directory).free < 2 * size + 2**20:
            raise InputError(f"the disk is full: a checkpoint of {size / 2**20:.1f} MiB does not fit into {self._directory}")
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: State) -> State:
        """The last checkpoint, in the shapes and places of `like`. Raises InputError if there is none or it is damaged."""
        step = self._manager.latest_step()
        if step is None:
            raise InputError(f"{self._directory} holds no checkpoint")
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"the checkpoint {self._directory / str(step)} cannot be read: {reason}") from None

    def close(self) -> None:
        self._manager.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a killed program left unfinished; none if there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Log:
    """Appends to metrics.jsonl and, with --track, to Weights & Biases."""

    def __init__(self, run_dir: Path, step: int, args: Any):
        """Drops the lines after `step`: a killed run wrote them after its last checkpoint, and they come again.

        scored: the steps whose evaluations are there, and step 0. seconds: of compilation, updates and evaluations so far.
        """
        path, new = run_dir / "metrics.jsonl", run_dir / "metrics.jsonl.new"
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        self._file, self._tracker = None, None
        self.scored = {0} | {line["step"] for line in lines if "eval/return_mean" in line}
        self.seconds = {"compile": 0.0, "update": 0.0, "evaluation": 0.0}
        for line in lines:
            self.seconds |= {name: line[f"time/{name}"] for name in self.seconds if f"time/{name}" in line}
        if jax.process_index() > 0:  # the first process writes
            return
        new.write_text("".join(json.dumps(line) + "\n" for line in lines))
        new.rename(path)
        self._file = path.open("a")
        if args.track:
            import wandb

            run_id = json.loads((run_dir / "args.json").read_text())["id"]
            settings = {"project": args.wandb_project, "entity": args.wandb_entity, "config": dataclasses.asdict(args)}
            try:
                self._tracker = wandb.init(**settings, dir=run_dir, name=run_dir.name, id=run_id, resume="allow")
            except wandb.Error as error:
                raise InputError(f"Weights & Biases cannot be reached ({error}); WANDB_MODE=offline does without") from None

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        if not metrics:  # of an evaluation that was stopped
            return
        if "eval/return_mean" in metrics:
            self.scored.add(step)
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tracker is not None:
            self._tracker.finish()


class Progress:
    """A progress bar where stderr is a terminal, plain lines on stdout elsewhere."""

    def __init__(self, step: int, total_steps: int, seconds: float, cpu_hint: str, hint_after: int):
        """seconds: that updates took before. Without an accelerator, says after hint_after updates what one costs, and
        cpu_hint."""
        self._step, self._first_step, self._total_steps, self._seconds = step, step, total_steps, seconds
        self._hint_step = step + hint_after if jax.default_backend() == "cpu" else None
        self._hint = cpu_hint
        self._shown: dict[str, str] = {}
        self._silent = jax.process_index() > 0  # the first process talks
        hidden = self._silent or not sys.stderr.isatty()
        self._bar = tqdm(initial=step, total=total_steps, unit="update", disable=hidden, dynamic_ncols=True)

    def update(self, step: int, loss: float, seconds: float, log: bool) -> None:
        """Shows the step, the loss and the time left; seconds: of all updates. Plain lines come only with `log`."""
        self._shown["loss"] = f"{loss:.3f}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        cost = (seconds - self._seconds) / (step - self._first_step)
        left = f"{(self._total_steps - step) * cost / 60:.1f} min left"
        if self._hint_step is not None and step >= self._hint_step:
            hint = f"; {self._hint}" if self._hint else ""
            self.print(f"no accelerator: an update takes {1000 * cost:.1f} ms here, {left}{hint}")
            self._hint_step = None
        if log and self._bar.disable:
            self.print(f"{step}/{self._total_steps} updates, loss {loss:.3f}, {1 / cost:.1f} updates/s, {left}")

    def print(self, line: str) -> None:
        if self._silent:
            return
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def print_scores(self, step: int, scores: Mapping[str, float | None]) -> None:
        if not scores:  # of an evaluation that was stopped
            return
        self._shown["score"] = f"{scores['eval/return_mean']:.2f}"
        normalized = scores["eval/normalized_score"]
        self.print(
            f"{step} updates: return {scores['eval/return_mean']:.3f} +- {scores['eval/return_std']:.3f} in "
            f"{scores['eval/episodes']} episodes" + ("" if normalized is None else f", normalised {normalized:.3f}")
        )

    def close(self) -> None:
        self._bar.close()


def use_devices(batch_size: int, cpu_devices: int, distributed: bool = False) -> None:
    """Splits a machine without an accelerator into several devices, so that all its cores work on a batch.

    cpu_devices: how many; 0 for as many as cores, at most 8 and a divisor of batch_size. distributed: joins the other
    processes, which JAX finds on clusters that it knows (Slurm, for one), and elsewhere by the environment's
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call it before JAX computes anything. Raises InputError
    if the batch cannot be shared by the devices, or the other processes are not found.
    """
    if cpu_devices == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cpu_devices = max(n for n in range(1, min(cores, 8) + 1) if batch_size % n == 0)
    with suppress(RuntimeError):  # JAX has started already
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if distributed:
        given = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        try:
            num_processes, process_id = (None if value is None else int(value) for value in given)
            jax.distributed.initialize(num_processes=num_processes, process_id=process_id)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"--distributed: {str(error).strip().splitlines()[0]}") from None
    if batch_size % jax.device_count() != 0:
        raise InputError(f"--batch-size {batch_size} cannot be shared by {jax.device_count()} devices")


def prefetch(items: Iterator[Item], ahead: int = 4) -> Iterator[Item]:
    """Endless items, made ahead of their use in a thread; an error in the thread comes out where they are used."""
    waiting: queue.Queue[tuple[Item | None, Exception | None]] = queue.Queue()
    wanted = threading.Semaphore(ahead)  # items that may be made now
    stopped = threading.Event()

    def make() -> None:
        try:
            for item in items:
                waiting.put((item, None))
                wanted.acquire()
                if stopped.is_set():
                    return
        except Exception as error:
            waiting.put((None, error))

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            wanted.release()
            yield item  # type: ignore[misc]
    finally:  # nobody wants more
        stopped.set()
        wanted.release()


class Signals(list[int]):
    """Those that this process was sent."""

    def anywhere(self) -> bool:
        """Whether any process was sent one: then all have it. All processes ask together, and get the same answer."""
        if jax.process_count() == 1:
            return bool(self)
        first = int(multihost_utils.process_allgather(np.int32(self[0] if self else 0)).max())
        self.extend([first] if first and not self else [])
        return first > 0  # and not bool(self): one that came while the processes asked, the others have not heard of


def catch_signals() -> Signals:
    """From now on the first SIGINT or SIGTERM only goes into the list that this returns; a second one ends the program."""
    caught = Signals()

    def catch(signum: int, _: Any) -> None:
        caught.append(signum)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, catch)
    return caught


def run_program(program: Callable[[], int]) -> None:
    """Runs a program to its exit code; what its user can put right becomes one sentence and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(program())
    except InputError as error:
        sentence = str(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            sentence = "the disk is full; what was whole before is still there"
        elif isinstance(error, PermissionError) and error.filename is not None:
            sentence = f"{error.filename}: {error.strerror}"
        elif "RESOURCE_EXHAUSTED" in str(error):
            sentence = "the device has too little memory: name a smaller --batch-size, or on Atari --data-place host"
        else:
            raise
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
