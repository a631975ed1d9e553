"""The recipes of docs/first_day.md run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from backbone_table import ROWS, shrink

import geopeft_kit as gk

PAGE = Path(__file__).parent.parent / "docs" / "first_day.md"
RECIPES = re.findall(
    r"^## (.+?)\n.*?```python\n(.*?)```", PAGE.read_text(), re.S | re.M
)


def test_there_are_three_short_recipes():
    assert len(RECIPES) == 3
    assert max(code.count("\n") for _, code in RECIPES) <= 30


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title, _ in RECIPES])
def test_a_recipe_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Small data and a thin Prithvi stand in for what has to be downloaded."""
    monkeypatch.chdir(tmp_path)
    code = dict(RECIPES)[title]
    code = re.sub(r"epochs=\d+", "epochs=1", code)
    if "prithvi" in code:
        scars = gk.simulated_data("burn", chips_per_region=8)
        row = next(row for row in ROWS if row.name == "prithvi_eo_v2_300")
        shrink(monkeypatch, row.name, **row.card)
        upstream = '"data/hls_burn_scars", split="index"'
        code = code.replace(upstream, "FOLDER, test_regions=['savanna']")
        code = code.replace("bands=data.bands)", "bands=data.bands, weights=None)")
        code = f"FOLDER = {str(scars.folder)!r}\n{code}"
    exec(compile(code, title, "exec"), {})
