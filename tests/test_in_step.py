"""The scripts are copies of each other where they say the same thing. What may differ is listed here, with the reason."""

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def definitions(source: str) -> dict[str, str]:
    """The text of every top-level statement by its name, with the decorators, comments and section headings above it."""
    lines, parts, end = source.splitlines(), {}, 0
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or ast.unparse(node)
        if isinstance(node, ast.Expr):
            name = "docstring"
        if isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
        if isinstance(node, ast.If):
            name = "if __name__"
        if isinstance(node, ast.ImportFrom) and node.module in ("typing", "collections.abc"):
            name = f"from {node.module}"
        parts[name] = "\n".join(lines[end : node.end_lineno]).strip("\n")
        end = node.end_lineno or 0
    return parts


@dataclass(frozen=True)
class Pair:
    """Two scripts and what may differ between them; every entry says why."""

    first: str
    second: str
    only_first: dict[str, str] = field(default_factory=dict)  # definitions
    only_second: dict[str, str] = field(default_factory=dict)
    rewritten: dict[str, str] = field(default_factory=dict)  # in both, with texts of their own
    without: dict[str, tuple[str, str]] = field(default_factory=dict)  # the second is the first without lines that match
    without_second: dict[str, tuple[str, str]] = field(default_factory=dict)  # the first is the second without such lines
    fields: dict[str, dict[str, str]] = field(default_factory=dict)  # of a class, members that may differ


TARGET = "policy target: search in place of the one-step look-ahead"
BOOTSTRAP = "bootstrap value: the root's in place of the value head's"
BEHAVIOR = "no behaviour cloning"
ALGORITHMS: dict = {
    "only_first": dict.fromkeys(("one_step_advantage", "sampled_one_step_target", "improve_policy"), TARGET),
    "only_second": dict.fromkeys(("import mctx", "Search", "Nodes", "expand", "puct", "search"), TARGET),
    "rewritten": {
        "docstring": "another algorithm, another paper; the list of packages above it",
        "make_labels": f"{TARGET}; {BOOTSTRAP}",
        "act": "acting: the search's action in place of the improved policy's",
    },
    "without": {
        "Labels": ("advantage: ", f"{BEHAVIOR}, whose filter needs the advantage"),
        "Targets": ("behavior: ", BEHAVIOR),
        "make_targets": ("behavior", BEHAVIOR),
        "loss": ("behavior", BEHAVIOR),
    },
    "fields": {
        "Args": {
            "behavior_coef": BEHAVIOR,
            "sampling": "of the one-step target",
            "num_simulations": "the default: 4 samples, 20 simulations",
            **dict.fromkeys(("search_depth", "dirichlet_fraction", "temperature", "policy_target", "tau"), TARGET),
            "__post_init__": "limits of these flags, and which of them go together",
        }
    },
}
ALGORITHMS_ATARI = ALGORITHMS | {
    "rewritten": ALGORITHMS["rewritten"]
    | {"CPU_SIZE": "a search turns the errors of a younger model into its targets: it copies the parameters less often"}
}
FRAMES = "frames are stacked, and too many for the device to hold or to label all of them beforehand"
NETWORKS = "networks of convolutions"
ENVIRONMENTS = "EnvPool in place of bsuite"
IMPORTS = "of the other benchmark's environments and of what frames need"
CPU_SIZE = "the paper's size does not suit a CPU"
BENCHMARKS: dict = {
    "only_first": {
        "MLP": NETWORKS,
        **dict.fromkeys(("label_dataset", "update_many"), FRAMES),
        **dict.fromkeys(("BSuite", "make_environment", "import gymnasium"), ENVIRONMENTS),
        "from bsuite.environments import cartpole, catch, mountain_car": IMPORTS,
    },
    "only_second": {
        **dict.fromkeys(("conv", "layer_norm", "ResBlock", "Head"), NETWORKS),
        **dict.fromkeys(("stack_frames", "batches", "read_ahead", "update_windows"), FRAMES),
        **dict.fromkeys(("write_video", "import cv2"), "bsuite has no pictures"),
        **dict.fromkeys(("import envpool", "from envpool.atari.registration import atari_game_list"), IMPORTS),
        **dict.fromkeys(("from collections import deque", "from concurrent.futures import ThreadPoolExecutor"), FRAMES),
        "CPU_SIZE": CPU_SIZE,
    },
    "rewritten": {
        "docstring": "another benchmark, other commands and packages",
        **dict.fromkeys(("from typing", "from collections.abc"), IMPORTS),
        **dict.fromkeys(("Steps", "sample_windows", "make_labels", "update"), FRAMES),
        "per_device": "labels stay shared out over the devices",
        **dict.fromkeys(("find_dataset", "load_dataset", "make_environments"), ENVIRONMENTS),
        "Model": NETWORKS,
        "act": "shapes of observations, in its docstring",
        "evaluate": "the shape of an observation, the noise, the video (see test_the_evaluation_loop)",
        "main": "how batches come",
    },
    "without_second": {"parse_args": ("cpu_size|CPU_SIZE", CPU_SIZE)},
    "fields": {
        "Args": {
            **dict.fromkeys(("env_id", "data_dir", "noise", "__post_init__"), ENVIRONMENTS),
            **dict.fromkeys(("unroll_steps", "bootstrap_steps", "num_bins"), "the paper's value for this benchmark"),
            **dict.fromkeys(("dynamics_width", "channels", "representation_blocks", "dynamics_blocks"), NETWORKS),
            **dict.fromkeys(("prediction_blocks", "head_channels", "head_width"), NETWORKS),
            **dict.fromkeys(("data_place", "updates_per_call"), FRAMES),
            **dict.fromkeys(("eval_interval", "log_interval"), "updates take longer"),
            "capture_video": "bsuite has no pictures",
            **dict.fromkeys(("encoder", "cpu_size"), CPU_SIZE),
        }
    },
}
PAIRS = [
    Pair("rosmo_bsuite.py", "muzero_unplugged_bsuite.py", **ALGORITHMS),
    Pair("rosmo_atari.py", "muzero_unplugged_atari.py", **ALGORITHMS_ATARI),
    Pair("rosmo_bsuite.py", "rosmo_atari.py", **BENCHMARKS),
    Pair("muzero_unplugged_bsuite.py", "muzero_unplugged_atari.py", **BENCHMARKS),
]


