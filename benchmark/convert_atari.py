"""Steps per second and peak memory of data.convert_atari on shards of RL Unplugged's layout: the tests' fixture, repeated.

python -m benchmark.convert_atari --steps 200000
"""

import math
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmark.studies import ROOT
from data import convert_atari
from data.dataset import run_program
from data.tfrecords import read_example, read_records

FIXTURE = ROOT / "tests" / "fixtures" / "rlu_breakout" / "raw" / "Breakout"


@dataclass(frozen=True)
class Args:
    steps: int = 200_000  # of the input, at least
    folder: Path | None = None  # where input and output go for the while; by default the system's place for that


def main(args: Args) -> None:
    files = sorted(FIXTURE.iterdir())
    steps = sum(len(read_example(record, str(file))["observations"]) for file in files for record in read_records(file))
    repeats = math.ceil(args.steps / steps)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "Breakout"
        source.mkdir()
        for file in files:  # GZIP files one after the other are one
            (source / file.name).write_bytes(repeats * file.read_bytes())
        size = sum(file.stat().st_size for file in source.iterdir()) / repeats / steps
        start = time.perf_counter()
        convert_atari.convert(convert_atari.Args("Breakout", source=(source,), out=Path(folder) / "out"))
        seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{repeats * steps} steps of {size:.0f} bytes in the source: {repeats * steps / seconds:.0f} steps/s")
    print(f"in {seconds:.1f} s on {os.cpu_count()} cores; peak memory {memory:.2f} GiB")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(Args, description=__doc__)))
