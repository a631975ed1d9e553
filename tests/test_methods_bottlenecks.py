"""Houlsby, AdaptFormer, Convpass, Conv-Adapter, Mona: formulas, counts, parity.

What all methods share (exact detach, saving, autocast, ...) is in test_methods.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from method_table import SMALL, image, make, output, stir
from torch import Tensor, nn
from torch.nn import functional as F

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.backbones.band_plan import plan_bands
from geopeft_kit.backbones.base import TokenGrid
from geopeft_kit.backbones.hierarchical import HierarchicalBackbone
from geopeft_kit.backbones.timm_zoo import make_card
from geopeft_kit.backbones.vit import ViTBackbone
from geopeft_kit.methods.conv_adapter import ConvAdapterUnit
from geopeft_kit.methods.convpass import ConvpassUnit
from geopeft_kit.methods.mona import MonaUnit

VECTORS = Path(__file__).parent / "vectors"
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def small_vit(**options: Any) -> Backbone:
    """A two-block ViT of timm with the given block options."""
    card = make_card("timm:vit_tiny_patch16_224")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,
        **options,
    )
    model.patch_embed.flatten = False
    model.patch_embed.output_fmt = "NHWC"
    return ViTBackbone(card, model, plan_bands(card)).eval()


def small_swin_v2() -> Backbone:
    card = make_card("timm:swinv2_tiny_window8_256")
    model = timm.create_model(
        "swinv2_tiny_window8_256",
        pretrained=False,
        num_classes=0,
        img_size=64,
        window_size=4,
        embed_dim=8,
        depths=(1, 2, 1, 1),
        num_heads=(1, 2, 2, 2),
    )
    return HierarchicalBackbone(card, model, plan_bands(card), "swin").eval()


def attached(backbone: Backbone, name: str, **options: Any) -> gk.Adapter:
    """An adapter that has moved away from its start."""
    adapter = gk.attach(backbone, name, **{**SMALL[name], **options})
    stir(adapter)
    backbone.eval()
    return adapter


def block_and_input(backbone: Backbone, number: int) -> tuple[nn.Module, Tensor]:
    """A block as it stands now, and what it is given on a random image."""
    block = backbone.blocks[number][1]
    seen: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    size = max(32, 2 * max(backbone.strides))
    with torch.no_grad():
        backbone(torch.rand(2, 3, size, size))
    hook.remove()
    return block, seen[0]


def bottleneck(tensors: dict[str, Tensor], path: str, x: Tensor, act: Any) -> Tensor:
    """Up(act(Down x)), from the saved tensors alone."""
    p = {key: tensors[f"{path}.{key}.weight"] for key in ("down", "up")}
    b = {key: tensors[f"{path}.{key}.bias"] for key in ("down", "up")}
    return act(x @ p["down"].T + b["down"]) @ p["up"].T + b["up"]


# --- the formulas, written out ------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}])
def test_adaptformer_on_a_vit_is_its_formula(options: dict) -> None:
    """Layer scale multiplies the MLP, and not the adapter."""
    backbone = small_vit(**options)
    frozen = copy.deepcopy(backbone.blocks[1][1])
    adapter = attached(backbone, "adaptformer", scale=0.7)
    block, x = block_and_input(backbone, 1)
    with torch.no_grad():
        x1 = x + frozen.ls1(frozen.attn(frozen.norm1(x)))
        small = bottleneck(adapter.tensors(), "blocks.1.mlp.adapter", x1, F.relu)
        expected = x1 + frozen.ls2(frozen.mlp(frozen.norm2(x1))) + 0.7 * small
        assert small.abs().max() > 1e-3
        torch.testing.assert_close(block(x), expected, **CLOSE)


def test_houlsby_on_a_vit_is_its_formula() -> None:
    backbone = small_vit(init_values=0.3)
    frozen = copy.deepcopy(backbone.blocks[0][1])
    adapter = attached(backbone, "houlsby")
    block, x = block_and_input(backbone, 0)
    tensors = adapter.tensors()
    with torch.no_grad():
        y = frozen.attn(frozen.norm1(x))
        y = y + bottleneck(tensors, "blocks.0.attn.adapter", y, F.gelu)
        x1 = x + frozen.ls1(y)
        y = frozen.mlp(frozen.norm2(x1))
        y = y + bottleneck(tensors, "blocks.0.mlp.adapter", y, F.gelu)
        torch.testing.assert_close(block(x), x1 + frozen.ls2(y), **CLOSE)


def test_convpass_on_a_vit_is_its_formula() -> None:
    """The class token goes through the centre of the kernel; patches through all."""
    backbone = small_vit()
    frozen = copy.deepcopy(backbone.blocks[0][1])
    adapter = attached(backbone, "convpass", scale=0.5)
    block, x = block_and_input(backbone, 0)
    tensors = adapter.tensors()

    def bypass(path: str, x: Tensor) -> Tensor:
        t = {k.removeprefix(f"{path}.adapter."): v for k, v in tensors.items()}
        z = x @ t["down.weight"].T + t["down.bias"]
        z = z * torch.sigmoid(1.702 * z)
        maps = z[:, 1:].transpose(1, 2).reshape(2, 4, 4, 4)  # (B, h, rows, columns)
        maps = F.conv2d(maps, t["conv.weight"], t["conv.bias"], padding=1)
        alone = z[:, :1] @ t["conv.weight"][:, :, 1, 1].T + t["conv.bias"]
        z = torch.cat([alone, maps.flatten(2).transpose(1, 2)], dim=1)
        z = z * torch.sigmoid(1.702 * z)
        return 0.5 * (z @ t["up.weight"].T + t["up.bias"])

    with torch.no_grad():
        normed = frozen.norm1(x)
        x1 = x + frozen.attn(normed) + bypass("blocks.0.attn", normed)
        normed = frozen.norm2(x1)
        expected = x1 + frozen.mlp(normed) + bypass("blocks.0.mlp", normed)
        assert x.shape == (2, 17, 16)
        torch.testing.assert_close(block(x), expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}])
def test_mona_follows_each_sum_of_a_vit_block(options: dict) -> None:
    backbone = small_vit(**options)
    frozen = copy.deepcopy(backbone.blocks[0][1])
    attached(backbone, "mona")
    block, x = block_and_input(backbone, 0)
    units: Any = block.mlp
    with torch.no_grad():
        x1 = x + frozen.ls1(frozen.attn(frozen.norm1(x)))
        x1 = x1 + units.after_attention(x1)
        x1 = x1 + frozen.ls2(frozen.mlp(frozen.norm2(x1)))
        x1 = x1 + units.after_mlp(x1)
        torch.testing.assert_close(block(x), x1, **CLOSE)


@pytest.mark.parametrize("name", ["convpass", "mona"])
def test_swin_blocks_convolve_over_the_whole_map(name: str) -> None:
    """Attention sees shifted windows; the convolution must see rows and columns."""
    backbone = make("swin")
    number = 2  # the second block of its stage: shifted windows
    frozen = copy.deepcopy(backbone.blocks[number][1])
    attached(backbone, name)
    block: Any
    block, x = block_and_input(backbone, number)
    units = block.block.mlp
    with torch.no_grad():
        normed = frozen.norm1(x)
        x1 = x + frozen._attn(normed)
        if name == "convpass":
            x1 = x1 + block.beside_attention(normed)
            normed = frozen.norm2(x1)
            expected = x1 + frozen.mlp(normed) + units.adapter(normed)
        else:
            x1 = x1 + units.after_attention(x1)
            x1 = x1 + frozen.mlp(frozen.norm2(x1))
            expected = x1 + units.after_mlp(x1)
        assert x.ndim == 4
        torch.testing.assert_close(block(x), expected, **CLOSE)


def test_maps_of_a_swin_are_convolved_as_maps() -> None:
    """(B, H, W, C) of unequal sides gives what the same map as a sequence gives."""
    unit = MonaUnit(6, 4, 0.0, TokenGrid(2, 5))
    x = torch.randn(3, 2, 5, 6)
    torch.testing.assert_close(unit(x).flatten(1, 2), unit(x.flatten(1, 2)))


def test_norms_behind_the_layers_stay_there() -> None:
    """Swin V2: x + LN(attention x), then x + LN(MLP x)."""
    plain = small_swin_v2()
    frozen = plain.blocks[2][1]
    backbone = copy.deepcopy(plain)
    adapter = attached(backbone, "adaptformer", scale=1.0)
    block, x = block_and_input(backbone, 2)
    path = f"{backbone.blocks[2][0]}.mlp.adapter"
    with torch.no_grad():
        x1 = x + frozen.norm1(frozen._attn(x))
        expected = x1 + frozen.norm2(frozen.mlp(x1))
        expected = expected + bottleneck(adapter.tensors(), path, x1, F.relu)
        torch.testing.assert_close(block(x), expected, **CLOSE)

    attached(backbone, "mona")
    block, x = block_and_input(backbone, 2)
    units: Any = block.block.mlp
    with torch.no_grad():
        x1 = x + frozen.norm1(frozen._attn(x))
        x1 = x1 + units.after_attention(x1)
        x1 = x1 + frozen.norm2(frozen.mlp(x1))
        torch.testing.assert_close(block(x), x1 + units.after_mlp(x1), **CLOSE)


@pytest.mark.parametrize("name", ["adaptformer", "houlsby"])
def test_both_layouts_of_a_convnext_mlp(name: str) -> None:
    """An MLP of 1x1 convolutions and one of Linear layers give the same maps."""
    outputs = []
    for conv_mlp in (False, True):
        torch.manual_seed(0)
        card = make_card("timm:convnext_atto")
        model = timm.create_model(
            "convnext_atto", num_classes=0, conv_mlp=conv_mlp, dims=(8, 8, 8, 8)
        )
        backbone = HierarchicalBackbone(
            card, model, plan_bands(card), "convnext"
        ).eval()
        with torch.no_grad():
            for key, value in model.state_dict().items():
                generator = torch.Generator().manual_seed(len(key))
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        attached(backbone, name)
        outputs.append(output(backbone))
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)


# --- grids --------------------------------------------------------------------------


@pytest.mark.parametrize("unit_class", [ConvpassUnit, MonaUnit])
def test_each_group_of_a_patch_is_a_grid_of_its_own(unit_class: Any) -> None:
    """Galileo: what stands in one channel group reaches its neighbours there only."""
    grid = TokenGrid(height=3, width=4, groups=2)
    if unit_class is ConvpassUnit:
        unit = ConvpassUnit(8, 4, 3, 0.0, 1.0, grid)
    else:
        unit = MonaUnit(8, 4, 0.0, grid)
    for parameter in unit.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(1, 24, 8)
    moved = tokens.clone().unflatten(1, (3, 4, 2))
    moved[:, 1, 1, 0] += 1.0  # row 1, column 1, first group
    with torch.no_grad():
        change = (unit(moved.flatten(1, 3)) - unit(tokens)).unflatten(1, (3, 4, 2))
    change = change.abs().amax(dim=(0, 4))  # (3, 4, 2)
    assert change[..., 1].max() == 0
    reached = change[..., 0] > 0
    assert reached[:, :3].all()
    # 3 x 3 ends two columns further; Mona's 7 x 7 reaches everything.
    assert reached[:, 3].any() == (unit_class is MonaUnit)


def test_prefix_tokens_meet_nobody() -> None:
    unit = ConvpassUnit(8, 4, 3, 0.0, 1.0, TokenGrid(2, 2))
    for parameter in unit.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 3 + 4, 8)
    moved = tokens.clone()
    moved[:, 1] += 1.0
    with torch.no_grad():
        change = (unit(moved) - unit(tokens)).abs().amax(dim=(0, 2))
    assert change[1] > 0
    assert change[[0, 2, 3, 4, 5, 6]].max() == 0


@pytest.mark.parametrize("name", ["convpass", "mona"])
@pytest.mark.parametrize("kind", ["fused", "split", "swin"])
def test_oblong_images_and_copies_of_a_backbone(kind: str, name: str) -> None:
    """The grid follows the image; a copy has a grid of its own."""
    backbone = make(kind)
    attached(backbone, name)
    step = 2 * max(backbone.strides)
    oblong = torch.rand(1, len(backbone.bands), step, 2 * step)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        expected = backbone(oblong)
        twin(image(twin))
        again = twin(oblong)
        backbone.grid.height = backbone.grid.width = 1  # the copy must not look here
        for first, second in zip(expected, again, strict=True):
            torch.testing.assert_close(first, second, atol=0, rtol=0)
        tall = backbone(oblong.mT)
    for first, second in zip(expected, tall, strict=True):
        assert first.shape == second.mT.shape


# --- parity and counts --------------------------------------------------------------


def test_conv_adapter_equals_the_published_module() -> None:
    vector = json.loads((VECTORS / "conv_adapter.json").read_text())
    state = {key: torch.tensor(value) for key, value in vector["state"].items()}
    unit = ConvAdapterUnit(8, 8, reduction=4, kernel_size=3)
    names = {"conv1": "spatial", "conv2": "pointwise"}
    ours = {"gain": state.pop("se")[0]}
    for key, value in state.items():
        layer, _, leaf = key.partition(".")
        ours[f"{names[layer]}.{leaf}"] = value
    unit.load_state_dict(ours)
    with torch.no_grad():
        found = unit(torch.tensor(vector["x"]))
    torch.testing.assert_close(found, torch.tensor(vector["y"]), atol=1e-6, rtol=1e-5)


def test_mona_equals_the_published_module(real_data: Path) -> None:
    file = real_data.parent / "reference" / "vectors" / "mona.pt"
    if not file.is_file():
        pytest.skip(f"no test vector at {file}")
    vector = torch.load(file, weights_only=True)
    unit = MonaUnit(8, 64, 0.1, TokenGrid(*vector["hw"])).eval()
    names = {
        "gamma": "normed_gain",
        "gammax": "raw_gain",
        "project1": "down",
        "project2": "up",
        "adapter_conv.conv1": "narrow",
        "adapter_conv.conv2": "middle",
        "adapter_conv.conv3": "wide",
        "adapter_conv.projector": "mix",
        "norm": "norm",
    }
    ours = {}
    for key, value in vector["state"].items():
        layer, dot, leaf = key.rpartition(".")
        ours[f"{names[layer]}.{leaf}" if dot else names[key]] = value
    unit.load_state_dict(ours)
    with torch.no_grad():
        found = vector["x"] + unit(vector["x"])  # the outer skip is the block's sum
    torch.testing.assert_close(found, vector["y"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("channels", "count"),
    [(128, 26_752), (256, 43_776), (512, 77_824), (768, 111_872), (1024, 145_920)],
)
def test_size_of_one_mona(channels: int, count: int) -> None:
    with torch.device("meta"):
        unit = MonaUnit(channels, 64, 0.1, TokenGrid())
    assert sum(p.numel() for p in unit.parameters()) == count
    assert count == 5 * channels + 2 * channels * 64 + 64**2 + 88 * 64


def test_houlsby_on_convnext_stands_behind_the_mlp_only() -> None:
    backbone = make("convnext")
    adapter = gk.attach(backbone, "houlsby", width=4)
    assert all(".mlp.adapter." in name for name in adapter.tensors())
    widths = [block.conv_dw.in_channels for _, block in backbone.blocks]
    assert adapter.num_parameters == sum(2 * d * 4 + 4 + d for d in widths)


# --- convolutions of all kinds ------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, 5])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_conv_adapter_keeps_the_size_of_its_neighbour(
    stride: int, dilation: int, kernel: int | None
) -> None:
    conv = nn.Conv2d(8, 12, 3, stride, padding=dilation, dilation=dilation)
    unit = ConvAdapterUnit(8, 12, 4, kernel or 3, stride, dilation)
    for size in (9, 16):
        x = torch.randn(1, 8, size, size)
        assert unit(x).shape == conv(x).shape


def test_conv_adapter_serves_resnets_with_bottlenecks() -> None:
    backbone = gk.load_backbone("timm:resnet26", weights=None).eval()
    start = output(backbone)
    adapter = attached(backbone, "conv_adapter")
    assert output(backbone).shape == start.shape
    assert all(".conv2.adapter." in name for name in adapter.tensors())
    assert len(adapter.tensors()) == 5 * len(backbone.blocks)


# --- refusals ---------------------------------------------------------------------


def test_convpass_refuses_networks_that_norm_behind() -> None:
    with pytest.raises(ValueError, match=r"convpass.*does not fit.*norm their output"):
        gk.attach(small_swin_v2(), "convpass")


@pytest.mark.parametrize("name", ["houlsby", "adaptformer", "mona"])
def test_blocks_without_a_plain_mlp_are_refused(name: str) -> None:
    block = timm.models.vision_transformer.ParallelScalingBlock
    backbone = small_vit(block_fn=block)
    with pytest.raises(ValueError, match="ParallelScalingBlock.*Methods that fit"):
        gk.attach(backbone, name)
