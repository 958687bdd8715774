"""Updates per second of a training script, compile time apart, and what the rest of its time goes to.

    python benchmark/throughput.py rosmo_bsuite --env-id catch
    python benchmark/throughput.py rosmo_bsuite --env-id cartpole --batch-size 256 --cpu-devices 1

What follows the script's name are its own flags. Every figure is the median of REPEATS timings in one
process, with the smallest and the largest; quote the median. Peak memory is that of the whole process.
"""

import importlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import InputError
from data.record_bsuite import make_environment
from data.runs import parse_args, run_program, use_devices

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 9
UPDATES = 200  # per timing, in calls of --updates-per-call as in training


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def spread(values: list[float], unit: str) -> str:
    return f"{np.median(values):.3g} {unit} ({min(values):.3g} to {max(values):.3g})"


def main(name: str, flags: list[str]) -> int:
    if not (ROOT / f"{name}.py").exists():
        raise InputError(f"there is no script {name}.py in {ROOT}")
    script: Any = importlib.import_module(name)
    args = parse_args(script.Args, Path(script.__file__), f"{name}'s flags", flags)
    use_devices(args.batch_size, args.cpu_devices)
    environment = make_environment(args.env_id, args.seed, args.noise)
    model = script.Model(environment.action_spec().num_values, args)
    dataset = script.load_dataset(args)
    data = jax.device_put(script.Steps(*(getattr(dataset, field) for field in script.Steps._fields)), script.sharding())
    state = script.init_state(environment.observation_spec().shape, model)

    start = time.perf_counter()
    labels = jax.block_until_ready(script.label_dataset(state, data.observation, model))
    compiled = script.update_many.lower(state, np.int32(0), data, labels, model).compile()
    compile_seconds = time.perf_counter() - start

    @jax.jit
    def sample_only(key: jax.Array, data: Any, labels: Any) -> jax.Array:
        """Draws the windows of UPDATES updates and reads every number of them."""

        def body(i: jax.Array, total: jax.Array) -> jax.Array:
            index = script.sample_windows(jax.random.fold_in(key, i), len(data.action), args)
            rows = (jnp.sum(x[index].reshape(args.batch_size, -1), axis=1) for x in jax.tree.leaves((data, labels)))
            return total + jnp.sum(sum(rows, start=jnp.zeros(args.batch_size)))  # devices exchange one number

        return jax.lax.fori_loop(0, UPDATES, body, jnp.float32(0))

    jax.block_until_ready(sample_only(state.key, data, labels))
    state, _ = compiled(state, np.int32(UPDATES), data, labels)
    script.evaluate(state, model)
    update_ms, label_ms, sample_ms, evaluation_s = [], [], [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(UPDATES // args.updates_per_call):
            state, metrics = compiled(state, np.int32(args.updates_per_call), data, labels)
            jax.tree.map(float, metrics)
        updates = UPDATES // args.updates_per_call * args.updates_per_call
        update_ms.append((time.perf_counter() - start) / updates * 1e3)
        label_ms.append(timed(script.label_dataset, state, data.observation, model) * 1e3 / args.target_update_interval)
        sample_ms.append(timed(sample_only, state.key, data, labels) / UPDATES * 1e3)
        evaluation_s.append(timed(script.evaluate, state, model))
    total_ms = [update + label for update, label in zip(update_ms, label_ms, strict=True)]
    evaluation_ms = np.median(evaluation_s) * 1e3 / args.eval_interval
    share = {
        "sampling windows": np.median(sample_ms) / np.median(total_ms),
        "labelling the dataset": np.median(label_ms) / np.median(total_ms),
        f"evaluation every {args.eval_interval} updates": evaluation_ms / (np.median(total_ms) + evaluation_ms),
    }
    print(f"{name} {' '.join(flags)}")
    print(f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{len(data.action)} steps, batch {args.batch_size}, {args.compute_dtype}")
    print(f"compilation          {compile_seconds:.1f} s")
    print(f"updates per second   {spread([1e3 / ms for ms in total_ms], '')}")
    print(f"one update           {spread(total_ms, 'ms')}")
    print(f"one evaluation       {spread(evaluation_s, 's')}, {args.eval_episodes} episodes")
    for part, value in share.items():
        print(f"share of time        {100 * value:.1f} % {part}")
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
    print(f"peak memory          {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run_program(lambda: main(sys.argv[1].removesuffix(".py"), sys.argv[2:]))
