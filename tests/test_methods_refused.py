"""Wrong options and targets: errors name what is allowed, and change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from method_table import RGB, make
from test_methods import assert_same, snapshot

import geopeft_kit as gk

PATCHES = {"patch_embedding": True}
Refused = tuple[str, dict[str, Any], type[Exception], str]

# On a ViT with a fused qkv; DEFLECT-style on its RGB twin under six bands.
ON_VIT: list[Refused] = [
    ("loora", {}, ValueError, r"no method 'loora'.*lora, dora"),
    ("lora", {"rang": 4}, TypeError, r"no option 'rang'.*rank: int = 16"),
    ("frozen", {"targets": ["q"]}, TypeError, "no option 'targets'.*none"),
    ("lora", {"rank": 0}, ValueError, "rank=0; it must be 1 or more"),
    ("lora", {"rank": 2.0}, TypeError, "rank=2.0; a whole number"),
    ("lora", {"alpha": -1}, ValueError, "alpha=-1"),
    ("lora", {"alpha": "big"}, TypeError, "alpha='big'"),
    ("lora", {"dropout": 1.0}, ValueError, "dropout=1.0"),
    ("lora", {"rslora": 1}, TypeError, "^rslora=1"),
    ("lora", {"init": "zero"}, ValueError, "init='zero'.*pissa"),
    ("lora", {"init": "orthogonal", "rank": 3}, ValueError, "rank=3.*even"),
    ("lora", {"targets": ["query"]}, ValueError, r"\['query'\].*attn.qkv.*mlp.fc1"),
    ("lora", {"targets": "q"}, TypeError, "a list of names"),
    ("lora", {"targets": []}, TypeError, "at least one name"),
    ("lora", {"targets": ["q", "q"]}, ValueError, "given twice"),
    ("lora", {"targets": ["q", "qkv"]}, ValueError, "meant by two"),
    ("lora", {"targets": ["fc1", "mlp.fc1"]}, ValueError, "meant by two"),
    ("lora", {"layers": "last:7"}, ValueError, "k from 1 to 6"),
    ("lora", {"layers": "first:1"}, ValueError, "first:1"),
    ("lora", {"layers": [0, 6]}, ValueError, r"\[6\] are out of range"),
    ("lora", {"layers": [-1]}, ValueError, r"\[-1\] are out of range"),
    ("lora", {"layers": [1, 1]}, ValueError, "repeated"),
    ("lora", {"layers": []}, ValueError, "empty"),
    ("lora", {"layers": 3}, TypeError, "a list of 0..5"),
    ("lora", {"layers": [True]}, TypeError, "True"),
    ("last_blocks", {"number": 7}, ValueError, "number=7.*6 blocks"),
    ("oft", {"block_size": 5}, ValueError, r"size=5.*192 inputs, which take \[2, 3"),
    ("boft", {"block_size": 3, "factors": 2}, ValueError, "size=3.*factors=2"),
    ("boft", {"block_size": 1}, ValueError, "block_size=1; it must be 2 or more"),
    ("adalora", {"rank": 4, "start_rank": 4}, ValueError, "start_rank=4.*5 or more"),
    ("adalora", {"rank": 0}, ValueError, "rank=0"),
    ("fourierft", {"frequencies": 40_000}, ValueError, "smallest target has 36864"),
    ("vera", {"seed": -1}, ValueError, "seed=-1"),
    ("loha", {"alpha": 0}, ValueError, "alpha=0"),
    ("lokr", {"factor": 0}, ValueError, "factor=0"),
    ("ssf", {"rank": 2}, TypeError, "no option 'rank'"),
    ("slr", {"targets": ["q"]}, ValueError, "part of blocks.0.attn.qkv.*use 'qkv'"),
    ("slr", {"rank": 0}, ValueError, "rank=0"),
    ("slr", {"norms": 1}, TypeError, "norms=1"),
    ("slr", {"patch_embedding": "yes"}, TypeError, "patch_embedding='yes'"),
    ("slr", {**PATCHES, "layers": "last:2"}, ValueError, "outside those blocks"),
    ("slr", {**PATCHES, "all_bands": True}, ValueError, "reads every band"),
    ("slr", {"all_bands": True}, ValueError, "needs patch_embedding=True"),
    ("vpt", {"tokens": 0}, ValueError, "tokens=0"),
    ("vpt", {"deep": "yes"}, TypeError, "deep='yes'"),
    ("vpt", {"deep": False, "layers": [0, 2]}, ValueError, "follow one another"),
    ("houlsby", {"width": 0}, ValueError, "width=0; it must be 1 or more"),
    ("adaptformer", {"scale": 0.0}, ValueError, "scale=0.0; .* above 0"),
    ("adaptformer", {"dropout": 1.0}, ValueError, "dropout=1.0; .* below 1"),
    ("convpass", {"kernel_size": 4}, ValueError, "kernel_size=4; it must be odd"),
    ("mona", {"dropout": -0.1}, ValueError, "dropout=-0.1; it must be at least 0"),
    ("vit_adapter", {"heads": 5}, ValueError, "heads=5 do not divide the 96"),
    ("vit_adapter", {"interactions": 7}, ValueError, "interactions=7.*6 blocks"),
    ("vit_adapter", {"layers": "last:2"}, ValueError, "interactions=4.*2 blocks"),
    ("vit_adapter", {"width": 0}, ValueError, "width=0"),
    ("vit_adapter", {"points": 1.5}, TypeError, "points=1.5"),
    ("vit_adapter", {"value_ratio": 0}, ValueError, "value_ratio=0"),
    ("vit_adapter", {"last_extractors": 0}, ValueError, "last_extractors=0"),
    ("deflect", {"width": 0}, ValueError, "width=0"),
    ("deflect", {"features": 1.5}, TypeError, "features=1.5"),
    ("deflect", {"form": "round"}, ValueError, "form='round'; one of additive, polar"),
    ("deflect", {"stage": "all"}, ValueError, "stage='all'; one of embedding"),
    ("deflect", {"stage": "embedding", "form": "polar"}, ValueError, "no effect"),
    ("deflect", {"stage": "embedding", "layers": [0]}, ValueError, "touches no block"),
    ("deflect", {"rho_max": 0}, ValueError, "rho_max=0"),
    ("deflect", {"theta_max": 2.0}, ValueError, "below pi / 2"),
    ("deflect", {"start": "small"}, TypeError, "start='small'"),
    ("deflect", {"start": math.nan}, TypeError, "start=nan"),
    ("deflect", {"indices": "NDVI"}, TypeError, "a list is needed"),
    ("deflect", {"indices": ["EVI"]}, ValueError, "no index 'EVI'"),
    ("deflect", {"auxiliary_mlp": 1}, TypeError, "auxiliary_mlp=1"),
    ("earth_adapter", {"width": 0}, ValueError, "width=0"),
    ("earth_adapter", {"ratio": 1.5}, ValueError, "ratio=1.5.*at most 1"),
    ("earth_adapter", {"ratio": 0}, ValueError, "ratio=0"),
    ("earth_adapter", {"frequency_layers": "first:7"}, ValueError, "first:7.*1 to 6"),
    ("earth_adapter", {"frequency_layers": [0, 6]}, ValueError, r"\[0, 6\].*out of"),
    ("earth_adapter", {"frequency_layers": [1, 1]}, ValueError, "different numbers"),
    ("earth_adapter", {"frequency_layers": 3}, ValueError, "frequency_layers=3"),
    ("earth_adapter", {"frequency_layers": [True]}, ValueError, r"\[True\].*out of"),
]
ELSEWHERE: dict[str, list[Refused]] = {
    "split": [
        ("lora", {"targets": ["qkv"]}, ValueError, r"\['qkv'\].*attn.q, attn.k"),
        ("slr", PATCHES, ValueError, "no patch_embed.proj.*patch_embedding=False"),
    ],
    "convnext": [
        ("lora", {"targets": ["conv_dw"]}, ValueError, r"conv_dw is.*\d+ groups"),
        ("loha", {"targets": ["conv_dw"]}, ValueError, r"conv_dw is a conv.*groups"),
        ("slr", PATCHES, ValueError, "no patch_embed.proj.*patch_embedding=False"),
        ("conv_adapter", {"kernel_size": 2}, ValueError, "kernel_size=2; .* odd"),
        ("conv_adapter", {"reduction": 7}, ValueError, r"reduction=7 .*\[1, 2, 4, 5"),
        ("quantised_adapter", {"bits": 3}, ValueError, "bits=3; one of 1, 2, 4, 8, 32"),
        ("quantised_adapter", {"bits": True}, ValueError, "bits=True"),
        ("quantised_adapter", {"width": 0}, ValueError, "width=0"),
        ("quantised_adapter", {"scale": 0}, ValueError, "scale=0"),
        ("upetu", {"prompts": 0}, ValueError, "prompts=0"),
        ("upetu", {"cross_scale": 1}, TypeError, "cross_scale=1"),
    ],
    "resnet": [
        ("vera", {}, ValueError, "does not fit.*no Linear layer"),
        ("fourierft", {}, ValueError, "does not fit.*no Linear layer"),
        ("oft", {"block_size": 4}, ValueError, "does not fit.*look at several cells"),
        ("lora", {"init": "orthogonal"}, ValueError, "is for Linear layers"),
    ],
    "mambaout_femto": [
        ("vera", {"targets": ["conv"]}, ValueError, r"\(Linear\).*: fc1, fc2"),
    ],
}
CASES = [
    pytest.param(kind, *row, id=f"{kind}-{row[0]}-{row[1]}")
    for kind, rows in {"fused": ON_VIT, **ELSEWHERE}.items()
    for row in rows
]


@pytest.mark.parametrize(("kind", "name", "options", "error", "text"), CASES)
def test_a_refused_attach_changes_nothing(kind, name, options, error, text) -> None:
    backbone = make(kind, RGB if name == "deflect" else None)
    active = gk.attach(backbone, "norm")
    before = snapshot(backbone)
    with pytest.raises(error, match=text):
        gk.attach(backbone, name, **options)
    assert backbone.adapter is active
    assert_same(before, snapshot(backbone))
