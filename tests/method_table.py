"""The table behind the method tests: every method, its options, whom it serves.

One row a method and setting. `serves` is written out by hand, so that a method which
silently stops serving an architecture fails a test instead of shrinking the table.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.backbones.band_plan import plan_bands
from geopeft_kit.backbones.hierarchical import HierarchicalBackbone
from geopeft_kit.backbones.timm_zoo import make_card
from geopeft_kit.methods import Adapter

# "fused": a ViT with one qkv matrix. "split": Galileo, with q, k, v apart and several
# tokens per patch. The others are named after their architecture.
BACKBONES = {
    "fused": "geopeft_tiny",
    "split": "galileo_nano",
    "swin": "timm:swin_tiny_patch4_window7_224",
    "convnext": "timm:convnext_atto",
    "resnet": "timm:resnet10t",
}
ALL = tuple(BACKBONES)
TOKENS = ("fused", "split")
WITH_MLP = ("fused", "split", "swin", "convnext")


@dataclass(frozen=True)
class Row:
    """One method with options, and the kinds of backbone that it serves."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    serves: tuple[str, ...] = ALL
    load: dict[str, Any] = field(default_factory=dict)  # arguments of load_backbone

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.name, *words])


RGB = {"bands": "hls", "new_bands": "ignore"}  # an RGB network under six-band images

ROWS = [
    # the two ends, and existing tensors
    Row("frozen"),
    Row("full"),
    Row("last_blocks", {"number": 1}),
    Row("bias"),
    Row("norm"),
    Row("ia3"),
    Row("ssf"),
    Row("apla", {"rows": 4}, ("fused", "split", "swin")),
    # low rank and relatives, from Hugging Face peft
    Row("lora", {"rank": 2}),
    Row("dora", {"rank": 2}),
    Row("adalora", {"rank": 2}),
    # peft's VeRA and FourierFT are for Linear layers; this ConvNeXt has convolutions
    Row("vera", {"rank": 4}, ("fused", "split", "swin")),
    Row("loha", {"rank": 2}),
    Row("lokr", {"rank": 2}),
    # peft's OFT is no identity on convolutions that look at several cells
    Row("oft", {}, WITH_MLP),
    Row("boft"),
    Row("boft", {"block_size": 4, "factors": 2}),
    Row("fourierft", {"frequencies": 20}, ("fused", "split", "swin")),
    Row("randlora", {"rank": 8, "alpha": 8}, ("fused", "split", "swin")),
    Row("shira", {"rank": 2}, ("fused", "split", "swin")),
    Row("delora", {"rank": 2}, ("fused", "split", "swin")),
    # ours
    Row("slr", {"rank": 2}, WITH_MLP),
    Row("slr", {"rank": 2, "patch_embedding": True}, ("fused", "swin")),
    Row(
        "slr", {"rank": 2, "patch_embedding": True, "all_bands": True}, ("fused",), RGB
    ),
    Row("vpt", {"tokens": 3, "dropout": 0.0}, TOKENS),
    Row("vpt", {"tokens": 3, "deep": False, "dropout": 0.0}, TOKENS),
    Row("houlsby", {"width": 4}, WITH_MLP),
    # wide enough that some ReLU is awake in every block, whatever the last digit
    Row("adaptformer", {"width": 16, "dropout": 0.0}, WITH_MLP),
    Row("convpass", {"width": 4, "dropout": 0.0}, ("fused", "split", "swin")),
    Row("conv_adapter", {"reduction": 2}, ("convnext", "resnet")),
    Row("mona", {"width": 8, "dropout": 0.0}, ("fused", "split", "swin")),
    Row("quantised_adapter", {"width": 4, "bits": 1, "dropout": 0.0}, WITH_MLP),
    Row("quantised_adapter", {"width": 4, "bits": 4, "dropout": 0.0}, WITH_MLP),
    Row("vit_adapter", {"width": 16, "heads": 2}, TOKENS),
    Row("deflect", {}, ("fused",), RGB),
    Row("deflect", {"form": "polar"}, ("fused",), RGB),
    Row("upetu", {"width": 4, "bits": 1}, ("swin", "convnext")),
    Row("earth_adapter", {"width": 4}, ("fused", "split")),
]
CARDS = {card.name: card for card in gk.list_methods()}
# Method -> options that keep it small; its first row.
SMALL = {row.name: row.options for row in reversed(ROWS)}


@functools.cache
def _made(kind: str, load: tuple[tuple[str, Any], ...]) -> Backbone:
    torch.manual_seed(0)
    backbone = _small_swin() if kind == "swin" else _loaded(kind, dict(load))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            # Fresh networks have zero biases, unit gains and tiny layer scales, where
            # a swapped or forgotten tensor would not show.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "gamma" in name:
                parameter.fill_(0.5)
    return backbone.eval()


def _loaded(kind: str, load: dict[str, Any]) -> Backbone:
    name = "geopeft_tiny_rgb" if load else BACKBONES.get(kind, f"timm:{kind}")
    return gk.load_backbone(name, weights=None, **load)


def _small_swin() -> Backbone:
    """timm's own Swin with four thin stages; Swin-T takes too long for these tests."""
    card = make_card(BACKBONES["swin"])
    model = timm.create_model(
        BACKBONES["swin"].removeprefix("timm:"),
        pretrained=False,
        num_classes=0,
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(1, 2, 1, 1),
        num_heads=(1, 2, 4, 8),
        strict_img_size=False,
        drop_path_rate=0.0,  # or a block may be left out of a step by chance
    )
    plan = plan_bands(card)
    return HierarchicalBackbone(card, model, plan, "swin")


def make(kind: str, load: dict[str, Any] | None = None) -> Backbone:
    """The same small backbone every time; drawing random weights is the slow part.

    Other kinds than those of the table are names of timm.
    """
    return copy.deepcopy(_made(kind, tuple((load or {}).items())))


def stir(adapter: Adapter) -> None:
    """Move every trained tensor away from its start."""
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=generator))


def image(backbone: Backbone, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 2 * max(backbone.strides)
    return torch.rand(2, len(backbone.bands), size, size, generator=generator)


def output(backbone: Backbone) -> Tensor:
    with torch.no_grad():
        return torch.cat([m.flatten() for m in backbone(image(backbone))])
