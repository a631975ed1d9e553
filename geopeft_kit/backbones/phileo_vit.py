"""PhilEO's ViT-UPerNet: a plain ViT, a neck to four scales, and UPerNet's fusion.

Written from the formulas, on timm's ViT; names inside the head are those of mmseg,
which the upstream uses.

Source: PhilEO on MajorTOM, arXiv 2506.14765, and its public code
(github.com/ESA-PhiLab/PhilEO-MajorTOM); UPerNet, arXiv 1807.10221, section 3.
Taught in notebook 11 (architectures and few labels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import (
    Backbone,
    Meta,
    adapt_kernels,
    tap_points,
    tapped_tokens,
)
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.phileo_unet import CNNBlock, check_locked, locked
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import (
    fixed_table,
    tokens_to_map,
    vit_network,
    with_class_row,
)
from geopeft_kit.backbones.weights import State, check_patch, filled, strip_prefixes

_PATCHES = (4, 16)
_POOLS = (1, 2, 3, 6)
# Heads of pretraining, the classifier, and the neck's second name.
_DROPPED = (
    "encoder.linear_proj.",
    "encoder.head_",
    "decoder.sample_list_base.",
    "decoder.decoder_upernet.conv_seg.",
    "head.",
)
_PREFIXES = {  # the upstream's -> here
    "encoder.vit_encoder.": "vit.",
    "decoder.decoder_upernet.": "head.",
    "decoder.": "",
}


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class UPerHead(nn.Module):
    """Pooling at four sizes on the coarsest map, a top-down path, and their fusion."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        deep = channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvUnit(deep, width, 1))
            for size in _POOLS
        )
        self.bottleneck = ConvUnit(deep + len(_POOLS) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvUnit(c, width, 1) for c in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvUnit(width, width, 3) for _ in channels[:-1])
        self.fpn_bottleneck = ConvUnit(len(channels) * width, width, 3)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps (B, C_i, H_i, W_i) -> four (B, width, H_i, W_i), first fused."""
        deep = maps[-1]
        pooled = [_like(unit(deep), deep) for unit in self.psp_modules]
        levels = [
            unit(x) for unit, x in zip(self.lateral_convs, maps[:-1], strict=True)
        ]
        levels.append(self.bottleneck(torch.cat([deep, *pooled], dim=1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + _like(levels[i + 1], levels[i])
        levels[:-1] = [
            unit(x) for unit, x in zip(self.fpn_convs, levels[:-1], strict=True)
        ]
        fused = torch.cat([_like(x, levels[0]) for x in levels], dim=1)
        return [self.fpn_bottleneck(fused), *levels[1:]]


class ViTUPerNet(nn.Module):
    """ViT, neck and head; `stem` puts the pretraining code's convolutions first."""

    def __init__(self, card: BackboneCard, patch: int, stem: bool) -> None:
        super().__init__()
        bands, width, size = len(card.bands), card.width, card.image_size
        self.stem: nn.Module = nn.Identity()
        if stem:
            self.stem = CNNBlock(bands, bands, size, nn.LeakyReLU())
        self.vit = vit_network(card, epsilon=1e-5, patch_size=patch)
        table = with_class_row(fixed_table(width, size // patch, size // patch))
        self.vit.pos_embed = nn.Parameter(table, requires_grad=False)
        half, quarter = width // 2, width // 4
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(width, half, 2, 2),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )
        self.fpn2 = nn.Sequential(
            nn.ConvTranspose2d(width, half, 2, 2), nn.BatchNorm2d(half), nn.ReLU()
        )
        channels = (quarter, half, width, width)
        self.head = UPerHead(channels, card.architecture["head_width"])


class PhilEOViTBackbone(Backbone):
    """The head's maps at patch / 4, / 2, x 1 and x 2; the first is fused."""

    layout = "vit"
    num_prefix_tokens = 1
    model: ViTUPerNet

    def __init__(
        self,
        card: BackboneCard,
        model: ViTUPerNet,
        plan: BandPlan,
        patch: int,
    ) -> None:
        super().__init__(card, model, plan)
        self.width = card.width
        self.channels = [card.architecture["head_width"]] * 4
        self.strides = [patch // 4, patch // 2, patch, 2 * patch]
        self.taps = tap_points(card.depth)

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, 256, H_i, W_i)."""
        model, vit = self.model, self.model.vit
        if isinstance(model.stem, CNNBlock):
            check_locked(self.card, image)
            image = model.stem(image)
        patches = vit.patch_embed(image)  # (B, h, w, D)
        self.grid.height, self.grid.width = patches.shape[1:3]
        tokens = vit._pos_embed(patches)  # (B, 1 + h*w, D)
        tapped = tapped_tokens(vit, tokens, self.taps)
        maps = [tokens_to_map(each, *patches.shape[1:3]) for each in tapped]
        pooled = F.max_pool2d(maps[3], 2)
        return model.head([model.fpn1(maps[0]), model.fpn2(maps[1]), maps[2], pooled])


@register("phileo_vit")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    image_size: int | None = None,
    patch: int = 4,
    stem: bool | None = None,
) -> PhilEOViTBackbone:
    """Build ViT, neck and UPerNet head.

    Args:
        card, plan, state: as for every builder.
        image_size: the card's own where there is a stem; else any.
        patch: 4 or 16 pixels: equal in size, 19 times apart in computation.
        stem: the convolutional block before the ViT, which ties the network to one
            image size and needs all bands. None: as the checkpoint has it, and none
            without a checkpoint, as in the counts of the card.
    """
    if patch not in _PATCHES:
        raise ValueError(f"patch={patch!r}: {card.name} takes 4 or 16")
    kept = None if state is None else _own_names(state)
    if stem is None:
        stem = kept is not None and any(key.startswith("stem.") for key in kept)
    if stem:
        _check_stem(card, plan, image_size)
    if kept is not None:
        check_patch(card.name, kept.get("vit.patch_embed.proj.weight"), patch)
    model = filled(lambda: ViTUPerNet(card, patch, bool(stem)), kept, card.name)
    adapt_kernels(model.vit.patch_embed.proj, plan)
    return PhilEOViTBackbone(card, model, plan, patch)


def _own_names(state: State) -> State:
    """The checkpoint in the names used here, without the heads of pretraining."""
    kept = {}
    for key, tensor in strip_prefixes(state, ("module.",)).items():
        if key.startswith(_DROPPED):
            continue
        prefix = next((p for p in _PREFIXES if key.startswith(p)), None)
        if prefix is not None:
            key = key.replace(prefix, _PREFIXES[prefix], 1)
        kept[key] = tensor
    return kept


def _check_stem(card: BackboneCard, plan: BandPlan, image_size: int | None) -> None:
    if image_size not in (None, card.image_size):
        raise ValueError(locked(card, f"image_size={image_size}"))
    if plan.kernels != tuple(range(len(card.bands))):
        raise ValueError(
            f"the stem of {card.name} adds the image to what it computes from it, so "
            f"it needs all its bands in their order: {', '.join(card.bands)}. Others "
            "may come with new_bands='ignore'"
        )


def _like(x: Tensor, other: Tensor) -> Tensor:
    """A map in the height and width of another."""
    return F.interpolate(x, other.shape[-2:], mode="bilinear", align_corners=False)
