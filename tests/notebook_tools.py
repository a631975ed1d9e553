"""Read, split and run the notebooks: shared by the tests of the course."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
DETAILS = re.compile(r"<details\b[^>]*>.*?</details>", re.DOTALL)
FENCE = re.compile(r"^[ ]*```python\s*\n(.*?)^[ ]*```", re.DOTALL | re.MULTILINE)

# Python imports this file at start-up: whatever a cell calls, only connections to
# this machine (the kernel's own sockets) get through.
OFFLINE = """
import socket

_connect = socket.socket.connect
_local = ("127.0.0.1", "::1", "localhost")


def connect(self, address):
    if isinstance(address, tuple) and address[0] not in _local:
        raise OSError(f"the network is off in this test; refused {address}")
    return _connect(self, address)


socket.socket.connect = connect
"""

# Runs before a notebook's own cells.
DEVICE = """
import standin_gpu

if standin_gpu.wanted():
    standin_gpu.install()
"""


def tags(cell: NotebookNode) -> list[str]:
    """Tags of a cell."""
    return list(cell.metadata.get("tags", []))


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """Cells that carry a tag."""
    return [cell for cell in notebook.cells if tag in tags(cell)]


def solutions(markdown: str) -> list[str]:
    """Code of every collapsed solution in a markdown cell."""
    return [
        code for block in DETAILS.findall(markdown) for code in FENCE.findall(block)
    ]


def offline_environment(folder: Path) -> dict[str, str]:
    """Environment of a process in fast mode that cannot leave this machine."""
    guard = folder / "offline"
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(OFFLINE)
    inherited = os.environ.get("PYTHONPATH")
    tests = str(Path(__file__).parent)
    path = os.pathsep.join([str(guard), tests, *([inherited] if inherited else [])])
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return kept | {
        "PYTHONPATH": path,
        "GEOPEFT_FAST": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }


@dataclass
class Executed:
    """One run of a notebook: its cells with outputs, or the error that ended it."""

    notebook: NotebookNode
    seconds: float
    error: str | None
    solutions: list[NotebookNode] = field(default_factory=list)


def with_solutions(notebook: NotebookNode) -> tuple[NotebookNode, list[NotebookNode]]:
    """Copy of a notebook in which each collapsed solution follows as a code cell.

    A solution may fail without ending the run; its own test then says so. The cell to
    copy, the last one, is left out: `test_copyme.py` runs it, and alone.
    """
    added: list[NotebookNode] = []
    cells: list[NotebookNode] = []
    for cell in notebook.cells:
        if "copyme" in tags(cell):
            continue
        cells.append(cell)
        for code in solutions(cell.source) if cell.cell_type == "markdown" else []:
            added.append(new_code_cell(code))
            added[-1].metadata.tags = ["solution", "raises-exception"]
            cells.append(added[-1])
    copy = nbformat.from_dict({**notebook, "cells": cells})
    return copy, [cell for cell in copy.cells if "solution" in tags(cell)]


def run(notebook: NotebookNode, folder: Path, timeout: int = 600) -> Executed:
    """Run a notebook offline, in fast mode, in `folder`, its solutions included.

    It runs on the stand-in GPU: what a GPU would refuse, fails here.
    """
    notebook, added = with_solutions(notebook)
    notebook.cells.insert(0, new_code_cell(DEVICE))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    start, error = time.perf_counter(), None
    try:
        client.execute(env=offline_environment(folder))
    except CellExecutionError as failure:
        error = str(failure)
    del notebook.cells[0]
    return Executed(notebook, time.perf_counter() - start, error, added)


@lru_cache
def run_once(path: Path, folder: Path) -> Executed:
    """The one run of a notebook that all tests of a session look at."""
    return run(nbformat.read(path, as_version=4), folder)


def error_outputs(cell: NotebookNode) -> list[str]:
    """Errors that a cell shows."""
    return [
        f"{output.ename}: {output.evalue}"
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
