"""What XLA says of an update of the Atari scripts on accelerators: nothing runs, and no accelerator is needed.

    python -m benchmark.compile_ahead                  # with '.[benchmark,compile-ahead]' installed
    python -m benchmark.compile_ahead --targets cpu    # this machine's compiler: nothing more has to be installed

The paper's settings, 4 actions, on one H100, or on eight TPU v5e chips that share the batch. Memory and bytes are of a chip.
The compiler for GPUs tells no bytes. Operations are of the whole update, not compiled; XLA counts a search's loop once.
"""

import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
if nvidia := importlib.util.find_spec("nvidia"):
    cuda = f"{next(iter(nvidia.submodule_search_locations or ['']))}/cu13"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda} {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import tyro
from jax import P
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding

import muzero_unplugged_atari
import rosmo_atari
from benchmark.studies import print_table
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
DEVICES: dict[str, Callable[[], Any]] = {
    "h100": lambda: get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices,
    "v5e": lambda: get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices,
    "cpu": lambda: jax.devices()[:1],
}


def lower_update(script: Any, model: Any, devices: Any) -> Any:
    """update_windows, lowered for these devices from shapes."""
    args, shapes = model.args, jax.ShapeDtypeStruct
    with jax.set_mesh(Mesh(jax.devices()[:1], ("batch",))):
        state = script.init_state((84, 84, 4), model)
    with jax.set_mesh(mesh := Mesh(devices, ("batch",))):
        state = jax.tree.map(lambda x: shapes(x.shape, x.dtype, sharding=NamedSharding(mesh, P())), state)
        lead = (args.batch_size, 3 + args.unroll_steps + args.bootstrap_steps + 1)
        array = functools.partial(shapes, sharding=NamedSharding(mesh, P("batch")))
        frames, numbers = array((*lead, 84, 84), jnp.uint8), (array(lead, jnp.int32), array(lead, jnp.float32))
        return script.update_windows.lower(state, script.Steps(frames, *numbers, *[array(lead, bool)] * 3), model)


def rows_of(targets: tuple[Literal["h100", "v5e", "cpu"], ...] = ("h100", "v5e")) -> Iterator[list[str]]:
    """The table of these chips, a row for each program."""
    yield ["chips", "script", "type", "temporary memory", "operations", "bytes accessed", "all-reduces"]
    scripts: tuple[Any, ...] = (rosmo_atari, muzero_unplugged_atari)
    for target, script, dtype in itertools.product(targets, scripts, ("float32", "bfloat16")):
        try:
            devices = DEVICES[target]()
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(f"there is no compiler for {target}: install '.[compile-ahead]' ({error})") from None
        model = script.Model(4, script.Args(compute_dtype=dtype))
        flops = lower_update(script, model, jax.devices()[:1]).cost_analysis()["flops"]
        compiled = lower_update(script, model, devices).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
        cells = [f"{len(devices)} x {target}", script.__name__, dtype, f"{memory:.2f} GiB", f"{flops / 1e12:.2f} TFLOP"]
        accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
        exchanges = len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text()))
        yield [*cells, f"{accessed / 1e9:.1f} GB" if accessed else "", str(exchanges)]


if __name__ == "__main__":
    run_program(lambda: print_table(tyro.cli(rows_of, description=__doc__)))
