"""Clay: equal to TerraTorch's, with any bands by wavelength, with date and place."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_table import shrink
from formula_weights import draw
from parity import Fixture, assert_same_tokens
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone, find_card, load_backbone
from geopeft_kit.backbones.clay import week_of
from geopeft_kit.bands import BANDS

NAMES = ("clay_v1", "clay_v1_5")
DATE = torch.tensor([[[2020.0, 0.0]], [[2018.0, 33.0]]])
LONLAT = torch.tensor([[151.2, -33.9], [-21.9, 64.1]])  # Sydney, Reykjavik
HLS = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def twin(
    monkeypatch: pytest.MonkeyPatch,
    name: str = "clay_v1",
    weights: Any = None,
    **options: Any,
) -> Backbone:
    """Two thin blocks."""
    sizes = {"width": 64, "depth": 2, "image_size": 32}
    shrink(monkeypatch, name, **sizes, architecture={"heads": 2})
    return load_backbone(name, weights=weights, **options)


def checkpoint(folder: Path, name: str) -> tuple[Fixture, Path]:
    """The training checkpoint: decoder, projection, teacher and optimiser inside."""
    fixture = Fixture(name)
    assert all(key.startswith("model.encoder.") for key in fixture.state)
    fixture.state |= {
        "model.decoder.mask_patch": torch.ones(8),
        "model.proj.weight": torch.ones(8, 8),
        "model.teacher.blocks.0.attn.qkv.weight": torch.ones(8, 8),
    }
    optimiser = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1}]}
    path = fixture.write(folder, optimizer_states=[optimiser], epoch=7)
    return fixture, path


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_terratorchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    fixture, path = checkpoint(tmp_path, name)
    backbone = twin(monkeypatch, name, path, bands=HLS, normalise=False, hour=10)
    image = draw("image", (2, 6, 32, 32))
    assert_same_tokens(backbone(image), fixture.outputs["plain"])
    known = backbone(image, {"date": DATE, "lonlat": LONLAT})
    assert_same_tokens(known, fixture.outputs["metadata"])
    coarse = twin(
        monkeypatch,
        name,
        path,
        bands=["RED", "COASTAL_AEROSOL", "SWIR_2"],
        normalise=False,
        resolution=30,
    )
    three = draw("three", (2, 3, 32, 32))
    assert_same_tokens(coarse(three), fixture.outputs["coarse"])


@torch.no_grad()
def test_the_encoder_alone_loads_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fixture, path = checkpoint(tmp_path, "clay_v1")
    prefix = "model.encoder."
    alone = {k.removeprefix(prefix): t for k, t in fixture.state.items() if prefix in k}
    torch.save(alone, tmp_path / "encoder.pt")
    one, other = (
        twin(monkeypatch, weights=file) for file in (path, tmp_path / "encoder.pt")
    )
    assert one.weights_hash() == other.weights_hash()
    del alone["transformer.layers.1.0.to_out.weight"]
    torch.save(alone | {"surprise": torch.ones(1)}, tmp_path / "broken.pt")
    with pytest.raises(
        ValueError,
        match=r"1 missing \(blocks\.1\.attn\.proj\.weight\); 1 unexpected \(surprise\)",
    ):
        twin(monkeypatch, weights=tmp_path / "broken.pt")


# Bands by wavelength


@torch.no_grad()
def test_every_optical_band_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    optical = [b.name for b in BANDS.values() if b.kind == "optical"]
    assert len(optical) > len(find_card("clay_v1").bands)
    backbone = twin(monkeypatch, bands=optical)
    image = torch.rand(1, len(optical), 16, 16)
    maps = backbone(image)
    for channel in range(len(optical)):
        other = image.clone()
        other[:, channel] += 0.2
        assert not same(maps, backbone(other)), optical[channel]
    pan = backbone.model.patch_embed.waves[optical.index("PAN")]
    assert float(pan) == pytest.approx(BANDS["PAN"].wavelength_um)
    red = backbone.model.patch_embed.waves[optical.index("RED")]
    assert float(red) == pytest.approx(0.665), "Clay's own number where it has one"


@torch.no_grad()
def test_radar_in_decibels_for_1_5_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not know VV, VH"):
        twin(monkeypatch, bands="sentinel1")
    with pytest.raises(ValueError, match="VV has none"):
        twin(monkeypatch, bands=["RED", "VV"], new_bands="random")
    backbone = twin(monkeypatch, "clay_v1_5", bands="sentinel1")
    torch.testing.assert_close(
        backbone.model.patch_embed.waves, torch.tensor([3.5, 4.0])
    )
    seen = backbone.normalised(torch.full((1, 2, 8, 8), -10.0))[0, :, 0, 0]
    expected = [(-10 + 12.113) / 8.314, (-10 + 18.673) / 8.017]
    torch.testing.assert_close(seen, torch.tensor(expected))
    ignoring = twin(monkeypatch, bands=["RED", "VV"], new_bands="ignore")
    image = torch.rand(1, 2, 16, 16)
    other = image.clone()
    other[:, 1] += 1
    assert same(ignoring(image), ignoring(other))


@torch.no_grad()
def test_ground_size_and_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = twin(monkeypatch)
    image = torch.rand(1, 10, 24, 40)
    maps = backbone(image)
    assert maps[-1].shape == (1, 64, 3, 5)
    backbone.resolution = 30.0
    assert not same(maps, backbone(image))
    with pytest.raises(ValueError, match="0 to 24"):
        twin(monkeypatch, hour=25)


# Date and place


def test_weeks_are_iso_weeks() -> None:
    for year in (2015, 2016, 2020, 2021, 2024):
        first = datetime.date(year, 1, 1)
        for day in (0, 1, 4, 58, 59, 60, 200, 363, 364):
            expected = (first + datetime.timedelta(day)).isocalendar().week
            assert week_of(float(year), float(day)) == expected


@torch.no_grad()
def test_metadata_is_added_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, image = twin(monkeypatch), torch.rand(2, 10, 16, 16)
    date, place = {"date": DATE}, {"lonlat": LONLAT}
    outputs = [backbone(image, m) for m in (None, date, place, date | place)]
    for number, one in enumerate(outputs):
        assert not any(same(one, other) for other in outputs[number + 1 :])
    assert not backbone.metadata_code(image, None).any()
    week = 2 * math.pi * torch.tensor([1.0, 5.0]) / 52  # 1 January, 3 February
    code = backbone.metadata_code(image, date | place)
    zero, one = torch.zeros(2), torch.ones(2)
    angles = LONLAT.deg2rad()
    expected = [week.sin(), week.cos(), zero, one]  # the hour is 0
    expected += [angles[:, 1].sin(), angles[:, 1].cos()]  # latitude first
    expected += [angles[:, 0].sin(), angles[:, 0].cos()]
    torch.testing.assert_close(code, torch.stack(expected, dim=1))
    with pytest.raises(ValueError, match=r"holds 151\.2"):
        backbone(image, {"lonlat": LONLAT.flip(1)})
    with pytest.raises(ValueError, match="T=1"):
        backbone(image, {"date": DATE.expand(-1, 2, -1)})


# Structure


@pytest.mark.parametrize("name", NAMES)
def test_attention_has_no_biases_and_norms_an_epsilon_of_1e_5(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    backbone = twin(monkeypatch, name)
    for block in backbone.model.blocks:
        assert block.attn.qkv.bias is None and block.attn.proj.bias is None
        assert block.mlp.fc1.bias is not None
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_lora_finds_attention_and_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = gk.attach(twin(monkeypatch), "lora", rank=2)
    found = {path.split(".")[3] for path, _ in adapter.named_parameters()}
    assert found == {"qkv", "fc1", "fc2"}
