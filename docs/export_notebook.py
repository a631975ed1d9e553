"""Run notebooks and write each as one HTML page that opens with no network.

    python docs/export_notebook.py notebooks/00_quickstart.ipynb --out build/tour

nbconvert's own template loads scripts from the web. This one leaves them out,
embeds every picture, shows the HTML twin of a widget where it has one and the last
text of a progress bar, turns links to follow from where the page is, and refuses to
write a page that would still ask for something outside. The output of a cell tagged
`table` is printed as text.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
import re
import sys
import time
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGETS = "application/vnd.jupyter.widget-state+json"
REFERENCE = "IPY_MODEL_"  # from one widget to another
INLINE = "module://matplotlib_inline.backend_inline"
NO_WIDGET = "<p><em>This control works in the live notebook only.</em></p>"
# The blocks of nbconvert's page that load scripts from the web.
WEB_BLOCKS = ("requirejs", "mathjax", "mermaidjs")
TEMPLATE = "{% extends 'lab/index.html.j2' %}{% block jupyter_widgets %}{% endblock %}"
TEMPLATE += "".join(
    f"{{% block html_head_js_{b} %}}{{% endblock %}}" for b in WEB_BLOCKS
)
EXTERNAL = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc\s*=\s*["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b[^>]*?\bhref\s*=\s*["']?(?:https?:)?//[^"'\s>]+"""
    r"""|(?:@import\s+["']|url\(\s*["']?)(?:https?:)?//[^"')\s]+""",
    re.IGNORECASE,
)


