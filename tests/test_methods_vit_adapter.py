"""ViT-Adapter: deformable attention, four scales that are all decoded, its state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from method_table import SMALL as SMALL_ROWS
from method_table import image, make, output, stir
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import geopeft_kit as gk
from geopeft_kit.decoders import build_decoder
from geopeft_kit.methods.deformable import DeformableAttention, centres
from geopeft_kit.methods.side_network import SharedTokens
from geopeft_kit.methods.vit_adapter import cut

SMALL = SMALL_ROWS["vit_adapter"]

# --- deformable attention -------------------------------------------------------------


def read(level: Tensor, x: float, y: float) -> Tensor:
    """Bilinear value (d,) of a map (d, h, w) at x, y in pixels, centres at .5."""
    total = torch.zeros(level.shape[0], dtype=level.dtype)
    left, top = int(torch.tensor(x - 0.5).floor()), int(torch.tensor(y - 0.5).floor())
    for row in (top, top + 1):
        for column in (left, left + 1):
            share = (1 - abs(x - 0.5 - column)) * (1 - abs(y - 0.5 - row))
            if 0 <= row < level.shape[1] and 0 <= column < level.shape[2]:
                total = total + share * level[:, row, column]
    return total


def by_loops(attention, queries, places, values, sizes):
    """Equation 3 written out: query by query, head by head, point by point."""
    heads, levels, points = attention.shape
    batch, count, _ = queries.shape
    offsets = attention.offsets(queries).view(batch, count, heads, levels, points, 2)
    weights = attention.weights(queries).view(batch, count, heads, -1).softmax(-1)
    weights = weights.view(batch, count, heads, levels, points)
    inner = attention.value(values).view(batch, values.shape[1], heads, -1)
    mixed = torch.zeros(batch, count, heads, inner.shape[-1])
    for b in range(batch):
        for q in range(count):
            for h in range(heads):
                start = 0
                for n, (rows, columns) in enumerate(sizes):
                    cells = inner[b, start : start + rows * columns, h]
                    level = cells.T.view(-1, rows, columns)
                    start += rows * columns
                    for k in range(points):
                        dx, dy = offsets[b, q, h, n, k].tolist()
                        x = places[q, 0].item() * columns + dx
                        y = places[q, 1].item() * rows + dy
                        mixed[b, q, h] += weights[b, q, h, n, k] * read(level, x, y)
    return attention.out(mixed.flatten(2))


@pytest.mark.parametrize("sizes", [[(3, 5)], [(4, 6), (2, 3), (1, 2)]])
@torch.no_grad()
def test_deformable_attention_equals_the_formula_written_as_loops(sizes) -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(8, len(sizes), heads=2, points=3, inner=4)
    for parameter in attention.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.5)
    queries = torch.randn(2, 7, 8)
    places = torch.rand(7, 2)
    values = torch.randn(2, sum(h * w for h, w in sizes), 8)
    fast = attention(queries, places, values, sizes)
    slow = by_loops(attention, queries, places, values, sizes)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_points_start_as_a_ring_with_equal_weights() -> None:
    attention = DeformableAttention(8, levels=2, heads=4, points=3, inner=4)
    start = attention.offsets.bias.view(4, 2, 3, 2)
    torch.testing.assert_close(start[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    torch.testing.assert_close(start[1, 1, 0], torch.tensor([0.0, 1.0]))
    assert (start.abs().amax(-1) == torch.arange(1.0, 4)).all()
    assert not attention.weights.bias.any()


def test_centres_are_x_then_y_and_row_by_row() -> None:
    expected = torch.tensor([[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]])
    assert torch.equal(centres([(1, 2), (2, 1)], torch.device("cpu")), expected)


# --- the maps -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fused", "split"])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_four_strides_and_channels_at_any_size(
    kind: str, size: tuple[int, int]
) -> None:
    backbone = make(kind)
    width, own = backbone.width, backbone.strides
    adapter = gk.attach(backbone, "vit_adapter", **SMALL)
    assert backbone.strides == [4, 8, 16, 32]
    assert backbone.channels == [width] * 4
    for batch in (1, 3):
        maps = backbone(torch.rand(batch, len(backbone.bands), *size))
        wanted = [(batch, width, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
        assert [tuple(m.shape) for m in maps] == wanted
    with pytest.raises(ValueError, match="multiples of 32"):
        backbone(torch.rand(1, len(backbone.bands), 48, 64))
    adapter.deactivate()
    assert backbone.strides == own
    assert gk.build_model(backbone, "linear").decoder.reads == (3,)


@pytest.mark.parametrize("kind", ["fused", "split"])
def test_injectors_leave_the_tokens_alone_at_the_start(kind: str) -> None:
    backbone = make(kind)
    picture = torch.rand(2, len(backbone.bands), 64, 64)
    seen: list[Tensor] = []

    def tokens() -> list[Tensor]:
        seen.clear()
        hooks = [
            block.register_forward_hook(lambda _, i, o: seen.append(o))
            for _, block in backbone.blocks
        ]
        with torch.no_grad():
            backbone(picture)
        for hook in hooks:
            hook.remove()
        return list(seen)

    plain = tokens()
    adapter = gk.attach(backbone, "vit_adapter", **SMALL)
    assert not adapter.identity_at_start
    for before, after in zip(plain, tokens(), strict=True):
        assert torch.equal(before, after)
    gammas = [p for n, p in adapter.named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 4
    for gamma in gammas:
        gamma.data.fill_(0.1)
    prefix = backbone.num_prefix_tokens
    first = tokens()[0]
    assert not torch.allclose(plain[0][:, prefix:], first[:, prefix:])


def test_prefix_tokens_are_not_touched_by_an_injector() -> None:
    backbone = make("fused")
    gk.attach(backbone, "vit_adapter", **SMALL)
    block = backbone.blocks[0][1]
    block.injector.gamma.data.fill_(1.0)
    backbone(image(backbone))
    tokens = torch.randn(2, 1 + 64, backbone.width)
    spatial, sizes = block.shared.spatial[0], block.shared.sizes
    read = block.injector(tokens, spatial, sizes)
    assert torch.equal(read[:, :1], tokens[:, :1])
    assert (read[:, 1:] != tokens[:, 1:]).any(2).all()


def test_all_bands_of_the_image_reach_the_prior() -> None:
    backbone = gk.load_backbone(
        "geopeft_tiny_rgb", weights=None, bands="hls", new_bands="ignore"
    )
    gk.attach(backbone, "vit_adapter", **SMALL)
    picture = torch.rand(1, 6, 64, 64, requires_grad=True)
    backbone(picture)[3].square().sum().backward()
    assert (picture.grad.abs().sum((0, 2, 3)) > 0).all()


# --- decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["linear", "fcn", "unet", "upernet"])
def test_every_decoder_uses_all_four_maps_and_trains(decoder: str) -> None:
    torch.manual_seed(0)
    backbone = make("fused")
    adapter = gk.attach(backbone, "vit_adapter", **SMALL)
    options = {} if decoder == "linear" else {"width": 32}
    model = gk.build_model(backbone, decoder, num_classes=3, **options).train()
    assert model.decoder.reads == (0, 1, 2, 3)
    picture = torch.rand(2, 6, 61, 70)
    maps = [m.detach().requires_grad_() for m in model.features(picture)]
    assert [m.shape[2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    logits = model.from_features(maps, (61, 70))
    assert logits.shape == (2, 3, 61, 70)
    logits.square().sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)

    target = torch.randint(3, (2, 61, 70))
    optimiser = torch.optim.AdamW(model.trainable_parameters(), 1e-3)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(picture), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[n], p) for n, p in adapter.named_parameters())


def test_no_pyramid_is_built_over_four_real_scales() -> None:
    backbone = make("fused")
    plain = gk.build_model(backbone, "unet", width=32)
    gk.attach(backbone, "vit_adapter", **SMALL)
    model = gk.build_model(backbone, "unet", width=32)
    assert sum(p.numel() for p in plain.decoder.neck.parameters()) > 0
    assert sum(p.numel() for p in model.decoder.neck.parameters()) == 0


def test_counts_of_decoders_that_read_all_scales() -> None:
    backbone = make("fused")
    gk.attach(backbone, "vit_adapter", **SMALL)
    linear = gk.build_model(backbone, "linear", num_classes=3)
    assert linear.config["all_scales"] is True
    count = 192 * 3 * (4**2 + 8**2 + 16**2 + 32**2) + 3
    assert linear.count()["decoder_trainable"] == count
    last = gk.build_model(backbone, "linear", num_classes=3, all_scales=False)
    assert last.count()["decoder_trainable"] == 192 * 3 * 32**2 + 3
    whole = gk.build_model(backbone, task="classification", num_classes=5)
    assert whole.count()["decoder_trainable"] == 4 * 192 * 5 + 5
    assert whole(torch.rand(2, 6, 40, 40)).shape == (2, 5)
    change = gk.build_model(backbone, "linear", task="change", fusion="concatenate")
    assert change(torch.rand(2, 6, 2, 32, 32)).shape == (2, 2, 32, 32)


@pytest.mark.parametrize("name", ["linear", "fcn"])
@pytest.mark.parametrize(
    ("channels", "strides"),
    [([8, 16, 24, 32], [4, 8, 16, 32]), ([16] * 4, [8] * 4)],
)
def test_all_scales_of_other_backbones_can_be_read_too(name, channels, strides) -> None:
    options = {} if name == "linear" else {"width": 16}
    decoder = build_decoder(name, channels, strides, 2, all_scales=True, **options)
    maps = [
        torch.randn(1, c, 64 // s, 32 // s, requires_grad=True)
        for c, s in zip(channels, strides, strict=True)
    ]
    logits = decoder(maps, (64, 32))
    assert logits.shape == (1, 2, 64, 32)
    logits.square().sum().backward()
    assert all(m.grad.any() for m in maps)
    assert all(p.grad.any() for p in decoder.parameters())


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_model_built_for_other_maps_says_so(task: str) -> None:
    backbone = make("fused")
    picture = torch.rand(1, 6, 64, 64)
    before = gk.build_model(backbone, task=task)
    adapter = gk.attach(backbone, "vit_adapter", **SMALL)
    with pytest.raises(ValueError, match=r"\[8, 8, 8, 8\].*now.*\[4, 8, 16, 32\]"):
        before(picture)
    after = gk.build_model(backbone, task=task)
    after(picture)
    adapter.deactivate()
    before(picture)
    with pytest.raises(ValueError, match=r"deactivated or detached.*build_model"):
        after(picture)
    adapter.activate()
    after(picture)


# --- counts and options ---------------------------------------------------------------


def formula(
    width: int,
    dim: int,
    bands: int,
    n: int,
    heads: int,
    points: int,
    v: float,
    f: float,
) -> int:
    """The card's count formula."""

    def attention(levels: int) -> float:
        own = 3 * heads * levels * points * (dim + 1)
        return 2 * v * dim**2 + (v + 1) * dim + own

    prior = 252 * width**2 + (11 * dim + 9 * bands + 26) * width
    network = 2 * f * dim**2 + 11 * f * dim
    return int(
        prior
        + 4 * dim**2
        + 16 * dim
        + n * (attention(3) + 5 * dim)
        + (n + 2) * (attention(1) + 7 * dim + network)
    )


