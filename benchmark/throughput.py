"""Updates per second of a training script, compile time apart, and what the rest of its time goes to.

    python -m benchmark.throughput rosmo_bsuite --env-id catch
    python -m benchmark.throughput muzero_unplugged_bsuite --env-id cartpole --batch-size 256 --cpu-devices 1
    python -m benchmark.throughput rosmo_atari --env-id Breakout --batch-size 16
    python -m benchmark.throughput rosmo_atari --env-id Breakout --memory     # compile only: operations and memory

What follows the script's name are its own flags. Every figure is the median of REPEATS timings in one process, with the
smallest and the largest; quote the median. Peak memory is that of the whole process.
"""

import importlib
import os
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

from benchmark.studies import ROOT
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


def report(rows: dict[str, str]) -> None:
    for name, value in rows.items():
        print(f"{name:20} {value}", flush=True)


def peak_memory() -> str:
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"


def bsuite(script: Any, args: Any) -> None:
    """Labels of the dataset and compiled loops of updates."""
    data, meta = script.load_dataset(args.data_dir or record_bsuite.record_if_missing(args.env_id, args.noise), args)
    data, model = jax.device_put(data, script.sharding()), script.Model(meta["num_actions"], args)
    state = script.init_state(data.observation.shape[1:], model)
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
    evaluation_ms = np.median(evaluation_s) * 1e3 / args.eval_interval
    share = 100 * evaluation_ms / (np.median(total_ms) + evaluation_ms)
    report(
        {
            "steps of data": f"{len(data.action)}",
            "compilation": f"{compile_seconds:.1f} s",
            "updates per second": spread([1e3 / ms for ms in total_ms], ""),
            "one update": spread(total_ms, "ms"),
            "of it labelling": spread(label_ms, "ms"),
            "one evaluation": f"{spread(evaluation_s, 's')}, {args.eval_episodes} episodes, "
            f"{share:.1f} % of the time at --eval-interval",
            "peak memory": peak_memory(),
        }
    )


def matrix_product_speed(dtype: str) -> float:
    """Operations per second of a large matrix product on one device, times the devices of an accelerator."""
    size = 8192 if jax.default_backend() != "cpu" else 3072
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    timed(product, x)
    devices = jax.device_count() if jax.default_backend() != "cpu" else 1  # one CPU device uses every core for this
    return 2 * size**3 / min(timed(product, x) for _ in range(5)) * devices


def atari(script: Any, args: Any, memory_only: bool) -> None:
    """Single updates on batches of windows."""
    data, rows, meta = script.load_dataset(args.data_dir or record_atari.record_if_missing(args.env_id), args)
    model = script.Model(meta["num_actions"], args)
    state = script.init_state((84, 84, 4), model)
    batches = script.batches(data, rows, state.key, 0, args)
    batch = next(batches)
    start = time.perf_counter()
    compiled = script.update_windows.lower(state, batch, model).compile()
    compile_seconds = time.perf_counter() - start
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    report(
        {
            "steps of data": f"{len(rows)}",
            "compilation": f"{compile_seconds:.1f} s",
            "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.3f} million",
            "temporary memory": f"{memory.temp_size_in_bytes / 2**30:.2f} GiB a device, by the compiler",
        }
    )
    if memory_only:
        return
    state, _ = compiled(state, batch)
    count = max(1, round(ATARI_SECONDS / timed(lambda: compiled(jax.tree.map(jnp.copy, state), batch))))
    update_s = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, batch)
            batch = next(batches)
            jax.tree.map(float, metrics)
        update_s.append((time.perf_counter() - start) / count)
    from_host = script.batches(data, rows, state.key, 0, args)
    for _ in range(8):  # those that were read ahead
        next(from_host)
    read_s = [timed(lambda: next(from_host)) for _ in range(REPEATS)]
    results = {
        "updates per second": spread([1 / seconds for seconds in update_s], ""),
        "one update": spread([1e3 * seconds for seconds in update_s], "ms"),
        "reading a batch": spread([1e3 * seconds for seconds in read_s], "ms"),
    }
    if not hasattr(script, "search"):  # of a search's simulations the compiler counts one
        flops, most = cost.get("flops", float("nan")) * jax.device_count(), matrix_product_speed(args.compute_dtype)
        speed = flops / np.median(update_s)
        share = f"{100 * speed / most:.0f} % of a large matrix product's {most / 1e9:.0f}"
        results["operations"] = f"{flops / 1e9:.1f} GFLOP an update, by the compiler"
        results["speed"] = f"{speed / 1e9:.0f} GFLOP/s, {share}"
    report(results | {"peak memory": peak_memory()})


def main(name: str, flags: list[str]) -> None:
    if not (ROOT / f"{name}.py").exists():
        raise InputError(f"there is no script {name}.py in {ROOT}")
    script: Any = importlib.import_module(name)
    own = [flag for flag in flags if flag != "--memory"]
    try:
        args = script.parse_args(own)
        jax.config.update("jax_num_cpu_devices", args.cpu_devices or len(os.sched_getaffinity(0)))
        print(f"{name} {' '.join(own)}\nbatch {args.batch_size}, {args.compute_dtype}, {platform.machine()}, ", end="")
        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
        if hasattr(script, "label_dataset"):
            bsuite(script, args)
        else:
            atari(script, args, memory_only=own != flags)
    except script.InputError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run_program(lambda: main(sys.argv[1].removesuffix(".py"), sys.argv[2:]))
