"""RGB foundation models: parity with independent code, upstream's keys, refusals."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_table import shrink
from plain_vit import assert_close, stirred
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from geopeft_kit.backbones import find_card, load_backbone
from geopeft_kit.backbones.vit import fixed_table

WIDTH, DEPTH, HEADS = 48, 4, 3
NAMES = ["scalemae_large", "dino_mc_small", "cross_scale_mae_base", "satmae_large"]
NORM = partial(nn.LayerNorm, eps=1e-6)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same families with four thin blocks, and the same random numbers."""
    torch.manual_seed(0)
    for name in NAMES:
        sizes = {"heads": HEADS}
        shrink(monkeypatch, name, width=WIDTH, depth=DEPTH, architecture=sizes)
    with torch.no_grad():
        yield


def taps(
    blocks: nn.Module, norm: nn.Module, tokens: Tensor, size: tuple
) -> list[Tensor]:
    """Four maps of (B, 1 + h*w, D) tokens that go through four blocks."""
    maps = []
    for index, block in enumerate(blocks):
        tokens = block(tokens)
        seen = norm(tokens) if index == DEPTH - 1 else tokens
        maps.append(seen[:, 1:].transpose(1, 2).unflatten(2, size))
    return maps


def mae_table(side: int) -> Tensor:
    """MAE's table from its formula, cell by cell; a zero row for the class token."""
    table = np.zeros((1 + side * side, WIDTH))
    quarter = WIDTH // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                rate = 10000 ** (-i / quarter)
                place = 1 + row * side + column
                for half, position in enumerate((column, row)):
                    start = half * WIDTH // 2 + i
                    table[place, start] = math.sin(position * rate)
                    table[place, start + quarter] = math.cos(position * rate)
    return torch.tensor(table, dtype=torch.float32)[None]


# --- Scale-MAE ------------------------------------------------------------------------


def scalemae(size: int, resolution: float) -> nn.Module:
    from torchgeo.models.scale_mae import ScaleMAE

    return ScaleMAE(
        res=resolution,
        img_size=size,
        patch_size=16,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        norm_layer=NORM,
        num_classes=0,
    )


@pytest.mark.parametrize(("size", "resolution"), [(224, 1.0), (64, 0.3), (96, 10.0)])
def test_scalemae_equals_torchgeo(tmp_path: Path, size: int, resolution: float) -> None:
    theirs = stirred(scalemae(size, resolution))
    state = theirs.state_dict()
    extra = {
        "mask_token": torch.zeros(1),
        "decoder_blocks.0.norm1.weight": torch.zeros(1),
        "fpn.do_ups.weight": torch.zeros(1),
    }
    torch.save({"model": state | extra, "args": Namespace()}, tmp_path / "scale.pth")
    ours = load_backbone(
        "scalemae_large", weights=tmp_path / "scale.pth", resolution=resolution
    )
    image = torch.rand(2, 3, size, size)
    side = size // 16
    tokens = theirs._pos_embed(theirs.patch_embed(ours.normalised(image)))
    assert_close(ours(image), taps(theirs.blocks, theirs.norm, tokens, (side, side)))
    last = theirs.forward_features(ours.normalised(image))[:, 1:]
    torch.testing.assert_close(ours(image)[3].flatten(2).mT, last, **CLOSE)


def test_scalemae_counts_metres_and_takes_any_shape() -> None:
    backbone = load_backbone("scalemae_large", weights=None)
    assert backbone.resolution == 1.0
    image = torch.rand(1, 3, 64, 96)
    first = backbone(image)
    assert [m.shape for m in first] == [(1, WIDTH, 4, 6)] * 4
    backbone.resolution = 10.0
    assert not torch.allclose(first[0], backbone(image)[0], atol=1e-3)
    # every tenth cell of 1 m lies where a cell of 10 m lies
    fine, coarse = fixed_table(WIDTH, 31, 41), fixed_table(WIDTH, 4, 5, spacing=10.0)
    tenth = fine.view(31, 41, WIDTH)[::10, ::10].flatten(0, 1)
    torch.testing.assert_close(tenth, coarse)


# --- DINO-MC --------------------------------------------------------------------------


def dino(patch: int) -> nn.Module:
    return VisionTransformer(
        img_size=224,
        patch_size=patch,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        norm_layer=NORM,
        num_classes=0,
    )


