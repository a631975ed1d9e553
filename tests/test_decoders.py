"""Decoders: shapes, counts, gradients, standardisation, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from geopeft_kit.decoders import DECODERS, ClassificationDecoder, build_decoder
from geopeft_kit.decoders.neck import (
    Pyramid,
    Standardise,
    channel_statistics,
    group_norm,
    pad_to_multiple,
)
from geopeft_kit.decoders.plain import PatchTranspose2d

NAMES = sorted(DECODERS)
# Channels and strides of a plain ViT with patch 8, and of a network with four stages.
LAYOUTS = {
    "vit": ([32] * 4, [8] * 4),
    "stages": ([8, 16, 24, 32], [4, 8, 16, 32]),
}
SMALL = {"linear": {}, "fcn": {"width": 32}, "unet": {"width": 64}}
SMALL["upernet"] = {"width": 32}


def make(name, layout="vit", outputs=3, **options):
    channels, strides = LAYOUTS[layout]
    return build_decoder(name, channels, strides, outputs, **(SMALL[name] | options))


def make_maps(decoder, size, batch=2):
    grid = [-(-n // decoder.multiple) * decoder.multiple for n in size]
    return [
        torch.randn(batch, c, grid[0] // s, grid[1] // s)
        for c, s in zip(decoder.channels, decoder.strides, strict=True)
    ]


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", [(64, 64), (61, 77), (7, 5)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_size_of_the_image(name, layout, size):
    decoder = make(name, layout)
    assert decoder(make_maps(decoder, size), size).shape == (2, 3, *size)


@pytest.mark.parametrize("stride", [1, 2, 4, 14, 16])
@pytest.mark.parametrize("name", NAMES)
def test_any_patch_size_is_served(name, stride):
    decoder = build_decoder(name, [32] * 4, [stride] * 4, 2, **SMALL[name])
    size = (3 * stride, 5 * stride)
    assert decoder(make_maps(decoder, size), size).shape == (2, 2, *size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient_from_one_image(name, layout):
    decoder = make(name, layout).train()
    maps = make_maps(decoder, (48, 48), batch=1)
    F.cross_entropy(decoder(maps, (48, 48)), torch.ones(1, 48, 48).long()).backward()
    silent = [
        name
        for name, p in decoder.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert silent == []


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_decoded_alike_alone_and_in_a_batch(name):
    """Would fail with batch normalisation, in training mode or out of step with it."""
    decoder = make(name).train()
    maps = make_maps(decoder, (32, 32), batch=3)
    together = decoder(maps, (32, 32))
    alone = decoder([m[1:2] for m in maps], (32, 32))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together, decoder.eval()(maps, (32, 32)))


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_not_written_to(name):
    decoder = make(name)
    maps = make_maps(decoder, (32, 32))
    before = [m.clone() for m in maps]
    kept = list(maps)
    decoder(maps, (32, 32)).sum().backward()
    assert all(a is b for a, b in zip(maps, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


@pytest.mark.parametrize(
    ("width", "stride", "classes", "expected"),
    [
        (192, 16, 2, 98_306),
        (768, 16, 2, 393_218),
        (1024, 16, 2, 524_290),
        (1280, 14, 2, 501_762),
        (768, 8, 5, 768 * 64 * 5 + 5),
    ],
)
def test_linear_trains_as_many_weights_as_published(width, stride, classes, expected):
    with torch.device("meta"):
        decoder = build_decoder("linear", [width] * 4, [stride] * 4, classes)
    assert count(decoder) == expected


def test_counts_agree_with_the_published_decoders():
    """Neck, UNet and FCN have the counts of the study's TerraTorch decoders."""
    with torch.device("meta"):
        unet = build_decoder("unet", [1024] * 4, [16] * 4, 2, width=512)
        fcn = build_decoder("fcn", [1024] * 4, [16] * 4, 2, width=512, steps=4)
        small = build_decoder("unet", [768] * 4, [16] * 4, 3)
    assert round(count(unet.neck) / 1e6, 2) == 4.72
    assert round((count(unet) - count(unet.neck)) / 1e6, 2) == 15.60
    assert round(count(fcn) / 1e6, 2) == 14.69
    assert round(count(small) / 1e6, 2) == 7.92


