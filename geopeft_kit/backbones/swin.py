"""Swin transformers with four stages: GFM's Swin-B and SatlasPretrain's Swin V2.

GFM's is timm's network; SatlasPretrain's layers are torchvision's, as in torchgeo, with
timm's names for stages and MLPs, which the methods know. Both pad a map that their
windows do not fill, so any image size works.

Sources: GFM: Mendieta et al., arXiv 2302.04476; key names from github.com/mmendiet/GFM
(Apache-2.0), which are those of SimMIM around Microsoft's Swin. SatlasPretrain: Bastani
et al., arXiv 2211.15660; torchgeo (MIT); torchvision (BSD-3-Clause).
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import partial
from typing import Any

import timm.models.swin_transformer as timm_swin
from timm.layers import Mlp
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta, adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.hierarchical import HierarchicalBackbone
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.weights import State, filled, load_strictly, strip_prefixes

_PRETRAINED_WINDOW = 6
# Sizes between which the authors fine-tune with windows of a 32nd of the image.
_SMALLEST, _LARGEST = 128, 256
_MASK_TOKEN = "encoder.mask_token"


class GFMBackbone(HierarchicalBackbone):
    """GFM's Swin-B; the four maps are the stages' outputs, before each merging.

    Attributes:
        mask_token: (1, 1, 128), what stood for hidden patches in pretraining; not used
            by `forward`. None without a checkpoint that has it.
    """

    mask_token: Tensor | None


@register("gfm")
def build_gfm(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    image_size: int | None = None,
    window: int | None = None,
) -> GFMBackbone:
    """Build GFM's student encoder.

    Args:
        card, plan, state: as for every builder.
        image_size: determines the windows, see `window`. Other sizes run, padded.
        window: side of the attention windows in cells; the bias tables are resized.
            None: a 32nd of the image from 128 to 256 px, as the authors fine-tune (no
            padding), else that of pretraining, 6.
    """
    size = image_size or card.image_size
    if window is None:
        fits = _SMALLEST <= size <= _LARGEST and size % 32 == 0
        window = size // 32 if fits else _PRETRAINED_WINDOW
    if type(window) is not int or window < 1:
        raise ValueError(f"window={window!r}: a whole number of cells, 1 or more")
    sizes = card.architecture
    model = timm_swin.SwinTransformer(
        img_size=max(size, 32),
        window_size=window,
        embed_dim=sizes["embed_dim"],
        depths=sizes["depths"],
        num_heads=sizes["heads"],
        num_classes=0,
        drop_path_rate=0.0,
        strict_img_size=False,
    )
    mask_token = None
    if state is not None:
        kept, mask_token = _student(state)
        # Microsoft's names as timm's, which has each merging in the next stage.
        load_strictly(model, timm_swin.checkpoint_filter_fn(kept, model), card.name)
    adapt_kernels(model.get_submodule("patch_embed.proj"), plan)
    backbone = GFMBackbone(card, model, plan, "swin")
    backbone.register_buffer("mask_token", mask_token, persistent=False)
    return backbone


def _student(state: State) -> tuple[State, Tensor | None]:
    """The student's encoder without its prefix, and its mask token."""
    kept = {
        key.removeprefix("encoder."): tensor
        for key, tensor in state.items()
        if key.startswith("encoder.") and key != _MASK_TOKEN
    }
    return kept or dict(state), state.get(_MASK_TOKEN)


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


@register("satlas")
def build_satlas(
    card: BackboneCard, plan: BandPlan, state: State | None
) -> SatlasBackbone:
    """Build SatlasPretrain's Swin V2 from torchvision's keys, which torchgeo's have."""
    kept = None if state is None else stage_state(state)
    sizes = card.architecture
    network = partial(
        SwinV2,
        len(card.bands),
        sizes["width"],
        list(sizes["depths"]),
        list(sizes["heads"]),
    )
    model = filled(network, kept, card.name)
    adapt_kernels(model.get_submodule("patch_embed.proj"), plan)
    return SatlasBackbone(card, model, plan, "swin")


def stage_state(state: State) -> State:
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
