"""The setup cells and the maps of the course, in an environment like Colab's."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import nbformat
import pytest
from browser import Visit
from colab import PINS, STAND_IN, Colab
from notebook_tools import NOTEBOOKS, REPO, error_outputs, tagged
from packaging.requirements import Requirement

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1800)]

VIEW = "application/vnd.jupyter.widget-view+json"
# Those with leafmap come last: up to there it must not be installed.
WITH_A_MAP = ("00", "06", "13", "09", "14")
WITH_LEAFMAP = ("09", "14")


def notebook_of(number: str) -> nbformat.NotebookNode:
    path = next(path for path in NOTEBOOKS if path.name.startswith(number))
    return nbformat.read(path, as_version=4)


def test_the_environment_is_colabs(colab: Colab) -> None:
    lines = [
        line for line in PINS.read_text().splitlines() if line[:1] not in ("", "#")
    ]
    versions = {
        name.lower().replace("_", "-"): v for name, v in colab.versions().items()
    }
    for pin in map(Requirement, lines):
        assert pin.specifier.contains(versions[pin.name]), pin
    assert "geopeft-kit" not in versions


def install(colab: Colab, number: str, folder: Path) -> None:
    """Run the setup cell of a notebook."""
    only = nbformat.v4.new_notebook(cells=tagged(notebook_of(number), "setup"))
    _, setup = colab.execute(only, folder).cells
    assert [output.text for output in setup.outputs] == ["custom widgets enabled\n"]


@pytest.mark.parametrize("number", WITH_A_MAP)
def test_notebook_shows_its_map(
    number: str, colab: Colab, visit: Visit, tmp_path: Path
) -> None:
    """Its setup cell installs the kit and changes nothing else; its cells run offline.

    The page of each map, which the cell gives beside the widget, is then opened.
    """
    before = colab.versions()
    install(colab, number, tmp_path)
    after = colab.versions()
    assert before.items() <= after.items()
    assert "geopeft-kit" in after
    assert ("leafmap" in after) == (number in WITH_LEAFMAP)

    executed = colab.execute(notebook_of(number), tmp_path, offline=True)
    outputs = [o for cell in executed.cells for o in cell.get("outputs", [])]
    errors = [error for cell in executed.cells for error in error_outputs(cell)]
    assert errors == []
    states = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]
    alive = [o for o in outputs if VIEW in o.get("data", {})]
    for output in alive:
        assert output.data[VIEW]["model_id"] in states["state"]
        # Colab's widget manager is told to display messages only, not to results.
        assert output.output_type == "display_data"
    shown = "\n".join(output.data["text/plain"] for output in alive)
    assert ("Explorer(" in shown) == (number == "13")
    maps = [o for o in alive if o.data["text/plain"].startswith("SceneMap(")]
    assert maps, "no cell gives a map"
    models = {one["model_name"] for one in states["state"].values()}
    assert "LeafletMapModel" in models
    for position, output in enumerate(maps):
        look_at(visit, output.data["text/html"], tmp_path / f"{number}_{position}")
    visit.clean()


def look_at(visit: Visit, page: str, name: Path) -> None:
    """Open the page of a map and check that its pictures are to be seen."""
    path = name.with_suffix(".html")
    path.write_text(f"<!doctype html><meta charset='utf-8'>{page}")
    visit.page.goto(path.as_uri())
    frame = visit.page.frame_locator("iframe")
    frame.locator(".leaflet-image-layer").first.wait_for(timeout=60_000)
    sizes = frame.locator(".leaflet-image-layer").evaluate_all(PICTURES)
    assert all(min(own) > 0 for own, _ in sizes), "a picture did not arrive"
    assert any(min(shown) > 100 for _, shown in sizes), "no picture is to be seen"
    box = frame.locator(".leaflet-container").first.bounding_box()
    assert box["width"] > 200 and box["height"] > 200
    picture = REPO / "build" / "colab" / f"{name.name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    visit.page.screenshot(path=picture, full_page=True)


# Of each picture: its own width and height, and those on the screen, 0 if it is off.
PICTURES = """all => all.map(i => {
  const box = i.getBoundingClientRect();
  return [[i.naturalWidth, i.naturalHeight], [box.width, box.height]];
})"""


def test_an_old_runtime_ends_in_one_sentence(colab: Colab, tmp_path: Path) -> None:
    """A kit that wants a newer torch than the runtime has."""
    facts = "geopeft_kit-99.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: geopeft-kit\nVersion: 99.0\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(tmp_path / "geopeft_kit-99.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{facts}/METADATA", f"{metadata}Requires-Dist: torch>=99\n")
        file.writestr(f"{facts}/WHEEL", wheel)
        file.writestr(f"{facts}/RECORD", "")
    (setup,) = tagged(notebook_of("00"), "setup")
    said = colab.run("-c", STAND_IN + setup.source, folder=tmp_path).splitlines()
    assert len(said) == 2, said
    assert re.fullmatch(r"This runtime is too old: .* run this cell again\.", said[1])
