"""TerraMind 1.0: one sensor at a time, on timm's VisionTransformer.

TerraMind has a patch embedding for each sensor and one ViT for all. With one sensor it
is a plain ViT without a class token, and its modality embedding is the bias of the
patch convolution. Two mistakes raise no error: base and large have gated MLPs (SwiGLU)
with SiLU; the position table has rows first, unlike MAE's, and is resized without
timm's antialiasing.

Sources: TerraMind, arXiv 2504.11171; key names, sizes and statistics from TerraTorch
(Apache-2.0), `terramind_register.py`.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import ViTBackbone, fixed_table, vit_network
from geopeft_kit.backbones.weights import State, filled
from geopeft_kit.bands import SENSORS

RADAR = SENSORS["sentinel1"]
_S2L2A = "untok_sen2l2a@224"
# Backscatter in decibels: ground range detected, or radiometrically terrain corrected.
_RADAR_PRODUCTS = {
    "grd": ("untok_sen1grd@224", (-12.599, -20.293), (5.195, 5.890)),
    "rtc": ("untok_sen1rtc@224", (-10.930, -17.329), (4.391, 4.459)),
}
# Parts of the published file outside the encoder.
_NOT_ENCODER = ("decoder", "mask_token", "encoder_embeddings.")


class TerraMindBackbone(ViTBackbone):
    """TerraMind's encoder for one sensor; there is no class token."""

    model: Any

    def add_positions(self, patches: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h*w, D); bicubic, neither antialiased nor aligned."""
        size, table = patches.shape[1:3], self.model.pos_embed  # (1, N, D)
        side = math.isqrt(table.shape[1])
        if tuple(size) != (side, side):
            grid = table.transpose(1, 2).unflatten(2, (side, side))  # (1, D, h, w)
            grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
            table = grid.flatten(2).transpose(1, 2)  # (1, h*w, D)
        return patches.flatten(1, 2) + table.to(patches.dtype)


@register("terramind")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    radar: str = "grd",
) -> TerraMindBackbone:
    """Build TerraMind's encoder for Sentinel-2 L2A, or for Sentinel-1 alone.

    Args:
        card, plan, state: as for every builder; bands of Sentinel-2, or VV and VH.
        radar: which patch embedding reads VV and VH: ``"grd"`` (ground range detected)
            or ``"rtc"`` (radiometrically terrain corrected), both in decibels.
    """
    if radar not in _RADAR_PRODUCTS:
        raise ValueError(f"radar={radar!r}: 'grd' and 'rtc' are allowed")
    known, modality = card.bands, _S2L2A
    if set(plan.read_bands) & set(RADAR):
        if set(plan.read_bands) - set(RADAR):
            raise ValueError(
                f"{card.name} is loaded for one sensor at a time, and "
                f"{', '.join(plan.read_bands)} are of two. Take bands='sentinel1' or "
                "bands of Sentinel-2"
            )
        modality, known = _RADAR_PRODUCTS[radar][0], RADAR
        plan = _radar_plan(card, plan, radar)
    kept = None if state is None else encoder_state(state, card, modality)
    model = filled(lambda: _network(card, len(known)), kept, card.name)
    if state is None:
        nn.init.normal_(model.patch_embed.proj.bias, std=0.02)
    adapt_kernels(model.patch_embed.proj, plan)
    return TerraMindBackbone(card, model, plan)


def _radar_plan(card: BackboneCard, plan: BandPlan, radar: str) -> BandPlan:
    """The kernels and statistics of VV and VH, in the card's unit."""
    scale = card.normalisation.scale
    _, means, stds = _RADAR_PRODUCTS[radar]
    mean, std = list(plan.mean), list(plan.std)
    kernels = []
    for position in plan.read:
        kernel = RADAR.index(plan.bands[position])
        mean[position], std[position] = means[kernel] * scale, stds[kernel] * scale
        kernels.append(kernel)
    return replace(plan, kernels=tuple(kernels), mean=tuple(mean), std=tuple(std))


def _network(card: BackboneCard, channels: int) -> Any:
    gated = bool(card.architecture["gated"])
    options: dict[str, Any] = {}
    if gated:  # two thirds of the usual width, times three matrices; no biases
        options = {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 8 / 3}
    model = vit_network(
        card,
        in_chans=channels,
        global_pool="",
        qkv_bias=not gated,
        proj_bias=not gated,  # of attention and MLP
        class_token=False,
        pos_embed="none",
        norm_layer=partial(nn.LayerNorm, eps=1e-6, bias=False),
        **options,
    )
    del model.pos_embed
    model.register_buffer("pos_embed", _position_table(card))  # it is in the file
    return model


def _position_table(card: BackboneCard) -> Tensor:
    """Sines and cosines: rows in the first half of the width, columns in the other.

    MAE's table has them the other way round, so it is transposed here.
    """
    side = card.image_size // card.patch
    table = fixed_table(card.width, side, side).unflatten(0, (side, side))
    return table.transpose(0, 1).flatten(0, 1)[None]  # (1, side*side, D)


def encoder_state(state: State, card: BackboneCard, modality: str) -> State:
    """A TerraMind checkpoint in timm's names, for the sensor with key `modality`.

    Other sensors and the decoder are dropped; the position table is kept. Raises
    ValueError if the sensor is missing or layer norms have biases, which TerraMind
    keeps at zero.
    """
    own = f"encoder_embeddings.{modality}."
    embedding = {k.removeprefix(own): t for k, t in state.items() if k.startswith(own)}
    if set(embedding) != {"proj.weight", "pos_emb", "mod_emb"}:
        raise ValueError(
            f"the checkpoint does not fit {card.name}: of the patch embedding "
            f"{modality} it has {', '.join(embedding) or 'nothing'}, and proj.weight, "
            "pos_emb and mod_emb are needed"
        )
    kernel = embedding["proj.weight"].unflatten(1, (card.patch, card.patch, -1))
    kept = {
        "patch_embed.proj.weight": kernel.permute(0, 3, 1, 2).contiguous(),
        "patch_embed.proj.bias": embedding["mod_emb"].flatten(),
        "pos_embed": embedding["pos_emb"],
    }
    for key, tensor in state.items():
        if key.startswith(_NOT_ENCODER):
            continue
        if re.search(r"norm\d?\.bias$", key):
            if tensor.any():
                raise ValueError(f"{key} is not zero: TerraMind's norms have no bias")
            continue
        kept[_timm_key(key, bool(card.architecture["gated"]))] = tensor
    return kept


def _timm_key(key: str, gated: bool) -> str:
    name = re.sub(r"^encoder\.(?=\d)", "blocks.", key)
    name = re.sub(r"^encoder_norm\.", "norm.", name)
    if gated:
        name = name.replace("mlp.fc1.", "mlp.fc1_g.").replace("mlp.fc3.", "mlp.fc1_x.")
    return name
