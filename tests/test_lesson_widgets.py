"""The sliders and toggles of notebooks 03 to 06, 10 and 11, in a real JupyterLab."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser import jupyter_lab, write_notebook

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(600)]

# Notebook -> the cell with its widgets, and cells before it that they do not need.
LESSONS = {
    "03_lora_by_hand": ("rank = widgets.IntSlider", ()),
    "04_adapters_and_prompts": (
        "method = widgets.ToggleButtons",
        (
            "by_hand",
            "assert",
            "rows = []",
            "results.",
            "attention",
            "why_not",
            "axes",
            "axis",
        ),
    ),
    "05_deflect_style": ("form = widgets.ToggleButtons", ("show_chip", "BrBG")),
    "06_upetu_style": ("slider = widgets.SelectionSlider", ()),
    "10_continual_pretraining": (
        "ratio = widgets.IntSlider",
        ("assert", "history[part]"),
    ),
    "11_phileo": (
        "slider = widgets.SelectionSlider",
        (
            "families",
            "by_loop",
            "milliseconds",
            "kinds",
            "on_a_circle",
            "geo =",
            "rebuilt",
            "published",
            "assert",
        ),
    ),
}


def cells(repo: Path, name: str) -> list[str]:
    """The code cells that the widgets of a notebook need, and theirs."""
    notebook = nbformat.read(repo / "notebooks" / f"{name}.ipynb", as_version=4)
    last, unneeded = LESSONS[name]
    kept = ['import os\n\nos.environ["GEOPEFT_FAST"] = "1"']
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type != "code" or tags & {"setup", "table"}:
            continue
        if last in cell.source:
            return [*kept, cell.source]
        if not any(text in cell.source for text in unneeded):
            kept.append(cell.source)
    raise AssertionError(f"{name} has no cell with {last!r}")


def slide(page: Any, number: int = 0) -> None:
    """Push a slider one step to the right, with the keyboard."""
    page.locator(".noUi-handle").nth(number).press("ArrowRight")


def click(label: str) -> Callable[[Any], None]:
    return lambda page: page.get_by_role("button", name=label, exact=True).click()


ACTIONS: list[tuple[str, list[Callable[[Any], None]]]] = [
    ("03_lora_by_hand", [slide]),
    ("04_adapters_and_prompts", [click("convpass"), slide]),
    ("05_deflect_style", [click("polar"), slide]),
    ("06_upetu_style", [slide, slide]),
    ("10_continual_pretraining", [slide]),
    ("11_phileo", [slide]),
]


@pytest.mark.parametrize(("name", "actions"), ACTIONS, ids=[a[0] for a in ACTIONS])
def test_widgets_answer(visit, repo: Path, tmp_path: Path, name, actions) -> None:
    write_notebook(tmp_path / "lesson.ipynb", cells(repo, name))
    page = visit.page
    with jupyter_lab(tmp_path) as lab:
        lab.open(page, "lesson.ipynb")
        lab.run_all(page)
        shown = "img.widget-image, .widget-html-content"
        page.locator(shown).first.wait_for(timeout=240_000)
        page.wait_for_timeout(1000)
        for act in actions:
            before = page.evaluate(LOOK, shown)
            act(page)
            changed = "([look, shown, old]) => eval(look)(shown) !== old"
            page.wait_for_function(changed, arg=[LOOK, shown, before], timeout=120_000)
        page.locator(shown).first.screenshot(path=tmp_path / "widget.png")
    visit.clean()


# What the widgets show: the picture's address, or the text.
LOOK = (
    "shown => [...document.querySelectorAll(shown)].map(e => e.src || e.innerText) + ''"
)
