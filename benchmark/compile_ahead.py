"""What XLA says of an update of the Atari scripts on an accelerator: nothing runs, and no accelerator is needed.

    pip install '.[compile-ahead]'
    python -m benchmark.compile_ahead                       # everything: about half an hour on one core
    python -m benchmark.compile_ahead --targets h100        # five minutes

The paper's settings, batch 512 and 4 actions, on one H100, or on a slice of eight TPU v5e chips that share the batch. All
figures are the compiler's own, for one chip. It counts a search's loop once: MuZero Unplugged needs far more than it says.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
from typing import Any, Literal

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
if nvidia := importlib.util.find_spec("nvidia"):
    cuda = f"{next(iter(nvidia.submodule_search_locations or ['']))}/cu13"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda} {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from data.dataset import InputError, run_program

# NVIDIA H100 SXM, in the terms of XLA's GpuTargetConfigProto.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 threads_per_core_limit: 2048 threads_per_block_limit: 1024
  threads_per_warp: 32 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TARGETS: dict[str, dict[str, Any]] = {
    "h100": {"platform": "cuda", "target_config": H100, "topology": "1x1x1"},
    "v5e": {"platform": "tpu", "topology_name": "v5e:2x4"},
}


@dataclasses.dataclass(frozen=True)
class Args:
    targets: tuple[Literal["h100", "v5e"], ...] = ("h100", "v5e")
    scripts: tuple[Literal["rosmo_atari", "muzero_unplugged_atari"], ...] = ("rosmo_atari", "muzero_unplugged_atari")
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


def lower_update(script: Any, model: Any, state: Any) -> Any:
    """update_windows, lowered for the devices that script.sharding() now has, on arguments that are shapes only."""
    args, everywhere, split = model.args, script.sharding(), script.sharding("batch")
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
    lead = (args.batch_size, 3 + args.unroll_steps + args.bootstrap_steps + 1)
    columns = {field: jax.ShapeDtypeStruct(lead, jnp.bool, sharding=split) for field in script.Steps._fields}
    columns["observation"] = jax.ShapeDtypeStruct((*lead, 84, 84), jnp.uint8, sharding=split)
    columns |= {"action": columns["action"].update(dtype=jnp.int32), "reward": columns["reward"].update(dtype=jnp.float32)}
    return script.update_windows.lower(state, script.Steps(**columns), model)


def main(options: Args) -> None:
    print("| chips | script | type | temporary memory | operations | bytes accessed | all-reduces |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for target in options.targets:
        try:
            devices = topologies.get_topology_desc(**TARGETS[target]).devices
        except Exception as error:
            raise InputError(f"no compiler for {target}: pip install '.[compile-ahead]' ({error})") from None
        for name in options.scripts:
            for dtype in options.dtypes:
                script: Any = importlib.import_module(name)
                model = script.Model(4, script.Args(compute_dtype=dtype))
                state = script.init_state((84, 84, 4), model)
                real = jax.devices, jax.device_count
                jax.devices, jax.device_count = functools.partial(list, devices), functools.partial(len, devices)
                compiled = lower_update(script, model, state).compile()
                jax.devices, jax.device_count = real
                memory, cost = compiled.memory_analysis().temp_size_in_bytes / 2**30, compiled.cost_analysis()
                exchanges = compiled.as_text().count(" all-reduce(") + compiled.as_text().count(" all-reduce-start(")
                cells = [f"{len(devices)} x {target}", name, dtype, f"{memory:.2f} GiB", f"{cost['flops'] / 1e12:.2f} TFLOP"]
                print(f"| {' | '.join(cells)} | {cost['bytes accessed'] / 1e9:.1f} GB | {exchanges} |", flush=True)


if __name__ == "__main__":
    options = tyro.cli(Args, description=__doc__)
    run_program(lambda: main(options))
