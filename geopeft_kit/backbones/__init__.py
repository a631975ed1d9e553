"""Backbones: geospatial foundation models behind one loader.

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from geopeft_kit.backbones import timm_zoo
from geopeft_kit.backbones.band_plan import BandPlan, NewBands, plan_bands
from geopeft_kit.backbones.base import SAMPLE, Backbone, Origin
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.cards import CARDS
from geopeft_kit.backbones.registry import builder
from geopeft_kit.backbones.weights import (
    State,
    check_fit,
    find_weights,
    is_tag,
    misfits,
    read_checkpoint,
    saved_bands,
)
from geopeft_kit.bands import resolve_bands

__all__ = ["Backbone", "BackboneCard", "find_card", "list_backbones", "load_backbone"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)  # each family registers its builder


def list_backbones(
    licence: str | Sequence[str] | None = None,
    sensor: str | Sequence[str] | None = None,
    max_parameters: float | None = None,
) -> list[BackboneCard]:
    """Cards of the named backbones; any ``timm:<name>`` can be loaded too.

    Args:
        licence: of the weights, as ``"MIT"`` or several; upper or lower case.
        sensor: a sensor's name or band names; keeps the backbones that read them all.
        max_parameters: keeps those of this size or smaller, as ``100e6``.

    Returns:
        The cards that pass every filter; maybe none.

    Raises:
        ValueError: a licence that no card has, an unknown band, or a size that is not a
            number above 0.
        TypeError: a licence or a band is not text.
    """
    cards = list(CARDS.values())
    if licence is not None:
        wanted = _known_licences([licence] if isinstance(licence, str) else licence)
        cards = [card for card in cards if card.licence.casefold() in wanted]
    if sensor is not None:
        bands = set(resolve_bands(sensor))
        cards = [card for card in cards if bands <= {*card.bands, *card.also_reads}]
    if max_parameters is not None:
        if type(max_parameters) not in (int, float) or not max_parameters > 0:
            raise ValueError(
                f"max_parameters={max_parameters!r}: a number above 0, as 100e6"
            )
        cards = [card for card in cards if card.parameters <= max_parameters]
    return cards


def _known_licences(names: Sequence[str]) -> set[str]:
    """Licences in lower case; an error for one that no card has."""
    known = {card.licence.casefold(): card.licence for card in CARDS.values()}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"licence={name!r}: text is needed, as 'MIT'")
        if name.casefold() not in known:
            raise ValueError(
                f"no backbone has licence={name!r}. There are: "
                f"{', '.join(repr(text) for text in sorted(known.values()))}"
            )
    return {name.casefold() for name in names}


def find_card(name: str) -> BackboneCard:
    """The card of a backbone; that of ``timm:<name>`` is made from timm's own data.

    Raises ValueError if there is no such backbone; close names are proposed.
    """
    if name.startswith(timm_zoo.PREFIX):
        return timm_zoo.make_card(name)
    if name in CARDS:
        return CARDS[name]
    close = difflib.get_close_matches(name, CARDS, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"no backbone {name!r}: {hint}There are {', '.join(CARDS)}, and "
        "timm:<name> for timm's ViT, Swin, ConvNeXt, ResNet, MambaOut, EfficientViM"
    )


def load_backbone(
    name: str,
    bands: str | Sequence[str] | None = None,
    weights: str | Path | None = "default",
    image_size: int | None = None,
    new_bands: NewBands = "error",
    normalise: bool = True,
    **options: Any,
) -> Backbone:
    """Load a geospatial foundation model as a source of four feature maps.

    Args:
        name: a name of `list_backbones`, or ``timm:<name>``.
        bands: the bands of your images, in their order: a sensor's name or C band
            names. Any subset, in any order; None means the card's own.
        weights: ``"default"``, a tag of the card, None (random), or a local path,
            which is loaded strictly; what `pretrain` wrote, for the bands it had.
        image_size: height and width in pixels that you will use most; None means the
            card's own. ViTs take other sizes too.
        new_bands: what to do with a band that the backbone does not know:
            ``"error"``; ``"random"``, a random kernel; ``"copy_nearest"``, the kernel
            nearest in wavelength, with its band's statistics; ``"share_nearest"``, that
            kernel divided among all bands that meet it, so that the response keeps its
            size, with published statistics of the band itself; or ``"ignore"``, which
            passes the band on without reading it.
        normalise: apply the card's normalisation to images of reflectance 0-1; False
            passes values through.
        **options: the family's own, as ``dates`` and ``metadata`` of Prithvi,
            ``radar`` of TerraMind, ``resolution`` of Clay, ``patch`` of Galileo.

    Returns:
        The backbone in eval mode, parameters trainable until a method freezes them.

    Raises:
        ValueError: an unknown name, band, tag, option or size, or a checkpoint that
            does not fit.
        FileNotFoundError: the file is neither local nor at its source.
        RuntimeError: a download fails.
    """
    card = find_card(name)
    plan = plan_bands(card, bands, new_bands)
    path = find_weights(card, weights)
    drawn = path is None or new_bands == "random"
    generator = torch.random.get_rng_state() if drawn else None
    build = builder(card, plan, image_size, options)
    backbone = build(None) if path is None else _from_file(build, card, plan, path)
    backbone.normalise = normalise
    step = max(backbone.strides)
    backbone.image_size = card.image_size if image_size is None else image_size
    if image_size is not None and (image_size <= 0 or image_size % step):
        raise ValueError(f"image_size={image_size}: {name} needs a multiple of {step}")
    arguments = {
        "name": name,
        "bands": list(plan.bands),
        "weights": weights if is_tag(card, weights) else str(path),
        "image_size": image_size,
        "new_bands": new_bands,
        "normalise": normalise,
        **options,
    }
    if not any(tensor.is_meta for tensor in backbone.weights().values()):
        sample = backbone.weights_hash(SAMPLE)
        backbone.origin = Origin(arguments, generator, sample)
    return backbone.eval()


def _from_file(
    build: Callable[[State | None], Backbone],
    card: BackboneCard,
    plan: BandPlan,
    path: Path,
) -> Backbone:
    """Build a backbone with the weights of a file.

    A file of `save_weights` has the network's own names, and kernels for its own bands;
    all others have the upstream's names, which builders read.
    """
    state, saved = read_checkpoint(path), saved_bands(path)
    if saved not in (None, card.bands, plan.bands):
        raise ValueError(
            f"{path} was saved for the bands {', '.join(saved or ())}, not for "
            f"{', '.join(plan.bands)}. Load it with bands={list(saved or ())}"
        )
    if saved == plan.bands:
        with torch.random.fork_rng(devices=[]):  # a file needs no random numbers
            backbone = build(None)
        own = backbone.weights()
        if saved != card.bands or not misfits(own, state):
            check_fit(own, state, card.name)
            for key, tensor in own.items():
                tensor.copy_(state[key])
            return backbone
    return build(state)
