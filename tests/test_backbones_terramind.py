"""TerraMind: equal to TerraTorch's, one sensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_table import shrink
from formula_weights import draw
from parity import Fixture, assert_same_tokens
from torch import Tensor, nn

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone, find_card, load_backbone

SIZES = ("tiny", "base")
# What the file holds besides, by the attributes of TerraTorch's TerraMind.
DECODER = {
    "mask_token": torch.ones(1, 1, 48),
    "decoder_proj_context.weight": torch.ones(48, 48),
    "decoder.0.cross_attn.kv.weight": torch.ones(96, 48),
    "decoder_norm.weight": torch.ones(48),
    "decoder_embeddings.tok_lulc@224.token_emb.weight": torch.ones(4, 48),
    "encoder_embeddings.tok_lulc@224.token_emb.weight": torch.ones(4, 48),
}


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def twin(
    monkeypatch: pytest.MonkeyPatch, size: str, weights: Any = None, **options: Any
) -> Backbone:
    """Two thin blocks, for images of 4 x 4 patches."""
    sizes = {"width": 48, "depth": 2, "image_size": 64}
    shrink(monkeypatch, f"terramind_v1_{size}", **sizes, architecture={"heads": 3})
    return load_backbone(f"terramind_v1_{size}", weights=weights, **options)


def checkpoint(folder: Path, size: str) -> tuple[Fixture, Path]:
    fixture = Fixture(f"terramind_v1_{size}")
    fixture.state |= DECODER
    return fixture, fixture.write(folder)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_terratorchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str
) -> None:
    fixture, path = checkpoint(tmp_path, size)
    optical = twin(monkeypatch, size, path, normalise=False)
    image, wide = draw("image", (2, 12, 64, 64)), draw("wide", (2, 12, 48, 96))
    assert_same_tokens(optical(image), fixture.outputs["plain"])
    assert_same_tokens(optical(wide), fixture.outputs["wide"])
    radar = draw("radar", (2, 2, 64, 64))
    for product in ("grd", "rtc"):
        backbone = twin(
            monkeypatch, size, path, bands="sentinel1", radar=product, normalise=False
        )
        assert_same_tokens(backbone(radar), fixture.outputs[product])


@torch.no_grad()
def test_the_activation_of_the_gated_mlp_matters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """GELU instead of SiLU raises no error, and the fixture would see it."""
    fixture, path = checkpoint(tmp_path, "base")
    backbone = twin(monkeypatch, "base", path, normalise=False)
    assert all(isinstance(block.mlp.act, nn.SiLU) for block in backbone.model.blocks)
    for block in backbone.model.blocks:
        block.mlp.act = nn.GELU()
    with pytest.raises(AssertionError, match="not close"):
        assert_same_tokens(
            backbone(draw("image", (2, 12, 64, 64))), fixture.outputs["plain"]
        )


@pytest.mark.parametrize("size", SIZES)
def test_norms_have_no_bias_and_an_epsilon_of_1e_6(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    norms = [m for m in twin(monkeypatch, size).modules() if type(m) is nn.LayerNorm]
    assert len(norms) == 5 and all(n.eps == 1e-6 and n.bias is None for n in norms)


def test_random_weights_have_the_published_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = twin(monkeypatch, "tiny")
    published = Fixture("terramind_v1_tiny").state
    table = published["encoder_embeddings.untok_sen2l2a@224.pos_emb"]
    torch.testing.assert_close(backbone.model.pos_embed, table, atol=1e-6, rtol=0)
    assert backbone.num_prefix_tokens == 0


# Sensors and bands


@torch.no_grad()
def test_radar_statistics_are_in_decibels(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.full((1, 2, 32, 32), -10.0)
    for product, mean, std in (
        ("grd", (-12.599, -20.293), (5.195, 5.890)),
        ("rtc", (-10.930, -17.329), (4.391, 4.459)),
    ):
        for bands, order in ((["VV", "VH"], [0, 1]), (["VH", "VV"], [1, 0])):
            backbone = twin(monkeypatch, "tiny", bands=bands, radar=product)
            seen = backbone.normalised(image)[0, :, 0, 0]
            expected = [(-10 - mean[i]) / std[i] for i in order]
            torch.testing.assert_close(seen, torch.tensor(expected))


def test_one_sensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one sensor at a time.*RED, VV"):
        twin(monkeypatch, "tiny", bands=["RED", "VV"])
    with pytest.raises(ValueError, match=r"radar='slc': 'grd' and 'rtc'"):
        twin(monkeypatch, "tiny", bands="sentinel1", radar="slc")
    with pytest.raises(ValueError, match="does not know CIRRUS"):
        twin(monkeypatch, "tiny", bands="sentinel2_l1c")
    single = twin(monkeypatch, "tiny", bands=["VH"])
    assert single(torch.zeros(1, 1, 32, 32))[0].shape == (1, 48, 2, 2)


# Checkpoints


def test_checkpoints_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fixture, _ = checkpoint(tmp_path, "base")
    whole = dict(fixture.state)

    def refused(changes: dict[str, Tensor | None], words: str) -> None:
        state = {k: t for k, t in {**whole, **changes}.items() if t is not None}
        torch.save(state, tmp_path / "changed.pt")
        with pytest.raises(ValueError, match=words):
            twin(monkeypatch, "base", tmp_path / "changed.pt")

    refused({"encoder.1.mlp.fc3.weight": None}, r"1 missing \(blocks\.1\.mlp\.fc1_x")
    refused({"encoder.0.attn.proj.bias": torch.ones(48)}, "1 unexpected")
    refused({"encoder.0.norm1.bias": torch.ones(48)}, "norms have no bias")
    refused(
        {"encoder_embeddings.untok_sen2l2a@224.pos_emb": None},
        r"of the patch embedding untok_sen2l2a@224 it has",
    )
    torch.save(Fixture("terramind_v1_tiny").state, tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="does not fit terramind_v1_base"):
        twin(monkeypatch, "base", tmp_path / "tiny.pt")


# Counts


def test_counts_and_cards() -> None:
    published = {"tiny": 5.9, "small": 22.5, "base": 87.3, "large": 305.1}
    for size, millions in published.items():
        card = find_card(f"terramind_v1_{size}")
        assert round(card.parameters / 1e6, 1) == millions
        assert card.bands == gk.bands.SENSORS["sentinel2_l2a"]
        assert card.weights["default"].file == f"TerraMind_v1_{size}.pt"
    with torch.device("meta"):
        radar = load_backbone("terramind_v1_base", "sentinel1", None)
    assert sum(p.numel() for p in radar.parameters()) == 87_313_920 - 10 * 256 * 768


# Methods


@pytest.mark.parametrize(
    ("size", "layers"),
    [("tiny", {"qkv", "fc1", "fc2"}), ("base", {"qkv", "fc1_g", "fc1_x", "fc2"})],
)
def test_lora_finds_the_layers_of_both_mlps(
    monkeypatch: pytest.MonkeyPatch, size: str, layers: set[str]
) -> None:
    adapter = gk.attach(twin(monkeypatch, size), "lora", rank=2)
    found = {path.split(".")[3] for path, _ in adapter.named_parameters()}
    assert found == layers
