"""Run notebooks and write each as one HTML page that opens with no network.

    python docs/export_notebook.py notebooks/00_quickstart.ipynb --out build/tour

nbconvert's own template loads scripts from the web. This one leaves them out,
embeds every picture, shows the HTML twin of a widget where it has one, and refuses
to write a page that would still ask for something outside. The output of a cell
tagged `table` is printed as text.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

WIDGET = "application/vnd.jupyter.widget-view+json"
INLINE = "module://matplotlib_inline.backend_inline"
NO_WIDGET = "<p><em>A control stands here in the live notebook.</em></p>"
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


def last_text(widget: dict[str, str], states: dict[str, dict]) -> str:
    """What a progress bar said last; nothing for a widget without words."""
    state = states.get(widget["model_id"], {}).get("state", {})
    parts = [child.removeprefix("IPY_MODEL_") for child in state.get("children", [])]
    texts = [states.get(part, {}).get("state", {}).get("value") for part in parts]
    words = [html.unescape(text) for text in texts if isinstance(text, str)]
    return "".join(words).replace("\u2007", " ").strip()


def make_static(notebook: nbformat.NotebookNode) -> None:
    """Replace, in place, what needs a kernel or the web by what stands alone."""
    kept = notebook.metadata.pop("widgets", {})
    states = kept.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # a badge: its picture lives on the web
            text = re.sub(r"!\[([^]]*)\]\(https?://[^)]*\)", r"\1", cell.source)
            cell.source = re.sub(r"<img[^>]*src=.https?://[^>]*>", "", text)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            widget = data.pop(WIDGET, None)
            if widget is not None:
                words = html.escape(last_text(widget, states))
                data.setdefault(
                    "text/html", f"<pre>{words}</pre>" if words else NO_WIDGET
                )


def fold_solutions(page: str) -> str:
    """Put each solution back inside its <details>.

    The Markdown of nbconvert closes the element at the first blank line, which leaves
    the code of the solution open below it.
    """
    stray = r'(</summary>)\s*</details>\s*(<div class="highlight">.*?</div>)'
    return re.sub(stray, r"\1\2</details>", page, flags=re.DOTALL)


def export(path: Path, out: Path, timeout: int = 1800) -> tuple[Path, list[str]]:
    """Run the notebook in its own folder; return the page and its tables."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"name": path.stem, "path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=resources
    )
    # Figures go into the page also where the caller's shell asks for none.
    client.execute(env=os.environ | {"MPLBACKEND": INLINE})
    texts = tables(notebook)
    make_static(notebook)
    embed_pictures(notebook, path.parent)
    exporter = HTMLExporter(raw_template=TEMPLATE)
    page, _ = exporter.from_notebook_node(notebook, resources)
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
    return target, texts


def main(arguments: list[str] | None = None) -> int:
    """Export the notebooks named on the command line; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/gallery"))
    options = parser.parse_args(arguments)
    failed = 0
    for path in options.notebooks:
        start = time.perf_counter()
        print(f"Running {path} ...", flush=True)
        try:
            page, texts = export(path.resolve(), options.out)
        except (CellExecutionError, RuntimeError) as error:
            print(f"{path} failed:\n{error}", file=sys.stderr)
            failed = 1
            continue
        print(*texts, sep="\n\n")
        print(f"\nPage: {page} ({time.perf_counter() - start:.0f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
