"""Hierarchical networks of timm: ConvNeXt, ResNet, Swin, MambaOut, EfficientViM.

Their four stages give four maps of growing stride. The network is timm's, under timm's
names, without its classifier. EfficientViM is the state-space model among them, and
MambaOut its control: the same kind of block without a state space.

Source: timm; Lee et al. 2024, EfficientViM, arXiv 2411.15241; Yu & Wang 2024, MambaOut,
arXiv 2405.07992.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone, Meta
from geopeft_kit.backbones.card import BackboneCard


def resnet50(bands: int) -> Any:
    """Timm's ResNet-50 with random weights and without its classifier."""
    return timm.create_model(
        "resnet50", pretrained=False, num_classes=0, in_chans=bands
    )


class HierarchicalBackbone(Backbone):
    """Four maps, one per stage, usually at strides 4, 8, 16 and 32.

    Swin's final norm is applied to its last map, as timm does; the norm in the
    classifier of a ConvNeXt belongs to the classifier and is left out.
    """

    model: Any

    def __init__(
        self, card: BackboneCard, model: Any, plan: BandPlan, layout: str
    ) -> None:
        super().__init__(card, model, plan)
        self.layout = layout
        stages = model.feature_info[-4:]
        self.channels = [stage["num_chs"] for stage in stages]
        self.strides = [stage["reduction"] for stage in stages]

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, C_i, H_i, W_i)."""
        return self.model.forward_intermediates(
            image, indices=4, norm=True, intermediates_only=True
        )


class EfficientViMBackbone(HierarchicalBackbone):
    """EfficientViM: maps of its stem and its three stages, at strides 8, 16, 32, 64.

    The stem's four convolutions halve the image each; the first map is the output of
    the third. That use of the stem is the kit's own; timm offers the three stages.
    """

    def __init__(
        self, card: BackboneCard, model: Any, plan: BandPlan, layout: str
    ) -> None:
        super().__init__(card, model, plan, layout)
        stem = model.patch_embed.conv[2].conv.out_channels
        self.channels = [stem, *self.channels]
        self.strides = [self.strides[0] // 2, *self.strides]

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, C_i, H_i, W_i)."""
        stem = self.model.patch_embed.conv
        maps = [stem[:3](image)]  # (B, C_1, H / 8, W / 8)
        x = stem[3:](maps[0])
        for stage in self.model.stages:
            found, x, _ = stage(x)
            maps.append(found)
        return maps
