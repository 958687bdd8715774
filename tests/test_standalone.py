"""Each script copied alone into an empty folder; and the list of packages at its top."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.programs import (
    SCRIPTS,
    assert_same_state,
    checkpoint_steps,
    is_atari,
    last_state,
    metrics,
    program,
    run,
    scores,
    small_flags,
    wait_for,
)

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"orbax": "orbax-checkpoint", "cv2": "opencv-python-headless"}  # packages whose names are not their modules'
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@pytest.mark.parametrize("script", SCRIPTS[1::2], ids=lambda script: script.__name__)
def test_a_copy_is_killed_and_goes_on(script, request, tmp_path):
    """Alone, under another name, it trains and evaluates; kill -9 at any moment costs what came after the checkpoint.

    The others' main() is the same (test_in_step.py); test_runs.py stops them."""
    every, dataset = (5, "breakout_dataset") if is_atari(script) else (10, "catch_dataset")
    shutil.copytree(request.getfixturevalue(dataset), tmp_path / "dataset")
    copy = shutil.copy(script.__file__, tmp_path / "mine.py")
    flags = [*small_flags(script), "--eval-episodes", 1, "--total-steps", 10**6, "--eval-interval", 2 * every]
    process = program(
        copy, "--data-dir", "dataset", *flags, "--checkpoint-interval", every, "--run-dir", "run", cwd=tmp_path, env=ALONE
    )
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    wait_for(lambda: scores(metrics(run_dir)) and checkpoint_steps(run_dir), process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.communicate()
    step = checkpoint_steps(run_dir)[-1]
    assert step % every == 0
    run(script, ["--resume", run_dir, "--total-steps", step + every])
    run(script, ["--data-dir", tmp_path / "dataset", *flags, "--total-steps", step + every, "--run-dir", whole])
    assert_same_state(last_state(script, run_dir), last_state(script, whole))
    assert metrics(run_dir) == metrics(whole)


def test_a_copy_without_a_dataset(tmp_path):
    copy = shutil.copy(SCRIPTS[0].__file__, tmp_path)
    process = program(copy, cwd=tmp_path, env=ALONE)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and out == "" and err.count("\n") == 1
    assert re.match(r"error: the dataset datasets/bsuite/catch is missing or damaged .*: name another by --data-dir", err)
    assert [path.name for path in tmp_path.iterdir()] == ["rosmo_bsuite.py"]


def test_importing_does_nothing():
    names = ", ".join(script.__name__ for script in SCRIPTS)
    check = f"import sys, jax, {names}; assert not jax._src.xla_bridge._backends; assert 'data' not in sys.modules; print(1)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT).stdout == "1\n"


def requirements(script):
    """The block of inline script metadata (PEP 723), read by the reference implementation's expression."""
    (match,) = re.finditer(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", Path(script.__file__).read_text())
    return tomllib.loads("".join(line.removeprefix("# ").removeprefix("#") for line in match["content"].splitlines(True)))


@each
def test_what_a_script_imports(script):
    """The block at its top names the packages, as pyproject.toml does. Of this repository it imports a recorder, if that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    source, block = Path(script.__file__).read_text(), requirements(script)
    assert block["requires-python"] == project["requires-python"]
    assert set(block["dependencies"]) <= set(project["dependencies"])
    nodes, late = list(ast.walk(ast.parse(source))), set(re.findall(r'import_module\(f?"(\w+)', source))
    modules = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    named = {re.split("[<>=]", requirement)[0] for requirement in block["dependencies"]}
    assert named == {NAMES.get(module, module) for module in (modules | late) - sys.stdlib_module_names - {"data"}}
    own = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not own & modules and own & late == {"data"}


def test_nothing_of_data_imports_a_script():
    for path in (ROOT / "data").glob("*.py"):
        assert not re.search(r"(rosmo|muzero_unplugged)_(atari|bsuite)(?!\.py)", path.read_text()), path
