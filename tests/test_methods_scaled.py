"""Scale and shift, scaled low rank, Earth-Adapter-style: counts, parity, properties.

What every method must hold is tested over the table in test_methods.py. The numbers in
tests/vectors were made by running the authors' modules.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_table import make, output, stir
from safetensors.torch import load_file
from torch import Tensor, nn

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.backbones.base import TokenGrid
from geopeft_kit.methods.earth_adapter import FrequencyAdapter, split_frequencies
from geopeft_kit.methods.scaled_low_rank import factors, linear_form, patch_form


@pytest.fixture(scope="module")
def vectors(request: pytest.FixtureRequest) -> Any:
    return request.path.parent / "vectors"


# --- scale and shift ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fused", "split", "swin", "convnext", "resnet"])
def test_scale_and_shift_start_exactly_at_the_frozen_network(kind: str) -> None:
    backbone = make(kind)
    start = output(backbone)
    gk.attach(backbone, "ssf")
    assert torch.equal(output(backbone), start)


@pytest.mark.parametrize("kind", ["fused", "split", "swin", "convnext", "resnet"])
def test_every_layer_is_scaled_and_shifted_once(kind: str) -> None:
    """Each output channel of a Linear, convolution or norm: one scale, one shift."""
    backbone = make(kind)
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
    layers = [m for m in backbone.model.modules() if isinstance(m, kinds)]
    count = sum(
        m.weight.shape[0] * (1 if m.bias is None else 2)  # no bias: a scale only
        for m in layers
    )
    assert gk.attach(backbone, "ssf").num_parameters == count


def test_layers_without_a_bias_have_no_shift() -> None:
    backbone = make("resnet")
    names = set(gk.attach(backbone, "ssf", layers=[0]).tensors())
    assert {"layer1.0.conv1.scale", "layer1.0.bn1.shift"} <= names
    assert "layer1.0.conv1.shift" not in names


def test_layers_keep_scale_and_shift_inside_the_blocks() -> None:
    adapter = gk.attach(make("split"), "ssf", layers=[1])
    assert {name.split(".")[0] for name in adapter.tensors()} == {"blocks"}
    assert {name.split(".")[1] for name in adapter.tensors()} == {"1"}


@pytest.mark.parametrize("patch", [8, 4])
def test_patch_embeddings_of_galileo_scale_and_merge_at_any_patch_size(patch) -> None:
    """At other sizes than 8 they read the kernel without calling the convolution."""
    backbone = gk.load_backbone("galileo_nano", weights=None, patch=patch).eval()
    start = output(backbone)
    adapter = gk.attach(backbone, "ssf")
    tensors = adapter.tensors()
    with torch.no_grad():
        tensors["space_time_embed.S2_SWIR.scale"].fill_(2)
        tensors["space_time_embed.S2_RGB.shift"].fill_(0.5)
    changed = output(backbone)
    assert not torch.allclose(changed, start, atol=1e-3)
    adapter.merge()
    torch.testing.assert_close(output(backbone), changed, atol=1e-5, rtol=1e-5)


def test_statistics_of_frozen_batch_norms_stay() -> None:
    backbone = make("resnet")
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    adapter = gk.attach(backbone, "ssf")
    backbone.train()
    backbone(torch.rand(2, 3, 64, 64))
    adapter.detach()
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name]), name


# --- scaled low rank ----------------------------------------------------------------


def test_the_linear_form_equals_the_authors(vectors) -> None:
    known = json.loads((vectors / "slr_linear.json").read_text())
    state = {name: torch.tensor(values) for name, values in known["state"].items()}
    x = torch.tensor(known["x"])
    base = nn.Linear(6, 4)
    base.load_state_dict({leaf: state[f"linear.{leaf}"] for leaf in ("weight", "bias")})
    layer = linear_form(base, 2)
    start = torch.tensor(known["y_at_init_equals_linear"])
    torch.testing.assert_close(layer(x), start, atol=1e-6, rtol=1e-6)
    fill(layer, state, scale_in="in_scaler", scale_out="out_scaler")
    torch.testing.assert_close(layer(x), torch.tensor(known["y"]), atol=1e-6, rtol=1e-6)
    assert_folds(layer, x)


def test_the_patch_form_equals_the_authors(vectors) -> None:
    state = load_file(vectors / "slr_patch_embed.safetensors")
    base = nn.Conv2d(3, 4, 16, 16)
    base.load_state_dict({leaf: state[f"proj.{leaf}"] for leaf in ("weight", "bias")})
    layer = patch_form(base, 2, 3)
    fill(layer, state, scale_out="scaler")
    y = layer(state["x"])
    torch.testing.assert_close(y, state["y"], atol=1e-6, rtol=1e-5)
    assert_folds(layer, state["x"])


def fill(layer: nn.Module, state: dict[str, Tensor], **others: str) -> None:
    """Copy the authors' tensors into ours; `others` says which names differ."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base."):
                parameter.copy_(state[others.get(name, name)])


