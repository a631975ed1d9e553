"""One way to use ipywidgets 7, which Colab ships, and ipywidgets 8.

Used by `maps` and `explorer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ipywidgets

VIEW = "application/vnd.jupyter.widget-view+json"


def view_bundle(widget: ipywidgets.Widget) -> dict[str, Any]:
    """The live widget as a MIME bundle; ipywidgets 7 has no method that returns it."""
    model = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {VIEW: model}


def show_bundle(bundle: dict[str, Any]) -> None:
    """Display a MIME bundle as a message of its own.

    Colab tells the front end where the code of ipyleaflet is in these messages only,
    not in the results of cells.
    """
    from IPython.display import display

    display(bundle, raw=True)


def tooltip(kind: type[ipywidgets.Widget], text: str) -> dict[str, str]:
    """The argument of a widget that sets its tooltip."""
    name = "tooltip" if "tooltip" in kind.class_trait_names() else "description_tooltip"
    return {name: text}
