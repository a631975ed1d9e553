"""The exported page holds figures and tables, and asks for nothing outside."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPO = Path(__file__).resolve().parent.parent
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
BAR = """
from geopeft_kit.progress import progress_bar
for _ in progress_bar(range(3), desc="work"):
    pass
"""


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
    path = write(folder / "00_page.ipynb", TABLE, FIGURE, FRAME, CONTROL, BAR)
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
    assert page.count("A control stands here") == 1
    assert "<pre>work: 100% 3/3 [" in page
    assert "widget-state" not in page
    assert [p.name for p in exported[0].parent.iterdir()] == ["00_page.html"]


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
