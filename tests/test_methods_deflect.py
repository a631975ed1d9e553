"""DEFLECT-style: two streams, one attention map, a bounded deflection; and indices."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.bands import SENSORS
from geopeft_kit.indices import available_indices, index_bands, spectral_indices
from geopeft_kit.methods import Adapter
from geopeft_kit.methods.two_streams import (
    Deflection,
    PixelSetEmbedding,
    UntangledBlock,
    add_bounded,
    match_norm,
    rotate,
    shared_attention,
)

FORMS = ("additive", "polar")
LADDER = [
    ("embedding", "additive"),
    ("attention", "additive"),
    *itertools.product(("unbounded", "bounded"), FORMS),
]
EMBEDDING = [f"select.{m}.{k}" for m in ("pixel", "token") for k in ("weight", "bias")]


def make(bands="hls", new_bands="ignore", **options) -> Backbone:
    torch.manual_seed(0)
    rgb = {"weights": None, "image_size": 16, "new_bands": new_bands}
    return gk.load_backbone("geopeft_tiny_rgb", bands=bands, **rgb, **options)


def image(backbone: Backbone, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 2 * max(backbone.strides)
    return torch.rand(batch, len(backbone.bands), size, size, generator=generator)


def flat(maps: list[Tensor]) -> Tensor:
    return torch.cat([m.flatten() for m in maps])


def stir(adapter: Adapter, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_((scale * noise).to(parameter.dtype))


def angle(a: Tensor, b: Tensor) -> Tensor:
    a, b = (nn.functional.normalize(x.double(), dim=-1) for x in (a, b))
    return 2 * torch.asin((a - b).norm(dim=-1) / 2)


@pytest.fixture
def block() -> Block:
    """A block with everything that timm may put into one."""
    torch.manual_seed(0)
    made = Block(
        32, 4, qkv_bias=True, qk_norm=True, scale_attn_norm=True, init_values=0.5,
        drop_path=0.3, attn_drop=0.0,
    )  # fmt: skip
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return made.eval()


# --- indices ------------------------------------------------------------------------


def test_indices_of_known_reflectance() -> None:
    bands = ("GREEN", "RED", "NIR_BROAD", "SWIR_1", "SWIR_2")
    pixel = torch.tensor([0.1, 0.05, 0.4, 0.2, 0.1]).view(1, 5, 1, 1)
    names = ("NDVI", "NDWI", "MNDWI", "NDMI", "NBR")
    found = spectral_indices(pixel, bands, names).flatten()
    expected = torch.tensor([0.35 / 0.45, -0.3 / 0.5, -0.1 / 0.3, 0.2 / 0.6, 0.3 / 0.5])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_indices_stay_finite_and_within_one() -> None:
    values = torch.tensor([-0.3, -0.01, 0.0, 1e-9, 0.2, 1.0])
    pairs = torch.cartesian_prod(values, values).T.reshape(1, 2, 6, 6)
    ndvi = spectral_indices(pairs, ("NIR_BROAD", "RED"), ("NDVI",))
    assert torch.isfinite(ndvi).all()
    assert ndvi.abs().max() <= 1
    sign = torch.sign(pairs[:, 0] - pairs[:, 1])
    assert torch.equal(torch.sign(ndvi[:, 0]), sign)  # darker never counts as brighter


def test_indices_take_the_bands_that_are_there() -> None:
    assert index_bands("NDVI", "sentinel2_l1c") == ("NIR_BROAD", "RED")
    assert index_bands("NDVI", "hls") == ("NIR_NARROW", "RED")
    assert available_indices("rgb") == ()
    assert available_indices("rgbn") == ("NDVI", "NDWI")
    with pytest.raises(ValueError, match=r"NBR needs SWIR_2.*Available are NDVI, NDWI"):
        index_bands("NBR", "rgbn")
    with pytest.raises(ValueError, match="no index 'EVI'; there are NDVI"):
        index_bands("EVI", "hls")


def test_the_method_computes_indices_from_reflectance() -> None:
    backbone = make("hls")
    adapter = gk.attach(backbone, "deflect")
    assert adapter.config["indices"] == ["NDVI", "NDWI", "NDMI", "NBR"]
    x = image(backbone)
    features = backbone.select.describe(backbone.normalised(x))
    assert torch.equal(features[:, :6], backbone.normalised(x))
    expected = spectral_indices(x, "hls", adapter.config["indices"])
    torch.testing.assert_close(features[:, 6:], expected, atol=1e-5, rtol=0)


# --- the pixel set ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_shuffling_the_pixels_of_a_patch_changes_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    embedding = PixelSetEmbedding(17, 32, 24, (8, 8))
    x = torch.randn(2, 17, 16, 24)
    order = torch.randperm(64)
    sets = x.view(2, 17, 2, 8, 3, 8).permute(0, 1, 2, 4, 3, 5).flatten(4)
    mixed = sets[..., order].unflatten(4, (8, 8)).permute(0, 1, 2, 4, 3, 5)
    mixed = mixed.reshape(x.shape)
    assert not torch.equal(mixed, x)
    tokens = embedding(x)
    assert tokens.shape == (2, 6, 24)
    torch.testing.assert_close(embedding(mixed), tokens, atol=1e-6, rtol=1e-5)
    # One pixel from the next patch is noticed, in the two patches it concerns.
    swapped = x.clone()
    swapped[:, :, 0, 0], swapped[:, :, 0, 8] = x[:, :, 0, 8], x[:, :, 0, 0]
    moved = (embedding(swapped) - tokens).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == [True, True, False, False, False, False]


def test_mean_and_biased_spread_by_hand() -> None:
    embedding = PixelSetEmbedding(3, 5, 7, (4, 2))
    x = torch.randn(1, 3, 4, 4)
    pixels = x[0, :, :, 2:].flatten(1).T  # the second patch, (8, 3)
    hidden = torch.relu(embedding.pixel(pixels))
    spread = (hidden - hidden.mean(0)).square().mean(0).sqrt()
    expected = embedding.token(torch.cat([hidden.mean(0), spread]))
    torch.testing.assert_close(embedding(x)[0, 1], expected)


def test_a_uniform_patch_has_a_finite_gradient() -> None:
    """Its spread is zero, where the slope of a square root is infinite."""
    embedding = PixelSetEmbedding(3, 5, 7, (4, 4))
    embedding(torch.ones(1, 3, 4, 4)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in embedding.parameters())


def test_auxiliary_tokens_get_the_norm_of_the_principal_ones() -> None:
    principal = torch.randn(2, 6, 16)
    auxiliary = 50 * torch.randn(2, 4, 16)
    auxiliary[0, 1] = 0
    matched = match_norm(auxiliary, principal)
    assert not matched[:, :2].any()  # class token and register
    lengths, wanted = matched[:, 2:].norm(dim=-1), principal[:, 2:].norm(dim=-1)
    wanted[0, 1] = 0
    torch.testing.assert_close(lengths, wanted)
    cosine = nn.functional.cosine_similarity(matched[1, 2:], auxiliary[1], dim=-1)
    torch.testing.assert_close(cosine, torch.ones(4))


# --- untangled attention ------------------------------------------------------------


def deflection(g: float, form="additive", limit=0.3, width=32) -> Deflection:
    return Deflection(nn.Parameter(torch.tensor(g)), width, 4, form, limit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", [False, True])
def test_the_principal_stream_is_timms_own_block(block: Block, form, last) -> None:
    principal, auxiliary = torch.randn(3, 9, 32), torch.randn(3, 9, 32)
    two = UntangledBlock(block, deflection(0.0, form), last, True)
    both = torch.cat([auxiliary, principal], 1)
    out = two(both)
    assert out.shape == (3, 9 if last else 18, 32)
    torch.testing.assert_close(out[:, -9:], block(principal), atol=1e-5, rtol=1e-5)
    two.train()  # the same samples lose their path, in both streams at once
    torch.manual_seed(5)
    expected = block(principal)
    torch.manual_seed(5)
    torch.testing.assert_close(two(both)[:, -9:], expected, atol=1e-5, rtol=1e-5)


def test_both_streams_share_the_map_of_the_principal_one(block: Block) -> None:
    attention, tokens = block.attn, torch.randn(2, 10, 32)
    auxiliary, principal = tokens.chunk(2, 1)

    def heads(x: Tensor, part: int) -> Tensor:
        x = (
            x @ attention.qkv.weight.chunk(3)[part].T
            + attention.qkv.bias.chunk(3)[part]
        )
        return x.view(2, 5, 4, 8).transpose(1, 2)

    q = attention.q_norm(heads(principal, 0))
    k = attention.k_norm(heads(principal, 1))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)
    expected = [
        attention.proj(
            attention.norm((weights @ heads(x, 2)).transpose(1, 2).flatten(2))
        )
        for x in (auxiliary, principal)
    ]
    found = shared_attention(attention, tokens)
    torch.testing.assert_close(found, torch.cat(expected, 1), atol=1e-5, rtol=1e-5)


def test_the_auxiliary_stream_may_skip_the_mlp(block: Block) -> None:
    auxiliary, principal = torch.randn(2, 1, 5, 32)
    both = torch.cat([auxiliary, principal], 1)
    seen = auxiliary + block.ls1(shared_attention(block.attn, block.norm1(both)))[:, :5]
    for passes in (False, True):
        out = UntangledBlock(block, deflection(0.1), False, passes)(both)[:, :5]
        wanted = seen + block.ls2(block.mlp(block.norm2(seen))) if passes else seen
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


# --- the deflection -----------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.9, -0.1, 0.0, 0.3])
def test_the_additive_bound_is_hard(rho: float) -> None:
    torch.manual_seed(0)
    s, e = (
        20 * torch.randn(200, 24),
        torch.randn(200, 24) * torch.logspace(-4, 4, 200)[:, None],
    )
    moved = add_bounded(s, e, rho)
    share = (moved - s).norm(dim=-1) / s.norm(dim=-1)
    torch.testing.assert_close(
        share, torch.full_like(share, abs(rho)), atol=1e-6, rtol=0
    )
    assert (torch.sin(angle(moved, s)) <= abs(rho) + 1e-6).all()
    assert torch.equal(add_bounded(s, torch.zeros_like(s), rho), s)


@pytest.mark.parametrize("theta", [-1.2, -0.1, 0.0, 0.3])
def test_the_polar_form_keeps_the_norm_and_turns_by_theta(theta: float) -> None:
    torch.manual_seed(0)
    s, e = 20 * torch.randn(200, 24), torch.randn(200, 24)
    moved = rotate(s, e, torch.tensor(theta))
    torch.testing.assert_close(moved.norm(dim=-1), s.norm(dim=-1), atol=0, rtol=1e-6)
    turned = angle(moved, s)
    torch.testing.assert_close(
        turned, torch.full_like(turned, abs(theta)), atol=1e-5, rtol=0
    )
    aside = e - (e * s).sum(-1, keepdim=True) / s.square().sum(-1, keepdim=True) * s
    assert ((((moved * aside).sum(-1)) * theta) >= 0).all()
    for nowhere in (torch.zeros_like(s), 3 * s):
        kept = rotate(s, nowhere, torch.tensor(theta)).norm(dim=-1)
        torch.testing.assert_close(kept, s.norm(dim=-1), atol=0, rtol=1e-6)


@pytest.mark.parametrize(("stage", "form"), LADDER[2:])
def test_sizes_in_the_network_obey_the_bound(stage: str, form: str) -> None:
    backbone = make()
    adapter = gk.attach(
        backbone, "deflect", stage=stage, form=form, rho_max=0.2, theta_max=0.25
    )
    stir(adapter, scale=3.0)
    sizes = []

    def measure(module: Deflection, inputs: tuple[Tensor, Tensor], out: Tensor) -> None:
        s = inputs[0]
        share = (out - s).norm(dim=-1) / s.norm(dim=-1)
        sizes.append(angle(out, s) if module.form == "polar" else share)
        if stage == "bounded":
            wanted = module.size.detach().abs().to(sizes[-1].dtype)
            assert wanted <= (0.25 if form == "polar" else 0.2)
            torch.testing.assert_close(
                sizes[-1], wanted.expand_as(sizes[-1]), atol=1e-5, rtol=0
            )

    for _, block in backbone.blocks:
        block.deflection.register_forward_hook(measure)
    with torch.no_grad():
        backbone(image(backbone))
    assert len(sizes) == 6
    if stage == "unbounded":
        assert max(float(size.max()) for size in sizes) > 0.25


# --- the method ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cross_scale_mae_base", 197_964),
        ("scalemae_large", 460_376),
        ("dino_mc_small", 99_276),
    ],
)
def test_counts_and_shapes_of_real_sizes(name: str, count: int) -> None:
    """ViT-B/16, ViT-L/16 and ViT-S/8 under 13 bands, on the meta device."""
    with torch.device("meta"):
        backbone = gk.load_backbone(
            name, weights=None, bands="sentinel2_l1c", new_bands="ignore"
        )
    adapter = gk.attach(backbone, "deflect")
    D, L, patch = backbone.width, len(backbone.blocks), backbone.strides[0]
    assert adapter.num_parameters == count
    assert count == (13 + 4 + 1) * 32 + (2 * 32 + 1) * D + L * (2 * 8 * D + 1)
    assert all(p.is_meta for p in adapter.parameters())
    x = torch.zeros(2, 13, 2 * patch, 2 * patch, device="meta")
    assert [m.shape for m in backbone(x)] == [(2, D, 2, 2)] * 4


@pytest.mark.parametrize(("stage", "form"), LADDER)
def test_each_stage_starts_at_the_frozen_network_and_trains_what_it_says(
    stage: str, form: str
) -> None:
    backbone = make()
    x, start = image(backbone), None
    with torch.no_grad():
        start = flat(backbone(x))
    adapter = gk.attach(backbone, "deflect", stage=stage, form=form)
    names = {
        "embedding": ["gate"],
        "attention": ["g"],
        "unbounded": ["g", "V", "U"],
        "bounded": ["g", "V", "U"],
    }[stage]
    found = {name.rpartition(".")[2] for name in adapter.tensors()}
    assert found == {"weight", "bias", *names}
    assert adapter.identity_at_start
    loss = sum(m.square().mean() for m in backbone(x))
    with torch.no_grad():
        torch.testing.assert_close(flat(backbone(x)), start, atol=1e-5, rtol=1e-5)
    loss.backward()
    # At g = 0 only g sees a gradient; the rest does as soon as g has moved.
    for name, parameter in adapter.named_parameters():
        scalar = name.endswith((".g", ".gate"))
        assert bool(parameter.grad.any()) is scalar, name
        parameter.grad = None
        parameter.data.add_(0.1 if scalar else 0)
    sum(m.square().mean() for m in backbone(x)).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.any(), name


def test_another_start_gives_up_the_identity_and_says_so() -> None:
    backbone = make()
    x = image(backbone)
    with torch.no_grad():
        start = flat(backbone(x))
        adapter = gk.attach(backbone, "deflect", start=0.01)
        assert not adapter.identity_at_start
        assert not torch.allclose(flat(backbone(x)), start, atol=1e-5)
    sum(m.square().mean() for m in backbone(x)).backward()
    assert all(p.grad.any() for p in adapter.parameters())


def test_the_embedding_alone_adds_the_second_tokens_once() -> None:
    backbone = make()
    adapter = gk.attach(backbone, "deflect", stage="embedding")
    dict(adapter.named_parameters())["norm_pre.gate"].data.fill_(0.7)
    seen = []
    backbone.blocks[0][1].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    x = image(backbone)
    with torch.no_grad():
        backbone(x)
        tokens = backbone.select.embedding(
            backbone.select.describe(backbone.normalised(x))
        )
        adapter.deactivate()
        backbone(x)
    difference = seen[0] - seen[1]
    assert not difference[:, 0].any()  # the class token
    wanted = 0.7 * match_norm(tokens, seen[1])
    torch.testing.assert_close(difference, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", range(3, 14))
def test_any_number_of_bands(count: int) -> None:
    rest = [b for b in SENSORS["sentinel2_l1c"] if b not in SENSORS["rgb"]]
    backbone = make((*rest[: count - 3], "RED", "BLUE", "GREEN"))
    x = image(backbone)
    with torch.no_grad():
        start = flat(backbone(x))
        adapter = gk.attach(backbone, "deflect", layers=[0, 5])
        torch.testing.assert_close(flat(backbone(x)), start, atol=1e-5, rtol=1e-5)
        indices = len(adapter.config["indices"])
        assert backbone.select.embedding.pixel.in_features == count + indices
        stir(adapter)
        here = flat(backbone(x))
        if count > 3:  # a band that the frozen network never reads
            x[:, 0] *= 0.5
            assert (flat(backbone(x)) - here).abs().max() > 1e-3
            adapter.deactivate()
            torch.testing.assert_close(flat(backbone(x)), start)


def test_a_network_that_reads_all_bands_is_served_too() -> None:
    torch.manual_seed(0)
    backbone = gk.load_backbone("geopeft_tiny", weights=None)
    x = image(backbone)
    with torch.no_grad():
        start = flat(backbone(x))
        adapter = gk.attach(backbone, "deflect")
        torch.testing.assert_close(flat(backbone(x)), start, atol=1e-5, rtol=1e-5)
        stir(adapter)
        assert not torch.allclose(flat(backbone(x)), start, atol=1e-3)
        adapter.detach()
        assert torch.equal(flat(backbone(x)), start)


def test_blocks_outside_layers_work_on_the_principal_stream_alone() -> None:
    backbone = make()
    blocks = dict(backbone.blocks)
    adapter = gk.attach(backbone, "deflect", layers=[1, 3])
    stir(adapter)
    chosen = {name.partition(".V")[0] for name in adapter.tensors() if ".V" in name}
    assert chosen == {"blocks.1", "blocks.3"}
    auxiliary, principal = torch.randn(2, 2, 5, 192)
    waiting = backbone.blocks[2][1](torch.cat([auxiliary, principal], 1))
    assert torch.equal(waiting[:, :5], auxiliary)
    assert torch.equal(waiting[:, 5:], blocks["blocks.2"](principal))
    assert backbone.blocks[3][1](torch.cat([auxiliary, principal], 1)).shape[1] == 5
    assert backbone.blocks[4][1] is blocks["blocks.4"]
    with torch.no_grad():
        assert [m.shape for m in backbone(image(backbone))] == [(2, 192, 2, 2)] * 4


def test_calls_do_not_leak_into_each_other(tmp_path) -> None:
    backbone = make()
    first = gk.attach(backbone, "deflect")
    stir(first)
    x, y = image(backbone, 2), image(backbone, 3, seed=4)
    with torch.no_grad():
        expected = flat(backbone(x))
        second = gk.attach(backbone, "deflect", form="polar", layers="last:2")
        stir(second, 0.5)
        other = flat(backbone(x))
        assert not torch.allclose(other, expected, atol=1e-3)
        first.activate()
        backbone(y)  # another batch size in between
        assert torch.equal(flat(backbone(x)), expected)
        twin = copy.deepcopy(backbone)
        stir(twin.adapter)
        assert not torch.allclose(flat(twin(x)), expected, atol=1e-3)
        assert torch.equal(flat(backbone(x)), expected)
        assert backbone.select.buffer.tokens is None  # nothing is kept
        assert twin.select.buffer is twin.model.norm_pre.buffer
        assert twin.select.buffer is not backbone.select.buffer
    folder = second.save(tmp_path / "adapter")
    fresh = make()
    gk.load_adapter(fresh, folder)
    with torch.no_grad():
        assert torch.equal(flat(fresh(x)), other)


def test_recomputing_blocks_after_another_forward_pass() -> None:
    """Two passes before one backward pass, as in change detection."""
    backbone = make()
    adapter = gk.attach(backbone, "deflect")
    stir(adapter)
    gradients = []
    for recompute in (False, True):
        if recompute:
            for _, block in backbone.blocks:
                block.forward = _recomputed(block.forward)
        one, two = (backbone(image(backbone, seed=s)) for s in (1, 2))
        sum((a - b).square().mean() for a, b in zip(one, two, strict=True)).backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-4)


def _recomputed(forward):
    return lambda tokens: checkpoint(forward, tokens, use_reentrant=False)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_starts_near_the_frozen_network(form: str) -> None:
    backbone = make().to(torch.bfloat16)
    x = image(backbone).to(torch.bfloat16)
    with torch.no_grad():
        start = flat(backbone(x)).float()
        gk.attach(backbone, "deflect", form=form)
        difference = (flat(backbone(x)).float() - start).abs().max()
    assert difference < 0.03 * start.abs().max()  # bfloat16 keeps three digits


def test_indices_need_reflectance() -> None:
    backbone = make(normalise=False)
    with pytest.raises(ValueError, match="normalise=False"):
        gk.attach(backbone, "deflect")
    adapter = gk.attach(backbone, "deflect", indices=())
    assert adapter.config["indices"] == []
    assert backbone(image(backbone))[0].shape == (2, 192, 2, 2)


def test_the_network_alone_says_that_the_image_is_missing() -> None:
    backbone = make()
    gk.attach(backbone, "deflect")
    with pytest.raises(RuntimeError, match="Call backbone"):
        backbone.forward_maps(torch.zeros(1, 3, 16, 16), None)


@pytest.mark.parametrize(
    "name", ["galileo_nano", "timm:resnet10t", "timm:vit_small_patch14_reg4_dinov2"]
)
def test_other_networks_are_refused_with_the_reason(name: str) -> None:
    (card,) = [card for card in gk.list_methods() if card.name == "deflect"]
    with torch.device("meta"):
        backbone = gk.load_backbone(name, weights=None)
    reason = card.why_not(backbone)
    if "vit" in name:
        assert reason is None
        assert gk.attach(backbone, "deflect").num_parameters > 0
    else:
        assert "VisionTransformer" in reason