def assert_folds(layer: nn.Module, x: Tensor) -> None:
    expected = layer(x)
    with torch.no_grad():
        for tensor, values in list(layer.folded()):
            tensor.copy_(values)
    torch.testing.assert_close(layer.base(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patch", [8, 14, 6, 5])
def test_other_patch_sizes_fold_too(patch: int, bias: bool) -> None:
    layer = patch_form(nn.Conv2d(2, 5, patch, patch, bias=bias), 3, 2)
    with torch.no_grad():
        layer.scale_out.uniform_(0.5, 2)
    assert_folds(layer, torch.randn(2, 2, 2 * patch, 3 * patch))


def test_factors_are_the_closest() -> None:
    sizes = {16: (4, 4), 8: (4, 2), 14: (7, 2), 32: (8, 4), 7: (7, 1), 1: (1, 1)}
    assert {size: factors(size) for size in sizes} == sizes


@pytest.mark.parametrize("base", [nn.Linear(6, 4, False), nn.Conv2d(6, 4, 1)], ids=str)
def test_a_layer_without_bias_and_a_convolution_fold(base: nn.Module) -> None:
    layer = linear_form(base, 2)
    assert layer.down.weight.std() > 0.3
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base."):
                parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 6) if isinstance(base, nn.Linear) else torch.randn(2, 6, 3, 3)
    assert_folds(layer, x)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("fused", ["qkv", "proj", "fc1", "fc2"]),
        ("split", ["q", "k", "v", "proj", "fc1", "fc2"]),
        ("swin", ["qkv", "proj", "fc1", "fc2"]),
        ("convnext", ["fc1", "fc2"]),
    ],
)
def test_default_targets_of_scaled_low_rank(kind: str, targets: list[str]) -> None:
    assert gk.attach(make(kind), "slr", rank=1).config["targets"] == targets


def multispectral() -> Backbone:
    """An RGB network under images with six bands."""
    torch.manual_seed(0)
    backbone = gk.load_backbone(
        "geopeft_tiny_rgb", weights=None, bands="hls", new_bands="ignore"
    )
    return backbone.eval()


def test_the_patch_form_reads_the_bands_that_the_frozen_network_ignores() -> None:
    backbone = multispectral()
    image = torch.rand(1, 6, 16, 16)
    other = image.clone()
    other[:, backbone.bands.index("NIR_NARROW")] += 0.5
    assert torch.equal(backbone(image)[-1], backbone(other)[-1])

    adapter = gk.attach(backbone, "slr", rank=2, patch_embedding=True)
    assert adapter.config["all_bands"] is True
    assert not adapter.identity_at_start and not adapter.mergeable
    assert not torch.allclose(backbone(image)[-1], backbone(other)[-1], atol=1e-4)

    with torch.no_grad():  # with the way up at zero only the frozen bands are left
        for name in ("weight", "bias"):
            adapter.tensors()[f"patch_embed.proj.up.{name}"].zero_()
    adapted = backbone(image)[-1]
    adapter.deactivate()
    assert torch.equal(backbone(image)[-1], adapted)


def test_without_new_bands_the_patch_form_merges() -> None:
    backbone = multispectral()
    image = torch.rand(1, 6, 16, 16)
    options = {"patch_embedding": True, "all_bands": False}
    adapter = gk.attach(backbone, "slr", rank=2, **options)
    assert adapter.mergeable and not adapter.identity_at_start
    stir(adapter)
    expected = backbone(image)[-1]
    adapter.merge()
    torch.testing.assert_close(backbone(image)[-1], expected, atol=1e-5, rtol=1e-5)
    assert gk.attach(backbone, "slr").identity_at_start


# --- frequencies --------------------------------------------------------------------


def test_the_frequency_split_equals_the_authors(vectors) -> None:
    known = load_file(vectors / "earth_adapter_fft_split.safetensors")
    x = known["x"].unsqueeze(-1)  # (32, 32, 1)
    for ratio in (0.1, 0.3, 0.5):
        parts = dict(zip(("low", "high"), split_frequencies(x, ratio), strict=True))
        for name, part in parts.items():
            expected = known.get(f"{name} at {ratio}")
            if expected is not None:
                torch.testing.assert_close(part[..., 0], expected, atol=2e-6, rtol=0)
    assert len(known) == 4
    low, high = split_frequencies(x, 1.0)
    torch.testing.assert_close(low, x, atol=2e-6, rtol=0)
    assert high.abs().max() < 2e-6


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (14, 3), (2, 2), (1, 7)])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.6])
def test_low_and_high_sum_to_the_map(shape: tuple[int, int], ratio: float) -> None:
    x = torch.randn(2, *shape, 3)
    low, high = split_frequencies(x, ratio)
    torch.testing.assert_close(low + high, x, atol=1e-6, rtol=1e-6)
    mean = x.mean((1, 2), keepdim=True)  # the zero frequency is always low
    torch.testing.assert_close(low.mean((1, 2), keepdim=True), mean)
    if int(min(shape) * ratio / 2) == 0:
        torch.testing.assert_close(low, mean.expand_as(x))
    assert high.abs().max() > 1e-3


