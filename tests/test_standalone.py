"""Each script copied alone into an empty folder; and the list of packages at its top."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.programs import (
    SCRIPTS,
    alone,
    assert_same_state,
    is_atari,
    last_state,
    metrics,
    program,
    run,
    scores,
    small_flags,
    training,
    wait_for,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "flax": "flax",
    "orbax": "orbax-checkpoint",
    "cv2": "opencv-python-headless",
}  # of packages that are not the module's


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_copy_alone(script, request, tmp_path):
    """Trains, evaluates, is killed, resumes and scores, with the numbers of a run in the repository."""
    shutil.copytree(
        request.getfixturevalue("breakout_dataset" if is_atari(script) else "catch_dataset"), tmp_path / "dataset"
    )
    copy = Path(shutil.copy(script.__file__, tmp_path))
    total, every = (12, 5) if is_atari(script) else (240, 60)
    flags = ["--data-dir", "dataset", *small_flags(script), "--eval-episodes", 1]
    flags += ["--total-steps", total, "--eval-interval", every, "--run-dir", "run"]
    process = program(copy, *flags, cwd=tmp_path, env=alone())
    wait_for(lambda: scores(metrics(tmp_path / "run")), process)
    process.kill()
    process.communicate()
    process = program(copy, "--resume", "run", cwd=tmp_path, env=alone())
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and f"{total} updates: return_mean" in out, err
    flags[1] = tmp_path / "dataset"
    assert run(script, [*flags, "--run-dir", tmp_path / "whole"]) == 0
    lines, expected = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert training(lines) == training(expected) and scores(lines) == scores(expected)
    assert_same_state(last_state(script, tmp_path / "run"), last_state(script, tmp_path / "whole"))


def test_a_copy_without_a_dataset(tmp_path):
    copy = Path(shutil.copy(SCRIPTS[0].__file__, tmp_path))
    process = program(copy, cwd=tmp_path, env=alone())
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and out == ""
    assert err == "error: there is no dataset datasets/bsuite/catch: name the folder of one by --data-dir\n"


def test_working_folder(tmp_path, catch_dataset):
    """Called from anywhere, a script of the repository finds and makes datasets/ and runs/ where it is called."""
    shutil.copytree(catch_dataset, tmp_path / "datasets" / "bsuite" / "catch")
    process = program(SCRIPTS[0], *small_flags(SCRIPTS[0]), "--total-steps", 10, cwd=tmp_path)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("catch__rosmo_bsuite__0__")


def requirements(script):
    """The block of inline script metadata (PEP 723), read by the reference implementation's expression."""
    (match,) = re.finditer(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", Path(script.__file__).read_text())
    return tomllib.loads("".join(line.removeprefix("# ").removeprefix("#") for line in match["content"].splitlines(True)))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_packages_of_a_script(script):
    """The block at its top names the packages that it imports, as pyproject.toml does, and Python's version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    block = requirements(script)
    assert block["requires-python"] == project["requires-python"]
    assert set(block["dependencies"]) <= set(project["dependencies"])
    tree = ast.parse(Path(script.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    named = {re.split("[<>=]", requirement)[0] for requirement in block["dependencies"]}
    assert named == {NAMES.get(package, package) for package in packages - {"data"}}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_imports_nothing_of_the_repository(script):
    """But for the recorder, in the function that finds a dataset missing."""
    own = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    found = []
    for function in ast.parse(Path(script.__file__).read_text()).body:
        for node in ast.walk(function):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            found += [(getattr(function, "name", ""), name) for name in names if name.split(".")[0] in own]
    assert found == [("find_dataset", "data.record_atari" if is_atari(script) else "data.record_bsuite")]


def test_nothing_of_data_imports_a_script():
    for path in (ROOT / "data").glob("*.py"):
        assert not re.search(r"(rosmo|muzero_unplugged)_(atari|bsuite)(?!\.py)", path.read_text()), path


@pytest.mark.slow
def test_installing_leaves_no_module_behind(tmp_path):
    """A wheel of this project holds its list of dependencies, and no module whose name could be somebody else's."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(pip, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    assert [path.name.split("-")[0] for path in (tmp_path / "wheel").iterdir()] == ["rosmo"]