def test_linear_paints_each_token_into_its_own_patch_only():
    decoder = make("linear")
    maps = make_maps(decoder, (32, 32), batch=1)
    changed = [maps[0].clone()]
    changed[0][..., 1, 2] += 1.0
    difference = decoder(changed, (32, 32)) - decoder(maps, (32, 32))
    touched = difference.abs().sum(dim=(0, 1)) > 0
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[8:16, 16:24] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_painter_is_a_transposed_convolution(autocast):
    """In training too, where it takes another kernel."""
    torch.manual_seed(0)
    ours, maps = PatchTranspose2d(6, 3, 4, 4), torch.randn(2, 6, 3, 5)
    plain = nn.ConvTranspose2d(6, 3, 4, 4)
    plain.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ones, others = ours(maps), plain(maps)
        assert torch.equal(ours.eval()(maps), others)
    torch.testing.assert_close(ones, others)
    ones.square().sum().backward()
    others.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_pyramid_scales_and_channels():
    neck = Pyramid([32] * 4, stride=16)
    out = neck([torch.randn(2, 32, 4, 6)] * 4)
    assert [m.shape[1] for m in out] == neck.channels == [8, 16, 32, 32]
    assert [tuple(m.shape[2:]) for m in out] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_pyramid_makes_odd_maps_even_without_inventing_values():
    neck = Pyramid([32] * 4, stride=16)
    odd = torch.randn(1, 32, 3, 5)
    third = neck([odd] * 4)[2]
    assert third.shape[-2:] == (4, 6)
    assert torch.equal(third[..., :3, :5], odd)
    assert torch.equal(third[..., 3, :5], odd[..., 2, :])


def test_stages_pass_the_neck_unchanged():
    assert count(make("unet", "stages").neck) == 0


@pytest.mark.parametrize("channels", [1, 2, 7, 20, 48, 96, 256])
def test_group_norm_divides_every_width(channels):
    layer = group_norm(channels)
    assert channels % layer.num_groups == 0
    assert channels < 32 or channels // layer.num_groups >= 16


def test_no_batch_norm_is_left_in_library_bodies():
    for name in ("unet", "upernet"):
        kinds = [type(m) for m in make(name).modules()]
        assert nn.GroupNorm in kinds
        assert not any(issubclass(k, nn.modules.batchnorm._BatchNorm) for k in kinds)


def test_dropout_acts_in_training_only():
    for name in NAMES:
        decoder = make(name, dropout=0.5)
        maps = make_maps(decoder, (32, 32))
        a, b = decoder.train()(maps, (32, 32)), decoder(maps, (32, 32))
        assert not torch.equal(a, b)
        a, b = decoder.eval()(maps, (32, 32)), decoder(maps, (32, 32))
        assert torch.equal(a, b)


def test_standardised_features_have_mean_zero_and_spread_one():
    batches = [[torch.randn(n, 5, 4, 4) * 0.15 + 7.0] for n in (4, 1, 9)]
    layer = Standardise(5)
    layer.set_statistics(*channel_statistics(batches)[0])
    out = torch.cat([layer(b[0]) for b in batches])
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    spread = out.std((0, 2, 3), correction=0)
    torch.testing.assert_close(spread, torch.ones(5), atol=1e-4, rtol=0)


def test_statistics_do_not_depend_on_how_batches_are_cut():
    """A mean of batch means would differ here: the batches have unequal sizes."""
    whole = torch.randn(10, 3, 2, 2) + torch.arange(10.0).view(-1, 1, 1, 1)
    cut = channel_statistics([[whole[:1]], [whole[1:4]], [whole[4:]]])[0]
    mean, std = whole.double().mean((0, 2, 3)), whole.double().std((0, 2, 3), False)
    torch.testing.assert_close(cut[0], mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cut[1], std, atol=1e-5, rtol=1e-5)


def test_standardise_is_the_identity_until_calibrated():
    features = torch.randn(2, 4, 3, 3)
    assert torch.equal(Standardise(4)(features), features)


def test_a_constant_channel_is_not_blown_up():
    features = torch.randn(2, 2, 4, 4)
    features[:, 1] = 1234.5678
    layer = Standardise(2)
    layer.set_statistics(*channel_statistics([[features]])[0])
    assert layer(features)[:, 1].abs().max() < 1e-3
    assert layer.std[1] == 1.0


