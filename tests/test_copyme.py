"""The cell to copy into one's own project runs alone, without a name of another."""

from __future__ import annotations

from pathlib import Path

import alone
import nbformat
import pytest
from notebook_tools import NOTEBOOKS, offline_environment, tagged


@pytest.fixture(scope="module", autouse=True)
def _forks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Scripts run offline and in fast mode."""
    environment = offline_environment(tmp_path_factory.mktemp("forks"))
    alone.start_forks(environment | {"MPLBACKEND": "Agg"})


def run_alone(code: str, folder: Path) -> tuple[int | None, str]:
    """Run code as a script in an empty folder, offline."""
    script = folder / "copied.py"
    script.write_text(code)
    return alone.run_alone(script)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_copyme_runs_alone(path: Path, tmp_path: Path):
    (cell,) = tagged(nbformat.read(path, as_version=4), "copyme")
    code, said = run_alone(cell.source, tmp_path)
    assert code == 0, said[-3000:]


@pytest.mark.slow
def test_a_cell_that_leans_on_others_is_found(tmp_path: Path):
    code, said = run_alone("print(model)", tmp_path)
    assert code == 1
    assert "NameError" in said


@pytest.mark.slow
def test_a_cell_finds_nothing_and_cannot_leave(tmp_path: Path):
    """No name, no kit in memory, fast mode, and no way out of this machine."""
    lines = (
        "names = [name for name in dir() if not name.startswith('__')]",
        "import os, socket, sys",
        "assert not names, names",
        "assert __name__ == '__main__'",
        "assert not [m for m in sys.modules if m.startswith('geopeft_kit')]",
        "assert os.environ['GEOPEFT_FAST'] == '1'",
        "socket.create_connection(('192.0.2.1', 80), timeout=5)",
    )
    code, said = run_alone("\n".join(lines), tmp_path)
    assert code == 1
    assert said.rstrip().splitlines()[-1].startswith("OSError: the network is off")
