"""Steps per second and peak memory of data.convert_atari on synthetic shards of RL Unplugged's layout.

    python benchmark/convert_atari.py --steps 200000

The frames are those of the tests' fixture in random order, so that images and compression are as in real shards.
"""

import gzip
import os
import resource
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tfrecord import example_pb2
from tqdm import tqdm

from data.convert_atari import Args as ConvertArgs
from data.convert_atari import convert
from data.runs import run_program
from data.tfrecords import masked_crc, read_example, read_records

FIXTURE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "rlu_breakout" / "raw" / "Breakout"


@dataclass(frozen=True)
class Args:
    steps: int = 200_000  # of the input
    shards: int = 4  # that they are spread over
    episode: int = 1000  # mean steps of an episode; lengths are from half to one and a half of it
    seed: int = 0  # of lengths, frames and actions
    folder: Path | None = None  # where input and output go for the while; by default the system's place for that


def write_shard(path: Path, steps: int, images: list[bytes], args: Args, random: np.random.Generator) -> None:
    """A GZIP TFRecord file of whole episodes, `steps` steps together."""
    with gzip.open(path, "wb", compresslevel=6) as file:
        while steps > 0:
            length = min(steps, int(random.integers(args.episode // 2, args.episode * 3 // 2 + 1)))
            example = example_pb2.Example()
            feature = example.features.feature
            feature["observations"].bytes_list.value.extend(images[i] for i in random.integers(len(images), size=length))
            feature["actions"].int64_list.value.extend(random.integers(4, size=length).tolist())
            feature["clipped_rewards"].float_list.value.extend((random.random(length) < 0.01).astype(float).tolist())
            feature["discounts"].float_list.value.extend([1.0] * (length - 1) + [0.0])
            record = example.SerializeToString()
            header = struct.pack("<Q", len(record))
            file.write(header + struct.pack("<I", masked_crc(header)))
            file.write(record + struct.pack("<I", masked_crc(record)))
            steps -= length


def main(args: Args) -> int:
    images: list[bytes] = []
    for file in sorted(FIXTURE.iterdir()):
        for record in read_records(file):
            images += read_example(record, str(file))["observations"]
    random = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "Breakout"
        source.mkdir()
        for i in tqdm(range(args.shards), unit="shard", desc="making the input"):
            steps = args.steps * (i + 1) // args.shards - args.steps * i // args.shards
            write_shard(source / f"run_1-{i:05d}-of-{args.shards:05d}", steps, images, args, random)
        size = sum(file.stat().st_size for file in source.iterdir())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu_start = time.perf_counter(), time.process_time()
        convert(ConvertArgs("Breakout", source=(source,), out=Path(folder) / "out"))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    after, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    speed = f"{args.steps / seconds:.0f} steps/s in {seconds:.1f} s on {os.cpu_count()} cores"
    print(f"{args.steps} steps of {size / args.steps:.0f} bytes in the source: {speed}, of the processor {cpu:.1f} s")
    memory = f"{after / 2**20:.2f} GiB, {before / 2**20:.2f} GiB of it before the conversion"
    print(f"peak memory {memory}; of child processes {children / 2**20:.2f} GiB")
    return 0


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    run_program(lambda: main(args))
