"""One colour and marker for each method and split, the same in every figure and map.

Colours come from the set of Okabe and Ito, which readers with any of the common
colour-vision deficiencies can tell apart; where lines could be confused, a marker or a
label repeats the colour.

Source:
    Okabe and Ito 2008, "Color universal design", https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

from collections.abc import Mapping

from geopeft_kit.pictures import OKABE_ITO

# One colour per method, the same in every figure, table and map. The methods that are
# compared most have Okabe and Ito's own eight, relatives a shade of their family.
METHOD_COLOURS: dict[str, str] = {
    # the two ends, and the rivals that are not adaptations
    "full": "#000000",
    "frozen": "#737373",
    "last_blocks": "#404040",
    "from_scratch": "#d55e00",
    "pixel_statistics": "#b8a48c",
    "spectral_index": "#8a6d4b",
    # existing weights
    "bias": "#e69f00",
    "norm": "#f0e442",
    "ia3": "#c98500",
    "ssf": "#f5c45e",
    # low rank and its relatives
    "lora": "#0072b2",
    "dora": "#56b4e9",
    "adalora": "#004c78",
    "vera": "#7d9fc4",
    "loha": "#2f5fd0",
    "lokr": "#8fd0f5",
    "oft": "#00355a",
    "boft": "#5a78a8",
    "fourierft": "#a9bfe0",
    "slr": "#3a8fb7",
    # prompts
    "vpt": "#cc79a7",
    "upetu": "#8f3b6b",
    # adapters and side networks
    "houlsby": "#009e73",
    "adaptformer": "#006b4e",
    "convpass": "#4fc3a1",
    "conv_adapter": "#a5d6a7",
    "mona": "#5f8f3e",
    "quantised_adapter": "#b3c93c",
    "vit_adapter": "#7a5195",
    "deflect": "#9b1b30",
    "earth_adapter": "#c7a4d8",
}
# Family -> shades for methods that are not listed above, in the order of registration.
FAMILY_SHADES: Mapping[str, tuple[str, ...]] = {
    "ends": ("#acacac", "#d5d5d5"),
    "existing weights": ("#796d00", "#6f4100", "#b5b066"),
    "low rank": ("#3a3ad6", "#00085b", "#8f8fe0", "#a984fd", "#1f0087"),
    "prompts": ("#a21e97", "#f28ad6"),
    "adapters": ("#11a200", "#86e8a8", "#2f4a1e"),
    "side networks": ("#a057f2", "#2c0933"),
    "Earth observation": ("#f2836f", "#47100c"),
}

# One more way to tell relatives apart, for readers and printers without colour.
MARKERS = "osD^vP*Xph"


def add_method_colour(method: str, family: str) -> None:
    """Give a method that has no colour yet the next free shade of its family.

    When all are taken, the last shade is used again.
    """
    taken = set(METHOD_COLOURS.values())
    free = [shade for shade in FAMILY_SHADES[family] if shade not in taken]
    METHOD_COLOURS.setdefault(method, (free or FAMILY_SHADES[family][-1:])[0])


def method_colour(method: str) -> str:
    """The colour of a method, "#rrggbb", the same in all figures and maps."""
    if method not in METHOD_COLOURS:
        raise ValueError(
            f"No colour is set for the method {method!r}. Known: "
            f"{', '.join(METHOD_COLOURS)}."
        )
    return METHOD_COLOURS[method]


def method_marker(method: str) -> str:
    """The matplotlib marker of a method; neighbours of one family differ."""
    method_colour(method)
    return MARKERS[list(METHOD_COLOURS).index(method) % len(MARKERS)]


# What training holds in memory: one colour for each cause, in every figure.
CAUSE_COLOURS: Mapping[str, str] = {
    "weights": OKABE_ITO["sky"],
    "originals": "#b0b0b0",
    "gradients": OKABE_ITO["orange"],
    "optimiser": OKABE_ITO["green"],
    "activations": OKABE_ITO["purple"],
    "temporary": OKABE_ITO["yellow"],
}


# Colour, marker and its size: later ones are smaller, so that all stay in sight.
SPLIT_STYLES: Mapping[str, tuple[str, str, int]] = {
    "train": (OKABE_ITO["blue"], "o", 130),
    "val": (OKABE_ITO["sky"], "s", 36),
    "test": (OKABE_ITO["vermillion"], "^", 60),
    "unused": ("#999999", "x", 25),
}