@pytest.mark.parametrize(
    ("size", "dim", "heads", "count"),
    [("base", 768, 12, 13_680_608), ("large", 1024, 16, 23_236_800)],
)
def test_counts_of_real_sizes(size: str, dim: int, heads: int, count: int) -> None:
    with torch.device("meta"):
        backbone = gk.load_backbone(f"timm:vit_{size}_patch16_224", weights=None)
    adapter = gk.attach(backbone, "vit_adapter")
    assert adapter.config["heads"] == heads
    assert adapter.num_parameters == formula(64, dim, 3, 4, heads, 4, 0.5, 0.25)
    assert adapter.num_parameters == count
    assert all(p.is_meta for p in adapter.parameters())
    maps = backbone(torch.zeros(2, 3, 64, 32, device="meta"))
    assert [m.shape[2:] for m in maps] == [(16, 8), (8, 4), (4, 2), (2, 1)]


def test_options_reach_the_network() -> None:
    backbone = make("fused")
    options = {"points": 2, "value_ratio": 1.0, "network_ratio": 0.5}
    adapter = gk.attach(
        backbone, "vit_adapter", interactions=3, **SMALL, **options, layers="last:4"
    )
    assert adapter.num_parameters == formula(16, 192, 6, 3, 2, 2, 1.0, 0.5)
    paths = {n.split(".inj")[0] for n, _ in adapter.named_parameters() if ".inj" in n}
    assert paths == {"blocks.2", "blocks.4", "blocks.5"}


