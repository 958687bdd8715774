"""The authors' own numbers (tests/golden), and their parameters under this repository's names."""

import ast
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "golden"

# BSuite: the authors' module and layer -> this repository's module path. Their names number the layers as they were made.
BSUITE_NAMES = {
    **{f"representation|mlp/~/linear_{i}": ("encoder", f"Dense_{i}") for i in range(3)},
    **{f"transition|mlp/~/linear_{i}": ("transition", f"Dense_{i}") for i in range(2)},
    "prediction|mlp/~/linear_0": ("torso",),
    "prediction|mlp_1/~/linear_0": ("policy_head",),
    "prediction|mlp_2/~/linear_0": ("value_head",),
    "prediction|mlp_3/~/linear_0": ("reward_head",),
}
LEAVES = {"w": "kernel", "b": "bias"}


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one file, and the authors' configuration where the file has one."""
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    return arrays, ast.literal_eval(str(arrays.pop("config", "{}")))


def parameters(arrays: dict[str, np.ndarray], which: str, names: dict[str, tuple[str, ...]] = BSUITE_NAMES) -> dict:
    """params0, target0 or params6 as a Flax variable tree."""
    tree: dict = {"params": {}}
    for name, path in names.items():
        node = tree["params"]
        for part in path:
            node = node.setdefault(part, {})
        for theirs, ours in LEAVES.items():
            node[ours] = arrays[f"{which}|{name}|{theirs}"]
    return tree
