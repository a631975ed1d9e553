"""Backbones: parity with independent code, bands by name, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from geopeft_kit.backbones import find_card, galileo, list_backbones, load_backbone
from geopeft_kit.backbones.band_plan import plan_bands
from geopeft_kit.backbones.base import Backbone, adapt_kernels, tap_points
from geopeft_kit.backbones.cards import STATISTICS
from geopeft_kit.backbones.prithvi import resize_table, sine_cosine_table
from geopeft_kit.files import hash_of

HLS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
# Radar twins differ from their optical ones in the first layer only.
NAMED = [
    pytest.param(name, marks=[pytest.mark.slow] if name.endswith("_s1") else [])
    for name in (card.name for card in list_backbones())
]
SMALL = {
    "vit": "timm:vit_tiny_patch16_224",
    "convnext": "timm:convnext_atto",
    "resnet": "timm:resnet18",
    "swin": "timm:swin_tiny_patch4_window7_224",
}


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def image(channels: int, height: int = 64, width: int = 64, batch: int = 1) -> Tensor:
    return torch.rand(batch, channels, height, width) * 0.5


class Doubled(nn.Module):
    """A block and a factor of two: what a method might put in its place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * self.inner(tokens)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The contract, over all families


@pytest.mark.parametrize("name", ["geopeft_tiny", SMALL["resnet"]])
def test_a_swapped_block_is_the_one_that_runs(name: str) -> None:
    backbone = load_backbone(name, weights=None)
    picture = image(len(backbone.bands))
    before = backbone(picture)
    path, block = backbone.blocks[1]
    owner, _, position = path.rpartition(".")
    substitute = Doubled(block)
    backbone.module(owner)[int(position)] = substitute
    assert backbone.blocks[1] == (path, substitute)
    assert not torch.equal(before[-1], backbone(picture)[-1])
    backbone.module(owner)[int(position)] = block
    assert torch.equal(before[-1], backbone(picture)[-1])


def test_taps_of_plain_vits() -> None:
    assert tap_points(12) == (2, 5, 8, 11)
    assert tap_points(24) == (5, 11, 17, 23)
    assert tap_points(32) == (7, 15, 23, 31)
    assert tap_points(6) == (1, 2, 4, 5)
    assert tap_points(4) == (0, 1, 2, 3)


@pytest.mark.parametrize("name", NAMED)
def test_parameters_on_the_card(name: str) -> None:
    card = find_card(name)
    with torch.device("meta"):
        backbone = load_backbone(name, weights=None)
    assert count(backbone.model) == card.parameters
    assert len(backbone.blocks) == card.depth
    assert backbone.width in (card.width, None)  # a hierarchy has no one width
    assert (
        len(card.normalisation.mean) == len(card.normalisation.std) == len(card.bands)
    )
    radar = [band in ("VV", "VH") for band in card.bands]
    assert [micrometres is None for micrometres in card.wavelengths] == radar
    assert all(0.4 < um < 2.5 for um in card.wavelengths if um is not None)


def test_published_counts() -> None:
    published = {
        "prithvi_eo_v2_tiny_tl": 5_634_048,
        "prithvi_eo_v1_100": 86_237_184,
        "prithvi_eo_v2_300": 303_886_336,
        "prithvi_eo_v2_600": 631_188_480,
    }
    assert {name: find_card(name).parameters for name in published} == published
    # timm counts the norm inside ConvNeXt's classifier, which no map passes through.
    assert find_card("timm:convnext_base").parameters == 87_566_464 - 2 * 1024


def test_card_as_html_is_escaped() -> None:
    html = find_card("geopeft_tiny")._repr_html_()
    assert "2,743,680" in html and "SWIR_2" in html
    hostile = dataclasses.replace(find_card("geopeft_tiny"), notes="<img src=x>")
    assert "<img" not in hostile._repr_html_()


# Refusals