def test_waves_go_to_their_band() -> None:
    steps = torch.arange(16.0) * 2 * torch.pi / 16
    slow, fast = (torch.cos(k * steps).expand(16, 16)[..., None] for k in (1, 6))
    low, high = split_frequencies(slow + fast, 0.3)  # half-width 2
    torch.testing.assert_close(low, slow, atol=1e-5, rtol=0)
    torch.testing.assert_close(high, fast, atol=1e-5, rtol=0)


# --- Earth-Adapter-style ------------------------------------------------------------


def on_grid(height: int, width: int, groups: int = 1, **options: Any) -> Any:
    """An adapter behind a block that changes nothing."""
    grid = TokenGrid(height, width, groups)
    block = nn.Sequential(nn.Linear(8, 8))
    nn.init.eye_(block[0].weight)
    nn.init.zeros_(block[0].bias)
    return FrequencyAdapter(block, grid, 8, 4, **{"ratio": 0.6, **options})


def test_the_update_is_the_published_formula() -> None:
    adapter = on_grid(5, 4)
    x = torch.randn(2, 1 + 20, 8)
    low, high = split_frequencies(x[:, 1:].unflatten(1, (5, 4)), 0.6)
    bands = [x[:, 1:], low.flatten(1, 2), high.flatten(1, 2)]
    weights = F.linear(x[:, 1:], adapter.router.weight, adapter.router.bias).softmax(-1)
    delta = torch.zeros(2, 20, 8)
    for number, part in enumerate(adapter.bottlenecks.values()):
        hidden = F.linear(bands[number], part.down.weight, part.down.bias).relu()
        update = F.linear(hidden, part.up.weight, part.up.bias)
        delta += weights[..., number, None] * update
    out = adapter(x)
    torch.testing.assert_close(out[:, 1:], x[:, 1:] + 0.1 * delta, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out[:, :1], x[:, :1])


def test_the_groups_of_a_patch_are_adapted_apart() -> None:
    adapter = on_grid(3, 5, groups=2)
    tokens = torch.randn(2, 30, 8)
    other = tokens.clone().unflatten(1, (15, 2))
    other[:, :, 1] += torch.randn(2, 15, 8)
    first = adapter(tokens).unflatten(1, (15, 2))[:, :, 0]
    second = adapter(other.flatten(1, 2)).unflatten(1, (15, 2))[:, :, 0]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("ratio", "expected"), [(None, 0.0465), (0.3, 0.0283)])
def test_the_first_update_is_as_large_as_the_authors(ratio, expected) -> None:
    """Their summary: ViT-L width, bottleneck of 2; two hidden units scatter a lot."""
    torch.manual_seed(0)
    grid = TokenGrid(16, 16)
    sizes = []
    for _ in range(8):
        adapter = FrequencyAdapter(nn.Linear(1, 1), grid, 1024, 2, ratio)
        with torch.no_grad():
            delta = adapter.scale * adapter.delta(torch.randn(1, 16, 16, 1024))
        sizes.append(delta.std())
    assert abs(torch.stack(sizes).mean() / expected - 1) < 0.1


def test_only_the_chosen_blocks_have_bands() -> None:
    backbone = make("fused")
    adapter = gk.attach(backbone, "earth_adapter", width=2, layers=[1, 3, 5])
    assert adapter.config["frequency_layers"] == [1]
    adapter.detach()
    adapter = gk.attach(
        backbone, "earth_adapter", width=2, layers=[1, 3, 5], frequency_layers="last:2"
    )
    assert adapter.config["frequency_layers"] == [3, 5]
    banded = {name.split(".")[1] for name in adapter.tensors() if ".high." in name}
    routed = {name.split(".")[1] for name in adapter.tensors() if ".router." in name}
    assert banded == routed == {"3", "5"}
    assert {name.split(".")[1] for name in adapter.tensors()} == {"1", "3", "5"}


@pytest.mark.parametrize("kind", ["fused", "split"])
def test_images_need_not_be_square(kind: str) -> None:
    backbone = make(kind)
    gk.attach(backbone, "earth_adapter", width=2, frequency_layers="all")
    maps = backbone(torch.rand(1, len(backbone.bands), 16, 40))
    assert {tuple(m.shape[-2:]) for m in maps} == {(2, 5)}