def test_groups_end_where_maps_are_taken() -> None:
    for depth in (4, 6, 12, 24, 32):
        ends = [group[-1] for group in cut(depth, 4)]
        assert tuple(ends) == gk.backbones.base.tap_points(depth)
        assert [i for group in cut(depth, 4) for i in group] == list(range(depth))


def test_patches_that_do_not_divide_32_are_refused() -> None:
    with torch.device("meta"):
        backbone = gk.load_backbone("prithvi_eo_v2_600", weights=None)
    with pytest.raises(ValueError, match="patches of 14 px do not divide"):
        gk.attach(backbone, "vit_adapter")


# --- state ----------------------------------------------------------------------------


def recompute_blocks(backbone) -> None:
    for _, block in backbone.blocks:
        block.forward = (
            lambda forward: (
                lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)
            )
        )(block.forward)


def test_recomputed_blocks_of_an_earlier_pass_are_refused() -> None:
    backbone = make("fused")
    adapter = gk.attach(backbone, "vit_adapter", **SMALL)
    stir(adapter)
    recompute_blocks(backbone)
    first = backbone(image(backbone, 1))
    backbone(image(backbone, 2))
    with pytest.raises(RuntimeError, match="backward before the next forward"):
        sum(m.square().mean() for m in first).backward()


