import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)  # as the scripts do on a machine with two cores


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
