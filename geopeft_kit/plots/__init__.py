"""Figures: short functions to copy, one colour per method, everything labelled.

Every function returns a matplotlib Figure and changes no global style. Pictures are
drawn north-up. `chips` draws inputs and outputs of a network, `runs` what methods cost
and reach. Used in every notebook.
"""

from geopeft_kit.plots.chips import (
    plot_errors,
    plot_spectrum,
    plot_split,
    plot_tokens,
    show_chip,
    show_chips,
)
from geopeft_kit.plots.colours import (
    CAUSE_COLOURS,
    MARKERS,
    METHOD_COLOURS,
    SPLIT_STYLES,
    method_colour,
    method_marker,
)
from geopeft_kit.plots.drawing import class_legend
from geopeft_kit.plots.runs import plot_gap, plot_history, plot_resources, plot_scores

__all__ = [
    "CAUSE_COLOURS",
    "MARKERS",
    "METHOD_COLOURS",
    "SPLIT_STYLES",
    "class_legend",
    "method_colour",
    "method_marker",
    "plot_errors",
    "plot_gap",
    "plot_history",
    "plot_resources",
    "plot_scores",
    "plot_spectrum",
    "plot_split",
    "plot_tokens",
    "show_chip",
    "show_chips",
]
