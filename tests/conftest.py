import os
import tempfile

# Programs that several tests compile, in this process or others, are compiled once.
cache = tempfile.TemporaryDirectory(prefix="rosmo-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)  # as the scripts do on a machine with two cores


@pytest.fixture(scope="session")
def catch_dataset(tmp_path_factory):
    """A small recorded dataset: 200 episodes of catch."""
    from data.record_bsuite import record

    return record("catch", episodes=200, out=tmp_path_factory.mktemp("datasets") / "catch")
