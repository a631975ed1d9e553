"""What networks share that make their kernels from wavelengths.

A plain ViT has one kernel per band, fixed by training. DOFA, Panopticon and
Copernicus-FM look at how a band is *described*: a small network turns wavelengths into
kernels (DOFA, Copernicus-FM), or one kernel serves all bands and an embedding of the
wavelength tells them apart (Panopticon). So they read any band that has a wavelength,
and radar by a number of its own. Trap: DOFA counts in micrometres, the other two in
nanometres.

The patch embeddings are torchgeo's own, the rest is timm's ViT, whose blocks equal
those of torchgeo's classes. torchgeo is imported when one is built.

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.rgb_vits import fixed_table, network
from geopeft_kit.backbones.weights import State, load_strictly, strip_prefixes

MICRO_TO_NANO = 1000.0

NO_STATISTICS = (
    " No statistics are published with the weights: those of SSL4EO-S12 are used."
)
NOT_SEEN = (
    " The published file was not at hand: key names are those of torchgeo's class."
)


class SpectralPatches(nn.Module):
    """torchgeo's patch embedding in place of timm's: (B, C, H, W) -> (B, h, w, D).

    `side` is the number of rows and columns of the position table.
    """

    def __init__(self, embed: nn.Module, patch: int, side: int) -> None:
        super().__init__()
        self.embed = embed
        self.patch_size = (patch, patch)
        self.grid_size = (side, side)

    def tokens(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h*w, D); each network calls its embedding its own way."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h, w, D)."""
        width = image.shape[3] // self.patch_size[1]
        return self.tokens(image).unflatten(1, (-1, width))


def described(
    plan: BandPlan,
    radar: Mapping[str, Any],
    optical: Callable[[Sequence[str]], Sequence[Any]],
) -> list[Any]:
    """The number that describes each band; an error for a band without one."""
    return [
        radar[name] if name in radar else optical([name])[0] for name in plan.read_bands
    ]


def spectral_network(
    card: BackboneCard,
    state: Mapping[str, Tensor] | None,
    patches: Callable[[], SpectralPatches],
    dropped: tuple[str, ...],
    **options: Any,
) -> Any:
    """A ViT of timm with another patch embedding, filled from a checkpoint if given.

    `dropped` are prefixes of keys outside the encoder; `options` are those of
    `network`.
    """
    learnt = "side" in card.architecture
    side = card.architecture.get("side", card.image_size // card.patch)
    model = network(
        card,
        state,
        card.patch,
        side * card.patch,
        pos_embed="learn" if learnt else "none",
        **options,
    )
    place = contextlib.nullcontext() if state is None else torch.device("meta")
    with place:
        model.patch_embed = patches()
    table = torch.cat([torch.zeros(1, card.width), fixed_table(card.width, side, side)])
    kept = None if state is None else _encoder_state(state, dropped)
    if not learnt:
        table = table[None] if kept is None else kept.pop("pos_embed", table[None])
        # A buffer under timm's name: the plain model runs alone, nothing trains it.
        del model.pos_embed
        model.register_buffer("pos_embed", table.float(), persistent=False)
    if kept is not None:
        load_strictly(model, kept, card.name)
    return model


def _encoder_state(state: Mapping[str, Tensor], dropped: tuple[str, ...]) -> State:
    """The encoder's keys; those of the patch embedding lie one level deeper here."""
    kept = {}
    for key, tensor in strip_prefixes(state, ("module.", "model.")).items():
        if key.startswith(dropped):
            continue
        for upstream in ("patch_embed_spectral.", "patch_embed."):
            if key.startswith(upstream):
                key = f"patch_embed.embed.{key.removeprefix(upstream)}"
                break
        kept[key] = tensor
    return kept
