"""What an update of the Atari scripts costs on an accelerator, by its compiler: nothing runs, and no accelerator is needed.

    pip install '.[compile-ahead]'
    python -m benchmark.compile_ahead                       # everything: about half an hour on one core
    python -m benchmark.compile_ahead --targets h100        # five minutes

The paper's settings, batch 512 and 4 actions, on one H100, or on a slice of eight TPU v5e chips that share the batch. All
figures are for one chip, and counts of the compiled program, no measurement: "memory alone" and "arithmetic alone" are what
its bytes and operations would take at the chip's peak rates, so an update takes at least the longer of the two.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
if nvidia := importlib.util.find_spec("nvidia"):
    cuda = f"{next(iter(nvidia.submodule_search_locations or ['']))}/cu13"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda} {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import numpy as np
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


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    topology: Callable[[], Any]
    bandwidth: float  # bytes a second of a chip
    speed: dict[str, float]  # operations a second of a chip, by type; NVIDIA's and Google's data sheets


TARGETS = {
    "h100": Target(
        "H100",
        functools.partial(topologies.get_topology_desc, platform="cuda", target_config=H100, topology="1x1x1"),
        3.35e12,
        {"float32": 495e12, "bfloat16": 989e12},  # JAX multiplies float32 in TF32 unless told otherwise
    ),
    "v5e": Target(
        "TPU v5e 2x4",
        functools.partial(topologies.get_topology_desc, platform="tpu", topology_name="v5e:2x4"),
        819e9,
        {"float32": 197e12, "bfloat16": 197e12},  # a TPU multiplies in bfloat16 unless told otherwise
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    targets: tuple[Literal["h100", "v5e"], ...] = ("h100", "v5e")
    scripts: tuple[Literal["rosmo_atari", "muzero_unplugged_atari"], ...] = ("rosmo_atari", "muzero_unplugged_atari")
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


def abstract_update(script: Any, model: Any, state: Any) -> Any:
    """update_windows, lowered for the devices that script.sharding() now has, on arguments that are shapes only."""
    args, everywhere, split = model.args, script.sharding(), script.sharding("batch")
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
    lead = (args.batch_size, 3 + args.unroll_steps + args.bootstrap_steps + 1)
    dtypes = {"observation": jnp.uint8, "action": jnp.int32, "reward": jnp.float32}
    shapes = [(*lead, 84, 84) if field == "observation" else lead for field in script.Steps._fields]
    columns = zip(shapes, script.Steps._fields, strict=True)
    windows = script.Steps(*(jax.ShapeDtypeStruct(x, dtypes.get(field, bool), sharding=split) for x, field in columns))
    return script.update_windows.lower(state, windows, model)


NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
WIDTHS = {"pred": 1, "s4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(.*)", re.M)


class Instruction(NamedTuple):
    whole: float  # bytes of its result
    size: float  # of these, in the main memory: what is on the chip of a TPU is marked S(1) and so on
    kind: str
    operands: list[str]  # a parameter's is its number
    attributes: str


def parse(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """The name of a compiled program's entry, and the instructions of its computations, by name."""

    def sizes(shape: str, kind: str) -> tuple[float, float]:
        arrays = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*S\(\d)?", re.sub(r"/\*.*?\*/", "", shape))
        if kind == "slice-start":  # a part of an array goes to the chip: its result is (the whole, the part, a handle)
            arrays = [(*arrays[1][:2], "")]
        size = [WIDTHS.get(dtype, 8) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims, _ in arrays]
        return sum(size), sum(x for x, (_, _, on_chip) in zip(size, arrays, strict=True) if not on_chip)

    entry, computations = "", dict[str, dict[str, Instruction]]()
    for block in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \((.*?)^\}", text, re.M | re.S):
        entry = block[2] if block[1] else entry
        computations[block[2]] = {
            name: Instruction(*sizes(shape, kind), kind, re.findall(r"[\w.\-]+", operands), attributes)
            for name, shape, kind, operands, attributes in INSTRUCTION.findall(block[3])
        }
    return entry, computations


