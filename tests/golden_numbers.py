"""The authors' own numbers (tests/golden), and their parameters under this repository's names."""

import ast
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "golden"

# BSuite: the authors' names number the layers in the order they were made. Our three heads are one layer, so their
# arrays are joined: policy, reward, value.
BSUITE_LAYERS = {
    **{("encoder", f"Dense_{i}"): [f"representation|mlp/~/linear_{i}"] for i in range(3)},
    **{("transition", f"Dense_{i}"): [f"transition|mlp/~/linear_{i}"] for i in range(2)},
    ("torso",): ["prediction|mlp/~/linear_0"],
    ("heads",): [f"prediction|mlp_{i}/~/linear_0" for i in (1, 3, 2)],
}
LEAVES = {"w": "kernel", "b": "bias"}


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one file, and the authors' configuration where the file has one."""
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    return arrays, ast.literal_eval(str(arrays.pop("config", "{}")))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The authors' configuration under the names of a script's Args."""
    names = {
        "batch_size", "unroll_steps", "num_bins", "value_coef", "policy_coef", "learning_rate", "warmup_steps",
        "learning_rate_decay", "weight_decay", "max_grad_norm", "target_update_interval",
    }  # fmt: skip
    others = {"bootstrap_steps": config["td_steps"], "discount": config["discount_factor"]}
    return {name: config[name] for name in names} | others


def relative(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest of their numbers."""
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def parameters(arrays: dict[str, np.ndarray], which: str) -> dict[str, Any]:
    """params0, target0 or params6 as the variables of a BSuite model."""
    tree: dict[str, Any] = {"params": {}}
    for path, names in BSUITE_LAYERS.items():
        node = tree["params"]
        for part in path:
            node = node.setdefault(part, {})
        for theirs, ours in LEAVES.items():
            node[ours] = np.concatenate([arrays[f"{which}|{name}|{theirs}"] for name in names], axis=-1)
    return tree