def test_images_that_do_not_fit() -> None:
    backbone = load_backbone("geopeft_tiny", weights=None)
    with pytest.raises(ValueError, match=r"4 channels.*BLUE, GREEN, RED"):
        backbone(image(4))
    with pytest.raises(ValueError, match=r"60 x 64 px.*multiples of 8"):
        backbone(image(6, 60, 64))
    with pytest.raises(TypeError, match="int16"):
        backbone((image(6) * 10000).to(torch.int16))
    with pytest.raises(ValueError, match="one date"):
        backbone(image(6).unsqueeze(2).expand(-1, -1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"no module 'blocks\.99'"):
        backbone.module("blocks.99")


def test_names_and_options_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="did you mean prithvi_eo_v2_300"):
        load_backbone("prithvi_eo_v2_30")
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        load_backbone("timm:vit_tiny_patch16_244")
    with pytest.raises(ValueError, match=r"no weights 'mine'.*augreg"):
        load_backbone("timm:vit_tiny_patch16_224.mine")
    with pytest.raises(ValueError, match=r"is a Eva.*ConvNeXt"):
        load_backbone("timm:eva02_tiny_patch14_224")
    with pytest.raises(ValueError, match=r"geopeft_tiny has no such option.*'size'"):
        load_backbone("geopeft_tiny", weights=None, size=3)
    with pytest.raises(ValueError, match=r"image_size=100.*multiple of 8"):
        load_backbone("geopeft_tiny", weights=None, image_size=100)


# Normalisation


def test_normalisation_happens_once_and_inside() -> None:
    torch.manual_seed(1)
    inside = load_backbone("prithvi_eo_v2_tiny_tl", weights=None)
    outside = load_backbone("prithvi_eo_v2_tiny_tl", weights=None, normalise=False)
    outside.model.load_state_dict(inside.model.state_dict())
    picture = image(6)
    mean = torch.tensor([1087.0, 1342, 1433, 2734, 1958, 1363]).view(-1, 1, 1)
    std = torch.tensor([2248.0, 2179, 2178, 1850, 1242, 1049]).view(-1, 1, 1)
    by_hand = (picture * 10000 - mean) / std
    for one, other in zip(inside(picture), outside(by_hand), strict=True):
        torch.testing.assert_close(one, other)


# Bands


def with_bands(full: Backbone, bands: object, new_bands: str = "error") -> Backbone:
    """The same weights, loaded again for other bands."""
    plan = plan_bands(full.card, bands, new_bands)
    model = copy.deepcopy(full.model)
    first = {"vit": "patch_embed.proj", "convnext": "stem.0", "resnet": "conv1"}
    adapt_kernels(model.get_submodule(first[full.layout]), plan)
    other = copy.deepcopy(full)
    Backbone.__init__(other, full.card, model, plan)
    return other.eval()


