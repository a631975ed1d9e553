"""Make the separate environment in which TerraTorch, the kit's peer, runs.

TerraTorch's pins conflict with the kit's, so it gets an environment of its own in
`build/terratorch/` of this checkout, about 6 GB. 1.2.11 is the newest release that
installs on Python 3.11: later ones want torchgeo 0.9, which needs Python 3.12.

    python benchmarks/terratorch_environment.py

The last line printed is the interpreter's path. An environment that is there already is
left as it is; delete the folder to make it anew.
"""

from __future__ import annotations

import subprocess
import venv
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "terratorch"
# torchgeo 0.10 renamed what TerraTorch imports (torchgeo/terratorch issue 1221). torch
# is the release of the kit: a comparison of systems is not to be one of kernels.
TORCH = f"torch=={version('torch').split('+')[0]}"
PACKAGES = ("terratorch[peft]==1.2.11", "torchgeo<0.9", TORCH)


def make_environment(folder: Path = FOLDER) -> Path:
    """Create the environment unless it is there.

    Args:
        folder: where it lies.

    Returns:
        Path of its Python interpreter.

    Raises:
        subprocess.CalledProcessError: if pip fails; the next call starts afresh.
    """
    python = folder / "bin" / "python"
    finished = folder / "finished"  # an installation that was cut lacks it
    if not finished.is_file():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", *PACKAGES], check=True)
        finished.write_text("\n".join(PACKAGES) + "\n")
    return python


if __name__ == "__main__":
    print(make_environment(), flush=True)
