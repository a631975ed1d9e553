"""Prithvi: equal to TerraTorch's, over several dates, with date and place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_table import shrink
from formula_weights import draw
from parity import Fixture, assert_same_tokens
from torch import Tensor
from toy import BANDS as HLS
from toy import toy_data

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone, find_card, load_backbone
from geopeft_kit.backbones.metadata import dates_of, lonlat_of
from geopeft_kit.backbones.prithvi import METADATA_SCALES

TINY = "prithvi_eo_v2_tiny_tl"
DATES = torch.tensor(
    [[[2020.0, 0.0], [2021.0, 150.0], [2024.0, 365.0]],
     [[2018.0, 33.0], [2019.0, 200.0], [2019.0, 364.0]]]
)  # fmt: skip
LONLAT = torch.tensor([[151.2, -33.9], [-21.9, 64.1]])  # Sydney, Reykjavik
CASES = [
    ("prithvi_eo_v1_100", 1),
    ("prithvi_eo_v1_100", 3),
    ("prithvi_eo_v2_300", 1),
    ("prithvi_eo_v2_100_tl", 3),
    ("prithvi_eo_v2_600_tl", 1),
]


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def twin(
    monkeypatch: pytest.MonkeyPatch,
    name: str = TINY,
    weights: Any = None,
    **options: Any,
) -> Backbone:
    """Two thin blocks of a Prithvi, for images of 4 x 4 patches."""
    size = 4 * find_card(name).patch
    sizes = {"width": 48, "depth": 2, "image_size": size}
    shrink(monkeypatch, name, **sizes, architecture={"heads": 3})
    return load_backbone(name, weights=weights, **options)


def images(dates: int = 1, batch: int = 2, size: int = 64) -> Tensor:
    return draw("image", (batch, 6, dates, size, size)) * 0.1 + 0.3


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Against TerraTorch


@pytest.mark.parametrize(("name", "dates"), CASES)
def test_tokens_are_terratorchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, dates: int
) -> None:
    fixture = Fixture(f"{name}_{dates}")
    path = fixture.write(tmp_path)
    backbone = twin(monkeypatch, name, path, dates=dates, normalise=False)
    patch = backbone.card.patch
    image = draw("image", (2, 6, dates, 4 * patch, 4 * patch))
    wide = draw("wide", (2, 6, dates, 3 * patch, 6 * patch))
    date, place = {"date": DATES[:, :dates]}, {"lonlat": LONLAT}
    calls = {"plain": (image, None), "wide": (wide, None)}
    if name.endswith("_tl"):
        calls |= {"metadata": (image, date | place), "date": (image, date)}
        calls |= {"place": (image, place)}
    assert set(fixture.outputs) == set(calls)
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}  # too fine for the comparison
    for case, call in calls.items():
        with torch.no_grad():
            assert_same_tokens(backbone(*call), fixture.outputs[case], dates)
    key = f"{'' if '_v1_' in name else 'encoder.'}blocks.1.attn.qkv.weight"
    assert torch.equal(backbone.module("blocks.1.attn.qkv").weight, fixture.state[key])


def test_the_order_of_latitude_and_longitude_matters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kit's lonlat turned is not TerraTorch's: a swap would show in the parity."""
    fixture = Fixture("prithvi_eo_v2_600_tl_1")
    path = fixture.write(tmp_path)
    backbone = twin(monkeypatch, "prithvi_eo_v2_600_tl", path, normalise=False)
    image, turned = draw("image", (2, 6, 1, 56, 56)), torch.tensor([[-33.9, 51.2]] * 2)
    with torch.no_grad():
        ours = backbone(image, {"lonlat": turned})[-1]
        swapped = backbone(image, {"lonlat": turned.flip(1)})[-1]
    assert float((ours - swapped).abs().max()) > 0.05


# Several dates


