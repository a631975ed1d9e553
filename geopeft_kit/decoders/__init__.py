"""Decoders: feature maps in, one value per class and pixel (or per image) out.

Four for pixels - `linear`, `fcn`, `unet`, `upernet` - and one for whole images. All
take the same maps, standardised (`neck.py`), and answer at the size of the image, so
they can be exchanged freely. A UNet trains more weights than most adapters, which is
why its count is given separately.

Source: the four decoders of the PEFT study, arXiv 2504.17397. Notebook: 07.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from geopeft_kit.decoders.base import Decoder
from geopeft_kit.decoders.plain import (
    ClassificationDecoder,
    FCNDecoder,
    LinearDecoder,
)
from geopeft_kit.decoders.pyramid import UNetDecoder, UPerNetDecoder

__all__ = ["DECODERS", "ClassificationDecoder", "Decoder", "build_decoder", "construct"]

DECODERS: dict[str, type[Decoder]] = {
    "linear": LinearDecoder,
    "fcn": FCNDecoder,
    "unet": UNetDecoder,
    "upernet": UPerNetDecoder,
}


def build_decoder(
    name: str,
    channels: Sequence[int],
    strides: Sequence[int],
    outputs: int,
    **options: Any,
) -> Decoder:
    """Build a pixel decoder by name, for four maps of given channels and strides.

    `options` are `dropout`, `width` (all but linear), `steps` (fcn) and `all_scales`
    (linear and fcn). Raises ValueError for an unknown name, TypeError for an unknown
    option.
    """
    if name not in DECODERS:
        raise ValueError(
            f"unknown decoder {name!r}. Choose one of: {', '.join(DECODERS)}."
        )
    return construct(DECODERS[name], name, channels, strides, outputs, **options)


def construct(
    kind: type[Decoder],
    name: str,
    channels: Sequence[int],
    strides: Sequence[int],
    outputs: int,
    **options: Any,
) -> Decoder:
    """Build `kind`, with an error that lists its options where one is not known."""
    known = set(inspect.signature(kind).parameters) - {"channels", "strides", "outputs"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"decoder {name!r} has no option {', '.join(map(repr, unknown))}. "
            f"Its options: {', '.join(sorted(known))}."
        )
    return kind(channels, strides, outputs, **options)