# Pictures of the repository in a markdown cell; badges of the web are not among them.
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?!\w+:)([^)\s]+)(?=\))")
# A link to a file; its heading, if one is named, follows the match.
LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()(?!\w+:)([^)\s#]+)")


def turn_links(
    notebook: nbformat.NotebookNode, folder: Path, out: Path, exported: Collection[Path]
) -> None:
    """Let the links of the markdown cells lead somewhere from the page's own folder.

    A notebook's page where there is one, the file itself from a page inside the
    repository, and elsewhere the file at the repository's address.

    Args:
        notebook: changed in place.
        folder: where the notebook lies.
        out: where the page will lie.
        exported: notebooks that get a page in ``out`` in the same run.
    """

    def turned(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        page = out / f"{target.stem}.html"
        if target.suffix == ".ipynb" and (target in exported or page.is_file()):
            return f"{link[1]}{page.name}"
        if target.is_relative_to(REPO) and not out.is_relative_to(REPO):
            path = target.relative_to(REPO).as_posix()
            return f"{link[1]}{PROJECT['urls']['Repository']}/blob/main/{path}"
        return f"{link[1]}{os.path.relpath(target, out)}"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(turned, cell.source)


def embed_pictures(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Put the repository's pictures into the markdown cells themselves.

    nbconvert embeds none that lies outside the notebook's own folder.

    Args:
        notebook: changed in place.
        folder: where the notebook lies.
    """

    def embedded(link: re.Match[str]) -> str:
        content = base64.b64encode((folder / link[2]).read_bytes()).decode()
        return f"{link[1]}data:image/png;base64,{content}"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = PICTURE.sub(embedded, cell.source)


def external_requests(page: str) -> list[str]:
    """Addresses that a browser would load from outside, frames (srcdoc) included."""
    frames = [html.unescape(s) for s in re.findall(r'\bsrcdoc="([^"]*)"', page)]
    found = [
        match.group(0) for text in [page, *frames] for match in EXTERNAL.finditer(text)
    ]
    return sorted(set(found))


def table_text(data: dict[str, str]) -> str:
    """An output's table as aligned text; its plain text where it holds no table."""
    table = BeautifulSoup(data.get("text/html", ""), "html.parser").find("table")
    if table is None:
        return data.get("text/plain", data.get("text", ""))
    rows: list[list[str]] = []
    for tr in table.find_all("tr"):
        rows.append([])
        for cell in tr.find_all(["td", "th"]):
            text = " ".join(cell.get_text(" ").split())
            rows[-1] += [text] + [""] * (int(cell.get("colspan", 1)) - 1)
    count = max(map(len, rows))
    rows = [row + [""] * (count - len(row)) for row in rows if any(row)]
    widths = [max(len(row[i]) for row in rows) for i in range(count)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def tables(notebook: nbformat.NotebookNode) -> list[str]:
    """Texts of the tables that cells tagged `table` show."""
    return [
        table_text(output.get("data", output))
        for cell in notebook.cells
        if "table" in cell.metadata.get("tags", [])
        for output in cell.get("outputs", [])
        if output.output_type in ("execute_result", "display_data", "stream")
    ]


def widget_tree(model: str, states: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The state of a widget, then those of the widgets inside it."""
    state = states[model.removeprefix(REFERENCE)]["state"]
    yield state
    for child in state.get("children", ()):
        yield from widget_tree(child, states)


def bar_text(model: str, states: dict[str, Any]) -> str | None:
    """Last text of a progress bar, "" of one that was taken away; None of the rest."""
    if model not in states:  # the run ended before they were kept
        return None
    tree = list(widget_tree(model, states))
    bars = [state for state in tree if state["_view_name"] == "ProgressView"]
    if not bars:
        return None
    (layout,) = widget_tree(tree[0]["layout"], states)
    if layout["visibility"] == "hidden":
        return ""
    texts = [state["value"] for state in tree if isinstance(state.get("value"), str)]
    texts = texts or [f"{bar['value']:g} of {bar['max']:g}" for bar in bars]
    words = BeautifulSoup(" ".join(texts), "html.parser").get_text().split()
    return " ".join(words)


def make_static(notebook: nbformat.NotebookNode) -> None:
    """Replace, in place, what needs a kernel or the web by what stands alone."""
    states = notebook.metadata.pop("widgets", {}).get(WIDGETS, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # a badge: its picture lives on the web
            text = re.sub(r"!\[([^]]*)\]\(https?://[^)]*\)", r"\1", cell.source)
            cell.source = re.sub(r"<img[^>]*src=.https?://[^>]*>", "", text)
        for output in list(cell.get("outputs", [])):
            data = output.get("data", {})
            view = data.pop(WIDGET, None)
            if view is None or "text/html" in data:
                continue
            text = bar_text(view["model_id"], states)
            if text is None:
                data["text/html"] = NO_WIDGET
            elif text:
                data["text/plain"] = text
            else:
                cell.outputs.remove(output)


def fold_solutions(page: str) -> str:
    """Put each solution back inside its <details>.

    The Markdown of nbconvert closes the element at the first blank line, which leaves
    the code of the solution open below it.
    """
    stray = r'(</summary>)\s*</details>\s*(<div class="highlight">.*?</div>)'
    return re.sub(stray, r"\1\2</details>", page, flags=re.DOTALL)


def export(
    path: Path, out: Path, exported: Collection[Path] = (), timeout: int = 1800
) -> tuple[Path, list[str]]:
    """Run the notebook in its own folder; return the page and its tables.

    Args:
        path: the notebook.
        out: folder of the page.
        exported: see `turn_links`.
        timeout: seconds for a cell.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    # Figures go into the page also where the caller's shell asks for none.
    client.execute(env=os.environ | {"MPLBACKEND": INLINE})
    texts = tables(notebook)
    return write_page(notebook, path, out, exported), texts


def write_page(
    notebook: nbformat.NotebookNode,
    path: Path,
    out: Path,
    exported: Collection[Path] = (),
) -> Path:
    """The page of a notebook that ran, which is changed; arguments as in `export`."""
    make_static(notebook)
    turn_links(notebook, path.parent, out.resolve(), exported)
    embed_pictures(notebook, path.parent)
    exporter = HTMLExporter(raw_template=TEMPLATE)
    page, _ = exporter.from_notebook_node(
        notebook, {"metadata": {"name": path.stem, "path": str(path.parent)}}
    )
    page = fold_solutions(page)
    outside = external_requests(page)
    if outside:
        raise RuntimeError(f"{path.name} would load from the web: {outside[:3]}")
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{path.stem}.html"
    part = target.with_suffix(".part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Export the notebooks named on the command line; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/gallery"))
    options = parser.parse_args(arguments)
    failed = 0
    exported = [path.resolve() for path in options.notebooks]
    for path in options.notebooks:
        start = time.perf_counter()
        print(f"Running {path} ...", flush=True)
        try:
            page, texts = export(path.resolve(), options.out, exported)
        except (CellExecutionError, RuntimeError) as error:
            print(f"{path} failed:\n{error}", file=sys.stderr)
            failed = 1
            continue
        print(*texts, sep="\n\n")
        print(f"\nPage: {page} ({time.perf_counter() - start:.0f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
