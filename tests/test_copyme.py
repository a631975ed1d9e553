"""The cell to copy into one's own project runs alone, in an empty process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nbformat
import pytest
from notebook_tools import NOTEBOOKS, offline_environment, python_command, tagged


def run_alone(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code as a script in an empty folder and an empty process, offline."""
    script = folder / "copied.py"
    script.write_text(code)
    environment = offline_environment(folder) | {"MPLBACKEND": "Agg"}
    return subprocess.run(
        python_command(script),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_copyme_runs_alone(path: Path, tmp_path: Path):
    (cell,) = tagged(nbformat.read(path, as_version=4), "copyme")
    finished = run_alone(cell.source, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.slow
def test_a_cell_that_leans_on_others_is_found(tmp_path: Path):
    finished = run_alone("print(model)", tmp_path)
    assert finished.returncode != 0
    assert "NameError" in finished.stderr
