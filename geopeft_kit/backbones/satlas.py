"""SatlasPretrain's Swin V2: windows, four stages, nine bands of Sentinel-2.

The layers are torchvision's, as in torchgeo; stages and MLPs carry timm's names, which
the methods know. torchvision pads a map that its windows do not fill, so that any image
size works, and equals torchgeo's result.

Sources: Bastani et al. 2023, SatlasPretrain, arXiv 2211.15660; torchgeo (MIT);
torchvision (BSD-3-Clause); pixel values from the authors' Normalization.md and, for the
true-colour image, ESA's Sentinel-2 user guide (saturation at reflectance 0.3558).
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta, adapt_kernels
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.hierarchical import HierarchicalBackbone
from geopeft_kit.backbones.torchgeo_facts import LICENCE
from geopeft_kit.backbones.weights import State, load_strictly, strip_prefixes

_WINDOW = 8
_EMBEDDING = {"0": "proj", "2": "norm"}  # places in torchvision's first layer


class Block(SwinTransformerBlockV2):
    """torchvision's block with timm's names: `mlp.fc1`, `mlp.fc2`, `drop_path1`, ..."""

    def __init__(self, dim: int, *inputs: Any, **options: Any) -> None:
        super().__init__(dim, *inputs, **options)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path1 = nn.Identity()
        self.drop_path2 = nn.Identity()

    def _attn(self, x: Tensor) -> Tensor:
        """Window attention under timm's name, (B, H, W, C) kept."""
        return self.attn(x)


class Stage(nn.Module):
    """Merge patches, then run the blocks."""

    def __init__(self, downsample: nn.Module, blocks: nn.Module) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C); the first stage keeps the shape."""
        return self.blocks(self.downsample(x))


class SwinV2(nn.Module):
    """torchvision's Swin V2 in four stages, without a classifier."""

    def __init__(
        self, bands: int, width: int, depths: list[int], heads: list[int]
    ) -> None:
        super().__init__()
        parts = SwinTransformer(
            patch_size=[4, 4],
            embed_dim=width,
            depths=depths,
            num_heads=heads,
            window_size=[_WINDOW, _WINDOW],
            stochastic_depth_prob=0.0,  # or a block may be left out by chance
            num_classes=1,  # thrown away
            block=Block,
            downsample_layer=PatchMergingV2,
        )
        _, permute, norm = parts.features[0]
        first = nn.Conv2d(bands, width, kernel_size=4, stride=4)
        self.patch_embed = nn.Sequential(
            OrderedDict(proj=first, permute=permute, norm=norm)
        )
        merges = [nn.Identity(), *parts.features[2::2]]
        self.layers = nn.ModuleList(
            Stage(merge, blocks)
            for merge, blocks in zip(merges, parts.features[1::2], strict=True)
        )
        self.norm = parts.norm
        self.feature_info = [
            {"num_chs": width * 2**i, "reduction": 4 * 2**i} for i in range(4)
        ]


class SatlasBackbone(HierarchicalBackbone):
    """Four maps, one per stage, at strides 4, 8, 16 and 32; the last one normed."""

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, C_i, H_i, W_i)."""
        x = self.model.patch_embed(image)  # (B, H/4, W/4, C)
        maps = []
        for stage in self.model.layers:
            x = stage(x)
            maps.append(x)
        maps[-1] = self.model.norm(x)
        return [found.permute(0, 3, 1, 2).contiguous() for found in maps]


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
) -> SatlasBackbone:
    """Build SatlasPretrain's Swin V2; maps are padded to its windows of 8 cells.

    `state` is in torchvision's key layout, as in torchgeo's files, with or without the
    prefix ``backbone.``; None gives random weights.
    """
    sizes = card.architecture
    made: dict[str, Any] = {
        "bands": len(card.bands),
        "width": sizes["width"],
        "depths": list(sizes["depths"]),
        "heads": list(sizes["heads"]),
    }
    if state is None:
        model = SwinV2(**made)
    else:
        with torch.device("meta"):  # no memory and no time for random numbers
            model = SwinV2(**made)
        load_strictly(model, stage_state(state), card.name)
    adapt_kernels(model.get_submodule("patch_embed.proj"), plan)
    return SatlasBackbone(card, model, plan, "swin")


def stage_state(state: Mapping[str, Tensor]) -> State:
    """Keys by stage: torchvision's ``features.3.0.mlp.3`` is an MLP's second layer.

    The classifier is dropped.
    """
    kept = {}
    for key, tensor in strip_prefixes(state, ("module.", "backbone.")).items():
        if key.startswith("head."):
            continue
        key = key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        kept[re.sub(r"^features\.(\d+)\.(\w+)", _stage_key, key)] = tensor
    return kept


def _stage_key(found: re.Match[str]) -> str:
    """First the patch embedding, then blocks (odd) and patch merging (even) in turn."""
    number, part = int(found[1]), found[2]
    if number == 0:
        return f"patch_embed.{_EMBEDDING.get(part, part)}"
    kind = "blocks" if number % 2 else "downsample"
    return f"layers.{number // 2}.{kind}.{part}"


_TRUE_COLOUR = 3558.0  # reflectance x 10000 that the 8-bit image shows as 255
_OTHERS = 8160.0
_S2_BANDS = (
    "RED", "GREEN", "BLUE", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3",
    "NIR_BROAD", "SWIR_1", "SWIR_2",
)  # fmt: skip
_S2 = Normalisation(1e4, (0.0,) * 9, (_TRUE_COLOUR,) * 3 + (_OTHERS,) * 6)
_SIZES: dict[str, dict[str, Any]] = {
    "t": {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "b": {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
}


def _card(size: str, parameters: int) -> BackboneCard:
    sizes = _SIZES[size]
    weights = f"Swin_V2_{size.upper()}_Weights"
    files = [
        WeightFile(torchgeo=f"{weights}.SENTINEL2_{tag}_MS_SATLAS")
        for tag in ("SI", "MI")
    ]
    return BackboneCard(
        name=f"satlas_swin_v2_{size}",
        family="satlas",
        bands=_S2_BANDS,
        patch=4,
        width=8 * sizes["width"],
        depth=sum(sizes["depths"]),
        parameters=parameters,
        image_size=256,
        normalisation=_S2,
        licence_weights=LICENCE,
        licence_code="BSD-3-Clause (torchvision), Apache-2.0 (timm)",
        source="https://github.com/allenai/satlas",
        weights={"default": files[0], "si": files[0], "mi": files[1]},
        architecture=sizes,
        paper="arXiv 2211.15660",
        notes="Supervised on SatlasPretrain's labels. Tags: si was trained on single "
        "images, mi on several of one place. Red, green and blue are those of the "
        "8-bit true-colour image of L1C: reflectance 0.3558 is 1.",
        cannot="Values above 1 after scaling are not clipped, which the authors do. "
        "The files for RGB, NAIP, Landsat and Sentinel-1 are not offered. LoRA and its "
        "relatives serve the MLPs: torchvision reads the attention's weights without "
        "calling its layers. The published files were not at hand: key names are those "
        "of torchvision's class.",
    )


CARDS = (
    _card("t", 27_591_786),
    _card("b", 86_918_136),
)
