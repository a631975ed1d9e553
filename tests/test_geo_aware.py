"""Geo-aware pretraining: places round trip, heads learn, erased pixels stay hidden."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit.data import Chip, write_chip_folder
from geopeft_kit.geo_aware import GeoAwareHeads, to_lonlat, to_place
from tests.toy import toy_data


def backbone(name: str = "geopeft_tiny", **options: object):
    torch.manual_seed(0)
    return gk.load_backbone(name, weights=None, **options)


def test_places_round_trip_and_close_over_the_date_line() -> None:
    corners = torch.tensor([[-180.0, -90], [180, 90], [0, 0], [-97.5, 33], [12, -60]])
    back = to_lonlat(to_place(corners))
    apart = (back - corners + 180) % 360 - 180
    assert apart.abs().max() < 1e-4
    east, west = to_place(torch.tensor([[179.9, 0.0], [-179.9, 0.0]]))
    assert (east - west).norm() < 0.01
    north, south = to_place(torch.tensor([[0.0, 90.0], [0.0, -90.0]]))
    assert (north - south).norm() == pytest.approx(2)
    # guesses off the circle are read as the nearest place on it
    torch.testing.assert_close(to_lonlat(3 * to_place(corners[2:])), corners[2:])


@pytest.mark.parametrize(
    ("name", "finest", "stride"),
    [("geopeft_tiny", 3, 8), ("timm:mambaout_femto", 0, 4)],
)
def test_heads_read_the_finest_and_the_deepest_map(
    name: str, finest: int, stride: int
) -> None:
    bands = gk.load_backbone("geopeft_tiny", weights=None).bands
    new = {} if name.startswith("geopeft") else {"new_bands": "random"}
    network = backbone(name, bands=bands, **new)
    heads = GeoAwareHeads(network, 5)
    assert heads.finest == finest and min(network.strides) == stride
    image, place, climate = heads(network(torch.rand(2, len(bands), 64, 64)))
    assert image.shape == (2, len(bands), 64, 64)
    assert place.shape == (2, 4) and climate.shape == (2, 5)
    width, pixels = network.channels[finest], len(bands) * stride**2
    deep = network.channels[-1]
    counted = (width + 1) * pixels + 2 * deep + (deep + 1) * (4 + 5)
    assert sum(p.numel() for p in heads.parameters()) == counted


@pytest.fixture(scope="module")
def world() -> gk.ChipData:
    return gk.simulated_data(
        "land_cover",
        chips_per_region=8,
        size=32,
        scene_size=64,
        train_regions=["temperate", "arid", "boreal"],
        val_fraction=0,
        shift={"cloud": -1.0},
    )


@pytest.mark.slow
def test_every_head_learns_and_a_seed_repeats(world: gk.ChipData) -> None:
    ends = []
    for _ in range(2):
        network = backbone()
        run = gk.pretrain_geo_aware(network, world, steps=30, batch_size=16)
        ends.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(*ends)
    first, last = run.history.head(5).mean(), run.history.tail(5).mean()
    for head in ("image", "place", "climate"):
        assert last[head] < 0.8 * first[head], head
    assert run.climates == {"arid": 0, "boreal": 1, "temperate": 2}
    assert first["climate"] == pytest.approx(math.log(3), abs=0.5)


def test_only_what_trains_is_changed_and_heads_can_be_left_out(
    world: gk.ChipData,
) -> None:
    network = backbone()
    before = {k: v.clone() for k, v in network.model.state_dict().items()}
    adapter = gk.attach(network, "lora", rank=2)
    run = gk.pretrain_geo_aware(
        network, world, steps=2, batch_size=4, weights={"place": 0, "climate": 2.0}
    )
    assert list(run.history) == ["step", "image", "climate"]
    assert run.weights == {"image": 1.0, "climate": 2.0}
    moved = [p for p in adapter.parameters() if p.requires_grad and p.any()]
    assert moved
    adapter.detach()
    after = network.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_data_without_any_label_are_a_corpus(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    chips = (
        Chip(
            f"chip_{number}",
            random.uniform(0, 0.3, (6, 32, 32)).astype(np.float32),
            crs="EPSG:32633",
            transform=from_origin(5e5, 5e6 - 320 * number, 10, 10),
        )
        for number in range(6)
    )
    facts = {"name": "plain", "task": "segmentation", "bands": "hls", "classes": ["a"]}
    data = gk.ChipData(write_chip_folder(tmp_path / "plain", chips, facts))
    assert data.splits == ["unlabelled"]
    run = gk.pretrain_geo_aware(backbone(), data, steps=2, batch_size=4)
    assert set(run.history) == {"step", "image", "place", "climate"}
    assert run.climates == {"everywhere": 0}
    assert np.isfinite(run.history.to_numpy()).all()


def test_a_rectangle_is_hidden_under_noise_as_dark_as_the_image(
    world: gk.ChipData, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, seen = backbone(), []
    forward = type(network).forward

    def keep(self, image, meta=None):
        seen.append(image.clone())
        return forward(self, image, meta)

    monkeypatch.setattr(type(network), "forward", keep)
    run = {"steps": 1, "batch_size": 8}
    gk.pretrain_geo_aware(network, world, erase=(0.25, 0.5), **run)
    gk.pretrain_geo_aware(network, world, erase=(0.001, 0.001), **run)
    hidden, plain = seen  # the same chips, since the seed is the same
    turns = [torch.rot90(plain, k, (2, 3)) for k in range(4)]
    turns += [turn.flip(3) for turn in turns]
    same = [((turn - hidden).abs() < 1e-5).all(1) for turn in turns]
    covered = 1 - max(same, key=lambda s: float(s.float().mean())).float()  # (B, H, W)
    assert ((covered.mean((1, 2)) > 0.2) & (covered.mean((1, 2)) < 0.55)).all()
    for cover in covered:  # one rectangle, and the other run's pixel
        rows, columns = cover.amax(1), cover.amax(0)
        assert cover.sum() > 0.8 * rows.sum() * columns.sum()
    noise = hidden.movedim(1, -1)[covered.bool()]
    torch.testing.assert_close(
        noise.mean(0), plain.mean((0, 2, 3)), atol=0.02, rtol=0.1
    )
    torch.testing.assert_close(noise.std(0), plain.std((0, 2, 3)), atol=0.02, rtol=0.1)


def test_refusals(world: gk.ChipData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no head 'clouds'.*image, place, climate"):
        gk.pretrain_geo_aware(backbone(), world, weights={"clouds": 100})
    with pytest.raises(ValueError, match="nothing would be learnt"):
        nothing = dict.fromkeys(("image", "place", "climate"), 0)
        gk.pretrain_geo_aware(backbone(), world, weights=nothing)
    with pytest.raises(ValueError, match="weight of 'image' is -1"):
        gk.pretrain_geo_aware(backbone(), world, weights={"image": -1})
    with pytest.raises(ValueError, match="no class for the region 'boreal'"):
        gk.pretrain_geo_aware(backbone(), world, climates={"arid": 0, "temperate": 1})
    frozen = backbone()
    gk.attach(frozen, "frozen")
    with pytest.raises(ValueError, match="nothing trains"):
        gk.pretrain_geo_aware(frozen, world)
    placeless = toy_data(tmp_path)
    placeless.dataset("train").table.lonlat[:] = float("nan")
    with pytest.raises(ValueError, match='not georeferenced.*"place": 0'):
        gk.pretrain_geo_aware(backbone(), placeless)
