"""A real headless Chromium for tests: pages from a file, or from a JupyterLab.

Debian's own Chromium is driven through playwright, so nothing is downloaded. Without
it the tests are skipped; with REQUIRE_BROWSER=1 they fail instead. Every request that
leaves this machine is noted in `Visit.external` and refused.

`conftest.py` hands the fixtures `chromium` and `visit` to every test.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

HERE = {"127.0.0.1", "localhost"}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def missing(reason: str) -> None:
    """Skip, or fail where a browser is asked for by REQUIRE_BROWSER=1."""
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(f"{reason}; REQUIRE_BROWSER=1 makes this a failure")


def chromium_path() -> str | None:
    """The system's Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@dataclass
class Visit:
    """A page, and what it did: requests that left this machine, errors it threw."""

    page: Any
    external: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def clean(self) -> None:
        """No request left this machine and no script failed."""
        assert self.external == []
        assert self.errors == []


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One Chromium for the tests of a file.

    While it lives, playwright runs an event loop in this thread, and tests that run one
    themselves fail.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    path = chromium_path()
    if path is None:
        missing("no Chromium was found on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Visit]:
    """A fresh page of 1100 x 700 pixels with no way out of this machine."""
    context = chromium.new_context(viewport={"width": 1100, "height": 700})
    visit = Visit(context.new_page())

    def judge(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("file", "data", "blob") or address.hostname in HERE:
            route.continue_()
        else:
            visit.external.append(route.request.url)
            route.abort()

    context.route("**/*", judge)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    yield visit
    context.close()


# --- JupyterLab and Notebook 7 --------------------------------------------------------

# Module of a front end -> where it opens a notebook, and the class of its settings.
FRONT_ENDS = {
    "jupyterlab": ("doc/tree", "LabApp"),
    "notebook": ("notebooks", "JupyterNotebookApp"),
}


@dataclass
class Lab:
    """A running JupyterLab or Notebook 7: its address, token and folder."""

    url: str
    token: str
    folder: Path
    path: str = "doc/tree"

    def open(self, page: Any, notebook: str, timeout: float = 90) -> None:
        """Open a notebook alone in the window and wait until its kernel answers."""
        address = f"{self.url}/{self.path}/{notebook}?token={self.token}&reset"
        page.goto(address, timeout=timeout * 1e3)
        page.wait_for_function("window.jupyterapp !== undefined", timeout=timeout * 1e3)
        # Cells sent before the kernel is connected are lost without a word.
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=timeout * 1e3)
        page.evaluate(READY)

    def run_all(self, page: Any) -> None:
        """Run every cell and wait until the kernel has finished; errors are shown."""
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        failed = page.locator("[data-mime-type='application/vnd.jupyter.error']")
        assert failed.count() == 0, "\n".join(failed.all_inner_texts())


READY = """async () => {
  const widget = window.jupyterapp.shell.currentWidget;
  await widget.context.ready;
  await widget.context.sessionContext.ready;
  await widget.context.sessionContext.session.kernel.info;
}"""


@contextlib.contextmanager
def jupyter_lab(
    folder: Path,
    timeout: float = 90,
    front_end: str = "jupyterlab",
    options: Sequence[str] = (),
) -> Iterator[Lab]:
    """A JupyterLab on a free port of 127.0.0.1, stopped at the end.

    Args:
        folder: Its notebooks.
        timeout: Seconds until it has to answer.
        front_end: "jupyterlab", or "notebook" for Notebook 7.
        options: Further options of its command line.
    """
    path, settings = FRONT_ENDS[front_end]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = "test"
    command = [
        sys.executable, "-m", front_end, "--no-browser", "--allow-root",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--{settings}.expose_app_in_browser=True", *options,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as own:
        # The question about Jupyter's news would cover a corner of the notebook.
        quiet = Path(own) / "@jupyterlab" / "apputils-extension"
        quiet.mkdir(parents=True)
        (quiet / "notification.jupyterlab-settings").write_text(
            '{"fetchNews": "false", "checkForUpdates": false}'
        )
        environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": own}
        log = Path(own) / "jupyterlab.log"
        with open(log, "w") as file:
            server = subprocess.Popen(
                command,
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/api?token={token}", server, log, timeout)
            yield Lab(url, token, folder, path)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for(url: str, server: subprocess.Popen, log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def write_notebook(path: Path, cells: list[str]) -> Path:
    """A notebook of code cells."""
    import nbformat

    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    path.write_text(json.dumps(made))
    return path


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press the mouse at one place and let it go at another."""
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=6)
    page.mouse.up()
