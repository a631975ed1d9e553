"""SpectralGPT: parity with plain PyTorch, bands in threes, refusals."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbone_table import shrink
from plain_vit import (
    State,
    assert_close,
    block,
    block_shapes,
    norm,
    random_state,
)
from torch import Tensor

from geopeft_kit.backbones import load_backbone

NAME = "spectralgpt_base"
WIDTH, DEPTH, HEADS = 48, 4, 3


@pytest.fixture(autouse=True)
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    small = {"width": WIDTH, "depth": DEPTH, "architecture": {"heads": HEADS}}
    shrink(monkeypatch, NAME, **small, image_size=48)
    with torch.no_grad():
        yield


def published(side: int) -> State:
    shapes = {
        "patch_embed.proj.weight": (WIDTH, 1, 3, 8, 8),
        "patch_embed.proj.bias": (WIDTH,),
        "pos_embed_spatial": (1, side * side, WIDTH),
        "pos_embed_temporal": (1, 4, WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for number in range(DEPTH):
        shapes |= block_shapes(f"blocks.{number}.", WIDTH, split=True)
    return random_state(shapes)


def save(state: State, path: Path) -> Path:
    rest = {
        "mask_token": torch.zeros(1),
        "decoder_embed.weight": torch.zeros(1),
        "decoder_pos_embed_spatial": torch.zeros(1),
        "decoder_blocks.0.attn.q.weight": torch.zeros(1),
        "decoder_pred.bias": torch.zeros(1),
    }
    torch.save({"model": state | rest, "args": Namespace()}, path)
    return path


def plain(state: State, image: Tensor, groups: list[int]) -> list[Tensor]:
    """(B, 12, H, W), tokens in the authors' order: three bands by three bands."""
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    cubes = F.conv3d(image[:, None], kernel, bias, stride=(3, 8, 8))  # (B,D,4,h,w)
    height, width = cubes.shape[-2:]
    side = round(state["pos_embed_spatial"].shape[1] ** 0.5)
    place = state["pos_embed_spatial"].mT.unflatten(2, (side, side))
    if (height, width) != (side, side):
        size = (height, width)
        place = F.interpolate(place, size, mode="bicubic", antialias=True)
    group = state["pos_embed_temporal"].mT[..., None, None]  # (1, D, 4, 1, 1)
    tokens = (cubes + place[:, :, None] + group)[:, :, groups]
    x = tokens.flatten(2).mT  # (B, 4*h*w, D)
    maps = []
    for number in range(DEPTH):
        x = block(state, f"blocks.{number}.", x, HEADS, 1e-6)
        seen = norm(state, "norm", x, 1e-6) if number == DEPTH - 1 else x
        own = seen.unflatten(1, (len(groups), height, width)).mean(1)
        maps.append(own.permute(0, 3, 1, 2))
    return maps


@pytest.mark.parametrize(("side", "height", "width"), [(6, 48, 48), (4, 48, 32)])
def test_equals_plain_pytorch(
    tmp_path: Path, side: int, height: int, width: int
) -> None:
    state = published(side)
    file = save(state, tmp_path / "spectral.pth")
    ours = load_backbone(NAME, weights=file)
    image = torch.rand(2, 12, height, width) * 0.4
    wanted = plain(state, ours.normalised(image), [0, 1, 2, 3])
    assert_close(ours(image), wanted)
    assert ours.grid.groups == 4


def test_any_bands_in_any_order(tmp_path: Path) -> None:
    state = published(6)
    file = save(state, tmp_path / "spectral.pth")
    ours = load_backbone(NAME, ["SWIR_2", "RED", "GREEN"], file)
    image = torch.rand(1, 3, 48, 48)
    whole = torch.zeros(1, 12, 48, 48)
    whole[:, [11, 3, 2]] = ours.normalised(image)
    assert_close(ours(image), plain(state, whole, [0, 1, 3]))

    bands = ["WATER_VAPOUR", "CIRRUS"]
    ours = load_backbone(NAME, bands, file, new_bands="copy_nearest", normalise=False)
    whole = torch.zeros(1, 12, 48, 48)
    whole[:, 9], whole[:, 10] = image[:, 0], image[:, 1]
    assert_close(ours(image[:, :2]), plain(state, whole, [3]))

    bands = ["WATER_VAPOUR", "SWIR_1", "CIRRUS"]
    options = {"new_bands": "share_nearest", "normalise": False}
    ours = load_backbone(NAME, bands, file, **options)
    whole[:, 10] = (image[:, 1] + image[:, 2]) / 2
    assert_close(ours(image), plain(state, whole, [3]))
    with pytest.raises(ValueError, match="in groups"):
        load_backbone(NAME, bands, None, new_bands="random")
