"""benchmark/compile_ahead.py on the smallest networks, for this machine."""

import functools
import itertools

import jax

import rosmo_atari
from benchmark import compile_ahead
from tests.programs import TINY


def test_a_row(monkeypatch):
    """Two devices share the batch: temporary memory, operations, bytes, and the exchanges of the gradient."""
    monkeypatch.setattr(rosmo_atari, "Args", functools.partial(rosmo_atari.Args, **TINY))
    monkeypatch.setitem(compile_ahead.DEVICES, "cpu", jax.devices)
    head, row = itertools.islice(compile_ahead.rows_of(("cpu",)), 2)
    cells = dict(zip(head, row, strict=True))
    assert (cells["chips"], cells["script"], cells["type"]) == ("2 x cpu", "rosmo_atari", "float32")
    assert cells["temporary memory"].endswith(" GiB") and float(cells["bytes accessed"].removesuffix(" GB")) >= 0
    assert 1 <= int(cells["all-reduces"]) <= 2
