"""Continuous integration: the workflows, the hooks and .ci/run ask for what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from notebook_tools import REPO
from test_docs import PROJECT, make, make_targets

WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
EACH = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def steps(path: Path) -> list[dict]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@EACH
def test_a_workflow_runs_real_targets(path: Path) -> None:
    commands = [step["run"] for step in steps(path) if "run" in step]
    targets = [re.fullmatch(r"make ([a-z]+) PYTHON=python", c) for c in commands]
    assert targets and all(targets), commands
    assert {found[1] for found in targets if found} <= make_targets()


@EACH
def test_the_actions_of_a_workflow_have_a_version(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", name) for name in used)


def test_between_them_the_workflows_do_everything() -> None:
    found = {
        path.stem: {step["run"].split()[1] for step in steps(path) if "run" in step}
        for path in WORKFLOWS
    }
    assert found == {"ci": {"lint", "quick"}, "nightly": {"test", "gallery"}}
    jobs = yaml.safe_load(WORKFLOWS[0].read_text())["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python-version"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_hooks_are_pinned() -> None:
    config = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["id"] for hook in hooks} == {"nbstripout", "ruff-check", "ruff-format"}
    for hook in hooks:
        (package,) = hook["additional_dependencies"]
        program, version = package.split("==")
        assert hook["entry"].split()[0] == program
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with .ci/run, where `make` notes what it is asked for.

    It fails for the target that the environment variable FAILS names.
    """
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPO / ".ci" / "run", tmp_path / ".ci" / "run")
    programs = {
        "make": """echo "$@" >> asked
            [ "$1" != "$FAILS" ] || exit 2
            mkdir -p .venv/bin
            printf '#!/bin/sh\\necho 11' > .venv/bin/python
            chmod +x .venv/bin/python""",
        "chromium": "",
    }
    for name, text in programs.items():
        write_program(tmp_path / "bin" / name, text)
    for name in ("bash", "chmod", "dirname", "mkdir", "rm"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def ci_run(checkout: Path, fails: str = "") -> tuple[int, list[str], str]:
    """Exit status, targets that were made, and what was printed."""
    environment = {
        "PATH": str(checkout / "bin"),
        "PYENV_ROOT": str(checkout / "pyenv"),
        "HOME": str(checkout),
        "FAILS": fails,
    }
    run = subprocess.run(
        [checkout / ".ci" / "run"], env=environment, capture_output=True, text=True
    )
    asked = (checkout / "asked").read_text().splitlines()
    return run.returncode, asked, run.stdout + run.stderr


QUICK = "quick VENV=.venv-newest PYTHON="


def test_ci_runs_the_everyday_tests_on_the_newest_python(checkout: Path) -> None:
    pyenv = checkout / "pyenv" / "versions"
    for minor in (11, 12):
        write_program(pyenv / f"3.{minor}.1" / "bin" / "python", f"echo 3.{minor}")
    write_program(checkout / "bin" / "python3.13", "exit 127")  # a shim without one
    status, asked, printed = ci_run(checkout)
    newest = pyenv / "3.12.1" / "bin" / "python"
    assert (status, asked) == (0, [".venv/.python", f"{QUICK}{newest}", "test"])
    assert "everyday tests run on 3.12" in printed
    write_program(checkout / "bin" / "python3.13", "echo 3.13")
    assert ci_run(checkout)[1][-2:] == [f"{QUICK}python3.13", "test"]


def test_ci_says_that_there_is_no_newer_python(checkout: Path) -> None:
    status, asked, printed = ci_run(checkout)
    assert (status, asked) == (0, [".venv/.python", "test"])
    assert "no newer Python was found" in printed


@pytest.mark.parametrize("fails", ["quick", "test"])
def test_ci_fails_with_either_run(checkout: Path, fails: str) -> None:
    write_program(checkout / "bin" / "python3.13", "echo 3.13")
    status, asked, _ = ci_run(checkout, fails)
    assert status != 0
    assert asked[-1] == "test", "the whole suite runs all the same"


def test_an_environment_of_another_python_is_not_taken_for_the_one_asked_for(
    tmp_path: Path,
) -> None:
    write_program(tmp_path / "bin" / "python", "echo 3.10")
    asked = make("-n", f"VENV={tmp_path}", f"PYTHON={sys.executable}", "test")
    assert asked.returncode != 0
    assert "has Python 3.10" in asked.stderr
    taken = make("-n", f"VENV={tmp_path}", "test")
    assert taken.returncode == 0, taken.stderr
