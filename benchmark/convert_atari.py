"""Steps per second and peak memory of data.convert_atari on synthetic shards of RL Unplugged's layout.

    python -m benchmark.convert_atari --steps 200000

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

from data import convert_atari
from data.dataset import run_program
from data.tfrecords import masked_crc, read_example, read_records

FIXTURE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "rlu_breakout" / "raw" / "Breakout"
SHARDS = 4


@dataclass(frozen=True)
class Args:
    steps: int = 200_000  # of the input
    folder: Path | None = None  # where input and output go for the while; by default the system's place for that


def write_shard(path: Path, steps: int, images: list[bytes], random: np.random.Generator) -> None:
    """A GZIP TFRecord file of whole episodes of 500 to 1,500 steps, `steps` steps together."""
    with gzip.open(path, "wb", compresslevel=6) as file:
        while steps > 0:
            length = min(steps, int(random.integers(500, 1501)))
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


def main(args: Args) -> None:
    records = [(record, file) for file in sorted(FIXTURE.iterdir()) for record in read_records(file)]
    images = [image for record, file in records for image in read_example(record, str(file))["observations"]]
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "Breakout"
        source.mkdir()
        for i in range(SHARDS):
            steps = args.steps * (i + 1) // SHARDS - args.steps * i // SHARDS
            write_shard(source / f"run_1-{i:05d}-of-{SHARDS:05d}", steps, images, random)
        size = sum(file.stat().st_size for file in source.iterdir())
        start = time.perf_counter()
        convert_atari.convert(convert_atari.Args("Breakout", source=(source,), out=Path(folder) / "out"))
        seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.steps} steps of {size / args.steps:.0f} bytes in the source: {args.steps / seconds:.0f} steps/s")
    print(f"in {seconds:.1f} s on {os.cpu_count()} cores; peak memory {memory:.2f} GiB")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
