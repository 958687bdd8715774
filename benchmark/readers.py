"""Seconds to read a batch of windows from the disk, by rosmo_atari's readers and by indexing the memory map, cold and warm.

    python -m benchmark.readers datasets/atari/Breakout

Cold: the pages of the file are dropped before every batch (Linux only). A batch has 512 windows of 14 frames, 50 MB.
"""

import os
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import rosmo_atari
from benchmark.studies import print_table
from data.dataset import InputError, open_dataset, run_program

BATCHES = 24


def main(folder: tyro.conf.Positional[Path]) -> None:
    rosmo_atari.InputError = InputError  # type: ignore[assignment, misc]
    jax.config.update("jax_num_cpu_devices", 1)
    jax.set_mesh(jax.sharding.Mesh(jax.devices(), ("batch",)))
    table = [["reader", "cold", "warm"]]
    for readers in (0, 1, 4, 16):
        args = rosmo_atari.Args(env_id=open_dataset(folder).meta["env_id"], data_place="host", data_readers=max(1, readers))
        data, rows, _ = rosmo_atari.load_dataset(folder, args)
        random, seconds = np.random.default_rng(0), []
        key = jax.device_put(jax.random.PRNGKey(0), jax.P())
        for cold in (True, False):
            windows = rosmo_atari.batches(data, rows, key, 0, args)
            (folder / "observation.npy").read_bytes()
            start = 0.0
            for i in range(BATCHES + 1):
                start = time.perf_counter() if i == 1 else start  # the first call compiles
                if cold:
                    with (folder / "observation.npy").open("rb") as raw:
                        os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if readers:
                    jax.block_until_ready(next(windows))
                else:
                    rows_read = random.integers(0, len(rows) - 14, 512)[:, None] + np.arange(14)
                    jax.block_until_ready(jax.device_put(data.observation[rows_read]))
            seconds.append((time.perf_counter() - start) / BATCHES)
        table.append([f"{readers} readers" if readers else "the map, indexed", *(f"{each:.3f} s" for each in seconds)])
    print_table(table)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(main, description=__doc__))
