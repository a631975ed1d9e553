"""The exported page holds figures and tables, and asks for nothing outside."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebook_form import anchors, repository
from notebook_tools import NOTEBOOKS, REPO, run_once

spec = importlib.util.spec_from_file_location(
    "export_notebook", REPO / "docs" / "export_notebook.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

TABLE = """
class Table:
    def _repr_html_(self):
        return ('<table><tr><th></th><th colspan="2">score</th></tr>'
                '<tr><th>LoRA</th><td>1.0</td><td>wide cell</td></tr></table>')
Table()
"""
FIGURE = """
import matplotlib.pyplot as plt
plt.plot([0, 1])
plt.show()
"""
FRAME = """
from html import escape
from IPython.display import HTML
page = "<b id='inside'>map</b><script>document.title = 'drawn'</script>"
HTML(f'<iframe srcdoc="{escape(page)}"></iframe>')
"""
CONTROL = """
import ipywidgets
ipywidgets.IntSlider()
"""
BARS = """
from tqdm.notebook import tqdm
list(tqdm(range(5), "kept"))
list(tqdm(range(5), "gone", leave=False))
ipywidgets.FloatProgress(value=3, max=4)
"""
LINKS = "[a](00_page.ipynb) [b](01_other.ipynb#part) [c](../docs/d.md#part) [d](#up)"


def write(path: Path, *sources: str) -> Path:
    cells = [
        new_markdown_cell("# 00 A page\n[![badge](https://x.org/b.svg)](https://x.org)")
    ]
    cells += [new_code_cell(source.strip()) for source in sources]
    cells[1].metadata.tags = ["table"]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("export")
    path = write(folder / "00_page.ipynb", TABLE, FIGURE, FRAME, CONTROL, BARS)
    before = path.read_bytes()
    result = tool.export(path, folder / "out")
    assert path.read_bytes() == before, "the notebook itself must not change"
    return result


@pytest.mark.slow
def test_page_stands_alone(exported):
    page = exported[0].read_text()
    assert tool.external_requests(page) == []
    assert re.search(r'<img[^>]*src="data:image/png;base64', page)
    assert "srcdoc=" in page
    assert page.count(tool.NO_WIDGET) == 1, "the slider's, and no bar's"
    assert "widget-state" not in page
    assert [p.name for p in exported[0].parent.iterdir()] == ["00_page.html"]


@pytest.mark.slow
def test_a_bar_shows_its_last_text(exported):
    page = BeautifulSoup(exported[0].read_text(), "html.parser")
    texts = [output.get_text().strip() for output in page.select("pre")]
    assert [text[:14] for text in texts if text.startswith("kept: ")] == [
        "kept: 100% 5/5"
    ]
    assert "3 of 4" in texts
    assert not [text for text in texts if text.startswith("gone: ")]


@pytest.mark.slow
def test_table_is_printed_with_every_column(exported):
    assert exported[1] == ["      score\nLoRA  1.0    wide cell"]


@pytest.mark.slow
@pytest.mark.browser
def test_browser_asks_for_nothing(exported, browser_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    asked: list[str] = []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(exported[0].as_uri())
        page.wait_for_load_state("load")
        inside = page.frames[-1].locator("#inside").inner_text()
        width = page.locator("img").first.evaluate("image => image.naturalWidth")
        browser.close()
    assert inside == "map"
    assert width > 0
    assert [
        u for u in asked if not u.startswith(("file:", "data:", "blob:", "about:"))
    ] == []


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://x.org/a.js"></script>',
        "<script async src=//x.org/a.js></script>",
        '<link rel="stylesheet" href="http://x.org/a.css">',
        '<style>@import "https://x.org/a.css";</style>',
        "<style>body { background: url(https://x.org/a.png) }</style>",
        '<iframe srcdoc="&lt;img src=&quot;https://x.org/a.png&quot;&gt;"></iframe>',
    ],
)
def test_an_outside_address_is_found(text: str):
    assert len(tool.external_requests(text)) == 1


def test_a_link_to_click_is_no_request():
    assert tool.external_requests('<a href="https://x.org">x</a>') == []


def test_text_without_a_table_is_kept():
    assert tool.table_text({"text/plain": "a b"}) == "a b"
    assert tool.table_text({"text": "streamed"}) == "streamed"


@pytest.mark.slow
def test_a_failing_notebook_fails_and_leaves_no_page(tmp_path, capsys):
    path = write(tmp_path / "00_page.ipynb", "1 / 0")
    assert tool.main([str(path), "--out", str(tmp_path / "out")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_solution_stays_inside_its_details():
    code = '<div class="highlight"><pre>\nx = 1\n</pre></div>'
    page = f"<details>\n<summary>Solution</summary>\n</details>\n{code}\n<p>next</p>"
    folded = tool.fold_solutions(page)
    assert folded.index("x = 1") < folded.index("</details>") < folded.index("next")
    assert tool.fold_solutions(folded) == folded


@pytest.mark.parametrize(
    ("out", "root"),
    [
        ("build/tour", "../.."),
        (None, f"{repository()}/blob/main"),
    ],
)
def test_links_lead_on_from_the_page(out: str | None, root: str, tmp_path: Path):
    notebook = new_notebook(cells=[new_markdown_cell(LINKS)])
    folder = REPO / "notebooks"
    page_folder = REPO / out if out else tmp_path
    tool.turn_links(notebook, folder, page_folder, [folder / "00_page.ipynb"])
    found = re.findall(r"\]\(([^)]*)\)", notebook.cells[0].source)
    files = ["notebooks/01_other.ipynb#part", "docs/d.md#part"]
    assert found == ["00_page.html", *(f"{root}/{file}" for file in files), "#up"]


def test_a_link_to_a_notebook_leads_to_a_page_that_is_there(tmp_path: Path):
    (tmp_path / "01_other.html").write_text("")
    notebook = new_notebook(cells=[new_markdown_cell(LINKS)])
    tool.turn_links(notebook, REPO / "notebooks", tmp_path, [])
    assert "(01_other.html#part)" in notebook.cells[0].source


def dead_links(page: Path) -> list[str]:
    """Links of a page that lead nowhere, as far as it can be told with no network."""
    dead = []
    for link in BeautifulSoup(page.read_text(), "html.parser").select("a[href]"):
        path, _, part = unquote(link["href"]).partition("#")
        file = page.parent / path if path else page
        if path.startswith(own := f"{repository()}/blob/main/"):
            file = REPO / path.removeprefix(own)
        elif re.match(r"[a-z]+:", path):
            continue
        if not file.exists() or (part and part not in parts(file)):
            dead.append(link["href"])
    return dead


def parts(file: Path) -> set[str]:
    """Names that a page can be entered at."""
    if file.suffix == ".md":
        return anchors(file.read_text())
    soup = BeautifulSoup(file.read_text(), "html.parser")
    return {tag["id"] for tag in soup.find_all(id=True)}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_link_of_a_page_is_dead(path: Path, run_folder, tmp_path: Path):
    """The page of a notebook that `test_notebooks_run.py` ran, in the same process."""
    notebook = copy.deepcopy(run_once(path, run_folder(path)).notebook)
    page = tool.write_page(notebook, path, tmp_path)
    assert dead_links(page) == []
    assert "%|" not in BeautifulSoup(page.read_text(), "html.parser").get_text()


def test_a_dead_link_is_found(tmp_path: Path):
    hrefs = ("gone.md", "#gone", f"{repository()}/blob/main/gone.md", "page.html")
    page = tmp_path / "page.html"
    page.write_text("".join(f'<a href="{href}">x</a>' for href in hrefs))
    assert dead_links(page) == list(hrefs[:3])


def test_pictures_outside_the_notebooks_folder_are_embedded(tmp_path: Path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"picture")
    text = "[![b](https://x.org/b.svg)](https://x.org) ![a](../figures/a.png)"
    notebook = new_notebook(cells=[new_markdown_cell(text)])
    tool.embed_pictures(notebook, tmp_path / "notebooks")
    source = notebook.cells[0].source
    assert "![a](data:image/png;base64,cGljdHVyZQ==)" in source
    assert source.startswith("[![b](https://x.org/b.svg)](https://x.org) ")
    gone = new_notebook(cells=[new_markdown_cell("![a](../figures/b.png)")])
    with pytest.raises(FileNotFoundError):
        tool.embed_pictures(gone, tmp_path / "notebooks")
