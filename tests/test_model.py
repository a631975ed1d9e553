"""The model: tasks, padding, the two halves, calibration, counts, errors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from geopeft_kit.decoders import DECODERS
from geopeft_kit.model import build_model, dates_after_bands

NAMES = sorted(DECODERS)


class StubViT(nn.Module):
    """A patch embedding and nothing else: what one patch holds moves no other."""

    def __init__(self, width=32, patch=8, bands=("BLUE", "GREEN", "RED")):
        super().__init__()
        self.bands, self.adapter = bands, None
        self.channels, self.strides = [width] * 4, [patch] * 4
        self.embed = nn.Conv2d(len(bands), width, patch, patch)
        self.seen = None

    def forward(self, image, meta=None):
        self.seen = (image, meta)
        if any(n % self.strides[0] for n in image.shape[-2:]):
            raise AssertionError("the backbone was given an image it cannot cut")
        tokens = self.embed(image)
        return [tokens * k for k in (1.0, 2.0, 3.0, 4.0)]


class StubStages(nn.Module):
    """Four stages at strides 4, 8, 16, 32."""

    def __init__(self, bands=("BLUE", "GREEN", "RED")):
        super().__init__()
        self.bands, self.adapter = bands, None
        self.channels, self.strides = [8, 16, 24, 32], [4, 8, 16, 32]
        sizes = [len(bands), *self.channels]
        self.stages = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], 4 if i == 0 else 2, 4 if i == 0 else 2)
            for i in range(4)
        )

    def forward(self, image, meta=None):
        maps = []
        for stage in self.stages:
            image = stage(image).relu()
            maps.append(image)
        return maps


def small(name):
    return {} if name == "linear" else {"width": 32}


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 64), (61, 77), (3, 5)])
@pytest.mark.parametrize("kind", [StubViT, StubStages])
@pytest.mark.parametrize("name", NAMES)
def test_maps_have_the_size_of_the_image(name, kind, size):
    model = build_model(kind(), name, num_classes=3, **small(name))
    assert model(images(2, 3, *size)).shape == (2, 3, *size)
    model = build_model(kind(), name, task="regression", **small(name))
    assert model.num_classes == 1
    assert model(images(2, 3, *size)).shape == (2, 1, *size)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("kind", [StubViT, StubStages])
def test_whole_images_get_one_answer(kind, task):
    model = build_model(kind(), task=task, num_classes=5)
    assert model(images(2, 3, 61, 77)).shape == (2, 5)
    assert model.count()["decoder_trainable"] == 32 * 5 + 5
    assert model.has_linear_head


@pytest.mark.parametrize(
    ("name", "task"),
    [(name, task) for name in NAMES for task in ("segmentation", "change")]
    + [("linear", "classification")],
)
def test_two_halves_are_the_whole(name, task):
    model = build_model(StubViT(), name, task=task, **small(name)).eval()
    shape = (2, 3, 2, 61, 77) if task == "change" else (2, 3, 61, 77)
    image = images(*shape)
    maps = [m.clone() for m in model.features(image)]
    assert torch.equal(model.from_features(maps, (61, 77)), model(image))


def test_features_hold_only_what_the_decoder_reads():
    image = images(1, 3, 60, 60)
    shapes = {
        name: [tuple(m.shape) for m in build_model(StubViT(), name).features(image)]
        for name in ("linear", "unet")
    }
    assert shapes == {"linear": [(1, 32, 8, 8)], "unet": [(1, 32, 8, 8)] * 4}
    model = build_model(StubViT(), task="classification")
    assert [tuple(m.shape) for m in model.features(image)] == [(1, 32, 1, 1)]


def test_padding_does_not_touch_pixels_of_whole_patches():
    model = build_model(StubViT(), "linear").eval()
    image = images(1, 3, 61, 77)
    inside = model(image[..., :56, :72])  # 7 x 9 patches of 8
    torch.testing.assert_close(model(image)[..., :56, :72], inside)


def test_padding_repeats_the_edge():
    backbone = StubViT()
    image = images(1, 3, 3, 5)
    build_model(backbone, "linear")(image)
    seen = backbone.seen[0]
    assert seen.shape[-2:] == (8, 8)
    corner = image[..., -1:, -1:].expand(-1, -1, 6, 4)
    assert torch.equal(seen[..., 2:, 4:], corner)


def test_an_image_that_fits_is_not_copied():
    backbone, image = StubViT(), images(1, 3, 64, 64)
    build_model(backbone, "linear")(image)
    assert backbone.seen[0] is image


def test_difference_is_blind_to_the_order_of_dates():
    model = build_model(StubViT(), "linear", task="change").eval()
    pair = images(2, 3, 2, 16, 16)
    torch.testing.assert_close(model(pair), model(pair.flip(2)))
    same = pair[:, :, :1].expand(-1, -1, 2, -1, -1)
    assert all((m == 0).all() for m in model.features(same))


def test_concatenation_sees_the_order_of_dates():
    model = build_model(StubViT(), "linear", task="change", fusion="concatenate")
    pair = images(2, 3, 2, 16, 16)
    forward, backward = model.features(pair)[0], model.features(pair.flip(2))[0]
    assert forward.shape[1] == 64
    torch.testing.assert_close(forward, torch.cat(backward.chunk(2, 1)[::-1], 1))
    assert not torch.allclose(model(pair), model(pair.flip(2)))


def test_dates_of_a_pair_do_not_mix_with_other_samples():
    model = build_model(StubViT(), "linear", task="change", fusion="concatenate")
    pair = images(3, 3, 2, 16, 16)
    backbone = model.backbone
    expected = torch.cat([backbone(pair[:, :, t])[-1] for t in (0, 1)], dim=1)
    torch.testing.assert_close(model.features(pair)[0], expected)


def test_metadata_goes_with_its_date():
    backbone = StubViT()
    model = build_model(backbone, "linear", task="change")
    date = torch.arange(8.0).view(2, 2, 2)
    lonlat = torch.tensor([[10.0, 50.0], [20.0, 60.0]])
    model(images(2, 3, 2, 8, 8), {"date": date, "lonlat": lonlat})
    meta = backbone.seen[1]
    assert torch.equal(meta["date"].squeeze(1), date.view(4, 2))
    assert torch.equal(meta["lonlat"], lonlat[[0, 0, 1, 1]])


def test_torchgeo_pairs_are_turned_where_it_is_plain():
    pair = images(2, 3, 2, 8, 8)
    assert torch.equal(dates_after_bands(pair, 3), pair)
    assert torch.equal(dates_after_bands(pair.transpose(1, 2), 3), pair)
    two_bands = images(1, 2, 2, 8, 8)
    assert torch.equal(dates_after_bands(two_bands, 2), two_bands)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 8, 8\).*\(B, 3, 2, H, W\)"):
        dates_after_bands(images(2, 3, 4, 8, 8), 3)
    model = build_model(StubViT(), "linear", task="change")
    with pytest.raises(ValueError, match="two dates"):
        model(images(2, 3, 8, 8))


@pytest.mark.parametrize("name", NAMES)
def test_calibration_standardises_what_the_decoder_sees(name):
    model = build_model(StubViT(), name, **small(name))
    batches = [images(n, 3, 32, 32, seed=n) for n in (1, 2, 5)]
    assert not model.is_calibrated
    model.calibrate(model.features(image) for image in batches)
    assert model.is_calibrated
    for level, layer in enumerate(model.decoder.standardise):
        seen = torch.cat([layer(model.features(b)[level]) for b in batches])
        assert seen.mean((0, 2, 3)).abs().max() < 1e-4
        assert (seen.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_calibration_travels_with_the_state_dict():
    model = build_model(StubViT(), "linear")
    model.calibrate([model.features(images(4, 3, 16, 16))])
    other = build_model(StubViT(), "linear")
    other.load_state_dict(model.state_dict())
    assert other.is_calibrated
    image = images(1, 3, 16, 16, seed=1)
    assert torch.equal(model(image), other(image))


def test_calibration_takes_one_list_of_maps_as_one_batch():
    image = images(4, 3, 16, 16)
    one, two = (build_model(StubViT(), "unet", **small("unet")) for _ in range(2))
    maps = one.features(image)
    one.calibrate(maps)
    two.calibrate([[m[:1] for m in maps], [m[1:] for m in maps]])
    for a, b in zip(one.decoder.standardise, two.decoder.standardise, strict=True):
        torch.testing.assert_close(a.mean, b.mean)
        torch.testing.assert_close(a.std, b.std)


def test_calibration_leaves_mode_and_weights_alone():
    model = build_model(StubViT(), "linear").train()
    weights = {k: v.clone() for k, v in model.named_parameters()}
    model.calibrate(model.features(images(2, 3, 16, 16)) for _ in range(2))
    assert model.training
    assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())
    with pytest.raises(ValueError, match="this model"):
        model.calibrate([[torch.randn(2, 5, 4, 4)]])


def test_trainable_parameters_are_split_in_two():
    model = build_model(StubViT(), "linear", num_classes=4)
    backbone = 3 * 64 * 32 + 32
    decoder = 32 * 64 * 4 + 4
    assert model.count() == {
        "backbone_total": backbone,
        "backbone_trainable": backbone,
        "decoder_trainable": decoder,
    }
    model.backbone.requires_grad_(False)
    assert model.count()["backbone_trainable"] == 0
    assert model.count()["backbone_total"] == backbone
    assert sum(p.numel() for p in model.trainable_parameters()) == decoder
    assert model.parameter_groups()["backbone"] == []


@pytest.mark.parametrize("name", NAMES)
def test_one_image_is_enough_for_a_training_step(name):
    """Tiny map, batch of one: where batch normalisation gives up."""
    model = build_model(StubViT(), name, **small(name)).train()
    before = [p.clone() for p in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    loss = F.cross_entropy(model(images(1, 3, 8, 8)), torch.ones(1, 8, 8).long())
    loss.backward()
    optimiser.step()
    assert loss.isfinite()
    moved = [
        not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    ]
    assert moved[0], "the backbone learns where it is not frozen"
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_training_works_in_bfloat16(name):
    model = build_model(StubViT(), name, **small(name)).train()
    model.calibrate(model.features(images(2, 3, 16, 16)))
    image, target = images(1, 3, 16, 16), torch.ones(1, 16, 16).long()
    exact = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(image)
    F.cross_entropy(rough.float(), target).backward()
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_frozen_backbone_gets_no_graph():
    model = build_model(StubViT().requires_grad_(False), "unet", **small("unet"))
    assert not any(m.requires_grad for m in model.features(images(1, 3, 16, 16)))


def test_shapes_alone_are_enough():
    """The memory estimate runs the model without a single number."""
    for kind in (StubViT, StubStages):
        with torch.device("meta"):
            model = build_model(kind(), "upernet", **small("upernet"))
            out = model(torch.empty(2, 3, 61, 77))
        assert out.is_meta
        assert out.shape == (2, 2, 61, 77)


def test_config_rebuilds_the_model():
    model = build_model(
        StubViT(), "unet", task="change", num_classes=3, fusion="concatenate", width=32
    )
    config = json.loads(json.dumps(model.config))
    twin = build_model(StubViT(), **config)
    twin.load_state_dict(model.state_dict())
    pair = images(1, 3, 2, 16, 16)
    assert torch.equal(model(pair), twin(pair))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "segment"}, r"'segment'.*segmentation, regression"),
        ({"decoder": "segformer"}, r"'segformer'.*linear, fcn, unet, upernet"),
        ({"num_classes": 1}, r"num_classes=1.*at least 2.*background"),
        ({"task": "change", "num_classes": 1}, "at least 2"),
        ({"task": "multilabel", "num_classes": 0}, "at least 1"),
        ({"task": "classification", "decoder": "unet"}, r"one answer per image"),
        ({"task": "change", "fusion": "sum"}, r"'sum'.*difference, concatenate"),
        ({"fusion": "difference"}, r"Only task='change'"),
    ],
)
def test_what_cannot_be_built_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(StubViT(), **arguments)


def test_unknown_options_are_refused_for_whole_images_too():
    with pytest.raises(TypeError, match=r"'width'.*dropout"):
        build_model(StubViT(), task="classification", width=64)


def test_wrong_images_are_explained():
    model = build_model(StubViT(), "linear")
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*image\[None\]"):
        model(images(3, 8, 8))
    with pytest.raises(ValueError, match="at least 1"):
        model(images(1, 3, 0, 8))
    with pytest.raises(TypeError, match="ndarray"):
        model.features(images(1, 3, 8, 8).numpy())
    with pytest.raises(ValueError, match=r"size=\(H, W\)"):
        model.from_features(model.features(images(1, 3, 8, 8)))


def test_maps_that_changed_after_building_are_explained():
    backbone = StubViT()
    model = build_model(backbone, "unet", **small("unet"))
    backbone.forward = lambda image, meta=None: StubStages()(image)
    with pytest.raises(ValueError, match="attached after build_model"):
        model(images(1, 3, 64, 64))


@pytest.mark.parametrize(
    "timm_name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"]
)
@pytest.mark.parametrize("name", NAMES)
def test_real_networks_of_odd_size(timm_name, name):
    import geopeft_kit as gk

    backbone = gk.load_backbone(f"timm:{timm_name}", weights=None)
    model = gk.build_model(backbone, name, num_classes=3, **small(name)).eval()
    assert model(images(1, 3, 61, 77)).shape == (1, 3, 61, 77)


def test_unet_from_scratch_trains_all_its_weights():
    """The baseline without pretraining: a ResNet with random weights and a UNet."""
    import geopeft_kit as gk

    backbone = gk.load_backbone(
        "timm:resnet18", bands="hls", new_bands="random", weights=None
    )
    model = gk.build_model(backbone, "unet", width=32).train()
    counts = model.count()
    assert counts["backbone_trainable"] == counts["backbone_total"] > 11e6
    target = torch.ones(2, 64, 64).long()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    # timm starts each residual branch at zero, so all gradients show in step two only.
    for _ in range(2):
        optimiser.step()
        optimiser.zero_grad()
        F.cross_entropy(model(images(2, 6, 64, 64)), target).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
