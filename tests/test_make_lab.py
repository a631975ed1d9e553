"""`make lab`: JupyterLab opens the course, whose pictures and links lead somewhere."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from browser import Visit, jupyter_lab
from test_docs import make

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(600)]
NOTEBOOK = "notebooks/00_quickstart.ipynb"
OPENED = "() => window.jupyterapp.shell.currentWidget?.context?.path"


def options() -> list[str]:
    """What `make lab` hands to JupyterLab, which it starts in the repository."""
    command = make("-n", "lab").stdout.splitlines()[-1]
    _, module, *own = shlex.split(command)
    assert [module, own[0]] == ["-m", "jupyterlab"]
    return own[1:]


def test_the_course_is_opened_with_its_pictures_and_links(
    visit: Visit, repo: Path, tmp_path: Path
) -> None:
    page = visit.page
    page.set_default_timeout(120_000)
    with jupyter_lab(repo, options=options()) as lab:
        page.goto(f"{lab.url}/?token={lab.token}")
        first = page.locator(".jp-DirListing-item", has_text=Path(NOTEBOOK).name)
        first.wait_for(state="attached")  # a kept layout may fold the list away
        lab.open(page, NOTEBOOK)
        cover = page.locator("img[src*='00_quickstart.png']")
        cover.wait_for()
        page.wait_for_function("image => image.complete", arg=cover.element_handle())
        assert cover.evaluate("image => image.naturalWidth") > 0
        page.screenshot(path=tmp_path / "lab.png")
        page.evaluate("() => document.querySelector('a[href*=\"results.md\"]').click()")
        page.wait_for_function(f"({OPENED})() === 'docs/results.md'")
