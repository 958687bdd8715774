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


def atari_layers(config: dict[str, Any]) -> dict[tuple[str, ...], list[str]]:
    """Atari: the same, for networks with the configuration's numbers of residual blocks."""
    layers: dict[tuple[str, ...], list[str]] = {}

    def res_block(ours: tuple[str, ...], theirs: str, projected: bool = False) -> None:
        for i in range(3 if projected else 2):
            layers[(*ours, f"Conv_{i}")] = [f"{theirs}/~/conv2_d{f'_{i}' if i else ''}"]
        for i in range(2):
            layers[(*ours, f"LayerNorm_{i}")] = [f"{theirs}/~/layer_norm{f'_{i}' if i else ''}"]

    def block(prefix: str, i: int) -> str:
        return f"{prefix}/res_conv_block{f'_{i}' if i else ''}"

    layers["encoder", "layers_0"] = ["representation|representation/conv2_d"]
    numbers = [1, 2, 3, 5, *range(7, 7 + config["blocks_representation"])]  # of the encoder's layers; 4 and 6 are poolings
    for i, number in enumerate(numbers):
        res_block(("encoder", f"layers_{number}"), block("representation|representation", i), projected=i == 1)
    layers[("with_action",)] = ["transition|transition/conv2_d"]
    layers[("state_norm",)] = ["transition|transition/layer_norm"]
    for i in range(config["blocks_transition"]):
        res_block((f"transition_{i}",), block("transition|transition", i))
    for i in range(config["blocks_prediction"]):
        res_block((f"torso_{i}",), block("prediction|prediction", i))
    for i, head in enumerate(("reward", "value", "policy")):
        suffix = ["", "_1", "_2"][i]
        layers[head, "Conv_0"] = [f"prediction|prediction/conv2_d{suffix}"]
        layers[head, "LayerNorm_0"] = [f"prediction|prediction/layer_norm{suffix}"]
        for j in range(3):
            number = 3 * i + j
            layers[head, f"LayerNorm_{1 + j}"] = [f"prediction|prediction/layer_norm_{3 + number}"]
            layers[head, f"Dense_{j}"] = [f"prediction|prediction/linear{f'_{number}' if number else ''}"]
    return layers


LEAVES = {"w": "kernel", "b": "bias", "scale": "scale", "offset": "bias"}


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one file, and the authors' configuration where the file has one."""
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    return arrays, ast.literal_eval(str(arrays.pop("config", "{}")))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The authors' configuration under the names of a script's Args."""
    names = {
        "batch_size", "unroll_steps", "num_bins", "value_coef", "policy_coef", "learning_rate", "warmup_steps",
        "learning_rate_decay", "weight_decay", "max_grad_norm", "target_update_interval",
        "num_simulations" if config["mcts"] else "behavior_coef",
    }  # fmt: skip
    theirs = {"bootstrap_steps": "td_steps", "discount": "discount_factor"}
    if "channels" in config:
        names.add("channels")
        theirs |= {"representation_blocks": "blocks_representation", "dynamics_blocks": "blocks_transition"}
        theirs |= {"prediction_blocks": "blocks_prediction", "head_channels": "reduced_channels_head"}
    sizes = {"head_width": config["fc_layers_value"][0]} if "channels" in config else {}
    return {name: config[name] for name in names} | {ours: config[name] for ours, name in theirs.items()} | sizes


def relative(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest of their numbers."""
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def parameters(arrays: dict[str, np.ndarray], which: str, config: dict[str, Any]) -> dict[str, Any]:
    """params0, target0 or params6 as the variables of a Model."""
    tree: dict[str, Any] = {"params": {}}
    for path, names in (atari_layers(config) if "channels" in config else BSUITE_LAYERS).items():
        node = tree["params"]
        for part in path:
            node = node.setdefault(part, {})
        for theirs, ours in LEAVES.items():
            if f"{which}|{names[0]}|{theirs}" in arrays:
                node[ours] = np.concatenate([arrays[f"{which}|{name}|{theirs}"] for name in names], axis=-1)
    return tree
