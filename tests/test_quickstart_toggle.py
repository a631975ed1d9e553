"""The quickstart's toggle, clicked in a real JupyterLab."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from browser import jupyter_lab, write_notebook
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(600)]

# The cells that the toggle needs; the comparison and the map take a minute each.
NEEDED = ("FAST =", "import geopeft_kit", "samples =", "backbone = gk", "picture")
LEFT_OUT = ("gk.compare", "import ipywidgets as widgets\n\nmethod", "Image(picture_of")


def toggle_cells(repo: Path) -> list[str]:
    notebook = nbformat.read(repo / "notebooks" / "00_quickstart.ipynb", as_version=4)
    cells = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code"
        and not {"setup", "copyme", "check"} & set(cell.metadata.get("tags", []))
        and any(text in cell.source for text in NEEDED)
        and not any(text in cell.source for text in LEFT_OUT)
    ]
    return ['import os\n\nos.environ["GEOPEFT_FAST"] = "1"', *cells]


def test_the_toggle_redraws(visit, repo: Path, tmp_path: Path) -> None:
    write_notebook(tmp_path / "toggle.ipynb", toggle_cells(repo))
    page = visit.page
    with jupyter_lab(tmp_path) as lab:
        lab.open(page, "toggle.ipynb")
        lab.run_all(page)
        picture = page.locator("img.widget-image")
        picture.wait_for(timeout=180_000)
        page.wait_for_timeout(1000)
        seen = [picture.get_attribute("src")]
        for name in ("lora", "fcn", "frozen"):
            page.get_by_role("button", name=name, exact=True).click()
            page.wait_for_function(
                "old => document.querySelector('img.widget-image').src !== old",
                arg=page.evaluate("document.querySelector('img.widget-image').src"),
                timeout=120_000,
            )
            page.wait_for_timeout(300)
            shot = tmp_path / f"{name}.png"
            picture.screenshot(path=shot)
            seen.append(Image.open(shot).convert("RGB").tobytes())
        assert len(set(seen)) == 4, "two choices drew the same picture"
    visit.clean()