def test_half_precision_features_are_standardised_in_full_precision():
    assert Standardise(4)(torch.randn(1, 4, 2, 2).half()).dtype == torch.float32


def test_statistics_refuse_nan_and_nothing():
    layer = Standardise(1)
    with pytest.raises(ValueError, match="NaN"):
        layer.set_statistics(
            *channel_statistics([[torch.full((1, 1, 2, 2), torch.nan)]])[0]
        )
    assert not layer.calibrated
    with pytest.raises(ValueError, match="no batch"):
        channel_statistics([])


def test_padding_repeats_the_edge_even_for_tiny_images():
    image = torch.arange(6.0).view(1, 1, 2, 3)
    padded = pad_to_multiple(image, 8)
    assert padded.shape == (1, 1, 8, 8)
    assert torch.equal(padded[..., :2, :3], image)
    assert (padded[0, 0, 1:, 2:] == 5.0).all()
    assert pad_to_multiple(padded, 8) is padded


@pytest.mark.parametrize("name", NAMES)
def test_wrong_maps_are_refused_with_both_shapes(name):
    decoder = make(name)
    maps = make_maps(decoder, (32, 32))
    with pytest.raises(ValueError, match=r"32x40.*build_model") as caught:
        decoder(maps, (32, 40))
    assert "(32, 4, 5)" in str(caught.value)
    assert "(32, 4, 4)" in str(caught.value)
    with pytest.raises(ValueError, match="reads maps"):
        decoder([m[:, :16] for m in maps], (32, 32))
    with pytest.raises(ValueError, match="reads maps"):
        decoder(maps[1:], (32, 32))


def test_classification_refuses_maps_that_are_not_averaged():
    head = ClassificationDecoder([8] * 4, [4] * 4, 3)
    assert head([torch.randn(2, 8, 1, 1)]).shape == (2, 3)
    with pytest.raises(ValueError, match="averaged"):
        head([torch.randn(2, 8, 4, 4)])


def test_unknown_names_and_options_list_the_known():
    with pytest.raises(ValueError, match=r"'segformer'.*linear, fcn, unet, upernet"):
        build_decoder("segformer", [8] * 4, [8] * 4, 2)
    with pytest.raises(TypeError, match=r"'width'.*dropout"):
        build_decoder("linear", [8] * 4, [8] * 4, 2, width=64)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_answer_is_near_no_answer(name):
    torch.manual_seed(0)
    decoder = make(name, outputs=5)
    maps = make_maps(decoder, (32, 32), batch=4)
    logits = decoder(maps, (32, 32))
    assert logits.std() < 1.0
    assert F.cross_entropy(logits, torch.randint(5, (4, 32, 32))) < math.log(5) + 0.3


@pytest.mark.parametrize("width", [32, 64, 256])
def test_a_narrow_unet_leaves_its_first_answer_in_few_steps(width):
    """At the default rate; a quarter of the pixels are of the second class."""
    decoder, maps, target = toy("unet", width=width)
    _, guess = train(decoder, maps, target, rate=1e-3)
    assert (guess == target).float().mean() > 0.95  # always "first class": 0.75


def toy(name, **options):
    """Which quarter of the patch grid is bright?"""
    torch.manual_seed(0)
    decoder = make(name, outputs=2, **options).train()
    maps = [torch.randn(4, 32, 4, 4) * 0.1 for _ in decoder.reads]
    target = torch.zeros(4, 32, 32, dtype=torch.long)
    for i in range(4):
        top, left = 2 * (i // 2), 2 * (i % 2)
        for m in maps:
            m[i, :, top : top + 2, left : left + 2] += 1.0
        target[i, 8 * top : 8 * top + 16, 8 * left : 8 * left + 16] = 1
    return decoder, maps, target


def train(decoder, maps, target, rate):
    """The loss of the last of 60 steps, and the guesses after it."""
    optimiser = torch.optim.Adam(decoder.parameters(), rate)
    for _ in range(60):
        loss = F.cross_entropy(decoder(maps, (32, 32)), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss, decoder(maps, (32, 32)).argmax(1)


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_a_toy_problem(name):
    """Every decoder can learn that."""
    decoder, maps, target = toy(name)
    loss, guess = train(decoder, maps, target, rate=1e-2)
    assert loss < 0.25
    assert (guess == target).float().mean() > 0.9  # three quarters come free
