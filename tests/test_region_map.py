"""The map of notebook 09, worked by hand in a real JupyterLab.

Pictures and numbers are compared, not presence: what a click shows is what the arrays
hold there, and what a box draws lies inside of the box.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import drag, jupyter_lab, write_notebook
from PIL import Image
from test_maps import CLASSES, EVIL, chips, with_probabilities

from geopeft_kit.maps import show_map

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1500)]

SETUP = """
import sys
sys.path[:0] = {paths!r}
import numpy as np
from rasterio.transform import from_bounds
from test_maps import CLASSES, EVIL, chips, with_probabilities
from geopeft_kit.maps import MapLayer, Raster, show_map

def paint(box):
    if box[3] - box[1] < 1e-5:
        raise ValueError("a box without a size " + EVIL)
    red = Raster(np.zeros((8, 8), "u1"), from_bounds(*box, 8, 8), "EPSG:4326")
    return [MapLayer("drawn", red, "classes", classes=[EVIL], colours=["#ff0000"])]

scene = show_map(with_probabilities(chips()), swipe=("image", "lora"), on_box=paint)
"""


def shot(page: Any) -> np.ndarray:
    """The map as the browser shows it, (h, w, 3)."""
    raw = page.locator(".gpk-map").screenshot()
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)


def settled(page: Any, before: np.ndarray | None = None) -> np.ndarray:
    """The map once it stands still, and once it differs from how it was before."""
    last = shot(page)
    for _ in range(120):
        page.wait_for_timeout(500)
        now = shot(page)
        moved = before is None or np.abs(now - before).sum() > 1000
        if moved and np.abs(now - last).max() == 0:
            return now
        last = now
    raise AssertionError("the map did not come to rest, or did not change")


def row(page: Any, name: str) -> Any:
    return page.locator(".gpk-row").filter(has=page.get_by_text(name, exact=True))


def test_the_map_by_hand(visit, tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    setup = SETUP.format(paths=[str(here), str(here.parent)])
    write_notebook(tmp_path / "map.ipynb", [setup, "scene"])
    page = visit.page
    page.set_default_timeout(300_000)
    with jupyter_lab(tmp_path, timeout=400) as lab:
        lab.open(page, "map.ipynb", timeout=400)
        lab.run_all(page)
        page.wait_for_selector(".gpk-map .leaflet-sbs-divider", timeout=300_000)
        settled(page)
        box = page.locator(".gpk-map").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        swipe(page)
        fade(page)
        click(page, middle)
        draw(page, middle)
        draw_with_the_swipe_on(page, middle, tmp_path)
        all_have_names(page)
        assert page.evaluate("window.hacked") is None
        page.screenshot(path=tmp_path / "map.png")
    visit.clean()


def swipe(page: Any) -> None:
    """What the divider passes over changes its layer; the rest stays."""
    before = settled(page)
    handle = page.locator(".leaflet-sbs-range").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"]
    drag(page, (x, y), (x + 90, y))
    changed = (np.abs(settled(page, before) - before).sum(axis=2) > 30).any(axis=0)
    half = changed.size // 2
    passed = changed[half + 12 : half + 75]
    assert passed.mean() > 0.8, "the swiped strip did not change"
    assert changed[: half - 30].mean() < 0.05, "the other side changed"
    page.locator(".gpk-swipe input").uncheck()
    page.locator(".leaflet-sbs-divider").wait_for(state="detached")


def fade(page: Any) -> None:
    """At half opacity a layer is half way between itself and what lies below."""
    sure = row(page, "confidence of lora")
    below = settled(page)
    sure.locator("input[type=checkbox]").check()
    above = settled(page, below)
    handle = sure.locator(".noUi-handle")
    for _ in range(5):
        handle.press("PageDown")
    now, selector = settled(page, above), ".leaflet-layer-5-pane img"
    share = float(page.eval_on_selector(selector, "i => i.style.opacity"))
    assert 0.2 < share < 0.8
    mixed = share * above + (1 - share) * below
    inside = np.abs(above - below).sum(axis=2) > 60
    assert inside.sum() > 1000
    assert np.abs(now - mixed)[inside].mean() < 8
    handle.press("End")


def click(page: Any, middle: tuple[float, float]) -> None:
    """The panel says what the arrays hold at the place that it names."""
    scene = show_map(with_probabilities(chips()))
    for shift in ((31, -47), (-60, 52)):
        panel = page.locator(".gpk-pixel")
        old = panel.inner_text()
        page.mouse.click(middle[0] + shift[0], middle[1] + shift[1])
        changed = "old => document.querySelector('.gpk-pixel').innerText !== old"
        page.wait_for_function(changed, arg=old)
        text = panel.inner_text()
        lat, ns, lon, ew = re.search(r"([\d.]+)° (.), ([\d.]+)° (.)", text).groups()
        lat, lon = float(lat) * (-1 if ns == "S" else 1), float(lon)
        found = {r.layer: r for r in scene.pixel(-lon if ew == "W" else lon, lat)}
        for name, chance in zip(CLASSES, found["lora"].values, strict=True):
            assert f"{name} {chance:.0%}" in text, text
        far = found["distance to training"].text
        assert f"distance to training: {far}" in text
        bands = found["image"]
        spectrum = panel.locator("img.gpk-spectrum")
        pairs = zip(bands.names, bands.values, strict=True)
        expected = ", ".join(f"{name} {value:.3f}" for name, value in pairs)
        assert spectrum.get_attribute("alt") == expected, text
        assert spectrum.evaluate("i => i.complete && i.naturalWidth > 100")


def draw(page: Any, middle: tuple[float, float]) -> None:
    """A box becomes a red layer inside of the box, and nowhere else."""
    x, y = middle
    before = settled(page)
    page.locator(".leaflet-draw-draw-rectangle").click()
    drag(page, (x - 70, y - 50), (x + 40, y + 60))
    row(page, "drawn").wait_for()
    after = settled(page, before)
    red = (after[:, :, 0] > 230) & (after[:, :, 1:] < 30).all(axis=2)
    rows, columns = np.nonzero(red)
    h, w = red.shape
    expected = (h / 2 - 50, h / 2 + 60, w / 2 - 70, w / 2 + 40)
    seen = (rows.min(), rows.max(), columns.min(), columns.max())
    assert np.abs(np.subtract(seen, expected)).max() < 12, (seen, expected)
    assert red.sum() > 0.9 * 110 * 110
    assert ((before[:, :, 0] > 230) & (before[:, :, 1:] < 30).all(axis=2)).sum() == 0
    assert EVIL in page.locator(".gpk-legend").inner_text().replace("\n", " ")


def draw_with_the_swipe_on(
    page: Any, middle: tuple[float, float], folder: Path
) -> None:
    """Boxes leave one divider, which the keyboard moves and the switch takes away."""
    x, y = middle
    swipe = page.locator(".gpk-swipe input")
    swipe.check()
    divider = page.locator(".leaflet-sbs-divider")
    divider.wait_for()
    for number in (2, 3):
        before = settled(page)
        page.locator(".leaflet-draw-draw-rectangle").click()
        drag(page, (x - 150 + 40 * number, y - 90), (x - 120 + 40 * number, y + 20))
        row(page, f"drawn {number}").wait_for()
        settled(page, before)
        assert divider.count() == 1
    before, place = settled(page), divider.bounding_box()["x"]
    for _ in range(10):
        page.locator(".leaflet-sbs-range").press("ArrowRight")
    settled(page, before)
    assert divider.bounding_box()["x"] > place + 40
    page.screenshot(path=folder / "swipe.png")
    page.locator(".gpk-chosen select").select_option("drawn 2")
    page.get_by_role("button", name="remove", exact=True).click()
    row(page, "drawn 2").wait_for(state="detached")
    settled(page)
    assert divider.count() == 1
    swipe.uncheck()
    divider.wait_for(state="detached")
    assert row(page, "drawn 3").count() == 1


def all_have_names(page: Any) -> None:
    """Every slider, field and button of the map says what it is."""
    roles = "[role=slider], input, select, button"
    nameless = page.locator(".gpk-scene").evaluate(
        """(root, roles) => [...root.querySelectorAll(roles)].filter(e => !(
        e.ariaLabel || e.title || e.textContent.trim() ||
        [...(e.labels ?? [])].some(l => l.textContent.trim())))
        .map(e => e.outerHTML.slice(0, 200))""",
        roles,
    )
    assert nameless == []