def members(text: str) -> Iterator[tuple[str, str]]:
    """Names and texts, comments included, of the members of a class."""
    lines = text.splitlines()
    (definition,) = ast.parse(text).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        name = node.target.id if isinstance(node, ast.AnnAssign) else node.name  # type: ignore[attr-defined,union-attr]
        yield name, "\n".join(lines[node.lineno - 1 : node.end_lineno])


def difference(first: str, second: str) -> str:
    return "\n".join(difflib.unified_diff(first.splitlines(), second.splitlines(), lineterm="", n=1))


def complaints(pair: Pair, first_source: str, second_source: str) -> list[str]:
    """What is out of step between two scripts."""
    first, second = definitions(first_source), definitions(second_source)
    found = []
    for name in first.keys() - second.keys() - pair.only_first.keys():
        found.append(f"{name} is in {pair.first} only")
    for name in second.keys() - first.keys() - pair.only_second.keys():
        found.append(f"{name} is in {pair.second} only")
    common = [name for name in first if name in second]
    if common != [name for name in second if name in first]:
        found.append("what the scripts share stands in different orders")
    for name in common:
        if name in pair.rewritten:
            continue
        ours, theirs = first[name], second[name]
        if name in pair.without:
            ours = "\n".join(line for line in ours.splitlines() if not re.search(pair.without[name][0], line))
        if name in pair.without_second:
            theirs = "\n".join(line for line in theirs.splitlines() if not re.search(pair.without_second[name][0], line))
        if name in pair.fields:
            ours, theirs = (
                "\n".join(text for member, text in members(whole) if member not in pair.fields[name])
                for whole in (ours, theirs)
            )
        if ours != theirs:
            found.append(f"{name} has drifted apart:\n{difference(ours, theirs)}")
    stale = [
        name
        for name in (*pair.rewritten, *pair.without, *pair.without_second, *pair.fields)
        if first.get(name) == second.get(name)
    ]
    stale += [name for name in pair.only_first if name not in first or name in second]
    stale += [name for name in pair.only_second if name not in second or name in first]
    return found + [f"{name} need not be in the list of what may differ" for name in stale]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.first}-{pair.second}")
def test_scripts_are_in_step(pair):
    found = complaints(pair, *((ROOT / name).read_text() for name in (pair.first, pair.second)))
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("pair", PAIRS[:2], ids=lambda pair: f"{pair.first}-{pair.second}")
def test_scripts_differ_in_few_lines(pair):
    first, second = ((ROOT / name).read_text().splitlines() for name in (pair.first, pair.second))
    changed = [line for line in difflib.unified_diff(first, second, lineterm="", n=0) if re.match(r"[+-](?![+-]{2} )", line)]
    assert len(changed) <= 200


def test_the_evaluation_loop():
    """The same text on both benchmarks, but for the shape of an observation, action noise and the video."""
    texts = []
    for name in ("rosmo_bsuite.py", "rosmo_atari.py"):
        body = definitions((ROOT / name).read_text())["evaluate"].split('"""')[2]
        lines = [line for line in body.splitlines() if not re.search("nois|film|video", line)]
        text = "\n".join(lines).replace("np.moveaxis(observation, 1, -1)", "observation")
        texts.append(re.sub(r"\[V, .*\]", "", text))
    assert texts[0] == texts[1], difference(*texts)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight_decay: float = 1e-4", "weight_decay: float = 1e-3"),  # a setting
        ("return scale * x + ", "return (scale) * x + "),  # a line of a function
        ("x itself, with its gradient", "x itself with its gradient"),  # a docstring
        ("def scale_gradient", "def scale_the_gradient"),  # a name
        ('"value_loss": cross_entropy(', '"value_loss": 2 * cross_entropy('),  # a line of a function that may lack others
        ("# ---", "# --"),  # a section's heading
        ("noisy = random.random(num_envs) < args.noise", "noisy = random.random(num_envs) > args.noise"),  # the evaluation
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_EX"),  # the plumbing
    ],
)
def test_drift_is_found(old, new):
    """Each of these changes to one script alone is found."""
    first, second = ((ROOT / name).read_text() for name in (PAIRS[0].first, PAIRS[0].second))
    assert old in second and complaints(PAIRS[0], first, second.replace(old, new))
