"""Updates per second of a training script, compile time apart, and what the rest of its time goes to.

    python -m benchmark.throughput rosmo_bsuite --env-id catch
    python -m benchmark.throughput muzero_unplugged_bsuite --env-id cartpole --batch-size 256 --cpu-devices 1
    python -m benchmark.throughput rosmo_atari --env-id Breakout --batch-size 16

What follows the script's name are its own flags. Every figure is the median of REPEATS timings in one process, with the
smallest and the largest; quote the median. Peak memory is that of the whole process; a CPU as a device has none of its own.
"""

import importlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from benchmark.studies import CORES, ROOT
from data import record_atari, record_bsuite
from data.dataset import InputError, run_program

REPEATS = 9
BSUITE_UPDATES = 200  # per timing, in one call as in training
ATARI_SECONDS = 3.0  # about, per timing


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def spread(values: list[float], unit: str) -> str:
    return f"{np.median(values):.3g} {unit} ({min(values):.3g} to {max(values):.3g})"


def bsuite(script: Any, args: Any) -> dict[str, str]:
    """Labels of the dataset and compiled loops of updates."""
    script.require(args.eval_episodes, "an evaluation is timed: --eval-episodes is 1 or more")
    data, _, meta = script.load_dataset(args.data_dir or record_bsuite.record_if_missing(args.env_id, args.noise), args)
    data, model = jax.device_put(data, jax.P()), script.Model(meta["num_actions"], args)
    state = jax.device_put(jax.device_get(script.init_state(data.observation.shape[1:], model)), jax.P())
    environments = gymnasium.make_vec(args.env_id, args.eval_episodes, "sync")
    start = time.perf_counter()
    labels = jax.block_until_ready(script.label_dataset(state, data, model))
    compiled = script.update_many.lower(state, np.int32(0), data, labels, model).compile()
    compile_seconds = time.perf_counter() - start
    state, _ = compiled(state, np.int32(BSUITE_UPDATES), data, labels)
    script.evaluate(state, environments, model, meta)
    update_ms, label_ms, evaluation_s = [], [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        state, metrics = compiled(state, np.int32(BSUITE_UPDATES), data, labels)
        jax.tree.map(float, metrics)
        update_ms.append((time.perf_counter() - start) / BSUITE_UPDATES * 1e3)
        label_ms.append(timed(script.label_dataset, state, data, model) * 1e3 / args.target_update_interval)
        evaluation_s.append(timed(script.evaluate, state, environments, model, meta))
    total_ms = [update + label for update, label in zip(update_ms, label_ms, strict=True)]
    return {
        "steps of data": f"{len(data.action)}",
        "compilation": f"{compile_seconds:.1f} s",
        "updates per second": spread([1e3 / ms for ms in total_ms], ""),
        "one update": spread(total_ms, "ms"),
        "of it labelling": spread(label_ms, "ms"),
        "one evaluation": f"{spread(evaluation_s, 's')}, {args.eval_episodes} episodes",
    }


def atari(script: Any, args: Any) -> dict[str, str]:
    """Single updates on batches of windows, metrics taken an update late, as in training."""
    data, rows, meta = script.load_dataset(args.data_dir or record_atari.record_if_missing(args.env_id), args)
    model = script.Model(meta["num_actions"], args)
    state = jax.device_put(jax.device_get(script.init_state((84, 84, 4), model)), jax.P())
    batches = script.batches(data, rows, state.key, 0, args)
    batch = next(batches)
    start = time.perf_counter()
    compiled = script.update_windows.lower(state, batch, model).compile()
    compile_seconds = time.perf_counter() - start
    state, _ = compiled(state, batch)
    count = max(1, round(ATARI_SECONDS / timed(lambda: compiled(jax.tree.map(jnp.copy, state), batch))))
    update_s, waiting = [], []
    for _ in range(REPEATS):
        start, waited, running = time.perf_counter(), 0.0, list[Any]()
        for _ in range(count):
            state, metrics = compiled(state, batch)
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            running = [*running, metrics][-2:]
            jax.device_get(running[0])
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        update_s.append(seconds / count)
        waiting.append(100 * waited / seconds)
    on_device = jax.local_devices()[0].memory_stats() or {}
    return {
        "steps of data": f"{len(rows)}",
        "compilation": f"{compile_seconds:.1f} s",
        "updates per second": spread([1 / seconds for seconds in update_s], ""),
        "one update": spread([1e3 * seconds for seconds in update_s], "ms"),
        "of it waiting for data": spread(waiting, "%"),
        "peak memory of device": f"{on_device.get('peak_bytes_in_use', 0) / 2**30:.2f} GiB",
    }


def main(name: str, flags: list[str]) -> None:
    if not (ROOT / f"{name}.py").exists():
        raise InputError(f"there is no script {name}.py in {ROOT}")
    script: Any = importlib.import_module(name)
    script.InputError = InputError
    args = script.parse_args(flags)
    shares = [n for n in range(1, min(len(CORES), 8) + 1) if args.batch_size % n == 0]  # as the scripts choose them
    jax.config.update("jax_num_cpu_devices", args.cpu_devices or shares[-1])
    jax.set_mesh(jax.sharding.Mesh(jax.devices(), ("batch",)))
    script.require(args.batch_size % jax.device_count() == 0, "the number of devices must divide --batch-size")
    print(f"{name} {' '.join(flags)}\nbatch {args.batch_size}, {args.compute_dtype}, {platform.machine()}, ", end="")
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    report = bsuite(script, args) if hasattr(script, "label_dataset") else atari(script, args)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # KiB
    for what, value in (report | {"peak memory": f"{memory:.2f} GiB"}).items():
        print(f"{what:22} {value}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run_program(lambda: main(sys.argv[1].removesuffix(".py"), sys.argv[2:]))
