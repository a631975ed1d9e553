"""SatMAE for Sentinel-2: a ViT that reads its ten bands in three groups.

Each group (visible and near infrared; red edge; short-wave infrared) has a patch
embedding of its own and makes one token a patch. The last 256 numbers of a token code
its group, the others its position; both codes are fixed sines and cosines. A short
module on timm's blocks, written from the formulas.

Sources: Cong et al. 2022, SatMAE, arXiv 2207.08051, section 3.3; key names and groups
from github.com/sustainlab-group/SatMAE (CC-BY-NC-4.0: facts only are taken).
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta, adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.grouped import GroupedViTBackbone, group_slots
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.rgb_vits import mae_state
from geopeft_kit.backbones.vit import (
    fixed_table,
    sines_and_cosines,
    with_class_row,
)
from geopeft_kit.backbones.weights import State, filled

# Indices of the card's bands; one patch embedding each.
GROUPS = [(0, 1, 2, 6), (3, 4, 5, 7), (8, 9)]
_TABLES = ("pos_embed", "channel_embed", "channel_cls_embed")


class GroupedViT(nn.Module):
    """The encoder: one patch embedding per group, a class token, blocks, a final norm.

    `groups` maps the number of each group to its bands. The number is its name in the
    checkpoint and its row in the channel table.
    """

    def __init__(
        self, width: int, depth: int, heads: int, patch: int, groups: Mapping[int, int]
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.patch_embed = nn.ModuleDict(
            {
                str(number): PatchEmbed(None, patch, bands, width, output_fmt="NHWC")
                for number, bands in groups.items()
            }
        )
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(width)


class SatMAEBackbone(GroupedViTBackbone):
    """SatMAE with the groups that the image has; positions are resized to each image.

    `tables` are position (1, 1 + N, D - E), channel (1, G, E) and class-token (1, 1, E)
    codes.
    """

    num_prefix_tokens = 1
    pos_embed: Tensor
    channel_embed: Tensor
    channel_cls_embed: Tensor

    def __init__(
        self,
        card: BackboneCard,
        model: GroupedViT,
        plan: BandPlan,
        tables: Mapping[str, Tensor],
    ) -> None:
        super().__init__(card, model, plan, card.patch)
        for name in _TABLES:  # nothing trains them, so they are not persistent
            self.register_buffer(name, tables[name], persistent=False)
        self.positions = {}
        for number, slots in enumerate(group_slots(card, plan, GROUPS)):
            if not slots:
                continue
            self.positions[str(number)] = [channel for channel, _ in slots]
            embedding = model.get_submodule(f"patch_embed.{number}.proj")
            kernels = tuple(kernel for _, kernel in slots)
            adapt_kernels(embedding, replace(plan, kernels=kernels))

    def embed(self, image: Tensor, meta: Meta | None) -> Tensor:
        """Normalised image (B, C, H, W) -> tokens with positions (B, h, w, N, D)."""
        patches = torch.stack(
            [
                embed(image[:, self.positions[number]])
                for number, embed in self.model.patch_embed.items()
            ],
            dim=3,
        )  # (B, h, w, N, D)
        height, breadth, groups = patches.shape[1:4]
        place = resample_abs_pos_embed(
            self.pos_embed, [height, breadth], num_prefix_tokens=1
        )  # (1, 1 + h*w, D - E)
        place = place[0, 1:].unflatten(0, (height, breadth))  # (h, w, D - E)
        rows = [int(number) for number in self.model.patch_embed]
        channel = self.channel_embed[0, rows]  # (N, E)
        code = torch.cat(
            [
                place[:, :, None].expand(-1, -1, groups, -1),
                channel.expand(height, breadth, -1, -1),
            ],
            dim=3,
        )  # (h, w, N, D)
        return patches + code.to(patches.dtype)

    def prefix(self) -> Tensor:
        """The class token with its code, (1, 1, D)."""
        code = torch.cat([self.pos_embed[:, :1], self.channel_cls_embed], dim=2)
        return self.model.cls_token + code


@register("satmae_multispectral")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
) -> SatMAEBackbone:
    """Build SatMAE for the groups of which the image has a band.

    The position and channel codes of the file are used, whatever their grid.
    """
    slots = group_slots(card, plan, GROUPS)
    groups = {i: len(GROUPS[i]) for i, pairs in enumerate(slots) if pairs}
    sizes = card.width, card.depth, card.architecture["heads"], card.patch
    kept, tables = None, _fixed_tables(card)
    if state is not None:
        kept, found = _split(state, card.name, groups)
        tables |= found
    model = filled(lambda: GroupedViT(*sizes, groups), kept, card.name)
    return SatMAEBackbone(card, model, plan, tables)


def _split(state: State, name: str, groups: Mapping[int, int]) -> tuple[State, State]:
    """The encoder's tensors without unused groups, and the codes."""
    kept = mae_state(state, name)
    if "fc_norm.weight" in kept:
        raise ValueError(
            f"this checkpoint of {name} was fine-tuned: it has lost the encoder's last "
            "norm. Take the file of pretraining, which the card names"
        )
    unused = tuple(f"patch_embed.{i}." for i in range(len(GROUPS)) if i not in groups)
    kept = {key: t for key, t in kept.items() if not key.startswith(unused)}
    return kept, {key: kept.pop(key).float() for key in _TABLES if key in kept}


def _fixed_tables(card: BackboneCard) -> State:
    """The codes as pretraining starts with them, and keeps them."""
    channels = card.architecture["channel_code"]
    side, half = card.image_size // card.patch, channels // 2
    place = fixed_table(card.width - channels, side, side)  # (side*side, D - E)
    rates = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    numbers = torch.arange(len(GROUPS), dtype=torch.float64)
    return {
        "pos_embed": with_class_row(place),  # (1, 1 + side*side, D - E)
        "channel_embed": sines_and_cosines(numbers, rates).float()[None],
        "channel_cls_embed": torch.zeros(1, 1, channels),
    }
