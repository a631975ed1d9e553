"""SatMAE's multispectral models: parity with plain PyTorch, groups, refusals."""

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
from geopeft_kit.pretraining import Objective, PretextTask

NAME = "satmae_multispectral_base"
WIDTH, CODE, DEPTH, HEADS, SIDE = 48, 16, 4, 3, 12
GROUPS = [(0, 1, 2, 6), (3, 4, 5, 7), (8, 9)]  # Sentinel-2 without B1, B9, B10


@pytest.fixture(autouse=True)
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    sizes = {"heads": HEADS, "channel_code": CODE}
    shrink(monkeypatch, NAME, width=WIDTH, depth=DEPTH, architecture=sizes)
    with torch.no_grad():
        yield


def published(side: int = SIDE) -> State:
    """The encoder under the names of models_mae_group_channels.py."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + side * side, WIDTH - CODE),
        "channel_embed": (1, 3, CODE),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for number, bands in enumerate(GROUPS):
        proj = f"patch_embed.{number}.proj"
        kernel = (WIDTH, len(bands), 8, 8)
        shapes |= {f"{proj}.weight": kernel, f"{proj}.bias": (WIDTH,)}
    for number in range(DEPTH):
        shapes |= block_shapes(f"blocks.{number}.", WIDTH, split=False)
    return random_state(shapes)


REST = {
    "mask_token": torch.zeros(1, 1, 32),
    "decoder_pos_embed": torch.zeros(1),
    "decoder_channel_embed": torch.zeros(1),
    "decoder_blocks.0.attn.qkv.weight": torch.zeros(1),
    "decoder_pred.0.weight": torch.zeros(1),
}


def save(state: State, path: Path) -> Path:
    content = {"model": state | REST, "optimizer": {}, "epoch": 199}
    torch.save(content | {"args": Namespace(grouped_bands=GROUPS)}, path)
    return path


def plain(state: State, image: Tensor, groups: list[int]) -> list[Tensor]:
    """The authors' order of tokens: group by group, rows inside."""
    height, width = image.shape[-2] // 8, image.shape[-1] // 8
    place = state["pos_embed"][0, 1:]
    side = round(len(place) ** 0.5)
    if (height, width) != (side, side):
        grid = place.T.reshape(1, -1, side, side)
        size = (height, width)
        grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
        place = grid.flatten(2)[0].T
    tokens = []
    for number in groups:
        proj = f"patch_embed.{number}.proj"
        weight, bias = state[f"{proj}.weight"], state[f"{proj}.bias"]
        patches = F.conv2d(image[:, GROUPS[number]], weight, bias, stride=8)
        code = state["channel_embed"][0, number].expand(len(place), -1)
        tokens.append(patches.flatten(2).mT + torch.cat([place, code], dim=1))
    first = torch.cat([state["pos_embed"][0, 0], torch.zeros(CODE)])
    first = (state["cls_token"][0, 0] + first).expand(len(image), 1, -1)
    x = torch.cat([first, *tokens], dim=1)
    maps = []
    for number in range(DEPTH):
        x = block(state, f"blocks.{number}.", x, HEADS, 1e-6)
        seen = norm(state, "norm", x, 1e-6) if number == DEPTH - 1 else x
        own = seen[:, 1:].unflatten(1, (len(groups), height, width)).mean(1)
        maps.append(own.permute(0, 3, 1, 2))
    return maps


@pytest.mark.parametrize(("height", "width", "side"), [(96, 96, 12), (32, 48, 12)])
def test_equals_plain_pytorch(
    tmp_path: Path, height: int, width: int, side: int
) -> None:
    state = published(side)
    ours = load_backbone(NAME, weights=save(state, tmp_path / "satmae.pth"))
    image = torch.rand(2, 10, height, width) * 0.4
    assert_close(ours(image), plain(state, ours.normalised(image), [0, 1, 2]))
    assert (ours.grid.height, ours.grid.width, ours.grid.groups) == (
        height // 8,
        width // 8,
        3,
    )


def test_groups_without_bands_are_not_in_the_sequence(tmp_path: Path) -> None:
    state = published()
    file = save(state, tmp_path / "satmae.pth")
    ours = load_backbone(NAME, ["SWIR_2", "RED", "SWIR_1"], file)
    image = torch.rand(1, 3, 96, 96) * 0.4
    whole = torch.zeros(1, 10, 96, 96)
    whole[:, [9, 2, 8]] = ours.normalised(image)  # a kernel left out reads zeros
    assert_close(ours(image), plain(state, whole, [0, 2]))


def test_a_copied_kernel_reads_both_bands(tmp_path: Path) -> None:
    state = published()
    file = save(state, tmp_path / "satmae.pth")
    bands = ["BLUE", "COASTAL_AEROSOL", "SWIR_1"]
    ours = load_backbone(NAME, bands, file, new_bands="copy_nearest", normalise=False)
    image = torch.rand(1, 3, 96, 96)
    whole = torch.zeros(1, 10, 96, 96)
    whole[:, 0] = image[:, 0] + image[:, 1]
    whole[:, 8] = image[:, 2]
    assert_close(ours(image), plain(state, whole, [0, 2]))
    ours = load_backbone(NAME, bands, file, new_bands="share_nearest", normalise=False)
    whole[:, 0] /= 2
    assert_close(ours(image), plain(state, whole, [0, 2]))
    with pytest.raises(ValueError, match=r"in groups.*copy_nearest"):
        load_backbone(NAME, bands, None, new_bands="random")
    ignored = load_backbone(NAME, bands, file, new_bands="ignore")
    other = image.clone()
    other[:, 1] += 1
    assert torch.equal(ignored(image)[3], ignored(other)[3])


def test_codes_of_random_weights_are_the_authors_formula() -> None:
    backbone = load_backbone(NAME, weights=None)
    rates = 10000 ** (-torch.arange(CODE // 2) / (CODE // 2))
    for number in range(3):
        code = torch.cat([(number * rates).sin(), (number * rates).cos()])
        torch.testing.assert_close(backbone.channel_embed[0, number], code)
    assert backbone.pos_embed.shape == (1, 1 + SIDE * SIDE, WIDTH - CODE)
    assert not backbone.pos_embed[0, 0].any()


def test_masked_modelling_needs_one_token_a_patch() -> None:
    backbone = load_backbone(NAME, weights=None)
    with pytest.raises(ValueError, match="hides one token per patch"):
        PretextTask(backbone, Objective(), 0, 0, 1e-3, 10)


def test_a_fine_tuned_checkpoint_is_refused(tmp_path: Path) -> None:
    tuned = published() | {"fc_norm.weight": torch.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"fine-tuned.*pretraining"):
        load_backbone(NAME, weights=save(tuned, tmp_path / "tuned.pth"))
