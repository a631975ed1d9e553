"""An environment like Colab's: its packages, and a stand-in for `google.colab`.

What Colab ships is pinned in `colab.txt`. The environment is built by uv, apart from
the one that runs the tests; pip installs the kit into it as the setup cell says.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from notebook_tools import REPO, offline_environment, tags

PINS = Path(__file__).with_name("colab.txt")
VERSION = "3.12"  # Colab's Python

# Colab imports its own module before the first cell.
STAND_IN = """
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

names = ("google", "google.colab", "google.colab.output")
google, colab, output = (module_from_spec(ModuleSpec(n, None)) for n in names)
google.colab, colab.output = colab, output
output.enable_custom_widget_manager = lambda: print("custom widgets enabled")
sys.modules |= dict(zip(names, (google, colab, output)))
"""


def missing(reason: str) -> None:
    """Skip, or fail where this environment is asked for by REQUIRE_COLAB=1."""
    if os.environ.get("REQUIRE_COLAB") == "1":
        pytest.fail(f"REQUIRE_COLAB=1, but {reason}")
    pytest.skip(f"{reason}; REQUIRE_COLAB=1 makes this a failure")


@dataclass
class Colab:
    """The environment, the wheel of the kit, and how code is run there."""

    folder: Path
    wheel: Path

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def environment(self) -> dict[str, str]:
        """Environment of its processes: its programs first, pip as it comes."""
        path = os.pathsep.join([str(self.python.parent), os.environ["PATH"]])
        own = {"PATH": path, "JUPYTER_PATH": str(self.folder / "jupyter")}
        # A machine's pip may have constraints, and Colab's has none.
        return os.environ | own | {"PIP_CONFIG_FILE": os.devnull}

    def run(self, *arguments: str, folder: Path | None = None) -> str:
        """What its Python prints, its errors included."""
        done = subprocess.run(
            [self.python, *arguments], cwd=folder, env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        return done.stdout

    def versions(self) -> dict[str, str]:
        """Version of each package that is installed."""
        found = json.loads(self.run("-m", "pip", "list", "--format=json"))
        return {one["name"]: one["version"] for one in found}

    def execute(
        self, notebook: NotebookNode, folder: Path, offline: bool = False
    ) -> NotebookNode:
        """Run a notebook, the cell to copy left out, in fast mode if offline."""
        cells = [cell for cell in notebook.cells if "copyme" not in tags(cell)]
        made = NotebookNode({**notebook, "cells": [new_code_cell(STAND_IN), *cells]})
        environment = self.environment()
        if offline:
            environment = offline_environment(folder) | {
                name: environment[name] for name in ("PATH", "PIP_CONFIG_FILE")
            }
        shutil.copy(self.wheel, folder)
        client = NotebookClient(
            made, timeout=900, kernel_name="colab",
            resources={"metadata": {"path": str(folder)}},
        )  # fmt: skip
        return client.execute(env=environment)


def find_python() -> str:
    """A Python of Colab's version; pyenv's are not on the PATH."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{VERSION}.*/bin/python"))
    for python in [f"python{VERSION}", *map(str, pyenv)]:
        try:
            subprocess.run([python, "-c", ""], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    return VERSION  # uv may have or fetch one


def uv(*arguments: str | Path) -> None:
    """Run uv; without it or without a package index there is no environment."""
    try:
        subprocess.run(["uv", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        missing("uv is not installed")
    except subprocess.CalledProcessError as error:
        missing(f"uv {arguments[0]} failed: {error.stderr.strip()}")


@pytest.fixture(scope="session")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Colab]:
    """The environment as Colab hands it over: without the kit."""
    folder = tmp_path_factory.mktemp("colab")
    uv("venv", "--python", find_python(), folder / "venv")
    python = folder / "venv" / "bin" / "python"
    ours = [
        f"{name}=={importlib.metadata.version(name).split('+')[0]}"
        for name in ("torch", "torchvision")
    ]
    uv("pip", "install", "--python", python, "-r", PINS, *ours)
    uv("build", "--wheel", "--python", python, "--out-dir", folder, REPO)
    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    launch = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": launch, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    made = Colab(folder, next(folder.glob("*.whl")))
    said = made.run("-m", "pip", "install", "--dry-run", "--no-deps", "lightning")
    if "Would install" not in said:
        missing(f"pip finds no package index: {said.strip()[-300:]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        yield made
    shutil.rmtree(folder / "venv")