def test_channels_are_date_major(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in date 2 of 3 moves its channels most, and date 1's by attention only.

    With the blocks taken out, what is left belongs to one date each.
    """
    backbone = twin(monkeypatch, dates=3)
    assert backbone.channels == [3 * 48] * 4 and backbone.dates == 3
    for position in range(2):
        backbone.model.blocks[position] = torch.nn.Identity()
    image = images(3)
    other = image.clone()
    other[:, :, 1] += 0.1
    moved = (backbone(image)[0] != backbone(other)[0]).unflatten(1, (3, 48))
    assert not moved[:, [0, 2]].any() and moved[:, 1].any()


def test_dates_differ_by_their_place_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = twin(monkeypatch, dates=2)
    picture = images(1)
    twice = backbone(picture.expand(-1, -1, 2, -1, -1))[-1].unflatten(1, (2, 48))
    assert not torch.allclose(twice[:, 0], twice[:, 1])


def test_one_date_comes_with_or_without_its_axis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = twin(monkeypatch)
    image = images()
    assert same(backbone(image), backbone(image.squeeze(2)))
    assert backbone.channels == [48] * 4
    assert backbone.model(image.squeeze(2)).shape == (2, 48), "it runs alone"


def test_images_of_other_dates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = twin(monkeypatch, dates=3)
    for image in (images(2), images(1).squeeze(2)):
        with pytest.raises(ValueError, match=r"takes 3 dates, \(B, C, 3, H, W\)"):
            backbone(image)
    with pytest.raises(ValueError, match=r"one date.*dates=T"):
        twin(monkeypatch)(images(3))
    for dates in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="whole number of dates"):
            twin(monkeypatch, dates=dates)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_model_reads_several_dates(
    monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    backbone = twin(monkeypatch, dates=2)
    gk.attach(backbone, "lora", rank=2)
    model = gk.build_model(backbone, "linear", task, num_classes=3)
    image = draw("image", (2, 6, 2, 50, 70))
    meta = {"date": DATES[:, :2], "lonlat": LONLAT}
    out = model(image, meta)
    assert out.shape == ((2, 3, 50, 70) if task == "segmentation" else (2, 3))
    out.square().mean().backward()
    turned = model(image.transpose(1, 2), meta)  # torchgeo's (B, T, C, H, W)
    assert torch.equal(out, turned)
    assert not torch.equal(out, model(image))


# Date and place


def test_metadata_is_added_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, image = twin(monkeypatch), images()
    date, place = {"date": DATES[:, :1]}, {"lonlat": LONLAT}
    plain = backbone(image)
    assert same(plain, backbone(image, {}))
    outputs = [plain, *(backbone(image, m) for m in (date, place, date | place))]
    for number, one in enumerate(outputs):
        assert not any(same(one, other) for other in outputs[number + 1 :])
    later = {"date": DATES[:, :1] + torch.tensor([0.0, 1.0])}
    assert not same(backbone(image, date), backbone(image, later))
    whole = {"date": DATES[:, :1].long(), "lonlat": LONLAT.double()}
    assert same(backbone(image, date | place), backbone(image, whole))


def test_metadata_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Fixture("prithvi_eo_v2_600_tl_1").write(tmp_path)
    name = "prithvi_eo_v2_600_tl"
    with_it = twin(monkeypatch, name, path)
    without = twin(monkeypatch, name, path, metadata=False)
    image, meta = images(size=56), {"date": DATES[:, :1], "lonlat": LONLAT}
    assert same(without(image, meta), with_it(image))
    assert not same(with_it(image, meta), with_it(image))
    assert not without.metadata_scales
    with pytest.raises(ValueError, match=r"learned no weight.*_tl"):
        twin(monkeypatch, "prithvi_eo_v2_300", metadata=True)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"date": DATES[:, :2]}, r"shape \(2, 2, 2\).*\(2, 1, 2\).*T=1"),
        ({"date": DATES[:1, :1]}, r"shape \(1, 1, 2\)"),
        ({"date": torch.tensor([[[2020.0, 366.0]]] * 2)}, "holds 366.*0 to 365"),
        ({"date": torch.tensor([[[20.0, 36.0]]] * 2)}, "holds 20;.*1900 to 2100"),
        ({"date": torch.full((2, 1, 2), torch.nan)}, "holds nan"),
        ({"lonlat": LONLAT.flip(1)}, r"holds 151\.2;.*longitude, then latitude"),
        ({"lonlat": LONLAT[:1]}, r"shape \(1, 2\).*\(2, 2\)"),
    ],
)
def test_metadata_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, meta: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        twin(monkeypatch)(images(), meta)


def test_metadata_readers() -> None:
    image = torch.zeros(6, 6, 8, 8)  # two images of three dates
    assert dates_of(None, image) is None and lonlat_of({}, image) is None
    read = dates_of({"date": DATES.double()}, image, 3)
    assert read.dtype == torch.float32 and torch.equal(read, DATES)
    assert torch.equal(lonlat_of({"lonlat": LONLAT}, image, 3), LONLAT)
    shapes_only = {"date": DATES.to("meta")}
    assert dates_of(shapes_only, image.to("meta"), 3).shape == (2, 3, 2)


def test_batches_and_scenes_bring_date_and_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone, seen = twin(monkeypatch), []
    forward = backbone.forward_maps
    monkeypatch.setattr(
        backbone, "forward_maps", lambda i, m: seen.append(m) or forward(i, m)
    )
    model = gk.build_model(backbone, "linear", num_classes=2)
    data = toy_data(tmp_path / "chips")
    gk.evaluate(model, data, "val")
    assert seen and all(14 < float(m["lonlat"][0, 0]) < 16 for m in seen)
    seen.clear()
    scene = next((tmp_path / "chips" / "images").glob("*.tif"))
    meta = {"date": DATES[:1, :1], "lonlat": LONLAT[:1]}
    gk.predict_scene(
        model, scene, tmp_path / "out.tif", window=16, scale=1e-4, bands=HLS, meta=meta
    )
    assert {tuple(m["date"].shape) for m in seen} == {(1, 1, 2), (2, 1, 2)}
    assert all(torch.equal(m["lonlat"][-1], LONLAT[0]) for m in seen)


# The two scales are weights


def test_scales_are_in_the_state_dict_and_the_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fixture = Fixture("prithvi_eo_v2_100_tl_3")
    backbone = twin(monkeypatch, "prithvi_eo_v2_100_tl", fixture.write(tmp_path))
    for key in METADATA_SCALES:
        expected = fixture.state[f"encoder.{key}"]
        assert torch.equal(backbone.state_dict()[key], expected)
        assert torch.equal(backbone.metadata_scales[key], expected)
    inside = sum(p.numel() for p in backbone.model.parameters())
    assert sum(p.numel() for p in backbone.parameters()) == inside + 2
    before = backbone.weights_hash()
    with torch.no_grad():
        backbone.get_parameter(METADATA_SCALES[1]).add_(0.1)
    assert backbone.weights_hash() != before


def test_full_fine_tuning_trains_the_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, image = twin(monkeypatch), images()
    meta = {"date": DATES[:, :1], "lonlat": LONLAT}
    start = backbone(image, meta)
    for method, there in (("full", True), ("lora", False), ("norm", False)):
        adapter = gk.attach(backbone, method)
        trained = dict(adapter.named_parameters())
        assert (set(METADATA_SCALES) <= set(trained)) is there
        assert same(backbone(image, meta), start) or not there
        sum(m.square().mean() for m in backbone(image, meta)).backward()
        if there:
            assert all(float(trained[key].grad.abs()) > 0 for key in METADATA_SCALES)
            with torch.no_grad():
                trained[METADATA_SCALES[0]].add_(1.0)
            assert not same(backbone(image, meta), start)
        adapter.detach()
        assert same(backbone(image, meta), start)
        scales = backbone.metadata_scales.values()
        assert all(float(scale) == pytest.approx(0.1) for scale in scales)


def test_a_full_adapter_with_scales_is_saved_and_merged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone, image = twin(monkeypatch), images()
    other, meta = copy.deepcopy(backbone), {"lonlat": LONLAT}
    adapter = gk.attach(backbone, "full")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    trained = backbone(image, meta)
    adapter.save(tmp_path)
    gk.load_adapter(other, tmp_path)
    assert same(other(image, meta), trained)
    adapter.merge()
    assert same(backbone(image, meta), trained)
    assert float(backbone.metadata_scales[METADATA_SCALES[1]]) == pytest.approx(0.15)


def test_counts_with_and_without_metadata() -> None:
    with torch.device("meta"):
        backbone = load_backbone(TINY, weights=None, dates=3)
        maps = backbone(torch.zeros(1, 6, 3, 32, 32), {"date": torch.zeros(1, 3, 2)})
    assert sum(p.numel() for p in backbone.model.parameters()) == 5_634_048
    assert sum(p.numel() for p in backbone.parameters()) == 5_634_048 + 2
    assert {tuple(m.shape) for m in maps} == {(1, 576, 2, 2)}


# Methods


class NoAttention(torch.nn.Module):
    """In the place of attention: no token sees another."""

    def forward(self, tokens: Tensor, **masks: Any) -> Tensor:
        return tokens


@torch.no_grad()
def test_methods_on_the_grid_see_each_date_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A convolution over the tokens of one date must not reach the other."""
    backbone = twin(monkeypatch, dates=2)
    for block in backbone.model.blocks:
        block.attn = NoAttention()  # or the dates would mix
    gk.attach(backbone, "convpass", width=4, dropout=0.0)
    for parameter in backbone.adapter.parameters():
        parameter.add_(0.1)
    image = images(2)
    other = image.clone()
    other[:, :, 1, :16, :16] += 0.1
    moved = (backbone(image)[-1] - backbone(other)[-1]).abs().unflatten(1, (2, 48))
    assert float(moved[:, 0].max()) == 0 and float(moved[:, 1, :, 1, 1].max()) > 0
