"""The explorer's panels as HTML: bars, curves, table, code. All text is escaped.

HTML and SVG, because they are drawn at once and stay sharp; matplotlib draws what is
looked at longer (`figures`). Colours are those of the method in every other figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from geopeft_kit.explorer.bench import KeptRun, Preview
from geopeft_kit.pictures import OKABE_ITO
from geopeft_kit.plots import METHOD_COLOURS
from geopeft_kit.training.evaluate import HEADLINE

GREY, PALE = "#7f7f7f", "#b5b5b5"  # so that the adapter alone has a colour
MEMORY_COLOURS = {
    "weights": OKABE_ITO["sky"],
    "gradients": OKABE_ITO["orange"],
    "optimiser": OKABE_ITO["green"],
    "activations": OKABE_ITO["purple"],
}
STYLE = """<style>
.gpk-panel{font:13px/1.45 var(--jp-ui-font-family,sans-serif);
  color:var(--jp-ui-font-color1,#222)}
.gpk-panel h4{margin:0 0 4px;font-size:13px;font-weight:600}
.gpk-panel small{color:var(--jp-ui-font-color2,#666);font-size:12px}
.gpk-bars{display:grid;grid-template-columns:78px 1fr auto;gap:3px 8px;
  align-items:center}
.gpk-bars i{display:block;height:12px;min-width:2px;border-radius:2px}
.gpk-bars b{font-weight:400;text-align:right;font-variant-numeric:tabular-nums}
.gpk-no{border-left:4px solid #d55e00;padding:4px 8px;margin:2px 0;
  background:var(--jp-layout-color2,#f4f4f4);overflow-wrap:anywhere}
.gpk-panel pre{margin:0;padding:8px 10px;font-size:12px;line-height:1.45;overflow:auto;
  background:var(--jp-layout-color2,#f4f4f4);color:inherit;border-radius:3px}
.gpk-runs{border-collapse:collapse;font-size:12px;width:100%}
.gpk-runs th,.gpk-runs td{padding:3px 8px;text-align:right;white-space:nowrap;
  font-variant-numeric:tabular-nums;border-bottom:1px solid #8884}
.gpk-runs th{font-weight:600}
.gpk-runs .l{text-align:left;white-space:normal}
.gpk-runs tr.shown td{background:#56b4e92e}
</style>"""


def panel(title: str, body: str, state: str = "") -> str:
    """A titled block; `state` is a word that tests wait for."""
    head = f"<h4>{escape(title)}</h4>" if title else ""
    return (
        f"<div class='gpk-panel' data-gpk-state='{escape(state, quote=True)}'>"
        f"{STYLE}{head}{body}</div>"
    )


def _bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Rows of (label, value, colour, text), all bars on one scale from zero."""
    longest = max((value for _, value, _, _ in rows), default=0) or 1
    cells = (
        f"<span>{escape(label)}</span><span><i style='background:{colour};"
        f"width:{100 * value / longest:.2f}%'></i></span><b>{escape(text)}</b>"
        for label, value, colour, text in rows
    )
    return f"<div class='gpk-bars'>{''.join(cells)}</div>"


def parameters_html(preview: Preview, method: str) -> str:
    """Parameters of backbone, adapter and decoder."""
    if preview.reason is not None:
        return panel("Parameters", "<small>nothing to count</small>", "refused")
    parts = {
        "backbone": (preview.backbone, GREY),
        "adapter": (preview.adapter, METHOD_COLOURS.get(method, GREY)),
        "decoder": (preview.decoder, PALE),
    }
    body = _bars([(k, n, colour, f"{n:,}") for k, (n, colour) in parts.items()])
    trained = preview.adapter + preview.decoder
    share = preview.adapter / preview.backbone if preview.backbone else 0.0
    body += (
        f"<small>trained: {trained:,}. The adapter is {share:.2%} of the backbone"
        "</small>"
    )
    return panel("Parameters", body, "counted")


def memory_html(preview: Preview, machine: tuple[float, float], device: str) -> str:
    """Predicted memory by part, against what the machine has (free, in all)."""
    if preview.reason is not None:
        return panel("Predicted memory", "<small>nothing to predict</small>", "refused")
    needed = sum(preview.memory.values())
    rows = [
        (part, size, MEMORY_COLOURS[part], f"{size:,.1f} MiB")
        for part, size in preview.memory.items()
    ]
    free, total = machine
    verdict = "fits" if needed < free else "<b>does not fit</b>"
    share = min(100.0, 100 * needed / free) if free else 100.0
    colour = OKABE_ITO["blue"] if needed < free else OKABE_ITO["vermillion"]
    gauge = (
        f"<div style='height:6px;margin:5px 0 2px;border-radius:3px;background:#8883'>"
        f"<div style='height:6px;min-width:2px;border-radius:3px;width:{share:.2f}%;"
        f"background:{colour}'></div></div>"
    )
    text = (
        f"{needed:,.0f} MiB in all; {escape(device)} has {free:,.0f} MiB free of "
        f"{total:,.0f}: {verdict}"
    )
    return panel(
        "Predicted memory", f"{_bars(rows)}{gauge}<small>{text}</small>", "known"
    )


def progress_html(
    losses: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    task: str,
    epochs: int,
    colour: str,
    facts: str,
    state: str,
) -> str:
    """Loss of each step and validation score of each epoch, as two small curves."""
    name = HEADLINE[task][0]
    scores = [row[f"val_{name}"] for row in rows if f"val_{name}" in row]
    curves = curve_svg(losses, f"loss ({len(losses)} steps)", colour)
    curves += curve_svg(scores, f"val {name} ({len(rows)}/{epochs})", colour)
    body = f"<div style='display:flex;gap:8px'>{curves}</div><small>{facts}</small>"
    return panel("Training", body, state)


def curve_svg(values: Sequence[float], label: str, colour: str) -> str:
    """A small curve with its last value; values that are not finite leave a gap."""
    width, height = 150, 66
    # No screen shows more points than this; the last one always stays.
    values = list(values)[:: -max(1, len(values) // 300)][::-1]
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = (high - low) or 1.0
    step = (width - 8) / max(1, len(values) - 1)
    points = [
        (4 + i * step, 4 + (height - 8) * (1 - (v - low) / span))
        for i, v in enumerate(values)
        if math.isfinite(v)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dot = ""
    if points:
        x, y = points[-1]
        dot = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{colour}'/>"
    last = f"{values[-1]:.3f}" if values else "-"
    ends = f"{low:.3f} to {high:.3f}" if finite else "&nbsp;"
    return (
        f"<div style='flex:1 1 0;min-width:0'><svg viewBox='0 0 {width} {height}' "
        "style='width:100%;height:66px;background:var(--jp-layout-color2,#f4f4f4)' "
        f"preserveAspectRatio='none'><polyline points='{line}' fill='none' "
        f"vector-effect='non-scaling-stroke' stroke='{colour}' stroke-width='1.6'/>"
        f"{dot}</svg><div>{escape(label)}: <b class='gpk-last'>{last}</b><br>"
        f"<small>{ends}</small></div></div>"
    )


def runs_html(runs: Sequence[KeptRun], shown: KeptRun | None, many_data: bool) -> str:
    """All runs as a table; the one that is shown is tinted."""
    if not runs:
        return panel(
            "", "<small>No run yet: choose, then press Train.</small>", "runs:0"
        )
    metric = HEADLINE[runs[0].model.task][0]
    heads = ["backbone", "held out", "epochs", "trained", "ms a step", "MiB",
             f"val {metric}", f"held-out {metric}"]  # fmt: skip
    if many_data:
        heads.insert(0, "data")
    table = "".join(f"<th>{escape(head)}</th>" for head in heads)
    table = f"<tr><th class='l'>run</th>{table}</tr>"
    for run in runs:
        choice = run.choice
        cells = [
            choice.backbone,
            choice.held_out or "as given",
            f"{len(run.rows)}",
            f"{run.counts['adapter'] + run.counts['decoder']:,}",
            f"{run.resources['step_ms']:.0f}",
            f"{run.memory:,.0f}",
            f"{run.score('val'):.3f}",
            f"{run.score():.3f}",
        ]
        if many_data:
            cells.insert(0, choice.data)
        mark = (
            "<span style='display:inline-block;width:10px;height:10px;margin-right:6px;"
            f"background:{METHOD_COLOURS.get(choice.method, GREY)}'></span>"
        )
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        style = " class='shown'" if run is shown else ""
        table += f"<tr{style}><td class='l'>{mark}{escape(run.name)}</td>{row}</tr>"
    body = f"<table class='gpk-runs'>{table}</table>"
    return panel("", body, f"runs:{len(runs)}")


def code_html(code: str) -> str:
    """The code, with a button that copies it where the page may."""
    # Without a secure address the page has no clipboard; a selection still works.
    copy = (
        "const p=this.parentNode.querySelector('pre');"
        "getSelection().selectAllChildren(p);"
        "const done=()=>{this.textContent='Copied'};"
        "if(navigator.clipboard){navigator.clipboard.writeText(p.textContent).then(done)}"
        "else if(document.execCommand('copy')){done()}"
    )
    body = (
        f'<button class="gpk-copy" onclick="{copy}" style="margin-bottom:6px">Copy'
        f"</button>{listing(code)}"
        "<small>This cell runs alone and gives the same numbers, on the same machine "
        "with the same number of threads.</small>"
    )
    return panel("", body, "code")


def listing(code: str) -> str:
    """Code as it is."""
    return f"<pre class='gpk-code'>{escape(code)}</pre>"


def message_html(text: str, state: str = "message", full: bool = False) -> str:
    """A sentence that has to be seen, or a whole traceback."""
    if not text:
        return ""
    if full:
        box = f"<pre style='max-height:260px'>{escape(text)}</pre>"
        return panel(
            "",
            f"<div class='gpk-no'>That failed; the explorer lives on.</div>{box}",
            state,
        )
    return panel("", f"<div class='gpk-no'>{escape(text)}</div>", state)
