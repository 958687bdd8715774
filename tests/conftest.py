import os
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)  # as the scripts do on a machine with two cores
# Programs that several tests compile, in this process or in others, are compiled once.
cache = tempfile.TemporaryDirectory(prefix="rosmo-tests-")
jax.config.update("jax_compilation_cache_dir", cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}


@pytest.fixture(scope="session")
def catch_dataset(tmp_path_factory):
    """A small recorded dataset: 200 episodes of catch."""
    from data.record_bsuite import record

    return record("catch", episodes=200, out=tmp_path_factory.mktemp("datasets") / "catch")


@pytest.fixture(scope="session")
def breakout_dataset(tmp_path_factory):
    """A small recorded dataset: 1,500 steps of random play of Breakout."""
    from data.record_atari import Args, record

    return record(Args("Breakout", steps=1500, num_envs=4, out=tmp_path_factory.mktemp("datasets") / "Breakout"))
