"""ViTs that make their kernels from wavelengths: DOFA and Panopticon.

A plain ViT has one kernel per band, fixed by training. Here a small network turns
wavelengths into kernels (DOFA, Copernicus-FM), or one kernel serves all bands and an
embedding of the wavelength tells them apart (Panopticon). So they read any band that
has a wavelength, and radar by a number of its own. DOFA counts in micrometres, the
other two in nanometres.

The patch embeddings are torchgeo's own, the rest is timm's ViT, whose blocks equal
those of torchgeo's classes. torchgeo is imported when one is built.

Sources: DOFA, arXiv 2403.15356; Panopticon, arXiv 2503.10845; torchgeo (MIT); radar's
number for DOFA from the authors' README.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import (
    ViTBackbone,
    fix_positions,
    fixed_table,
    vit_network,
    with_class_row,
)
from geopeft_kit.backbones.weights import State, filled, strip_prefixes
from geopeft_kit.bands import wavelengths

MICRO_TO_NANO = 1000.0
# DOFA takes Sentinel-1's frequency in GHz where it expects a wavelength.
_DOFA_RADAR = {"VV": 5.405, "VH": 5.405}
# Panopticon's transmitted and received polarisation, orbit unknown.
_PANOPTICON_RADAR = {"VV": -1, "VH": -2, "HH": -3, "HV": -4}


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
    state: State | None,
    patches: Callable[[], SpectralPatches],
    dropped: tuple[str, ...],
    **options: Any,
) -> Any:
    """A ViT of timm with another patch embedding, filled from a checkpoint if given.

    `dropped` are prefixes of keys outside the encoder; `options` are timm's.
    """
    learned = "side" in card.architecture
    side = card.architecture.get("side", card.image_size // card.patch)
    kept = None if state is None else _encoder_state(state, dropped)
    table = with_class_row(fixed_table(card.width, side, side))  # (1, 1 + N, D)
    if not learned and kept is not None:
        table = kept.pop("pos_embed", table).float()

    def make() -> Any:
        model = vit_network(
            card,
            img_size=side * card.patch,
            pos_embed="learn" if learned else "none",
            **options,
        )
        model.patch_embed = patches()
        if not learned:
            fix_positions(model, table)
        return model

    return filled(make, kept, card.name)


def _encoder_state(state: State, dropped: tuple[str, ...]) -> State:
    """The encoder's keys; those of the patch embedding are one level deeper here."""
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


class DofaPatches(SpectralPatches):
    """Kernels from `wavelengths` in micrometres."""

    wavelengths: Sequence[float]

    def tokens(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h*w, D)."""
        waves = torch.tensor(self.wavelengths, device=image.device)  # (C,)
        return self.embed(image, waves)[0]


@register("dofa")
def build_dofa(card: BackboneCard, plan: BandPlan, state: State | None) -> ViTBackbone:
    """Build DOFA's encoder from torchgeo's or the authors' file.

    Random weights get the sine-cosine positions that torchgeo leaves at zero.
    """

    def patches() -> DofaPatches:
        from torchgeo.models.dofa import DOFAEmbedding

        embed = DOFAEmbedding(128, card.patch, card.width)
        made = DofaPatches(embed, card.patch, card.image_size // card.patch)
        made.wavelengths = described(plan, _DOFA_RADAR, wavelengths)
        return made

    # Published without the last norm; the authors' own file has one, and a projector.
    dropped = ("mask_token", "norm.", "fc_norm.", "projector.", "head.")
    model = spectral_network(card, state, patches, dropped, final_norm=False)
    return ViTBackbone(card, model, plan)


class PanopticonPatches(SpectralPatches):
    """One kernel for all bands; `channels` are nanometres, or negative for radar."""

    channels: Sequence[int]

    def tokens(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h*w, D)."""
        # A new tensor every time: torchgeo writes into it.
        ids = torch.tensor(self.channels, device=image.device)
        ids = ids.repeat(image.shape[0], 1)  # (B, C)
        return self.embed({"imgs": image, "chn_ids": ids})


@register("panopticon")
def build_panopticon(
    card: BackboneCard, plan: BandPlan, state: State | None
) -> ViTBackbone:
    """Build Panopticon's encoder, with the table of its file (37 x 37 patches).

    The file has the authors' keys, with or without torchgeo's prefix ``model.``.
    """

    def nanometres(names: Sequence[str]) -> list[int]:
        return [round(MICRO_TO_NANO * value) for value in wavelengths(names)]

    def patches() -> PanopticonPatches:
        from torchgeo.models.panopticon import PanopticonPE

        embed = PanopticonPE(
            attn_dim=card.architecture["attention_width"],
            embed_dim=card.width,
            patch_size=card.patch,
            chnfus_cfg={"attn_cfg": {"num_heads": 16}},
        )
        made = PanopticonPatches(embed, card.patch, card.architecture["side"])
        made.channels = described(plan, _PANOPTICON_RADAR, nanometres)
        return made

    model = spectral_network(card, state, patches, ("mask_token",), init_values=1e-5)
    return ViTBackbone(card, model, plan)
