"""SatMAE for Sentinel-2: a ViT that reads its ten bands in three groups.

Each group (visible and near infrared; red edge; short-wave infrared) has a patch
embedding of its own and makes one token a patch. The last 256 numbers of a token say
which group it is, the others where it lies. Both codes are fixed sines and cosines.

Ours is a short module on timm's blocks, written from the formulas.

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
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.grouped import GroupedViTBackbone, group_slots
from geopeft_kit.backbones.rgb_vits import fixed_table, mae_state
from geopeft_kit.backbones.weights import State, load_strictly

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
        for name in _TABLES:  # fixed: nothing trains them, and none is in the file
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


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
) -> SatMAEBackbone:
    """Build SatMAE for the groups of which the image has a band.

    `state` is a pretraining checkpoint in the upstream's key layout, or None for random
    weights; the codes of the file are used, whatever their grid. Raises ValueError for
    a new band with a random kernel, or a checkpoint that does not fit.
    """
    slots = group_slots(card, plan, GROUPS)
    groups = {i: len(GROUPS[i]) for i, pairs in enumerate(slots) if pairs}
    sizes = card.width, card.depth, card.architecture["heads"], card.patch
    tables = _fixed_tables(card)
    if state is None:
        return SatMAEBackbone(card, GroupedViT(*sizes, groups), plan, tables)
    kept, found = _split(state, card.name, groups)
    with torch.device("meta"):  # no memory and no time for random numbers
        model = GroupedViT(*sizes, groups)
    load_strictly(model, kept, card.name)
    return SatMAEBackbone(card, model, plan, tables | found)


def _split(
    state: Mapping[str, Tensor], name: str, groups: Mapping[int, int]
) -> tuple[State, State]:
    """The encoder's tensors without the groups that are not at hand; the codes."""
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
    side = card.image_size // card.patch
    place = fixed_table(card.width - channels, side, side)  # (side*side, D - E)
    first = torch.zeros(1, card.width - channels)
    steps = torch.arange(channels // 2, dtype=torch.float64)
    rates = 10000 ** (-steps / (channels // 2))
    angles = torch.outer(torch.arange(len(GROUPS), dtype=torch.float64), rates)
    return {
        "pos_embed": torch.cat([first, place])[None],  # (1, 1 + side*side, D - E)
        "channel_embed": torch.cat([angles.sin(), angles.cos()], dim=1).float()[None],
        "channel_cls_embed": torch.zeros(1, 1, channels),
    }


# Of the authors' loader: band, mean, standard deviation of digital numbers.
STATISTICS = (
    ("COASTAL_AEROSOL", 1370.19151926, 633.15169573),
    ("BLUE", 1184.3824625, 650.2842772),
    ("GREEN", 1120.77120066, 712.12507725),
    ("RED", 1136.26026392, 965.23119807),
    ("RED_EDGE_1", 1263.73947144, 948.9819932),
    ("RED_EDGE_2", 1645.40315151, 1108.06650639),
    ("RED_EDGE_3", 1846.87040806, 1258.36394548),
    ("NIR_BROAD", 1762.59530783, 1233.1492281),
    ("NIR_NARROW", 1972.62420416, 1364.38688993),
    ("WATER_VAPOUR", 582.72633433, 472.37967789),
    ("SWIR_1", 1732.16362238, 1310.36996126),
    ("SWIR_2", 1247.91870117, 1087.6020813),
)
_UNUSED = ("COASTAL_AEROSOL", "WATER_VAPOUR")
_ZENODO = "https://zenodo.org/record/7338613/files"


def two_spreads(bands: tuple[str, ...]) -> Normalisation:
    """Mean - 2 std becomes 0, mean + 2 std becomes 1; fMoW-Sentinel's statistics.

    The authors clip to that range and round to 256 steps; here neither is done.
    """
    rows = [row for row in STATISTICS if row[0] in bands]
    return Normalisation(
        1e4,
        tuple(mean - 2 * std for _, mean, std in rows),
        tuple(4 * std for _, _, std in rows),
    )


def _card(
    size: str, width: int, depth: int, heads: int, parameters: int
) -> BackboneCard:
    bands = tuple(band for band, _, _ in STATISTICS if band not in _UNUSED)
    file = f"pretrain-vit-{size}-e199.pth"
    return BackboneCard(
        name=f"satmae_multispectral_{size}",
        family="satmae_multispectral",
        bands=bands,
        patch=8,
        width=width,
        depth=depth,
        parameters=parameters,
        image_size=96,
        normalisation=two_spreads(bands),
        licence_weights="CC-BY-NC-4.0",
        licence_code="Apache-2.0",
        source="https://github.com/sustainlab-group/SatMAE",
        weights={"default": WeightFile(file, url=f"{_ZENODO}/{file}")},
        architecture={"heads": heads, "channel_code": 256},
        paper="arXiv 2207.08051",
        notes="Masked autoencoder on fMoW-Sentinel, 200 epochs. Three groups of bands, "
        "one token each: BLUE, GREEN, RED, NIR_BROAD; RED_EDGE_1-3, NIR_NARROW; "
        "SWIR_1, SWIR_2. The maps are the mean over the groups of a patch. A group of "
        "which no band is given is not in the sequence.",
        cannot="No commercial use. No random kernel for a new band: it would belong to "
        "no group. The published file was not at hand: key names are those of the "
        "authors' code.",
    )


CARDS = (
    _card("base", 768, 12, 12, 85_550_592),
    _card("large", 1024, 24, 16, 302_970_880),
)
