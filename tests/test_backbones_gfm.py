"""GFM's Swin-B: parity with timm, Microsoft's key layout, windows, methods."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backbone_table import shrink
from plain_vit import assert_close, stirred
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from geopeft_kit.backbones import load_backbone

NAME = "gfm_swin_base"
SIZES = {"embed_dim": 16, "depths": (1, 2, 1, 1)}
HEADS = (1, 2, 4, 8)


@pytest.fixture(autouse=True)
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    shrink(monkeypatch, NAME, depth=5, architecture=SIZES | {"heads": HEADS})
    with torch.no_grad():
        yield


def swin(size: int, window: int) -> nn.Module:
    model = SwinTransformer(
        img_size=size, window_size=window, num_heads=HEADS, num_classes=0, **SIZES
    )
    return stirred(model)


def microsoft(model: nn.Module) -> dict[str, Tensor]:
    """A timm Swin's tensors as the authors' script saves them, teacher and all."""
    encoder = {"mask_token": torch.full((1, 1, 16), 0.5)}
    for key, tensor in model.state_dict().items():
        earlier = re.sub(
            r"layers\.(\d)\.downsample",
            lambda m: f"layers.{int(m[1]) - 1}.downsample",
            key,
        )
        encoder[earlier] = tensor
        if key.endswith("relative_position_bias_table"):
            owner = earlier.rpartition(".")[0]
            encoder[f"{owner}.relative_position_index"] = torch.zeros(36, 36).long()
    encoder["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 36, 36)
    state = {f"encoder.{key}": tensor for key, tensor in encoder.items()}
    state |= {f"teacher.{key}": tensor + 1 for key, tensor in encoder.items()}
    state |= {"decoder.0.weight": torch.zeros(1), "projector.bias": torch.zeros(1)}
    return state


def save(model: nn.Module, path: Path) -> Path:
    content = {"model": microsoft(model), "optimizer": {}, "epoch": 99}
    torch.save(content | {"max_accuracy": 0.0}, path)
    return path


def stages(model: nn.Module, image: Tensor) -> list[Tensor]:
    x = model.patch_embed(image)
    maps = []
    for stage in model.layers:
        x = stage(x)
        maps.append(x.permute(0, 3, 1, 2))
    maps[-1] = model.norm(x).permute(0, 3, 1, 2)
    return maps


def test_equals_timms_swin(tmp_path: Path) -> None:
    theirs = swin(192, 6)
    ours = load_backbone(NAME, weights=save(theirs, tmp_path / "gfm.pth"))
    image = torch.rand(1, 3, 192, 192)
    assert_close(ours(image), stages(theirs, ours.normalised(image)))
    assert ours.channels == [16, 32, 64, 128]
    assert ours.strides == [4, 8, 16, 32]
    assert torch.equal(ours.mask_token, torch.full((1, 1, 16), 0.5))
    assert "mask_token" not in ours.model.state_dict()


@pytest.mark.parametrize(("size", "window"), [(128, 4), (224, 7), (256, 8), (320, 6)])
def test_windows_follow_the_image(tmp_path: Path, size: int, window: int) -> None:
    theirs = swin(192, 6)
    file = save(theirs, tmp_path / "gfm.pth")
    ours = load_backbone(NAME, weights=file, image_size=size)
    attention = ours.model.layers[0].blocks[0].attn
    assert attention.window_size == (window, window)
    old = theirs.layers[0].blocks[0].attn.relative_position_bias_table
    shape = (window, window)
    new = resize_rel_pos_bias_table(old, shape, ((2 * window - 1) ** 2, old.shape[1]))
    torch.testing.assert_close(attention.relative_position_bias_table, new)
    maps = ours(torch.rand(1, 3, 64, 96))
    assert [m.shape[-2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(ValueError, match="window=0"):
        load_backbone(NAME, weights=None, window=0)
    assert load_backbone(NAME, weights=None).mask_token is None
