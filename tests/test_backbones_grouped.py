"""SatMAE and SpectralGPT: parity with plain PyTorch, groups of bands, refusals."""

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

SATMAE, SPECTRALGPT = "satmae_multispectral_base", "spectralgpt_base"
WIDTH, CODE, DEPTH, HEADS, SIDE = 48, 16, 4, 3, 12
GROUPS = [(0, 1, 2, 6), (3, 4, 5, 7), (8, 9)]  # Sentinel-2 without B1, B9, B10


@pytest.fixture(autouse=True)
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "depth": DEPTH}
    inside = {"heads": HEADS, "channel_code": CODE}
    shrink(monkeypatch, SATMAE, **sizes, architecture=inside)
    sizes["image_size"] = 48
    shrink(monkeypatch, SPECTRALGPT, **sizes, architecture={"heads": HEADS})
    with torch.no_grad():
        yield


# What the files hold besides the encoder.
REST = {
    name: torch.zeros(1)
    for name in (
        "mask_token",
        "decoder_pos_embed",
        "decoder_channel_embed",
        "decoder_pos_embed_spatial",
        "decoder_embed.weight",
        "decoder_blocks.0.attn.qkv.weight",
        "decoder_blocks.0.attn.q.weight",
        "decoder_pred.0.weight",
    )
}


def save(state: State, path: Path) -> Path:
    content = {"model": state | REST, "optimizer": {}, "epoch": 199}
    torch.save(content | {"args": Namespace(grouped_bands=GROUPS)}, path)
    return path


def resized(table: Tensor, height: int, width: int) -> Tensor:
    """A position table (N, D) for h x w patches, (h*w, D)."""
    side = round(len(table) ** 0.5)
    grid = table.T.reshape(1, -1, side, side)
    if (height, width) != (side, side):
        size = (height, width)
        grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
    return grid.flatten(2)[0].T


def through_blocks(
    state: State, x: Tensor, shape: tuple[int, int, int]
) -> list[Tensor]:
    """Four maps of tokens (B, P + N*h*w, D), in the authors' order: group by group."""
    maps = []
    for number in range(DEPTH):
        x = block(state, f"blocks.{number}.", x, HEADS, 1e-6)
        seen = norm(state, "norm", x, 1e-6) if number == DEPTH - 1 else x
        count = shape[0] * shape[1] * shape[2]
        own = seen[:, -count:].unflatten(1, shape).mean(1)
        maps.append(own.permute(0, 3, 1, 2))
    return maps


# --- SatMAE ---------------------------------------------------------------------------


def satmae(side: int = SIDE) -> State:
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


def plain_satmae(state: State, image: Tensor, groups: list[int]) -> list[Tensor]:
    height, width = image.shape[-2] // 8, image.shape[-1] // 8
    place = resized(state["pos_embed"][0, 1:], height, width)
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
    return through_blocks(state, x, (len(groups), height, width))


@pytest.mark.parametrize(("height", "width", "side"), [(96, 96, 12), (32, 48, 12)])
def test_satmae_equals_plain_pytorch(
    tmp_path: Path, height: int, width: int, side: int
) -> None:
    state = satmae(side)
    ours = load_backbone(SATMAE, weights=save(state, tmp_path / "satmae.pth"))
    image = torch.rand(2, 10, height, width) * 0.4
    assert_close(ours(image), plain_satmae(state, ours.normalised(image), [0, 1, 2]))
    assert (ours.grid.height, ours.grid.width, ours.grid.groups) == (
        height // 8,
        width // 8,
        3,
    )


def test_groups_without_bands_are_not_in_the_sequence(tmp_path: Path) -> None:
    state = satmae()
    file = save(state, tmp_path / "satmae.pth")
    ours = load_backbone(SATMAE, ["SWIR_2", "RED", "SWIR_1"], file)
    image = torch.rand(1, 3, 96, 96) * 0.4
    whole = torch.zeros(1, 10, 96, 96)
    whole[:, [9, 2, 8]] = ours.normalised(image)  # a kernel left out reads zeros
    assert_close(ours(image), plain_satmae(state, whole, [0, 2]))


