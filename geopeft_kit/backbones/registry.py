"""Which function builds the backbones of a family.

A builder takes the card, the plan of the bands, a checkpoint in the upstream's keys
(None for random weights), and the options of its family by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.weights import State

Builder = Callable[..., Backbone]
BUILDERS: dict[str, Builder] = {}
_COMMON = ("card", "plan", "state", "image_size")


def register(family: str) -> Callable[[Builder], Builder]:
    """Decorator: the function builds the cards of this family."""

    def keep(build: Builder) -> Builder:
        BUILDERS[family] = build
        return build

    return keep


def builder(
    card: BackboneCard,
    plan: BandPlan,
    image_size: int | None,
    options: Mapping[str, Any],
) -> Callable[[State | None], Backbone]:
    """A function from checkpoint to backbone.

    Builders that depend on the image size have it among their arguments. Raises
    ValueError for an option that the family does not have.
    """
    build = BUILDERS[card.family]
    known = inspect.signature(build).parameters
    own = [name for name in known if name not in _COMMON]
    unknown = [name for name in options if name not in own]
    if unknown:
        raise ValueError(
            f"{card.name} has no such option: {unknown[0]!r}. Its options: "
            f"{', '.join(own) or 'none'}"
        )
    sized = {"image_size": image_size} if "image_size" in known else {}
    return lambda state: build(card, plan, state, **options, **sized)