def count(text: str) -> tuple[float, float, int, int]:
    """Bytes moved, those of them by convolutions (a TPU's matrix products are some), kernels and all-reduces of a program.

    Loops count as often as the compiler knows that they turn, else once.

    A kernel reads its operands and writes its result; of an array that it only slices or updates in place, that part.
    """
    entry, computations = parse(text)

    def moved(instruction: Instruction, others: dict[str, Instruction]) -> float:
        called = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
        inside = computations[called[1]] if called and instruction.kind == "fusion" else {}
        updates = [x for x in inside.values() if x.kind == "dynamic-update-slice"]
        saved = sum(max(0, 2 * x.size - inside[x.operands[1]].whole) for x in updates if x.operands[1] in inside)
        if instruction.kind in ("copy-start", "slice-start"):  # the result names the operand too
            return instruction.size
        total = instruction.size + sum(others[x].size for x in instruction.operands if x in others)
        for name, parameter in inside.items():
            users = [x for x in inside.values() if name in x.operands] if parameter.kind == "parameter" else []
            if users and all(x.kind in ("gather", "dynamic-slice", "slice") and x.operands[0] == name for x in users):
                saved += max(0, parameter.size - sum(x.whole for x in users))
        return max(0.0, total - saved)

    def is_convolution(instruction: Instruction) -> bool:
        if instruction.kind == "fusion":  # on a TPU what comes before and after a convolution is in one kernel with it
            called = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
            return called is not None and any(x.kind == "convolution" for x in computations[called[1]].values())
        return instruction.kind == "convolution" or "conv_general_dilated" in instruction.attributes

    def turns(loop: Instruction) -> int:
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        inside = list(computations.get(condition[1], {}).values()) if condition else []
        bounds = [int(x.operands[0]) for x in inside if x.kind == "constant" and x.operands and x.operands[0].isdigit()]
        counts = any(x.kind == "compare" and "direction=LT" in x.attributes for x in inside)
        return bounds[0] if counts and len(bounds) == 1 else 1  # a TPU's program says no more than i < 20

    def of(name: str) -> np.ndarray:
        result = np.zeros(4)
        for instruction in computations[name].values():
            if loop := re.search(r"body=%?([\w.\-]+)", instruction.attributes):
                result += turns(instruction) * of(loop[1])
            elif instruction.kind not in NO_KERNEL and not instruction.kind.endswith("-done"):
                is_exchange = instruction.kind in ("all-reduce", "all-reduce-start")
                size = moved(instruction, computations[name])
                result += (size, size * is_convolution(instruction), 1, is_exchange)
        return result

    bytes_moved, by_convolutions, kernels, all_reduces = of(entry)
    return float(bytes_moved), float(by_convolutions), int(kernels), int(all_reduces)


def operations(script: Any, model: Any, state: Any) -> float:
    """Floating-point operations of an update, before a compiler changes it: the analysis counts a search's loop once."""
    total = float((abstract_update(script, model, state).cost_analysis() or {})["flops"])
    if hasattr(script, "search"):
        args = model.args
        roots = args.batch_size * (args.unroll_steps + args.bootstrap_steps + 1)
        states = jax.ShapeDtypeStruct((roots, 6, 6, args.channels), args.compute_dtype)
        step = jax.jit(functools.partial(script.expand, model=model)).lower(
            state.params, None, jnp.zeros(roots, int), states
        )
        total += (args.num_simulations - 1) * float((step.cost_analysis() or {})["flops"])
    return total


def main(options: Args) -> None:
    head = ["chips", "script", "type", "temporaries", "operations", "moved", "by convolutions", "kernels", "all-reduces"]
    head += ["memory alone", "arithmetic alone"]
    print("|", *(f"{x} |" for x in head))
    print("|", *("--- |" for _ in head), flush=True)
    real_devices, real_count = jax.devices, jax.device_count
    for target in (TARGETS[name] for name in options.targets):
        try:
            devices = target.topology().devices
        except Exception as error:
            raise InputError(f"no compiler for {target.name}: pip install '.[compile-ahead]' ({error})") from None
        for name in options.scripts:
            for dtype in options.dtypes:
                start = time.perf_counter()
                script: Any = importlib.import_module(name)
                model = script.Model(4, script.Args(compute_dtype=dtype))
                jax.devices, jax.device_count = real_devices, real_count
                state = script.init_state((84, 84, 4), model)
                jax.devices, jax.device_count = functools.partial(list, devices), functools.partial(len, devices)
                compiled = abstract_update(script, model, state).compile()
                jax.devices, jax.device_count = real_devices, real_count
                flops = operations(script, model, state) / len(devices)
                moved, by_convolutions, kernels, all_reduces = count(compiled.as_text())
                temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
                cells: list[str] = [target.name, name, dtype, f"{temporaries:.2f} GiB", f"{flops / 1e12:.2f} TFLOP"]
                cells += [f"{moved / 1e9:.1f} GB", f"{by_convolutions / 1e9:.1f} GB", f"{kernels:,}", str(all_reduces)]
                cells += [f"{moved / target.bandwidth * 1e3:.1f} ms", f"{flops / target.speed[dtype] * 1e3:.1f} ms"]
                print("|", *(f"{x} |" for x in cells), flush=True)
                print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    options = tyro.cli(Args, description=__doc__)
    run_program(lambda: main(options))