def test_subset_in_any_order_equals_absent_bands_at_their_mean(tmp_path: Path) -> None:
    full = load_backbone("geopeft_tiny", weights=None)
    path = tmp_path / "full.safetensors"
    save_file(full.model.state_dict(), path)
    wanted = ("SWIR_1", "BLUE", "NIR_NARROW")
    subset = load_backbone("geopeft_tiny", bands=wanted, weights=path)
    assert subset.bands == wanted
    picture = image(6)
    chosen = picture[:, [HLS.index(band) for band in wanted]]
    filled = picture.clone()
    for index, band in enumerate(HLS):
        if band not in wanted:
            filled[:, index] = full.card.normalisation.mean[index]
    for one, other in zip(subset(chosen), full(filled), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    assert subset.weights_hash() != full.weights_hash()


@pytest.mark.parametrize("layout", ["vit", "convnext", "resnet"])
def test_rgb_networks_meet_new_bands_by_policy(layout: str) -> None:
    full = load_backbone(SMALL[layout], weights=None)
    rgb = image(3)
    expected = full(rgb)
    wanted = ("BLUE", "GREEN", "RED", "NIR_NARROW", "VV")
    wide = torch.cat([rgb[:, [2, 1, 0]], image(2)], dim=1)

    with pytest.raises(ValueError, match=r"does not know NIR_NARROW, VV.*RED, GREEN"):
        load_backbone(SMALL[layout], bands=wanted, weights=None)

    ignoring = with_bands(full, wanted, "ignore")
    for one, other in zip(ignoring(wide), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    first = {"vit": "patch_embed.proj", "convnext": "stem.0", "resnet": "conv1"}
    old = full.module(first[layout]).weight
    drawn = with_bands(full, wanted, "random").module(first[layout]).weight
    assert torch.equal(drawn[:, :3], old[:, [2, 1, 0]])
    assert 0.8 < float(drawn[:, 3:].std() / old.std()) < 1.2
    assert not torch.equal(drawn[:, 3], drawn[:, 4])

    nearest = with_bands(full, wanted[:4], "copy_nearest")
    assert torch.equal(nearest.module(first[layout]).weight[:, 3], old[:, 0])
    maps = nearest(wide[:, :4])
    assert maps[0].shape == expected[0].shape

    # A band that says what its neighbour says leaves the answer where it was.
    shared = with_bands(full, wanted[:4], "share_nearest")
    same = wide[:, :4].clone()
    same[:, 3] = shared.normalised(same)[:, 2] * shared.std[3] + shared.mean[3]
    same[:, 3] /= full.card.normalisation.scale
    for one, other in zip(shared(same), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)

    for policy in ("copy_nearest", "share_nearest"):
        with pytest.raises(ValueError, match="VV has no wavelength"):
            load_backbone(SMALL[layout], wanted, None, new_bands=policy)


@pytest.mark.parametrize(
    "name", ["geopeft_tiny_rgb", "gfm_swin_base", "satlas_swin_v2_t"]
)
def test_a_shared_band_arrives_where_its_neighbour_does(name: str) -> None:
    """Whatever the card's convention: z-scores, photographs, or a division alone."""
    card = find_card(name)
    bands = (*card.bands, "NIR_NARROW", "WATER_VAPOUR")
    plan = plan_bands(card, bands, "share_nearest")
    published = STATISTICS["ssl4eo_s12_sentinel2"]
    scale = card.normalisation.scale / published.scale

    def arrives(band: str, deviations: float) -> float:
        """A place so many deviations above the world's mean, standardised."""
        mean, std = published.bands[band]
        value = mean + deviations * std
        index = bands.index(band)
        return (scale * value - plan.mean[index]) / plan.std[index]

    for band in bands[-2:]:
        neighbour = card.bands[plan.kernels[bands.index(band)]]
        for deviations in (0.0, 1.0):
            expected = arrives(neighbour, deviations)
            assert arrives(band, deviations) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"no statistics of PAN.*copy_nearest"):
        plan_bands(card, (*card.bands, "PAN"), "share_nearest")


def test_band_plans() -> None:
    card = find_card("geopeft_tiny")
    plan = plan_bands(card, ["B12", "RED_EDGE_3", "VV", "RED"], "ignore")
    assert plan.read == (0, 3) and plan.kernels == (5, 2)
    assert plan.mean == (0.15, card.normalisation.mean[3], 0.0, 0.11)  # 0.78 -> 0.86
    assert plan.std[2] == 1.0
    assert plan_bands(card, "hls", "error").kernels == (0, 1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="knows none of VV, VH"):
        plan_bands(card, ["VV", "VH"], "ignore")
    with pytest.raises(ValueError, match=r"new_bands='zero'.*share_nearest"):
        plan_bands(card, "hls", "zero")


# Frozen batch norm, hash


def test_frozen_batch_norm_does_not_move() -> None:
    backbone = load_backbone("timm:resnet18", weights=None).requires_grad_(False)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.train()
    assert backbone.training
    backbone(image(3, batch=2))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())

    backbone.module("bn1").requires_grad_(True)
    backbone.train()
    backbone(image(3, batch=2))
    changed = [k for k, v in backbone.state_dict().items() if not v.equal(before[k])]
    assert {key.split(".")[1] for key in changed} == {"bn1"}


def test_weights_hash_is_of_names_types_and_values() -> None:
    backbone = load_backbone("geopeft_tiny", weights=None)
    first = backbone.weights_hash()
    assert copy.deepcopy(backbone).weights_hash() == first
    backbone.model.norm.bias[7] += 1e-6
    second = backbone.weights_hash()
    assert second != first
    backbone.model.norm.bias[7] -= 1e-6
    assert backbone.weights_hash() == first
    assert backbone.to(torch.bfloat16).weights_hash() not in (first, second)


# Prithvi against timm's own class and a table written anew


