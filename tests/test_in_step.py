"""The scripts are copies of each other where they say the same thing. What may differ is listed here, with the reason."""

import ast
import difflib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Pair(NamedTuple):
    """Two scripts and the definitions in which they may differ."""

    first: str
    second: str
    only: set[str]  # in one of the two
    rewritten: set[str]  # in both, with texts of their own
    without: dict[str, str]  # the same in both, but for lines that match


def algorithms(benchmark: str, without: dict[str, str]) -> Pair:
    search = {"import mctx", "Nodes", "expand", "puct", "search"}  # in place of the one-step look-ahead
    flags = "behavior_coef|sampling|num_simulations|search_depth|dirichlet_fraction|temperature|policy_target|tau"
    return Pair(
        f"rosmo_{benchmark}.py",
        f"muzero_unplugged_{benchmark}.py",
        only={"one_step_advantage", "sampled_one_step_target"} | search,
        rewritten={
            "docstring",  # another paper; the list of packages above it
            "make_labels",  # the policy target; the bootstrap value, the root's in place of the value head's
            "act",  # by the improved policy or by search
        },
        without={
            "Args": f"^    ({flags}):",
            "Labels": "advantage: ",  # for the filter of the behaviour cloning, which MuZero Unplugged does not have
            **dict.fromkeys(("Targets", "make_targets", "loss"), "behavior"),
            "parse_args": "num_simulations|unused|is_default",  # which of these flags go together
        }
        | without,
    )


def benchmarks(algorithm: str) -> Pair:
    networks = {"MLP", "conv", "layer_norm", "avg_pool", "ResBlock", "Head"}
    # Frames are stacked, and too many for the device to hold or to label all of them beforehand.
    frames = {"label_dataset", "update_many", "stack_frames", "batches", "update_windows", "import itertools"}
    frames |= {"from collections import deque", "from concurrent.futures import ThreadPoolExecutor", "from collections.abc"}
    environments = {
        "import gymnasium",
        "BSUITE",
        "BSuite",
        "for name in BSUITE.keys() - gymnasium.registry.keys()",
        "import envpool",
        "make_environments",
    }
    sizes = "dynamics_width|channels|representation_blocks|dynamics_blocks|prediction_blocks|head_channels|head_width"
    return Pair(
        f"{algorithm}_bsuite.py",
        f"{algorithm}_atari.py",
        only=networks
        | frames
        | environments
        | {"import cv2", "write_video", "CPU_SIZE", "from jax.sharding", "read_frames"},  # BSuite has no pictures
        rewritten={
            "docstring",  # other commands and packages
            "Model",  # networks of convolutions
            "make_labels",  # of windows, of which only the first steps need a policy
            "sample_windows",  # with the steps before them
            "main",  # how environments are made, and how batches come
        },
        without={
            "Args": "^    (env_id|data_dir|noise|data_place|data_readers|rom_dir|unroll_steps|bootstrap_steps|num_bins"
            f"|encoder|{sizes}|eval_interval|eval_max_steps|eval_fraction|log_interval|capture_video|cpu_size):",
            "Steps": '"""|observation: ',
            "load_dataset": r'def |"""|Format:|Raises|fifbbb|uifbbb|np.load|arrays do not|env_id|observation|return'
            "|isfinite|episode|edges|drawn|held_out|longest|kept|^$"  # on BSuite some episodes can be held out
            "|returns|num_bins|reversed|zip",  # and there are few bins
            "act": '"""|representation',  # the shapes of observations
            "evaluate": r'def |"""|nois|film|video|normalised|seed|reset|number, step|steps|cut_|is_playing',  # videos
            "parse_args": "cpu_size|seed",
        },
    )


PAIRS = [
    algorithms("bsuite", {"label_dataset": "zeros = Labels|require"}),
    algorithms("atari", {}),
    benchmarks("rosmo"),
    benchmarks("muzero_unplugged"),
]
NAMES = [f"{pair.first}-{pair.second}" for pair in PAIRS]


def definitions(source: str) -> dict[str, str]:
    """The text of every top-level statement by its name, with the decorators, comments and section headings above it."""
    lines, parts, end = source.splitlines(), {}, 0
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or ast.unparse(node).splitlines()[0].removesuffix(":")
        if isinstance(node, ast.Expr):
            name = "docstring"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        if isinstance(node, ast.If):
            name = "if __name__"
        if isinstance(node, ast.ImportFrom) and node.module in ("collections.abc", "jax.sharding"):
            name = f"from {node.module}"
        parts[name] = "\n".join(lines[end : node.end_lineno]).strip("\n")
        end = node.end_lineno or 0
    return parts


def complaints(pair: Pair, first_source: str, second_source: str) -> list[str]:
    """What is out of step between two scripts, and what the list of what may differ need not name."""
    first, second = definitions(first_source), definitions(second_source)
    found = [f"{name} is in one of them only, or need not be" for name in first.keys() ^ second.keys() ^ pair.only]
    common = [name for name in first if name in second]
    if common != [name for name in second if name in first]:
        found.append("what the scripts share stands in different orders")
    for name in common:
        ours, theirs = first[name].splitlines(), second[name].splitlines()
        if ours == theirs and (name in pair.rewritten or name in pair.without):
            found.append(f"{name} need not be in the list of what may differ")
        if name in pair.without:
            ours, theirs = ([line for line in x if not re.search(pair.without[name], line)] for x in (ours, theirs))
        if ours != theirs and name not in pair.rewritten:
            found += [f"{name} has drifted apart:", *difflib.unified_diff(ours, theirs, lineterm="", n=1)]
    return found


def sources(pair: Pair) -> tuple[str, str]:
    return (ROOT / pair.first).read_text(), (ROOT / pair.second).read_text()


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_scripts_are_in_step(pair):
    found = complaints(pair, *sources(pair))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pair", PAIRS[:2], ids=NAMES[:2])
def test_algorithms_differ_in_few_lines(pair):
    lines = difflib.ndiff(*(source.splitlines() for source in sources(pair)))
    assert sum(line[0] in "+-" for line in lines) <= 180


@pytest.mark.parametrize(
    ("which", "old", "new"),
    [
        (0, "return jnp.sign(x) * (jnp.sqrt(", "return jnp.sign(x) * 1 * (jnp.sqrt("),  # a line of a function
        (0, '"value_loss": cross_entropy(', '"value_loss": 2 * cross_entropy('),  # in a function that may lack other lines
        (2, "key, act_key = jax.random.split(key)", "act_key = key"),  # the evaluation
        (2, "data.is_last[data.is_terminal].all()", "data.is_last.all()"),  # what a dataset must be
    ],
)
def test_drift_is_found(which, old, new):
    """Each of these changes to one script alone is found."""
    first, second = sources(PAIRS[which])
    assert old in second and complaints(PAIRS[which], first, second.replace(old, new))
