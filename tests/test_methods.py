"""PEFT methods: what trains, what it changes, and what is left when it is gone."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from method_table import BACKBONES, CARDS, ROWS, Row, image, make, output, stir
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import geopeft_kit as gk
from geopeft_kit import methods
from geopeft_kit.backbones import Backbone
from geopeft_kit.methods import Adapter, base
from geopeft_kit.methods.base import Method
from geopeft_kit.plots import colours

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def train(backbone: Backbone, adapter: Adapter, steps: int = 2) -> dict[str, Tensor]:
    """A few steps towards random maps; returns the largest gradient of each tensor."""
    backbone.train()
    largest: dict[str, Tensor] = {}
    for step in range(steps):
        maps = backbone(image(backbone, seed=step))
        generator = torch.Generator().manual_seed(step)
        loss = sum(
            (m - torch.randn(m.shape, generator=generator)).square().mean()
            for m in maps
        )
        if not adapter.num_parameters:
            assert not loss.requires_grad
            break
        loss.backward()
        for name, parameter in adapter.named_parameters():
            size = parameter.grad.abs().max()
            largest[name] = torch.maximum(largest.get(name, size), size)
        assert_only_trained_have_gradients(backbone, adapter)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    backbone.eval()
    return largest


def assert_only_trained_have_gradients(backbone: Backbone, adapter: Adapter) -> None:
    trained = {id(parameter) for parameter in adapter.parameters()}
    in_tree = {id(p) for p in backbone.parameters() if p.requires_grad}
    assert in_tree == trained
    assert {id(p) for p in backbone.parameters() if p.grad is not None} == trained


def snapshot(backbone: Backbone) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in backbone.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in backbone.named_parameters()},
        "modules": {name: id(m) for name, m in backbone.named_modules()},
        "tensors": {name: id(p) for name, p in backbone.named_parameters()},
        "active": backbone.adapter,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before["state"]) == list(after["state"])  # the order too
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name
        assert value.dtype == after["state"][name].dtype, name
    for key in ("flags", "modules", "tensors"):
        assert before[key] == after[key], key
    assert before["active"] is after["active"]


def differ(first: Tensor, second: Tensor) -> bool:
    """True if two outputs differ by more than rounding; other shapes differ."""
    return first.shape != second.shape or not torch.allclose(first, second, **CLOSE)


def everyday(number: int, kind: str, row: Row) -> bool:
    """One kind of backbone a row, in turn; `make test` takes all of them."""
    return kind == row.serves[number % len(row.serves)]


CASES = [
    pytest.param(
        kind,
        row,
        id=f"{kind}-{row}",
        marks=() if everyday(number, kind, row) else pytest.mark.slow,
    )
    for number, row in enumerate(ROWS)
    for kind in row.serves
]


TRAINED = [case for case in CASES if case.values[1].name != "frozen"]


def test_the_table_holds_every_method() -> None:
    assert {row.name for row in ROWS} == set(CARDS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_each_method_serves_what_the_table_says_and_refuses_the_rest(row: Row) -> None:
    for kind in BACKBONES:
        backbone = make(kind)
        if kind in row.serves:
            backbone = make(kind, row.load)
            assert CARDS[row.name].why_not(backbone) is None, kind
        elif not CARDS[row.name].supports(backbone):
            before = snapshot(backbone)
            with pytest.raises(ValueError, match="does not fit.*Methods that fit: "):
                gk.attach(backbone, row.name, **row.options)
            assert_same(before, snapshot(backbone))
        else:  # the method serves it, and only these options do not
            with pytest.raises((ValueError, TypeError)):
                gk.attach(backbone, row.name, **row.options)


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_identity_gradients_and_detach(kind: str, row: Row) -> None:
    backbone = make(kind, row.load)
    before, start = snapshot(backbone), output(backbone)
    torch.manual_seed(0)  # whichever tests ran before
    adapter = gk.attach(backbone, row.name, **row.options)

    assert differ(output(backbone), start) is not adapter.identity_at_start
    untrained = output(backbone)
    largest = train(backbone, adapter)
    assert set(largest) == dict(adapter.named_parameters()).keys()
    still = [tensor for tensor, size in largest.items() if not size > 0]
    assert not still
    if adapter.num_parameters:
        assert not torch.equal(output(backbone), untrained)

    adapter.deactivate()
    assert torch.equal(output(backbone), start)
    adapter.activate()
    adapter.detach()
    assert_same(before, snapshot(backbone))


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_merge_equals_unmerged(kind: str, row: Row) -> None:
    backbone = make(kind, row.load)
    keys, hash_before = list(backbone.state_dict()), backbone.weights_hash()
    adapter = gk.attach(backbone, row.name, **row.options)
    stir(adapter)
    unmerged = output(backbone)
    if not adapter.mergeable:
        with pytest.raises(ValueError, match=r"cannot be merged.*lora"):
            adapter.merge()
        assert torch.equal(output(backbone), unmerged)
        return
    adapter.merge()
    torch.testing.assert_close(output(backbone), unmerged, atol=5e-5, rtol=1e-4)
    assert backbone.adapter is None
    assert list(backbone.state_dict()) == keys
    assert all(p.requires_grad for p in backbone.parameters())
    assert (backbone.weights_hash() != hash_before) is (row.name != "frozen")


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_a_saved_adapter_gives_the_same_maps(kind: str, row: Row, tmp_path) -> None:
    backbone = make(kind, row.load)
    adapter = gk.attach(backbone, row.name, **row.options)
    stir(adapter)
    expected = output(backbone)
    folder = adapter.save(tmp_path / "adapter")
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert on_disk <= adapter.num_bytes + 30_000

    other = make(kind, row.load)
    torch.manual_seed(99)  # a random start must not matter
    loaded = gk.load_adapter(other, folder)
    assert torch.equal(output(other), expected)
    assert loaded.config == adapter.config
    assert loaded.num_parameters == adapter.num_parameters
    assert loaded.num_bytes == adapter.num_bytes


@pytest.mark.parametrize(("kind", "row"), TRAINED)
def test_autocast_keeps_trained_tensors_in_float32(kind: str, row: Row) -> None:
    backbone = make(kind, row.load).train()
    adapter = gk.attach(backbone, row.name, **row.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = backbone(image(backbone))
    sum(m.float().square().mean() for m in maps).backward()
    for tensor, parameter in adapter.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, tensor
        assert torch.isfinite(parameter.grad).all(), tensor


@pytest.mark.parametrize(("kind", "row"), TRAINED)
def test_recomputed_blocks_give_the_same_gradients(kind: str, row: Row) -> None:
    """Gradient checkpointing, block by block."""
    backbone = make(kind, row.load)
    adapter = gk.attach(backbone, row.name, **row.options)
    stir(adapter)
    gradients = []
    for recompute in (False, True):
        for _, block in backbone.blocks:
            if recompute:
                block.forward = _recomputed(block.forward)
        sum(m.square().mean() for m in backbone(image(backbone))).backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, **CLOSE)


def _recomputed(forward: Any) -> Any:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "split" else pytest.mark.slow)
        for kind in BACKBONES
    ],
)
def test_adapters_on_one_backbone_do_not_see_each_other(kind: str) -> None:
    backbone = make(kind)
    before, plain = snapshot(backbone), output(backbone)
    adapters = [
        gk.attach(backbone, row.name, **row.options)
        for row in ROWS
        if kind in row.serves and not row.load
    ]
    outputs = {}
    for adapter in adapters:
        adapter.activate()
        stir(adapter)
        outputs[adapter] = output(backbone)
    for adapter in reversed(adapters):
        adapter.activate()
        assert torch.equal(output(backbone), outputs[adapter]), adapter
    adapter.deactivate()
    assert torch.equal(output(backbone), plain)
    for adapter in adapters[1::2] + adapters[0::2]:  # neither order of attaching
        assert not any(p.requires_grad for p in backbone.parameters())
        adapter.detach()
    assert_same(before, snapshot(backbone))


def test_flags_of_the_user_come_back_after_the_last_detach() -> None:
    backbone = make("fused")
    backbone.model.blocks[0].requires_grad_(False)
    before = snapshot(backbone)
    first, second = gk.attach(backbone, "bias"), gk.attach(backbone, "lora", rank=1)
    first.detach()
    assert not any(
        p.requires_grad for n, p in backbone.named_parameters() if "lora" not in n
    )
    second.detach()
    assert_same(before, snapshot(backbone))


def test_an_error_inside_peft_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    backbone = make("fused")
    before = snapshot(backbone)
    inject = peft.inject_adapter_in_model

    def fail(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)  # which freezes the layers that it is given
        raise MemoryError("no memory")

    monkeypatch.setattr(peft, "inject_adapter_in_model", fail)
    with pytest.raises(MemoryError):
        gk.attach(backbone, "lora")
    assert_same(before, snapshot(backbone))


def test_a_method_that_does_not_fit_names_those_that_do() -> None:
    backbone = make("resnet")
    text = r"'vpt' does not fit.*'timm:resnet10t'.*token sequence.*fit: frozen, full"
    with pytest.raises(ValueError, match=text):
        gk.attach(backbone, "vpt")
    assert not CARDS["vpt"].supports(backbone)
    assert "token sequence" in CARDS["vpt"].why_not(backbone)
    assert CARDS["lora"].why_not(backbone) is None


# --- counts -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_counts_of_convolutional_networks(kind: str) -> None:
    backbone = make(kind)
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    affine = [m for m in backbone.modules() if isinstance(m, norms)]
    biases = [p for n, p in backbone.named_parameters() if n.endswith(".bias")]
    assert gk.attach(backbone, "norm").num_parameters == sum(
        m.weight.numel() + m.bias.numel() for m in affine
    )
    assert gk.attach(backbone, "bias").num_parameters == sum(b.numel() for b in biases)


def test_names_are_paths_inside_the_model() -> None:
    backbone = make("fused")
    keys, modules = (
        set(backbone.model.state_dict()),
        dict(backbone.model.named_modules()),
    )
    for name in ("bias", "norm", "full", "last_blocks"):
        adapter = gk.attach(backbone, name)
        assert set(adapter.tensors()) <= keys
        adapter.detach()
    for name, mark in (("lora", ".lora_"), ("dora", ".lora_"), ("vpt", ".prompts")):
        adapter = gk.attach(backbone, name)
        paths = {tensor.partition(mark)[0] for tensor in adapter.tensors()}
        paths = {path.removesuffix(".q").removesuffix(".v") for path in paths}
        assert paths <= modules.keys()
        adapter.detach()
    lora = gk.attach(backbone, "lora", layers=[3], targets=["q", "fc1"])
    assert list(lora.tensors()) == [
        "blocks.3.attn.qkv.q.lora_A",
        "blocks.3.attn.qkv.q.lora_B",
        "blocks.3.mlp.fc1.lora_A",
        "blocks.3.mlp.fc1.lora_B",
    ]


def test_layers_restrict_what_trains() -> None:
    backbone = make("fused")
    for name in ("full", "bias", "norm", "lora", "vpt", "last_blocks"):
        adapter = gk.attach(backbone, name, layers=[2, 4])
        starts = {tensor.split(".attn")[0][:8] for tensor in adapter.tensors()}
        assert starts == {"blocks.2", "blocks.4"}, name
        adapter.detach()


# --- LoRA against peft itself -------------------------------------------------------


class SplitQkv(nn.Module):
    """Three Linears in place of the fused one, as the PEFT study splits it."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights, biases = fused.weight.chunk(3), fused.bias.chunk(3)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            layer = nn.Linear(fused.in_features, fused.out_features // 3)
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.add_module(part, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_outputs_and_gradients_equal_those_of_peft(kind: str, dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    backbone = make(kind)
    twin = copy.deepcopy(backbone)
    adapter = gk.attach(backbone, "dora" if dora else "lora", rank=3, alpha=5)
    if kind in ("fused", "swin"):
        for _, block in twin.blocks:
            block.attn.qkv = SplitQkv(block.attn.qkv)
    paths = {
        name.rpartition(".lora_")[0] for name in adapter.tensors() if "lora_A" in name
    }
    config = LoraConfig(r=3, lora_alpha=5, use_dora=dora, target_modules=sorted(paths))
    inject_adapter_in_model(config, twin.model)

    ours, theirs = {}, dict(twin.model.named_parameters())
    for name, parameter in adapter.named_parameters():
        other = theirs[f"{name}.default.weight"]
        nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data.abs_().add_(1)
        other.data.copy_(parameter.data)
        ours[name] = (parameter, other)
    loss, loss_there = (
        sum(m.square().mean() for m in b(image(b))) for b in (backbone, twin)
    )
    torch.testing.assert_close(loss, loss_there, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output(backbone), output(twin), rtol=1e-4, atol=1e-5)
    loss.backward()
    loss_there.backward()
    for name, (parameter, other) in ours.items():
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_k_stays_as_it_is(name: str) -> None:
    backbone = make("fused")
    before = backbone.model.blocks[0].attn.qkv.weight.detach().clone()
    adapter = gk.attach(backbone, name, targets=("q", "v"), layers=[0])
    stir(adapter)
    adapter.merge()
    after = backbone.model.blocks[0].attn.qkv.weight.detach()
    changed = [
        not torch.equal(a, b)
        for a, b in zip(before.chunk(3), after.chunk(3), strict=True)
    ]
    assert changed == [True, False, True]


def test_a_merge_that_fails_changes_nothing() -> None:
    backbone = make("fused")
    adapter = gk.attach(backbone, "lora", rank=2)
    stir(adapter)
    before = snapshot(backbone)
    last = list(adapter.parameters())[-1]
    values = last.detach().clone()
    last.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        adapter.merge()
    last.data.copy_(values)
    assert_same(before, snapshot(backbone))
    adapter.merge()


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("qkv", "proj"), ("fc1",)])
def test_other_targets_train_and_merge(targets: tuple[str, ...]) -> None:
    backbone = make("fused")
    start = output(backbone)
    adapter = gk.attach(backbone, "lora", targets=targets, rank=2)
    assert torch.equal(output(backbone), start)
    assert all(size > 0 for size in train(backbone, adapter).values())
    unmerged = output(backbone)
    adapter.merge()
    torch.testing.assert_close(output(backbone), unmerged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian"])
def test_other_starts_begin_at_the_frozen_network(kind: str, init: str) -> None:
    backbone = make(kind)
    before, start = snapshot(backbone), output(backbone)
    if kind in ("convnext", "resnet") and init != "gaussian":
        with pytest.raises(ValueError, match=f"init='{init}' is for Linear layers"):
            gk.attach(backbone, "lora", rank=2, init=init)
        assert_same(before, snapshot(backbone))
        return
    adapter = gk.attach(backbone, "lora", rank=2, init=init)
    torch.testing.assert_close(output(backbone), start, atol=1e-4, rtol=1e-4)
    adapter.deactivate()
    assert torch.equal(output(backbone), start)  # the frozen weights were not changed
    adapter.activate()
    train(backbone, adapter)
    adapter.detach()
    assert_same(before, snapshot(backbone))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    backbone = make("fused")
    scales = []
    for rslora in (False, True):
        adapter = gk.attach(
            backbone,
            "lora",
            rank=4,
            alpha=8,
            rslora=rslora,
            targets=["fc1"],
            layers=[0],
        )
        (layer,) = adapter.substitutes().values()
        scales.append(layer.scaling["default"])
        adapter.detach()
    assert scales == [2, 4]


@pytest.mark.parametrize("row", [Row("lora", {"rank": 2}), Row("vpt", {"tokens": 4})])
def test_dropout_works_in_training_only(row: Row) -> None:
    backbone = make("fused")
    adapter = gk.attach(backbone, row.name, dropout=0.5, **row.options)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert torch.equal(output(backbone), output(backbone))
    backbone.train()
    assert not torch.equal(output(backbone), output(backbone))


# --- prompts ------------------------------------------------------------------------


def test_shallow_prompts_are_carried_through_the_chosen_blocks() -> None:
    backbone = make("fused")
    blocks = [module for _, module in backbone.blocks]
    adapter = gk.attach(
        backbone, "vpt", tokens=3, deep=False, dropout=0.0, layers=[1, 2, 3]
    )
    assert list(adapter.tensors()) == ["blocks.1.prompts"]
    (prompts,) = adapter.parameters()
    tokens = torch.randn(2, 17, 192)
    x = torch.cat([tokens[:, :1], prompts.expand(2, -1, -1), tokens[:, 1:]], 1)
    for block in blocks[1:4]:
        x = block(x)
    expected = torch.cat([x[:, :1], x[:, 4:]], 1)
    result = tokens
    for _, block in backbone.blocks[1:4]:
        result = block(result)
    torch.testing.assert_close(result, expected)


def test_deep_prompts_are_cut_off_after_each_block() -> None:
    backbone = make("fused")
    _, block = backbone.blocks[5]
    adapter = gk.attach(backbone, "vpt", tokens=3, dropout=0.0, layers=[5])
    (prompts,) = adapter.parameters()
    tokens = torch.randn(2, 17, 192)
    x = block(torch.cat([tokens[:, :1], prompts.expand(2, -1, -1), tokens[:, 1:]], 1))
    result = backbone.blocks[5][1](tokens)
    assert torch.equal(result, torch.cat([x[:, :1], x[:, 4:]], 1))
    bound = (6 / (3 * 8 * 8 + 192)) ** 0.5
    assert prompts.abs().max() <= bound


# --- batch-norm statistics ----------------------------------------------------------


@pytest.mark.parametrize("name", ["frozen", "bias", "norm", "lora", "full"])
def test_statistics_move_under_full_alone(name: str) -> None:
    backbone = make("resnet").train()
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    adapter = gk.attach(backbone, name)
    backbone.train()
    backbone(image(backbone))
    moved = [
        not torch.equal(value, backbone.state_dict()[key.replace(".base_layer", "")])
        for key, value in before.items()
    ]
    assert all(moved) if name == "full" else not any(moved)
    adapter.detach()
    after = backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_swapping_gives_batch_norms_their_mode() -> None:
    backbone = make("resnet").train()
    frozen = gk.attach(backbone, "frozen")
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    full = gk.attach(backbone, "full")
    assert all(norm.training for norm in norms)
    frozen.activate()
    assert not any(norm.training for norm in norms)
    full.detach()
    frozen.detach()
    assert all(norm.training for norm in norms)


# --- moving, copying, mixed precision -----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_moved_backbone_takes_all_its_adapters_along(kind: str) -> None:
    backbone = make(kind)
    adapters = [
        gk.attach(backbone, row.name, **row.options)
        for row in ROWS
        if kind in row.serves and not row.load
    ]
    single = {}
    for adapter in adapters:
        adapter.activate()
        single[adapter] = output(backbone)
    identities = {a: [id(p) for p in a.parameters()] for a in adapters}
    adapters[1].activate()  # full: its originals are all in hand
    backbone.double()
    for adapter in adapters:
        adapter.activate()
        with torch.no_grad():
            maps = torch.cat([m.flatten() for m in backbone(image(backbone).double())])
        assert maps.dtype == torch.float64
        torch.testing.assert_close(maps.float(), single[adapter], atol=1e-3, rtol=1e-3)
        assert all(p.dtype == torch.float64 for p in adapter.parameters())
        assert [id(p) for p in adapter.parameters()] == identities[adapter]
    for adapter in adapters:
        adapter.detach()
    state = make(kind).double().state_dict()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_deep_copy_has_adapters_of_its_own() -> None:
    backbone = make("fused")
    plain = output(backbone)
    lora, bias = gk.attach(backbone, "lora", rank=2), gk.attach(backbone, "bias")
    twin = copy.deepcopy(backbone)
    assert twin.adapter is not bias
    assert twin.adapter.backbone is twin
    stir(twin.adapter)
    assert not torch.equal(output(twin), plain)
    assert torch.equal(output(backbone), plain)
    lora.activate()
    assert twin.adapter.name == "bias"
    twin.adapter.detach()
    assert torch.equal(output(twin), plain)
    assert backbone.adapter is lora


@pytest.mark.parametrize(("kind", "row"), TRAINED)
def test_half_precision_backbones_get_float32_adapters(kind: str, row: Row) -> None:
    """Copies of existing tensors stay as they are."""
    backbone = make(kind, row.load).to(torch.bfloat16)
    existing = set(backbone.model.state_dict())
    adapter = gk.attach(backbone, row.name, **row.options)
    maps = backbone(image(backbone).to(torch.bfloat16))
    if row.name != "vit_adapter":  # its own maps leave in float32
        assert all(m.dtype == torch.bfloat16 for m in maps)
    sum(m.float().square().mean() for m in maps).backward()
    for name, parameter in adapter.named_parameters():
        wanted = torch.bfloat16 if name in existing else torch.float32
        assert parameter.dtype == wanted, name
        assert parameter.grad.isfinite().all(), name
    if adapter.mergeable:
        adapter.merge()
        assert all(p.dtype == torch.bfloat16 for p in backbone.parameters())


# --- the end of an adapter, and its card --------------------------------------------


def test_a_detached_adapter_says_so(tmp_path) -> None:
    backbone = make("fused")
    adapter = gk.attach(backbone, "lora", rank=1)
    adapter.detach()
    actions = [
        adapter.activate,
        adapter.deactivate,
        adapter.detach,
        adapter.merge,
        adapter.tensors,
        lambda: list(adapter.parameters()),
        lambda: adapter.save(tmp_path / "a"),
        lambda: adapter.export(tmp_path / "b"),
    ]
    for action in actions:
        with pytest.raises(RuntimeError, match=r"detached or merged.*load_adapter"):
            action()
    assert "detached" in repr(adapter)
    assert not list(tmp_path.iterdir())


def test_merging_beside_other_adapters_is_refused() -> None:
    backbone = make("fused")
    bias, lora = gk.attach(backbone, "bias"), gk.attach(backbone, "lora")
    with pytest.raises(RuntimeError, match=r"\['bias'\].*detach"):
        lora.merge()
    bias.detach()
    lora.merge()


def test_cards_say_what_a_method_is() -> None:
    for card in gk.list_methods():
        assert card.title
        assert (card.learning_rate is None) is (card.name == "frozen")
    assert CARDS["lora"].options["rank"] == "int = 16"
    adapter = gk.attach(make("fused"), "lora", rank=4)
    assert adapter.num_parameters == 14 * 4 * 192 * 6  # 14rD per block
    html = adapter._repr_html_()
    assert "64,512" in html
    assert "identity at start" in html


def own_method(name: str, family: str) -> type[Method]:
    """A method as a user writes it in a notebook cell."""

    class Own(Method):
        title, paper, trained, count_formula = "Own", "-", "nothing", "0"
        mergeable = identity_at_start = True
        learning_rate = None

        def build(self, backbone, blocks, *, width: int = 4):
            return []

    Own.name, Own.family = name, family
    return Own


def test_a_registered_method_is_listed_and_attached(monkeypatch) -> None:
    monkeypatch.setattr(base, "METHODS", base.METHODS.copy())
    monkeypatch.setattr(methods, "METHODS", base.METHODS)
    monkeypatch.setattr(colours, "METHOD_COLOURS", colours.METHOD_COLOURS.copy())
    for _ in range(2):  # a cell may run again
        base.register(own_method("mine", "prompts"))
    cards = {card.name: card for card in gk.list_methods()}
    assert list(cards).index("mine") == list(cards).index("vpt") + 1
    assert cards["mine"].options == {"width": "int = 4"}
    assert gk.attach(make("fused"), "mine", width=2).config["width"] == 2
    assert gk.plots.method_colour("mine") in colours.FAMILY_SHADES["prompts"]
    with pytest.raises(ValueError, match="'lora' belongs to .*Lora"):
        base.register(own_method("lora", "low rank"))
    with pytest.raises(ValueError, match="family='new'.*ends, existing weights"):
        base.register(own_method("mine", "new"))


def test_config_says_what_was_left_to_the_method() -> None:
    targets = {
        kind: gk.attach(make(kind), "lora", rank=4).config["targets"]
        for kind in BACKBONES
    }
    assert targets["fused"] == targets["split"] == ["q", "v", "fc1", "fc2"]
    assert gk.attach(make("fused"), "ia3").config["targets"] == ["k", "v", "fc2"]
    assert targets["convnext"] == ["fc1", "fc2"]
    assert targets["resnet"] == ["conv1", "conv2"]
    bottleneck = gk.load_backbone("timm:resnet26", weights=None)
    assert gk.attach(bottleneck, "lora").config["targets"] == ["conv1", "conv3"]


@pytest.mark.slow
def test_a_dozen_adapters_swap_in_milliseconds_on_a_vit_large() -> None:
    with torch.device("meta"):
        backbone = gk.load_backbone("timm:vit_large_patch16_224", weights=None)
    names = ["lora", "dora", "bias", "norm", "vpt", "full"] * 2
    adapters = [gk.attach(backbone, name) for name in names]
    seconds = []
    for adapter in adapters * 3:
        start = time.perf_counter()
        adapter.activate()
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[len(seconds) // 2] < 0.010
