"""The numbers in the explorer's panels; `panels.html` holds their markup.

HTML and SVG, because they are drawn at once and stay sharp. Colours are those of the
method in every other figure.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from geopeft_kit.explorer.session import KeptRun, Preview
from geopeft_kit.pictures import OKABE_ITO, png_url
from geopeft_kit.plots import METHOD_COLOURS
from geopeft_kit.training.evaluate import HEADLINE

GREY, PALE = "#7f7f7f", "#b5b5b5"  # so that the adapter alone has a colour
MEMORY_COLOURS = {
    "weights": OKABE_ITO["sky"],
    "gradients": OKABE_ITO["orange"],
    "optimiser": OKABE_ITO["green"],
    "activations": OKABE_ITO["purple"],
}
MARKUP = Environment(loader=PackageLoader("geopeft_kit.explorer", "."), autoescape=True)


def render(panel: str, *values: Any) -> str:
    """A panel of `panels.html` with these values, which are escaped."""
    return str(getattr(MARKUP.get_template("panels.html").module, panel)(*values))


def parameters_html(preview: Preview, method: str) -> str:
    """Parameters of backbone, adapter and decoder."""
    if preview.reason is not None:
        return render("nothing", "Parameters", "nothing to count", "refused")
    rows = [
        ("backbone", preview.backbone, GREY),
        ("adapter", preview.adapter, METHOD_COLOURS.get(method, GREY)),
        ("decoder", preview.decoder, PALE),
    ]
    trained = preview.adapter + preview.decoder
    share = preview.adapter / preview.backbone if preview.backbone else 0.0
    text = f"trained: {trained:,}. The adapter is {share:.2%} of the backbone"
    return render("parameters", [(*row, f"{row[1]:,}") for row in rows], text)


def memory_html(preview: Preview, machine: tuple[float, float], device: str) -> str:
    """Predicted memory by part, against the machine's MiB (free, in all)."""
    if preview.reason is not None:
        return render("nothing", "Predicted memory", "nothing to predict", "refused")
    (free, total), needed = machine, sum(preview.memory.values())
    rows = [
        (part, size, MEMORY_COLOURS[part], f"{size:,.1f} MiB")
        for part, size in preview.memory.items()
    ]
    fits = needed < free
    share = min(100.0, 100 * needed / free) if free else 100.0
    colour = OKABE_ITO["blue" if fits else "vermillion"]
    text = (
        f"{needed:,.0f} MiB in all; {device} has {free:,.0f} MiB free of {total:,.0f}"
    )
    return render("memory", rows, share, colour, text, fits)


def progress_html(
    losses: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    task: str,
    epochs: int,
    method: str,
    facts: str,
    state: str,
) -> str:
    """Loss of each step and validation score of each epoch, as two small curves."""
    name = HEADLINE[task][0]
    scores = [row[f"val_{name}"] for row in rows if f"val_{name}" in row]
    curves = (
        curve(losses, f"loss ({len(losses)} steps)"),
        curve(scores, f"val {name} ({len(rows)}/{epochs})"),
    )
    return render("progress", curves, METHOD_COLOURS.get(method, GREY), facts, state)


def curve(values: Sequence[float], label: str) -> dict[str, Any]:
    """Points of a small curve; values that are not finite leave a gap."""
    width, height = 150, 66
    # No screen shows more points than this; the last one always stays.
    values = list(values)[:: -max(1, len(values) // 300)][::-1]
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = (high - low) or 1.0
    step = (width - 8) / max(1, len(values) - 1)
    points = [
        (round(4 + i * step, 1), round(4 + (height - 8) * (1 - (v - low) / span), 1))
        for i, v in enumerate(values)
        if math.isfinite(v)
    ]
    return {
        "width": width,
        "height": height,
        "label": label,
        "line": " ".join(f"{x},{y}" for x, y in points),
        "dot": points[-1] if points else None,
        "last": f"{values[-1]:.3f}" if values else "-",
        "range": f"{low:.3f} to {high:.3f}" if finite else "\N{NO-BREAK SPACE}",
    }


def picture_html(png: bytes, text: str, name: str) -> str:
    """A PNG with its text for those who do not see it."""
    width = int.from_bytes(png[16:20], "big")  # pixels, from the PNG's header
    return render("picture", png_url(png), text, name, width // 2)


def runs_html(
    runs: Sequence[KeptRun], shown: KeptRun | None, many_data: bool, csv: str
) -> str:
    """All runs as a table, which `csv` downloads; the one that is shown is tinted."""
    if not runs:
        return render("nothing", "", "No run yet: choose, then press Train.", "runs:0")
    metric = HEADLINE[runs[0].model.task][0]
    heads = [f"held-out {metric}", f"val {metric}", "learning rate", "seed", "epochs",
             "trained", "ms a step", "MiB", "backbone", "held out"]  # fmt: skip
    rows = []
    for run in runs:
        choice = run.choice
        cells = [
            *([choice.data] if many_data else []),
            f"{run.score():.3f}",
            f"{run.score('val'):.3f}",
            f"{choice.rate:g}",
            f"{choice.seed}",
            f"{len(run.rows)}",
            f"{run.counts['adapter'] + run.counts['decoder']:,}",
            f"{run.resources['step_ms']:.0f}",
            f"{run.memory:,.0f}",
            choice.backbone,
            choice.held_out or "as given",
        ]
        colour = METHOD_COLOURS.get(choice.method, GREY)
        rows.append((run.name, colour, cells, run is shown))
    link = "data:text/csv;base64," + base64.b64encode(csv.encode()).decode()
    return render("runs", ["data", *heads] if many_data else heads, rows, link)
