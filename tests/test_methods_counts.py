"""Trained numbers on networks of real size, on torch's meta device.

Counts that follow a formula of their own are tested with their method.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone

PATCHES = {"patch_embedding": True}
CONVPASS = 2 * 768 * 8 + 8 + 768 + 9 * 8 * 8 + 8  # one unit on a ViT-B
# Method, options, count on ViT-B (D=768, L=12), count on ViT-L (D=1024, L=24).
COUNTS: list[tuple[str, dict[str, Any], int | None, int | None]] = [
    ("frozen", {}, 0, 0),
    ("last_blocks", {"number": 1}, 7_087_872, 12_596_224),
    ("bias", {}, 102_912, 272_384),
    ("norm", {}, 38_400, 100_352),
    ("ia3", {}, 6 * 768 * 12, 6 * 1024 * 24),
    ("ssf", {}, 205_824, 544_768),
    ("ssf", {"layers": [0, 5]}, 33_792, 45_056),
    ("lora", {}, 2_064_384, 5_505_024),
    ("lora", {"targets": ("q", "v")}, 589_824, 1_572_864),
    ("lora", {"targets": ("qkv",)}, 589_824, 1_572_864),
    ("lora", {"layers": "last:4"}, 688_128, 917_504),
    ("dora", {"targets": ("qkv",), "rank": 8}, 322_560, 860_160),
    ("slr", {"rank": 4}, 858_816, None),
    ("slr", {"rank": 8}, 1_448_832, 3_861_248),
    ("slr", {}, 2_628_864, 7_007_744),
    ("slr", {"norms": False}, 2_628_864 - 38_400, 7_007_744 - 100_352),
    ("slr", PATCHES, 2_628_864 + 198_928, 7_007_744 + 264_976),
    ("vpt", {}, 921_600, 2_457_600),
    ("vpt", {"tokens": 50}, 460_800, 1_228_800),
    ("vpt", {"deep": False}, 76_800, 102_400),
    ("vpt", {"layers": [0, 5]}, 153_600, 204_800),
    ("adaptformer", {"width": 16}, 304_320, None),
    ("adaptformer", {"width": 64}, 1_189_632, None),
    ("adaptformer", {"width": 16, "layers": "last:4"}, 304_320 // 3, None),
    ("houlsby", {"width": 16}, 2 * 304_320, None),
    ("convpass", {}, 24 * CONVPASS, None),
    ("mona", {}, 24 * 111_872, None),
    ("earth_adapter", {}, None, 1_825_674),
    ("earth_adapter", {"frequency_layers": "all"}, None, 3_688_224),
    ("earth_adapter", {"frequency_layers": "first:6"}, None, 1_825_674),
    ("earth_adapter", {"frequency_layers": "last:6"}, None, 1_825_674),
    ("earth_adapter", {"frequency_layers": "all", "width": 2}, None, 442_608),
    ("earth_adapter", {"frequency_layers": []}, None, 24 * (50_200 + 1)),
]


@pytest.fixture(scope="module")
def big() -> list[Backbone]:
    with torch.device("meta"):
        return [
            gk.load_backbone(f"timm:vit_{size}_patch16_224", weights=None)
            for size in ("base", "large")
        ]


@pytest.mark.parametrize(("name", "options", "base", "large"), COUNTS)
def test_counts_of_real_sizes(big, name, options, base, large) -> None:
    for backbone, count in zip(big, (base, large), strict=True):
        if count is None:
            continue
        adapter = gk.attach(backbone, name, **options)
        assert adapter.num_parameters == count
        assert adapter.num_bytes == 4 * count
        assert sum(p.numel() for p in adapter.parameters()) == count
        assert {p.device.type for p in adapter.parameters()} <= {"meta"}
        adapter.detach()


def test_full_counts_everything(big) -> None:
    everything = sum(p.numel() for p in big[0].parameters())
    adapter = gk.attach(big[0], "full")
    assert adapter.num_parameters == everything
    adapter.detach()


@pytest.mark.parametrize(("reduction", "million"), [(4, 3.54), (8, 2.23)])
def test_sizes_of_conv_adapter_on_convnext_base(reduction: int, million: float) -> None:
    with torch.device("meta"):
        backbone = gk.load_backbone("timm:convnext_base", weights=None)
    adapter = gk.attach(backbone, "conv_adapter", reduction=reduction)
    count = 0
    for channels, blocks in zip((128, 256, 512, 1024), (3, 3, 27, 3), strict=True):
        w = channels // reduction
        one = w * (channels // w) * 7**2 + w + w * channels + channels + channels
        count += blocks * one
    assert adapter.num_parameters == count
    assert round(count / 1e6, 2) == million