def test_two_passes_without_recomputing_may_share_a_backward() -> None:
    backbone = make("fused")
    adapter = gk.attach(backbone, "vit_adapter", **SMALL)
    stir(adapter)
    alone = []
    for seed in (1, 2):
        sum(m.square().mean() for m in backbone(image(backbone, seed))).backward()
    alone = [p.grad.clone() for p in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    passes = [backbone(image(backbone, seed)) for seed in (1, 2)]
    sum(m.square().mean() for maps in passes for m in maps).backward()
    for parameter, grad in zip(adapter.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


def test_a_block_alone_says_what_it_needs() -> None:
    backbone = make("fused")
    gk.attach(backbone, "vit_adapter", **SMALL)
    with pytest.raises(RuntimeError, match=r"Call backbone\(image\)"):
        backbone.blocks[0][1](torch.randn(1, 65, 192))
    output(backbone)  # without gradients nothing is kept behind
    with pytest.raises(RuntimeError, match=r"Call backbone\(image\)"):
        backbone.blocks[0][1](torch.randn(1, 65, 192))


def test_copies_share_empty_tokens_of_their_own() -> None:
    backbone = make("fused")
    gk.attach(backbone, "vit_adapter", **SMALL)
    expected = output(backbone)
    backbone(image(backbone))  # with gradients: the tokens are kept
    twin = copy.deepcopy(backbone)
    shared = twin.select.shared
    assert shared is twin.refine.shared is twin.blocks[0][1].shared
    assert shared is not backbone.select.shared
    assert shared.spatial == {}
    assert backbone.select.shared.spatial
    assert torch.equal(output(twin), expected)
    assert pickle.loads(pickle.dumps(SharedTokens())).spatial == {}
