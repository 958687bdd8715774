import ctypes
import gc
import os
import shutil
import sys
import tempfile

import psutil
import pytest


def pytest_configure(config):
    """One compilation cache for all processes of a run of the suite. (Only with a limit of its size does JAX lock it.)"""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compilation_cache = tempfile.mkdtemp(prefix="compilation_cache_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compilation_cache
        os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**31)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    # Compiles in half the time; the programs run slower.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    import jax  # not before: it reads the environment

    jax.config.update("jax_num_cpu_devices", 2)  # as the scripts do on a machine with two cores
    jax.set_mesh(jax.sharding.Mesh(jax.devices(), ("batch",)))


def pytest_unconfigure(config):
    if hasattr(config, "compilation_cache"):
        shutil.rmtree(config.compilation_cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def memory(request):
    """Keeps every process below 2 GB: forgets what was compiled; what is needed of it comes from the compilation cache."""
    needs = 1.3e9 if "test_six_updates" in request.node.name else 0.6e9  # to compile the paper's residual networks
    if psutil.Process().memory_info().rss + needs > 1.9e9:
        import jax

        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)


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
