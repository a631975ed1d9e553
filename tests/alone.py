"""Run a script without any name but its own, and without importing the world anew.

Other people's modules took half of the time of a cell to copy, the same ones each time.
So a script starts as a fork of a process that holds those, but neither the kit nor
anything of a test. It runs on the stand-in GPU, see `standin_gpu.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
from multiprocessing import forkserver
from pathlib import Path

import standin_gpu

# Without geopandas, which starts a thread: threads do not survive a fork.
OTHERS = ["lightning", "timm", "peft", "rasterio"]
FORKS = multiprocessing.get_context("forkserver")


def start_forks(environment: dict[str, str]) -> None:
    """Start the process to be forked, once; all forks inherit its environment."""
    FORKS.set_forkserver_preload(OTHERS)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_alone(script: Path, timeout: float = 500) -> tuple[int | None, str]:
    """Run a script in its folder: its exit code, None if it hung, and what it said."""
    process = FORKS.Process(target=_run, args=(script,))
    process.start()
    process.join(timeout)
    code = process.exitcode
    process.kill()
    return code, (script.parent / "output.txt").read_text()


def _run(script: Path) -> None:
    """In the fork."""
    os.chdir(script.parent)
    with open("output.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if standin_gpu.wanted():
        standin_gpu.install()
    runpy.run_path(str(script), run_name="__main__")
