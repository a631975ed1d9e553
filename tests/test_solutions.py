"""The code of every collapsed solution runs after the cells above it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from notebook_tools import NOTEBOOKS, error_outputs, run_once, solutions


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_solutions_run(path: Path, run_folder):
    executed = run_once(path, run_folder(path))
    assert executed.error is None, executed.error
    assert executed.solutions, "a notebook has exercises, each with a solution"
    for number, cell in enumerate(executed.solutions, 1):
        assert cell.execution_count, f"solution {number} did not run"
        assert error_outputs(cell) == [], f"solution {number}:\n{cell.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_solutions_are_code(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        for code in solutions(cell.source) if cell.cell_type == "markdown" else []:
            compile(code, path.name, "exec")


def test_solutions_are_found_in_details_only():
    text = (
        "```python\nshown = 1\n```\n<details>\n<summary>Solution</summary>\n\n"
        "```python\nhidden = 2\n```\n\nand\n\n```python\nhidden = 3\n```\n</details>"
    )
    assert solutions(text) == ["hidden = 2\n", "hidden = 3\n"]
