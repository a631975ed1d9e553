"""What every backbone promises, asked of a thin twin of each family."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from backbone_table import (
    EVERYDAY,
    ROWS,
    Row,
    check_method,
    idle,
    image,
    meta,
    refuses,
    stirred,
    twin,
)
from method_table import CARDS as METHODS
from safetensors import safe_open
from safetensors.torch import save_file

import geopeft_kit as gk
from geopeft_kit import backbones
from geopeft_kit.backbones import Backbone
from geopeft_kit.backbones.registry import BUILDERS
from geopeft_kit.backbones.weights import save_weights

FREE = [row for row in ROWS if row.size is None]
rows = pytest.mark.parametrize("row", ROWS, ids=str)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_family_has_a_row() -> None:
    families = {gk.backbones.find_card(row.name).family for row in ROWS}
    resnets = {
        "ssl4eo_resnet",
        "from_scratch",
    }  # as timm:resnet18
    assert families | resnets == set(BUILDERS)
    assert {card.family for card in backbones.CARDS.values()} <= set(BUILDERS)


@rows
def test_four_maps_as_announced(monkeypatch: Any, row: Row) -> None:
    backbone = twin(monkeypatch, row)
    picture = image(backbone, row)
    with torch.no_grad():
        maps = backbone(picture)
    height, width = picture.shape[-2:]
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, height // stride, width // stride)
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    assert len(maps) == 4 and all(m.isfinite().all() for m in maps)
    assert not backbone.training
    blocks = backbone.blocks
    assert len(blocks) == backbone.card.depth
    assert all(backbone.module(path) is block for path, block in blocks)
    assert (backbone.layout == "vit") == (backbone.width is not None)
    step = max(backbone.strides)
    with pytest.raises(ValueError, match=f"needs multiples of {step}"):
        backbone(picture[..., :-1])
    with pytest.raises(ValueError, match="no such option: 'colour'"):
        twin(monkeypatch, row, colour=1)


@rows
def test_every_parameter_reaches_a_map(monkeypatch: Any, row: Row) -> None:
    backbone = twin(monkeypatch, row)
    found = idle(backbone, image(backbone, row))
    assert all(name.startswith(row.idle or ("-",)) for name in found), found
    assert bool(found) == bool(row.idle)


@rows
def test_bands_in_another_order_give_the_same_maps(monkeypatch: Any, row: Row) -> None:
    torch.manual_seed(1)
    plain = twin(monkeypatch, row)
    torch.manual_seed(1)  # the same weights for the card's bands, then rearranged
    turned = twin(monkeypatch, row, bands=plain.bands[::-1])
    picture = image(plain, row)
    with torch.no_grad():
        for one, other in zip(plain(picture), turned(picture.flip(1)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@rows
def test_an_ignored_band_is_not_read(monkeypatch: Any, row: Row) -> None:
    known = row.options.get("bands") or gk.backbones.find_card(row.name).bands
    bands = [known[0], "NDVI", *known[1:]]
    with pytest.raises(ValueError, match="does not know NDVI"):
        twin(monkeypatch, row, bands=bands)
    torch.manual_seed(1)
    backbone = twin(monkeypatch, row, bands=bands, new_bands="ignore")
    torch.manual_seed(1)
    plain = twin(monkeypatch, row)
    picture = image(backbone, row)
    kept = [i for i in range(len(bands)) if i != 1]
    with torch.no_grad():
        for one, other in zip(backbone(picture), plain(picture[:, kept]), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@rows
def test_weights_are_saved_whole_and_loaded_strictly(
    monkeypatch: Any, tmp_path: Path, row: Row
) -> None:
    backbone = twin(monkeypatch, row)
    path = save_weights(stirred(backbone), tmp_path / "own.safetensors", half=False)
    assert twin(monkeypatch, row, path).weights_hash() == backbone.weights_hash()
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        bands = file.metadata()
    del state[next(key for key in state if "blocks" in key or "layer1" in key)]
    save_file(state | {"surprise": torch.ones(1)}, path, bands)
    with pytest.raises(ValueError, match="does not fit|lacks"):
        twin(monkeypatch, row, path)


@rows
def test_shapes_need_no_memory(monkeypatch: Any, row: Row) -> None:
    with torch.device("meta"):
        backbone = twin(monkeypatch, row)
        maps = backbone(image(backbone, row)) if row.on_meta else []
    assert all(m.is_meta for m in maps)
    assert all(parameter.is_meta for parameter in backbone.parameters())


@rows
def test_half_precision_copies_and_other_sizes(monkeypatch: Any, row: Row) -> None:
    backbone = stirred(twin(monkeypatch, row))
    picture = image(backbone, row)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = backbone(picture)
    with torch.no_grad():
        whole, copied = backbone(picture), copy.deepcopy(backbone)(picture)
        if row.size is None:
            backbone(torch.cat([picture, picture], dim=-1))  # another grid
        again = backbone(picture)
    assert same(whole, copied) and same(whole, again)
    for one, other in zip(half, whole, strict=True):
        assert (one.float() - other).std() < 0.1 * other.std() + 1e-3


@rows
def test_metadata_counts_where_the_row_says_so(monkeypatch: Any, row: Row) -> None:
    backbone = stirred(twin(monkeypatch, row))
    picture = image(backbone, row)
    with torch.no_grad():
        plain = backbone(picture)
        for key in ("date", "lonlat"):
            if key in row.meta:
                assert not same(plain, backbone(picture, meta(backbone, [key])))
            elif not row.meta:
                assert same(plain, backbone(picture, {key: torch.full((7,), 9e9)}))


@pytest.mark.parametrize("resolution", [0, -1.0, "10", math.nan, math.inf, True])
@pytest.mark.parametrize("row", [row for row in ROWS if row.ground_size], ids=str)
def test_a_pixel_has_a_size_on_the_ground(
    monkeypatch: Any, row: Row, resolution: Any
) -> None:
    with pytest.raises(ValueError, match="metres per pixel"):
        twin(monkeypatch, row, resolution=resolution)


def check_methods(backbone: Backbone, row: Row, names: Any) -> None:
    """Each method fits, or says why not, as the row has it."""
    reasons = refuses(backbone)
    for name in names:
        if name in row.refuses:
            with pytest.raises(ValueError, match="does not fit.*Methods that fit"):
                gk.attach(backbone, name)
        else:
            assert name not in reasons, reasons[name]
            picture = image(backbone, row, 32 if name == "vit_adapter" else 1)
            check_method(backbone, name, picture, meta(backbone, row.meta))


@rows
def test_everyday_methods_fit(monkeypatch: Any, row: Row) -> None:
    backbone = stirred(twin(monkeypatch, row))
    assert set(refuses(backbone)) == row.refuses
    check_methods(backbone, row, EVERYDAY)


@pytest.mark.slow
@rows
def test_all_methods_fit_or_say_why(monkeypatch: Any, row: Row) -> None:
    backbone = stirred(twin(monkeypatch, row))
    check_methods(backbone, row, sorted(set(METHODS) - set(EVERYDAY)))


@pytest.mark.parametrize(
    "decoder",
    ["linear", *(pytest.param(d, marks=pytest.mark.slow) for d in ("fcn", "unet"))],
)
@pytest.mark.parametrize("row", FREE, ids=str)
def test_dense_predictions_at_odd_sizes(
    monkeypatch: Any, row: Row, decoder: str
) -> None:
    backbone = twin(monkeypatch, row)
    model = gk.build_model(backbone, decoder, "segmentation", num_classes=3).train()
    picture = torch.rand(2, len(backbone.bands), backbone.dates, 50, 70)
    out = model(picture if backbone.dates > 1 else picture.squeeze(2))
    assert out.shape == (2, 3, 50, 70)
    out.square().mean().backward()


def test_nothing_is_downloaded_for_random_weights(
    no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a constructor asked the network for weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refused)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", refused)
    for row in ROWS:
        twin(monkeypatch, row)