def test_a_copied_kernel_reads_both_bands(tmp_path: Path) -> None:
    state = satmae()
    file = save(state, tmp_path / "satmae.pth")
    bands = ["BLUE", "COASTAL_AEROSOL", "SWIR_1"]
    ours = load_backbone(SATMAE, bands, file, new_bands="copy_nearest", normalise=False)
    image = torch.rand(1, 3, 96, 96)
    whole = torch.zeros(1, 10, 96, 96)
    whole[:, 0] = image[:, 0] + image[:, 1]
    whole[:, 8] = image[:, 2]
    assert_close(ours(image), plain_satmae(state, whole, [0, 2]))
    ours = load_backbone(
        SATMAE, bands, file, new_bands="share_nearest", normalise=False
    )
    whole[:, 0] /= 2
    assert_close(ours(image), plain_satmae(state, whole, [0, 2]))
    with pytest.raises(ValueError, match=r"in groups.*copy_nearest"):
        load_backbone(SATMAE, bands, None, new_bands="random")
    ignored = load_backbone(SATMAE, bands, file, new_bands="ignore")
    other = image.clone()
    other[:, 1] += 1
    assert torch.equal(ignored(image)[3], ignored(other)[3])


def test_codes_of_random_weights_are_the_authors_formula() -> None:
    backbone = load_backbone(SATMAE, weights=None)
    rates = 10000 ** (-torch.arange(CODE // 2) / (CODE // 2))
    for number in range(3):
        code = torch.cat([(number * rates).sin(), (number * rates).cos()])
        torch.testing.assert_close(backbone.channel_embed[0, number], code)
    assert backbone.pos_embed.shape == (1, 1 + SIDE * SIDE, WIDTH - CODE)
    assert not backbone.pos_embed[0, 0].any()


def test_masked_modelling_needs_one_token_a_patch() -> None:
    backbone = load_backbone(SATMAE, weights=None)
    with pytest.raises(ValueError, match="hides one token per patch"):
        PretextTask(backbone, Objective(), 0, 0, 1e-3, 10)


def test_a_fine_tuned_checkpoint_is_refused(tmp_path: Path) -> None:
    tuned = satmae() | {"fc_norm.weight": torch.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"fine-tuned.*pretraining"):
        load_backbone(SATMAE, weights=save(tuned, tmp_path / "tuned.pth"))


# --- SpectralGPT ----------------------------------------------------------------------


def spectralgpt(side: int) -> State:
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


def plain_spectralgpt(state: State, image: Tensor, groups: list[int]) -> list[Tensor]:
    """(B, 12, H, W), three bands by three bands."""
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    cubes = F.conv3d(image[:, None], kernel, bias, stride=(3, 8, 8))  # (B,D,4,h,w)
    height, width = cubes.shape[-2:]
    place = resized(state["pos_embed_spatial"][0], height, width)  # (h*w, D)
    place = place.T.unflatten(1, (1, height, width))  # (D, 1, h, w)
    group = state["pos_embed_temporal"].mT[..., None, None]  # (1, D, 4, 1, 1)
    tokens = (cubes + place + group)[:, :, groups]
    return through_blocks(state, tokens.flatten(2).mT, (len(groups), height, width))


@pytest.mark.parametrize(("side", "height", "width"), [(6, 48, 48), (4, 48, 32)])
def test_spectralgpt_equals_plain_pytorch(
    tmp_path: Path, side: int, height: int, width: int
) -> None:
    state = spectralgpt(side)
    file = save(state, tmp_path / "spectral.pth")
    ours = load_backbone(SPECTRALGPT, weights=file)
    image = torch.rand(2, 12, height, width) * 0.4
    wanted = plain_spectralgpt(state, ours.normalised(image), [0, 1, 2, 3])
    assert_close(ours(image), wanted)
    assert ours.grid.groups == 4


def test_spectralgpt_reads_any_bands(tmp_path: Path) -> None:
    state = spectralgpt(6)
    file = save(state, tmp_path / "spectral.pth")
    ours = load_backbone(SPECTRALGPT, ["SWIR_2", "RED", "GREEN"], file)
    image = torch.rand(1, 3, 48, 48)
    whole = torch.zeros(1, 12, 48, 48)
    whole[:, [11, 3, 2]] = ours.normalised(image)
    assert_close(ours(image), plain_spectralgpt(state, whole, [0, 1, 3]))

    bands = ["WATER_VAPOUR", "CIRRUS"]
    ours = load_backbone(
        SPECTRALGPT, bands, file, new_bands="copy_nearest", normalise=False
    )
    whole = torch.zeros(1, 12, 48, 48)
    whole[:, 9], whole[:, 10] = image[:, 0], image[:, 1]
    assert_close(ours(image[:, :2]), plain_spectralgpt(state, whole, [3]))

    bands = ["WATER_VAPOUR", "SWIR_1", "CIRRUS"]
    options = {"new_bands": "share_nearest", "normalise": False}
    ours = load_backbone(SPECTRALGPT, bands, file, **options)
    whole[:, 10] = (image[:, 1] + image[:, 2]) / 2
    assert_close(ours(image), plain_spectralgpt(state, whole, [3]))
    with pytest.raises(ValueError, match="in groups"):
        load_backbone(SPECTRALGPT, bands, None, new_bands="random")
