"""Few bits per weight: levels, packing, Q-Linear, and the two methods built on it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_table import image, make, output, stir
from safetensors.torch import load_file
from torch import Tensor
from toy import change_data

import geopeft_kit as gk
from geopeft_kit.methods import quantised, storage
from geopeft_kit.methods.quantised import QuantisedLinear
from geopeft_kit.methods.upetu import ContextPrompts

VECTORS = Path(__file__).parent / "vectors"
BITS = quantised.QUANTISED_BITS


def vectors(name: str) -> Any:
    """Numbers made by the public code of Jie et al. (MIT), torch 2.14.1, float32."""
    return json.loads((VECTORS / f"{name}.json").read_text())


def levels(bits: int) -> Tensor:
    return torch.tensor(quantised.levels_for_normal(bits), dtype=torch.float64)


def q_linear(weight: Tensor, bits: int) -> QuantisedLinear:
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], bits)
    layer.weight.data.copy_(weight)
    return layer


# --- the levels ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_are_those_of_the_original(bits: int) -> None:
    there = torch.tensor(vectors("qlinear_codebooks")[str(bits)])
    torch.testing.assert_close(levels(bits).float(), there, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_each_level_is_the_median_of_its_cell(bits: int) -> None:
    found = levels(bits)
    inner = torch.special.ndtr(quantised.thresholds_between(found))
    shares = torch.cat([torch.zeros(1), inner, torch.ones(1)])
    below, above = torch.special.ndtr(found) - shares[:-1], shares[1:]
    torch.testing.assert_close(below, above - torch.special.ndtr(found))
    assert (found.diff() > 0).all()
    assert torch.equal(found, -found.flip(0))


def test_eight_bits_are_converged_where_the_original_is_not() -> None:
    there = torch.tensor(vectors("qlinear_codebooks")["8"], dtype=torch.float64)
    assert error_of(there) > 0.022
    assert error_of(levels(8)) < 0.0049
    for nudged in (levels(8) * 1.01, levels(8) * 0.99, levels(8) + 0.002):
        assert error_of(nudged) > error_of(levels(8))


@pytest.mark.parametrize(
    ("bits", "known"), [(1, 0.473), (2, 0.266), (4, 0.0746), (8, 0.0049)]
)
def test_expected_error(bits: int, known: float) -> None:
    assert error_of(levels(bits)) == pytest.approx(known, rel=0.005)


def error_of(found: Tensor) -> float:
    """Expected distance of N(0, 1) to the nearest level, summed over a fine grid."""
    grid = torch.linspace(-7, 7, 200_001, dtype=torch.float64)
    nearest = found[torch.bucketize(grid, quantised.thresholds_between(found))]
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    return float(((grid - nearest).abs() * density).sum() * (grid[1] - grid[0]))


# --- packing ------------------------------------------------------------------------


@pytest.mark.parametrize("case", vectors("qlinear_packing"), ids=lambda c: c["bits"])
def test_bytes_are_those_of_the_original(case: dict[str, Any]) -> None:
    layer = q_linear(torch.tensor(case["weight"]), case["bits"])
    stored = layer.packed()
    assert bytes(stored["codes"].tolist()).hex() == case["bytes_hex"]
    there = torch.tensor([case["mean"], case["std"]])
    torch.testing.assert_close(stored["mean_std"], there)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_packing_round_trip(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,))
    codes[0] = 2**bits - 1
    stored = quantised.pack(codes, bits)
    assert stored.dtype == torch.uint8
    assert len(stored) == -(-count * bits // 8)
    assert torch.equal(quantised.unpack(stored, bits, count), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert quantised.pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00_11_10_01]


# --- Q-Linear -----------------------------------------------------------------------


CASES = [c for c in vectors("qlinear_forward_backward") if c["bits"] < 8]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['bits']}-bit")
def test_forward_and_backward_are_those_of_the_original(case: dict[str, Any]) -> None:
    layer = q_linear(torch.tensor(case["weight"]), case["bits"])
    x = torch.tensor(case["x"], requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor(case["grad_out"]))
    for found, name in (
        (y, "y"),
        (layer.quantised_weight(), "quantised_weight"),
        (layer.weight.grad, "grad_weight"),
        (x.grad, "grad_x"),
    ):
        there = torch.tensor(case[name])
        torch.testing.assert_close(found, there, atol=2e-6, rtol=2e-5, msg=name)


def test_forward_with_eight_bits_is_nearer_to_the_weight_than_the_original() -> None:
    (case,) = (c for c in vectors("qlinear_forward_backward") if c["bits"] == 8)
    weight = torch.tensor(case["weight"])
    ours = (q_linear(weight, 8).quantised_weight() - weight).abs().mean()
    there = (torch.tensor(case["quantised_weight"]) - weight).abs().mean()
    assert ours < there


@pytest.mark.parametrize("bits", BITS)
def test_weights_go_to_the_nearest_level(bits: int) -> None:
    weight = torch.randn(9, 13) * 0.3 + 0.1
    layer = q_linear(weight, bits)
    mean, std = weight.mean(), weight.std()
    distances = ((weight - mean) / (std + 1e-5))[..., None] - layer.levels
    best = layer.levels[distances.abs().argmin(dim=-1)] * std + mean
    torch.testing.assert_close(layer.quantised_weight(), best)
    assert len(layer.quantised_weight().unique()) <= 2**bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_what_is_loaded_is_idempotent(bits: int, spread: float) -> None:
    """Exactly the same weight, and exactly the same file when saved again."""
    first = q_linear(torch.randn(24, 40) * spread + 0.3 * spread, bits)
    second = QuantisedLinear(40, 24, bits)
    second.load_packed(**first.packed())
    assert torch.equal(second.quantised_weight(), first.quantised_weight())
    for name, tensor in second.packed().items():
        assert torch.equal(tensor, first.packed()[name]), name
    third = QuantisedLinear(40, 24, bits)
    third.load_packed(**second.packed())
    assert torch.equal(third.weight, second.weight)


def test_a_loaded_layer_trains_on_with_its_mean_and_std() -> None:
    layer = QuantisedLinear(40, 24, 1)
    layer.load_packed(**q_linear(torch.randn(24, 40), 1).packed())
    before = layer.statistics().detach()
    with torch.no_grad():
        layer.weight.mul_(1.5).add_(0.2)
    mean, std = (layer.statistics() - before).tolist()
    own = 0.6745 * float(before[1])  # the spread of a weight that has two values
    assert mean == pytest.approx(0.2 + 0.5 * float(before[0]), abs=2e-2)
    assert std == pytest.approx(0.5 * own, rel=0.02)


def test_32_bits_is_an_ordinary_linear_layer() -> None:
    layer, x = QuantisedLinear(6, 4, 32), torch.randn(3, 6)
    assert torch.equal(layer(x), F.linear(x, layer.weight))


# --- the methods --------------------------------------------------------------------


@pytest.fixture(scope="module")
def big() -> dict[str, gk.backbones.Backbone]:
    names = ("vit_base_patch16_224", "convnext_base", "swin_base_patch4_window7_224")
    with torch.device("meta"):
        return {
            name.split("_")[0]: gk.load_backbone(f"timm:{name}", weights=None)
            for name in names
        }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 32])
def test_counts_and_bytes_on_vit_b(big, bits: int, width: int) -> None:
    adapter = gk.attach(big["vit"], "quantised_adapter", width=width, bits=bits)
    assert adapter.num_parameters == 12 * 2 * 768 * width
    assert adapter.num_bytes == 12 * (-(-bits * 2 * 768 * width // 8) + 16)
    adapter.detach()


def test_the_published_72_kilobytes(big) -> None:
    adapter = gk.attach(big["vit"], "quantised_adapter")
    assert adapter.num_parameters == 589_824
    assert adapter.num_bytes == 589_824 // 8 + 24 * 8
    assert adapter.num_bytes / 1024 == pytest.approx(72.2, abs=0.05)
    adapter.detach()


def test_counts_and_bytes_on_convnext_b(big) -> None:
    adapter = gk.attach(big["convnext"], "upetu")
    assert adapter.num_parameters == 641_444 <= 643_613
    assert adapter.num_parameters / 87_566_464 == pytest.approx(0.007325, abs=1e-6)
    # 36 pairs of layers, 36 scales; everything of CAPM in float32
    assert adapter.num_bytes == 577_536 // 8 + 36 * 16 + 4 * (36 + 63_872)
    row = adapter.summary()
    assert (row["trained"], row["bytes"]) == (641_444, adapter.num_bytes)
    adapter.detach()
    two_stages = sum(2 * c * 16 + 8 * 16 + c for c in (512, 1024))
    for options, count in (
        ({"prompt_width": 8}, 610_468),
        ({"prompt_width": 32}, 703_396),
        ({"cross_scale": True}, 641_444 + 3 * 8 * 16),
        ({"layers": "last:4"}, 3 * 32 * 1024 + 32 * 512 + 4 + two_stages),
    ):
        adapter = gk.attach(big["convnext"], "upetu", **options)
        assert adapter.num_parameters == count, options
        adapter.detach()


def test_counts_on_swin_b(big) -> None:
    adapter = gk.attach(big["swin"], "upetu")
    widths, depths = (128, 256, 512, 1024), (2, 2, 18, 2)
    eqam = sum(n * (2 * c * 16 + 1) for c, n in zip(widths, depths, strict=True))
    capm = sum(2 * c * 16 + 8 * 16 + c for c in widths)
    assert adapter.num_parameters == eqam + capm
    adapter.detach()


METHODS = [
    ("fused", "quantised_adapter", {"width": 5}),
    ("swin", "quantised_adapter", {"width": 4}),
    ("convnext", "upetu", {"width": 3, "prompt_width": 4}),
    ("swin", "upetu", {"width": 3, "cross_scale": True}),
]


STORED = [(*METHODS[0], bits) for bits in (*BITS, 32)]
STORED += [(*method, bits) for method in METHODS[1:] for bits in (1, 32)]


@pytest.mark.parametrize(("kind", "name", "options", "bits"), STORED)
def test_saved_packed_and_loaded_exactly(
    kind: str, name: str, options: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    backbone = make(kind)
    adapter = gk.attach(backbone, name, bits=bits, **options)
    assert adapter.identity_at_start is (bits == 32)
    stir(adapter)
    expected = output(backbone)
    folder = adapter.save(tmp_path / "first")
    stored = load_file(folder / storage.TENSORS)
    assert sum(t.nbytes for t in stored.values()) == adapter.num_bytes
    assert (torch.uint8 in {t.dtype for t in stored.values()}) is (bits < 32)

    other = make(kind)
    loaded = gk.load_adapter(other, folder)
    assert torch.equal(output(other), expected)
    again = loaded.save(tmp_path / "second")
    for key, tensor in load_file(again / storage.TENSORS).items():
        assert torch.equal(tensor, stored[key])


def test_identity_only_without_bits() -> None:
    backbone = make("convnext")
    start = output(backbone)
    for bits in (1, 32):
        adapter = gk.attach(backbone, "upetu", bits=bits)
        assert torch.equal(output(backbone), start) is (bits == 32)
        adapter.detach()


def test_a_quantised_adapter_is_the_formula() -> None:
    backbone = make("fused")
    block = backbone.model.blocks[2]
    norm, mlp = block.norm2, block.mlp
    gk.attach(backbone, "quantised_adapter", width=3, bits=2, scale=0.5, layers=[2])
    inner = block.mlp.adapter
    x = torch.randn(2, 5, 192)
    middle = F.relu(x @ inner.down.quantised_weight().T)
    expected = mlp(norm(x)) + 0.5 * middle @ inner.up.quantised_weight().T
    torch.testing.assert_close(block.mlp(block.norm2(x)), expected)


def test_capm_is_the_formula_and_an_identity_with_gamma_zero() -> None:
    capm = ContextPrompts(6, 4, 3, channel_axis=1)
    features = torch.randn(2, 6, 5, 7)
    assert torch.equal(capm(features), torch.zeros_like(features))

    torch.nn.init.normal_(capm.gamma)
    down = torch.einsum("dc,bchw->bdhw", capm.down.weight, features)
    a = (down.mean(dim=(2, 3)) @ capm.prompts.T / 2).softmax(dim=1)
    p = a @ capm.prompts
    up = torch.einsum(
        "cd,bdhw->bchw", capm.up.weight, F.gelu(down + p[:, :, None, None])
    )
    expected = capm.gamma[:, None, None] * up
    torch.testing.assert_close(capm(features), expected)
    torch.testing.assert_close(capm.attention, a)
    assert capm.attention.shape == (2, 3)


def test_capm_looks_at_each_image_by_itself_and_at_the_stage_before() -> None:
    first = ContextPrompts(6, 4, 3, channel_axis=-1)
    second = ContextPrompts(8, 4, 3, channel_axis=-1, earlier=first)
    torch.nn.init.normal_(second.gamma)
    features, deeper = torch.randn(2, 4, 4, 6), torch.randn(2, 2, 2, 8)

    def run(shallow: Tensor) -> Tensor:
        first(shallow)
        return second(deeper)

    base, other = run(features), run(torch.stack([features[0], 3 * features[1]]))
    assert torch.equal(base[0], other[0])
    assert not torch.allclose(base[1], other[1])


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_every_stage_of_upetu_adds_its_prompts(kind: str) -> None:
    backbone = make(kind)
    gk.attach(backbone, "upetu", bits=32, width=2, prompt_width=4)
    start = backbone(image(backbone))
    modules = [m for m in backbone.modules() if isinstance(m, ContextPrompts)]
    assert len(modules) == 4
    torch.nn.init.ones_(modules[1].gamma)
    changed = [
        not torch.equal(a, b)
        for a, b in zip(start, backbone(image(backbone)), strict=True)
    ]
    assert changed == [False, True, True, True]


def test_a_backbone_is_copied_after_scoring() -> None:
    """CAPM remembers tensors of the last pass, also from inference mode."""
    backbone = make("convnext")
    gk.attach(backbone, "upetu", cross_scale=True)
    with torch.inference_mode():
        backbone(image(backbone))
    twin = copy.deepcopy(backbone)
    assert torch.equal(output(twin), output(backbone))


def test_upetu_refuses_what_has_no_stages() -> None:
    with pytest.raises(ValueError, match=r"'upetu' does not fit.*layout is 'vit'"):
        gk.attach(make("fused"), "upetu")


DAMAGE = {
    "truncated": "codes has shape",
    "not codes": "must be torch.uint8",
    "other width": "has shape",
    "other bits": "has shape",
    "renamed": "Missing: .*codes",
}


@pytest.mark.parametrize(("kind", "text"), DAMAGE.items())
def test_a_changed_file_is_refused(kind: str, text: str, tmp_path: Path) -> None:
    """Its checksum fits, so that only the content is wrong."""
    backbone = make("convnext")
    adapter = gk.attach(backbone, "upetu", width=8)
    saved = storage.read_adapter(adapter.save(tmp_path))
    adapter.detach()
    gk.load_adapter(backbone, tmp_path).detach()
    name = next(name for name in saved.tensors if name.endswith("codes"))
    codes, config = saved.tensors[name], dict(saved.config)
    if kind == "truncated":
        saved.tensors[name] = codes[:-1]
    if kind == "not codes":
        saved.tensors[name] = codes.half()
    if kind == "other width":
        config["width"] += 8
    if kind == "other bits":
        config["bits"] = 2
    if kind == "renamed":
        saved.tensors[name.replace("codes", "cods")] = saved.tensors.pop(name)
    storage.write_adapter(tmp_path, "upetu", config, saved.backbone, saved.tensors)
    with pytest.raises(ValueError, match=text):
        gk.load_adapter(backbone, tmp_path)
    assert backbone.adapter is None


# --- change detection ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "fusion"), [(2, "difference"), (3, "concatenate")])
def test_change_detection_from_end_to_end(
    classes: int, fusion: str, tmp_path: Path
) -> None:
    data = change_data(tmp_path / "data", classes)
    backbone = make("convnext")
    frozen = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    adapter = gk.attach(backbone, "upetu", width=4, prompt_width=4)
    model = gk.build_model(
        backbone, "fcn", task="change", num_classes=classes, fusion=fusion
    )
    before = gk.evaluate(model, data)["overall"]
    run = gk.fit(model, data, epochs=4, learning_rate=3e-3, progress=False)
    after = gk.evaluate(model, data)
    assert after["overall"]["miou"] > before["miou"]
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert set(after["regions"]) == {"far"}
    batch = next(iter(data.dataloader("test")))
    assert model(batch["image"]).shape == (3, classes, 32, 32)

    loaded = adapter.save(tmp_path / "adapter")
    expected = output(backbone)
    other = make("convnext")
    gk.load_adapter(other, loaded)
    assert torch.equal(output(other), expected)
    adapter.detach()
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, frozen[name]), name


@pytest.mark.slow
def test_change_on_simulated_pairs(tmp_path: Path) -> None:
    data = gk.simulated_data(
        "change",
        bands=["RED", "GREEN", "BLUE"],
        chips_per_region=4,
        size=32,
        scene_size=64,
        train_regions=["temperate"],
        chips_per_scene=2,
        batch_size=2,
    )
    backbone = make("convnext")
    gk.attach(backbone, "upetu", width=4, prompt_width=4)
    model = gk.build_model(backbone, task="change", num_classes=data.num_classes)
    run = gk.fit(model, data, epochs=1, progress=False)
    assert run.history["loss"].notna().all()
    scores = gk.evaluate(model, data)
    assert set(scores["regions"]) == {"savanna"}
    assert 0 <= scores["overall"]["miou"] <= 1