def dino_file(path: Path, teacher: nn.Module) -> Path:
    """A checkpoint as the training script writes it: two networks and the rest."""
    student = stirred(dino(16)).state_dict()
    heads = {
        "head.mlp.0.weight": torch.zeros(1),
        "head.last_layer.weight_g": torch.ones(1),
    }
    content = {
        "student": {f"module.backbone.{k}": v for k, v in student.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
        | heads,
        "epoch": 300,
        "args": Namespace(patch_size=8),
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("patch", [8, 16])
def test_dino_mc_takes_the_teacher(tmp_path: Path, patch: int) -> None:
    teacher = stirred(dino(patch))
    file = dino_file(tmp_path / "dino.pth", teacher)
    ours = load_backbone("dino_mc_small", weights=file, patch=patch)
    assert ours.strides == [patch] * 4
    image = torch.rand(1, 3, 224, 224)
    tokens = teacher._pos_embed(teacher.patch_embed(ours.normalised(image)))
    side = 224 // patch
    assert_close(ours(image), taps(teacher.blocks, teacher.norm, tokens, (side, side)))

    small = torch.rand(1, 3, 64, 96)
    size = (64 // patch, 96 // patch)
    table = resample_abs_pos_embed(teacher.pos_embed, size, (side, side))
    kernel = teacher.patch_embed.proj
    patches = kernel(ours.normalised(small)).flatten(2).mT
    tokens = torch.cat([teacher.cls_token, patches], dim=1) + table
    assert_close(ours(small), taps(teacher.blocks, teacher.norm, tokens, size))


def test_dino_mc_says_which_patch_a_file_has(tmp_path: Path) -> None:
    file = dino_file(tmp_path / "dino.pth", dino(16))
    with pytest.raises(ValueError, match=r"patches of 16 px.*Load it with patch=16"):
        load_backbone("dino_mc_small", weights=file)
    with pytest.raises(ValueError, match="takes 8 or 16"):
        load_backbone("dino_mc_small", weights=None, patch=14)


# --- Cross-Scale MAE and SatMAE -------------------------------------------------------


class Encoder(nn.Module):
    """MAE's encoder in the plainest way, with the names of Cross-Scale MAE."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 16, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.encoder_pos_embed = nn.Parameter(mae_table(side), requires_grad=False)
        self.encoder = nn.ModuleList(
            Block(WIDTH, HEADS, 4, qkv_bias=True, norm_layer=NORM) for _ in range(DEPTH)
        )
        self.encoder_norm = NORM(WIDTH)

    def tokens(self, image: Tensor) -> Tensor:
        patches = self.patch_embed.proj(image).flatten(2).mT
        patches = patches + self.encoder_pos_embed[:, 1:]
        first = self.cls_token + self.encoder_pos_embed[:, :1]
        return torch.cat([first.expand(len(image), -1, -1), patches], dim=1)


def encoder(side: int) -> Encoder:
    made = Encoder(side)
    stirred(made)
    made.encoder_pos_embed.copy_(mae_table(side))
    return made


REST = {
    "mask_token": torch.zeros(1),
    "decoder.0.norm1.weight": torch.zeros(1),
    "decoder_pos_embed": torch.zeros(1),
    "predictor.net.0.weight": torch.zeros(1),
}


def as_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of facebookresearch/mae."""
    names = {"encoder_pos_embed": "pos_embed"}
    return {
        names.get(k, k.replace("encoder.", "blocks.").replace("encoder_", "")): v
        for k, v in state.items()
    }


@pytest.mark.parametrize(
    ("name", "layout", "side"),
    [
        ("cross_scale_mae_base", "own", 8),
        ("cross_scale_mae_base", "own", 14),
        ("cross_scale_mae_base", "mae", 8),
        ("cross_scale_mae_base", "without a table", 8),
        ("satmae_large", "mae", 14),
        ("satmae_large", "mae", 8),
    ],
)
def test_masked_autoencoders_equal_a_plain_encoder(
    tmp_path: Path, name: str, layout: str, side: int
) -> None:
    theirs = encoder(side)
    state = theirs.state_dict()
    if layout == "mae":
        state = as_mae(state)
    elif layout == "without a table":
        del state["encoder_pos_embed"]
    torch.save({"model": state | REST, "args": Namespace()}, tmp_path / "cross.pth")
    ours = load_backbone(name, weights=tmp_path / "cross.pth")
    image = torch.rand(2, 3, 16 * side, 16 * side)
    tokens = theirs.tokens(ours.normalised(image))
    wanted = taps(theirs.encoder, theirs.encoder_norm, tokens, (side, side))
    assert_close(ours(image), wanted)


def test_cross_scale_mae_resizes_its_table() -> None:
    backbone = load_backbone("cross_scale_mae_base", weights=None)
    assert torch.equal(backbone.model.pos_embed, mae_table(8))
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, WIDTH, 4, 6)] * 4
    tokens = backbone.model._pos_embed(torch.zeros(1, 4, 6, WIDTH))
    table = resample_abs_pos_embed(mae_table(8), (4, 6), (8, 8))
    table[:, 0] += backbone.model.cls_token[0, 0]
    torch.testing.assert_close(tokens, table)


def test_xformers_blocks_are_refused(tmp_path: Path) -> None:
    key = "encoder.encoders.0.wrap_att.norm.weight"
    torch.save({"model": {key: torch.ones(WIDTH)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"xformers.*README"):
        load_backbone("cross_scale_mae_base", weights=tmp_path / "x.pth")


# --- all of them ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dino_mc_small", "cross_scale_mae_large"])
def test_weights_on_a_shared_drive_come_with_their_steps(name: str) -> None:
    text = rf"{name} cannot be downloaded.*https://github.com.*Google Drive.*weights=<"
    with pytest.raises(ValueError, match=text):
        load_backbone(name)
    assert not find_card(name).weights


@pytest.mark.parametrize("name", NAMES)
def test_cards_tell_bands_wavelengths_and_limits(name: str) -> None:
    card = find_card(name)
    assert card.bands == ("RED", "GREEN", "BLUE")
    red, green, blue = card.wavelengths
    assert red > green > blue
    assert "red, green and blue only" in card.cannot
    assert card.licence
    assert all(
        module.eps == 1e-6
        for module in load_backbone(name, weights=None).modules()
        if isinstance(module, nn.LayerNorm)
    )