def table_by_loops(width: int, height: int, breadth: int) -> np.ndarray:
    """The sheet's words as loops: x, y, time; sines then cosines; base 10000."""
    rows = []
    for y in range(height):
        for x in range(breadth):
            row: list[float] = []
            for place, size in (
                (x, width // 16 * 6),
                (y, width // 16 * 6),
                (0, width // 16 * 4),
            ):
                rates = [1 / 10000 ** (i / (size / 2)) for i in range(size // 2)]
                row += [np.sin(place * rate) for rate in rates]
                row += [np.cos(place * rate) for rate in rates]
            rows.append(row)
    return np.array(rows)


def test_position_table() -> None:
    table = sine_cosine_table(192, 3, 5)
    np.testing.assert_allclose(table.numpy(), table_by_loops(192, 3, 5), atol=1e-6)
    two_dates = sine_cosine_table(192, 3, 5, dates=2)
    assert torch.equal(two_dates[:15], table)
    changed = (two_dates[15:] != table).any(dim=0)
    assert not changed[:144].any() and changed[144:].any(), "time is the last quarter"
    with pytest.raises(ValueError, match="multiple of 16"):
        sine_cosine_table(100, 2, 2)


def test_position_table_is_resized_with_aligned_corners() -> None:
    table = sine_cosine_table(32, 4, 4)[None]
    large = resize_table(table, (4, 4), (7, 10)).unflatten(1, (7, 10))
    small = table.unflatten(1, (4, 4))
    for y in (0, -1):
        for x in (0, -1):
            torch.testing.assert_close(large[0, y, x], small[0, y, x])
    torch.testing.assert_close(
        large[0, 2, 0], small[0, 1, 0], msg="row 2 of 7 is row 1"
    )
    assert not torch.allclose(large[0, 1, 1], small[0, 0, 0], atol=1e-3)


# timm's networks against timm


@pytest.mark.parametrize("layout", list(SMALL))
def test_timm_weights_give_timms_features(tmp_path: Path, layout: str) -> None:
    name = SMALL[layout].removeprefix("timm:")
    # The published file has the classifier inside; it is dropped.
    published = timm.create_model(name, pretrained=False).eval()
    for module in published.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    path = tmp_path / "model.safetensors"
    save_file(published.state_dict(), path)
    backbone = load_backbone(SMALL[layout], weights=path)
    picture = image(3, 224, 224)
    mean = torch.tensor(backbone.card.normalisation.mean).view(-1, 1, 1)
    std = torch.tensor(backbone.card.normalisation.std).view(-1, 1, 1)
    maps, seen = backbone(picture), (picture - mean) / std
    if layout in ("convnext", "resnet"):
        features = timm.create_model(name, pretrained=False, features_only=True).eval()
        keys = features.state_dict().keys()
        renamed = {
            key.replace("stem.", "stem_").replace("stages.", "stages_"): tensor
            for key, tensor in published.state_dict().items()
        }
        features.load_state_dict({key: renamed[key] for key in keys})
        expected = features(seen)[-4:]
    else:
        taps = [2, 5, 8, 11] if layout == "vit" else 4
        expected = published.forward_intermediates(
            seen, indices=taps, norm=False, intermediates_only=True
        )
        expected[-1] = published.forward_intermediates(
            seen, indices=taps, norm=True, intermediates_only=True
        )[-1]
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_timm_vit_resizes_its_table_as_timm_does(tmp_path: Path) -> None:
    name = SMALL["vit"].removeprefix("timm:")
    published = timm.create_model(
        name, pretrained=False, num_classes=0, dynamic_img_size=True
    ).eval()
    path = tmp_path / "model.safetensors"
    save_file(published.state_dict(), path)
    backbone = load_backbone(SMALL["vit"], weights=path, normalise=False)
    picture = torch.randn(1, 3, 64, 96)
    tokens = published.forward_features(picture)[:, 1:]
    expected = tokens.transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(backbone(picture)[-1], expected)


def test_timm_card_says_where_it_comes_from() -> None:
    card = find_card("timm:vit_tiny_patch16_224")
    assert card.bands == ("RED", "GREEN", "BLUE")
    assert card.licence == "apache-2.0"
    assert (
        card.weights["default"].repo == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    )
    assert card.normalisation.mean == (0.5, 0.5, 0.5)
    tagged = find_card("timm:vit_tiny_patch16_224.augreg_in21k")
    assert tagged.weights["default"].repo == "timm/vit_tiny_patch16_224.augreg_in21k"


def test_timm_strict_errors(tmp_path: Path) -> None:
    state = timm.create_model("convnext_atto", pretrained=False).state_dict()
    del state["stages.1.blocks.0.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(stages\.1\.blocks\.0\.norm"):
        load_backbone("timm:convnext_atto", weights=tmp_path)


# Galileo


def test_galileo_groups() -> None:
    backbone = load_backbone("galileo_nano", weights=None)
    assert len(backbone.model.space_time_embed) == 5
    rgb = load_backbone("galileo_nano", ["RED", "GREEN", "BLUE"], None)
    assert list(rgb.model.space_time_embed) == ["S2_RGB"]
    with pytest.raises(ValueError, match="S2_RGB lacks BLUE, GREEN"):
        load_backbone("galileo_nano", ["RED", "SWIR_1", "SWIR_2"], None)
    partly = load_backbone(
        "galileo_nano", ["RED", "SWIR_1", "SWIR_2"], None, new_bands="ignore"
    )
    picture = image(3)
    other = picture.clone()
    other[:, 0] += 0.1
    assert torch.equal(partly(picture)[-1], partly(other)[-1]), "RED was read"
    other[:, 1] += 0.1
    assert not torch.equal(partly(picture)[-1], partly(other)[-1])
    with pytest.raises(ValueError, match=r"lacks BLUE, GREEN\. Add bands"):
        load_backbone("galileo_nano", ["RED"], None, new_bands="ignore")
    for policy in ("random", "copy_nearest"):
        with pytest.raises(ValueError, match="reads its bands in groups"):
            load_backbone("galileo_nano", "sentinel2_l2a", None, new_bands=policy)


def test_galileo_patch_sizes() -> None:
    for patch in (1, 3, 8):
        backbone = load_backbone("galileo_nano", "rgb", None, patch=patch)
        height, width = 2 * patch, 3 * patch
        assert backbone.strides == [patch] * 4
        assert backbone(image(3, height, width))[-1].shape == (1, 128, 2, 3)
    for options in ({"patch": 9}, {"patch": 0}, {"month": 12}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            load_backbone("galileo_nano", weights=None, **options)


@pytest.mark.parametrize("patch", [2, 4, 5, 7])
def test_galileo_kernels_resize_as_in_timm(patch: int) -> None:
    kernel = torch.randn(6, 3, 8, 8)
    ours = kernel.flatten(2) @ galileo.kernel_resize(8, patch)
    expected = resample_patch_embed(kernel, [patch, patch])
    torch.testing.assert_close(ours.unflatten(2, (patch, patch)), expected)


def test_galileo_month() -> None:
    for year in (1900, 2000, 2023, 2024):
        start = datetime.date(year, 1, 1)
        days = (datetime.date(year + 1, 1, 1) - start).days
        expected = [(start + datetime.timedelta(d)).month - 1 for d in range(days)]
        ours = galileo.month_of(torch.full((days,), year), torch.arange(days))
        assert ours.tolist() == expected
    backbone = load_backbone("galileo_nano", weights=None)
    july = load_backbone("galileo_nano", weights=None, month=0)
    july.model.load_state_dict(backbone.model.state_dict())
    picture = image(10)
    january = backbone(picture, {"date": torch.tensor([[[2024.0, 3.0]]])})[-1]
    assert torch.equal(january, july(picture)[-1])
    assert not torch.equal(january, backbone(picture)[-1])


@pytest.fixture(scope="module")
def nano(real_data: Path) -> tuple[Path, dict[str, Tensor]]:
    weights = real_data / "galileo_nano" / "encoder.pt"
    vectors = real_data.parent / "reference" / "vectors" / "galileo_nano_tokens.pt"
    for file in (weights, vectors):
        if not file.is_file():
            pytest.skip(f"{file} is not there")
    return weights, torch.load(vectors, weights_only=True, map_location="cpu")


@pytest.mark.real
def test_galileo_equals_its_published_code(
    nano: tuple[Path, dict[str, Tensor]],
) -> None:
    weights, vectors = nano
    load = partial(load_backbone, "galileo_nano", weights=weights, normalise=False)
    rgb = ["BLUE", "GREEN", "RED"]
    for backbone, images, tokens, step in (
        (load(rgb), "rgb_x", "rgb_patch8", 1),
        (load(rgb, patch=4), "rgb_x", "rgb_patch4", 2),
        (load(patch=4), "s2_x", "s2_patch4", 1),
    ):
        ours = backbone(vectors[images])[-1][..., ::step, ::step]
        expected = vectors[tokens].mean(dim=3).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.real
def test_galileo_fixed_tables_are_those_of_the_file(
    nano: tuple[Path, dict[str, Tensor]],
) -> None:
    random = load_backbone("galileo_nano", weights=None).model
    real = load_backbone("galileo_nano", weights=nano[0]).model
    torch.testing.assert_close(random.pos_embed, real.pos_embed, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        random.month_embed.weight, real.month_embed.weight, atol=1e-6, rtol=0
    )
    assert not torch.equal(random.s_t_channel_embed, real.s_t_channel_embed)


@pytest.mark.real
def test_galileo_file_is_the_one_on_the_card(
    nano: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    card = find_card("galileo_nano")
    assert hash_of(nano[0]) == card.sha256
    state = torch.load(nano[0], weights_only=True, map_location="cpu")
    torch.save(state | {"surprise": torch.ones(1)}, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"1 unexpected \(surprise\)"):
        load_backbone("galileo_nano", weights=tmp_path)
    del state["space_time_embed.S2_SWIR.proj.bias"]
    torch.save(state, tmp_path / "encoder.pt")
    load_backbone("galileo_nano", "rgb", tmp_path)  # SWIR is not needed here
    with pytest.raises(ValueError, match=r"1 missing .*S2_SWIR\.proj\.bias"):
        load_backbone("galileo_nano", weights=tmp_path)
