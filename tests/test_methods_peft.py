"""The relatives of LoRA: parity with `peft` itself, counts, what each promises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_table import image, make, output, stir
from test_methods import SplitQkv
from torch import Tensor, nn

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.methods.peft.layers import merged_tensors
from geopeft_kit.methods.peft.rank_budget import RankBudget
from tests.test_training import make_model
from tests.toy import toy_data

# --- parity with peft applied to the plain network ----------------------------------


@pytest.fixture
def plain_block_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let peft's BOFT run as with its CUDA extension, which multiplies blocks only."""
    from peft.tuners.boft import layer

    def apply(blocks: Tensor) -> Tensor:  # (m, n, b, b) -> (m, n*b, n*b)
        return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "_FBD_CUDA", True)
    monkeypatch.setattr(layer, "FastBlockDiag", SimpleNamespace(apply=apply))


def peft_twin(name: str, model: nn.Module, paths: list[str]) -> None:
    """Apply peft to a plain network, with the options of `PARITY`."""
    import peft

    second = [path for path in paths if "fc2" in path.split(".")]
    config: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5),
        "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=paths, feedforward_modules=second),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=5, total_step=1
        ),
        "vera": lambda: peft.VeraConfig(
            r=8, projection_prng_key=3, save_projection=False
        ),
        "randlora": lambda: peft.RandLoraConfig(
            r=8,
            randlora_alpha=1,
            projection_prng_key=3,
            save_projection=False,
            sparse=True,
        ),
        "shira": lambda: peft.ShiraConfig(r=3, random_seed=3),
        "delora": lambda: peft.DeloraConfig(r=3, delora_lambda=5),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=5),
        "lokr": lambda: peft.LoKrConfig(r=3, alpha=5),
        "fourierft": lambda: peft.FourierFTConfig(
            n_frequency=30, scaling=20.0, random_loc_seed=3, init_weights=True
        ),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2),
    }
    made = config[name]()
    made.target_modules = paths
    peft.get_peft_model(model, made)


PARITY: list[tuple[str, dict[str, Any], str]] = [
    ("ia3", {}, "fused"),
    ("ia3", {}, "split"),
    ("ia3", {}, "resnet"),
    ("adalora", {"rank": 2, "start_rank": 3, "alpha": 5}, "fused"),
    ("adalora", {"rank": 2, "start_rank": 3, "alpha": 5}, "resnet"),
    ("vera", {"rank": 8, "seed": 3}, "fused"),
    ("vera", {"rank": 8, "seed": 3}, "mambaout_femto"),
    ("randlora", {"rank": 8, "alpha": 1, "seed": 3}, "fused"),
    ("shira", {"rank": 3, "seed": 3}, "fused"),
    ("shira", {"rank": 3, "seed": 3}, "split"),
    ("delora", {"rank": 3, "bound": 5}, "fused"),
    ("loha", {"rank": 3, "alpha": 5}, "fused"),
    ("loha", {"rank": 3, "alpha": 5}, "resnet"),
    ("loha", {"rank": 3, "alpha": 5}, "efficientvim_m1"),
    ("lokr", {"rank": 3, "alpha": 5}, "fused"),
    ("lokr", {"rank": 3, "alpha": 5}, "resnet"),
    ("lokr", {"rank": 3, "alpha": 5}, "efficientvim_m1"),
    ("fourierft", {"frequencies": 30, "scale": 20.0, "seed": 3}, "fused"),
    ("oft", {"block_size": 4}, "fused"),
    ("oft", {"block_size": 4}, "efficientvim_m1"),
    ("boft", {"block_size": 4, "factors": 2}, "fused"),
    ("boft", {"block_size": 4, "factors": 2}, "resnet"),
    ("lora", {"rank": 3, "alpha": 5}, "efficientvim_m1"),
    ("dora", {"rank": 3, "alpha": 5}, "efficientvim_m1"),
]


@pytest.mark.parametrize(
    ("name", "options", "kind"), PARITY, ids=[f"{n}-{k}" for n, _, k in PARITY]
)
@pytest.mark.usefixtures("plain_block_diagonal")
def test_outputs_and_gradients_equal_those_of_peft(
    name: str, options: dict[str, Any], kind: str
) -> None:
    backbone = make(kind)
    twin = copy.deepcopy(backbone)
    adapter = gk.attach(backbone, name, layers=[0, 1], **options)
    if kind == "fused":
        for block in twin.model.blocks:
            block.attn.qkv = SplitQkv(block.attn.qkv)
    paths = sorted({tensor.rpartition(".")[0] for tensor in adapter.tensors()})
    peft_twin(name, twin.model, paths)

    theirs, pairs = dict(twin.model.named_parameters()), {}
    for number, (tensor, parameter) in enumerate(adapter.named_parameters()):
        key = f"{tensor}.default"
        other = theirs[key if key in theirs else f"{key}.weight"]
        assert other.shape == parameter.shape
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(parameter.shape, generator=generator)
        other.data.copy_(parameter.data.add_(0.1 * noise))
        pairs[tensor] = (parameter, other)
    trained_there = [p for p in twin.model.parameters() if p.requires_grad]
    assert len(trained_there) == len(pairs)
    # the frozen network computes something else
    adapter.deactivate()
    start = output(backbone)
    adapter.activate()
    assert not torch.allclose(output(backbone), start, atol=1e-3)

    loss, loss_there = (
        sum(m.square().mean() for m in b(image(b))) for b in (backbone, twin)
    )
    torch.testing.assert_close(output(backbone), output(twin), rtol=1e-4, atol=1e-5)
    loss.backward()
    loss_there.backward()
    for tensor, (parameter, other) in pairs.items():
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=tensor
        )


# --- counts -------------------------------------------------------------------------


def lokr(out: int, inputs: int, rank: int) -> int:
    a, b = _nearest_factors(out)
    c, d = _nearest_factors(inputs)
    full = rank >= max(b, d) / 2
    return a * c + (b * d if full else rank * (b + d))


def _nearest_factors(number: int) -> tuple[int, int]:
    small = max(f for f in range(1, int(number**0.5) + 1) if number % f == 0)
    return small, number // small


# (out, in) of q, v, fc1, fc2 in units of D.
SHAPES = ((1, 1), (1, 1), (4, 1), (1, 4))
FORMULAS: list[tuple[str, dict[str, Any], Callable[[int, int], int]]] = [
    ("adalora", {"rank": 8}, lambda o, i: 12 * (i + o + 1)),
    ("vera", {"rank": 256}, lambda o, i: 256 + o),
    ("randlora", {"rank": 32}, lambda o, i: min(o, i) // 32 * (32 + min(o, i))),
    ("shira", {"rank": 8}, lambda o, i: 8 * (i + o)),
    ("delora", {"rank": 8}, lambda o, i: 8 * (i + o) + 1),
    ("loha", {"rank": 8}, lambda o, i: 2 * 8 * (i + o)),
    ("lokr", {"rank": 8}, lambda o, i: lokr(o, i, 8)),
    ("lokr", {"rank": 64}, lambda o, i: lokr(o, i, 64)),
    ("fourierft", {"frequencies": 1000}, lambda o, i: 1000),
    ("oft", {"block_size": 32}, lambda o, i: i * 31 // 2),
    ("boft", {"block_size": 4}, lambda o, i: i * 4 + o),
    ("boft", {"block_size": 8, "factors": 2}, lambda o, i: 2 * i * 8 + o),
]


@pytest.fixture(scope="module")
def vit_base() -> Backbone:
    with torch.device("meta"):
        return gk.load_backbone("timm:vit_base_patch16_224", weights=None)


@pytest.mark.parametrize(
    ("name", "options", "formula"), FORMULAS, ids=[f"{f[0]}-{f[1]}" for f in FORMULAS]
)
def test_counts_follow_the_formulas(vit_base, name, options, formula) -> None:
    adapter = gk.attach(vit_base, name, layers=[11], **options)
    expected = sum(formula(out * 768, inputs * 768) for out, inputs in SHAPES)
    assert adapter.num_parameters == expected
    assert adapter.num_bytes == 4 * expected  # nothing but what trains is saved
    adapter.detach()


@pytest.mark.parametrize(("name", "usual"), [("oft", 32), ("boft", 4)])
@pytest.mark.parametrize(
    ("kind", "layers"),
    [("terramind_v1_large", "last:1"), ("timm:convnext_atto", "all")],
)
def test_the_default_block_is_the_largest_that_divides_each_layer(
    kind: str, layers: str, name: str, usual: int
) -> None:
    """TerraMind large has 2730 inputs, ConvNeXt atto 40; 32 divides neither."""
    with torch.device("meta"):
        backbone = gk.load_backbone(kind, weights=None)
    assert {c.name: c for c in gk.list_methods()}[name].why_not(backbone) is None
    adapter = gk.attach(backbone, name, layers=layers)
    found, targets = adapter.num_parameters, adapter.config["targets"]
    adapter.detach()
    pairs = gk.attach(backbone, "lora", layers=layers, targets=targets, rank=1)
    ins = [p.shape[1] for n, p in pairs.named_parameters() if "lora_A" in n]
    outs = [p.shape[0] for n, p in pairs.named_parameters() if "lora_B" in n]
    blocks = [max(b for b in range(2, usual + 1) if i % b == 0) for i in ins]
    assert max(blocks) == usual
    assert (min(blocks) < usual) == (name == "oft" or "terramind" in kind)
    if name == "oft":
        expected = sum(i * (b - 1) // 2 for i, b in zip(ins, blocks, strict=True))
    else:
        expected = sum(i * b for i, b in zip(ins, blocks, strict=True)) + sum(outs)
    assert found == expected


def test_a_width_without_a_small_divisor_takes_the_next_larger() -> None:
    from geopeft_kit.methods.peft.rotations import by_block_size
    from geopeft_kit.methods.targets import Target

    layers = {width: nn.Linear(width, 3) for width in (6, 37, 74, 64)}
    targets = [Target(f"fc{width}", layer) for width, layer in layers.items()]
    groups = by_block_size(None, 32, targets)
    assert {b: [t.path for t in group] for b, group in groups.items()} == {
        6: ["fc6"], 37: ["fc37"], 2: ["fc74"], 32: ["fc64"],
    }  # fmt: skip


# --- what each promises -------------------------------------------------------------


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_rotations_keep_the_singular_values(name: str) -> None:
    backbone = make("fused")
    adapter = gk.attach(backbone, name, layers=[0], targets=["fc1"], block_size=4)
    frozen = backbone.model.blocks[0].mlp.fc1.base_layer.weight
    for tensor, parameter in adapter.named_parameters():
        if "boft_s" not in tensor:
            nn.init.normal_(parameter, std=0.5)
    (layer,) = adapter.substitutes().values()
    merged = merged_tensors(layer)["weight"]
    assert not torch.allclose(merged, frozen, atol=1e-2)
    torch.testing.assert_close(
        torch.linalg.svdvals(merged), torch.linalg.svdvals(frozen), atol=1e-5, rtol=1e-4
    )


def test_butterfly_factors_carry_channels_across_blocks() -> None:
    reached = []
    for factors in (1, 3):
        backbone = make("fused")
        adapter = gk.attach(
            backbone,
            "boft",
            layers=[0],
            targets=["fc1"],
            block_size=4,
            factors=factors,
        )
        stir(adapter)
        (layer,) = adapter.substitutes().values()
        rotation, _ = layer.get_delta_weight("default")
        reached.append(int((rotation[0] != 0).sum()))
    assert reached == [4, 16]


def test_vera_draws_its_matrices_from_the_seed_and_saves_vectors_only(
    tmp_path: Path,
) -> None:
    outputs = {}
    for run, seed in enumerate((1, 1, 2)):
        backbone = make("fused")
        torch.manual_seed(run)
        adapter = gk.attach(backbone, "vera", rank=8, seed=seed)
        stir(adapter)
        outputs[run] = output(backbone)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)
    assert adapter.num_parameters == 6 * (4 * 8 + 7 * 192)
    folder = adapter.save(tmp_path / "vera")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < adapter.num_bytes + 30_000
    shared = {id(layer.vera_A) for layer in backbone.modules() if _is_vera(layer)}
    assert len(shared) == 1


def _is_vera(module: nn.Module) -> bool:
    return hasattr(module, "vera_A")


@pytest.mark.parametrize("name", ["randlora", "shira"])
def test_another_seed_is_another_adapter(name: str) -> None:
    outputs = []
    for run, seed in enumerate((1, 1, 2)):
        backbone = make("fused")
        torch.manual_seed(run)
        adapter = gk.attach(backbone, name, rank=8, seed=seed, layers=[0])
        stir(adapter)
        outputs.append(output(backbone))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)


def test_shira_changes_the_promised_entries_only() -> None:
    backbone = make("fused")
    before = backbone.model.blocks[0].mlp.fc1.weight.detach().clone()
    adapter = gk.attach(backbone, "shira", rank=2, targets=["fc1"], layers=[0])
    stir(adapter)
    adapter.merge()
    change = backbone.model.blocks[0].mlp.fc1.weight.detach() - before
    assert change.count_nonzero() == 2 * (192 + 768)
    assert torch.linalg.matrix_rank(change) > 100  # sparse, and of high rank
    with pytest.raises(ValueError, match="rank=154 is too large.*up to 153"):
        gk.attach(backbone, "shira", rank=154, targets=["fc1"])


def test_delora_moves_no_weight_further_than_its_bound() -> None:
    backbone = make("fused")
    options = {"rank": 2, "bound": 0.5, "targets": ["fc1"], "layers": [0]}
    adapter = gk.attach(backbone, "delora", **options)
    for name, parameter in adapter.named_parameters():
        if "lambda" not in name:
            nn.init.normal_(parameter, std=9)
    (layer,) = adapter.substitutes().values()
    frozen = layer.get_base_layer().weight
    moved = merged_tensors(layer)["weight"] - frozen
    lengths = frozen.norm(dim=0)
    assert 0.1 < (moved / lengths).norm() <= 0.5


def test_orthogonal_start_trains_both_factors_from_the_first_step() -> None:
    backbone = make("fused")
    start = output(backbone)
    adapter = gk.attach(backbone, "lora", rank=4, init="orthogonal")
    torch.testing.assert_close(output(backbone), start, atol=1e-5, rtol=1e-5)
    sum(m.square().mean() for m in backbone(image(backbone))).backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())


def test_attaching_boft_neither_compiles_nor_warns(recwarn) -> None:
    gk.attach(make("fused"), "boft", block_size=4, layers=[0])
    from peft.tuners.boft import layer

    assert layer._FBD_CUDA is None
    assert not [w for w in recwarn if "CUDA" in str(w.message)]


# --- AdaLoRA: the budget ------------------------------------------------------------


def small_adalora() -> tuple[Backbone, Any, RankBudget]:
    backbone = make("fused")
    torch.manual_seed(3)
    adapter = gk.attach(backbone, "adalora", rank=2, start_rank=4, layers="last:2")
    return backbone, adapter, adapter.training_rule(10)


def live(adapter: Any) -> list[int]:
    """Ranks: living directions of each target."""
    named = adapter.named_parameters()
    return [int(p.count_nonzero()) for name, p in named if "lora_E" in name]


def test_allocation_and_penalty_are_those_of_peft() -> None:
    from peft import AdaLoraConfig, AdaLoraModel

    _, adapter, budget = small_adalora()
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=4,
        tinit=1,
        tfinal=3,
        total_step=10,
        target_modules=["fc1", "fc2"],
    )

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=self.fc2(self.fc1(x)).square().mean())

    torch.manual_seed(0)
    theirs = AdaLoraModel(Inner(), config, "default")
    budget.layers = copy.deepcopy(nn.ModuleList(theirs.model.children()))
    budget.allocator._set_budget_scheduler(budget.layers)
    assert (budget.last, budget.allocator.peft_config.tinit) == (7, 1)
    optimisers = [
        torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
        for net in (theirs, budget.layers)
    ]
    ranks = []
    for step in range(1, 11):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        first, second = budget.layers
        ours = second(first(x)).square().mean() + budget.penalty()
        other = theirs(x).loss
        torch.testing.assert_close(ours, other)
        for loss in (ours, other):
            loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        theirs.update_and_allocate(step)
        budget.after_step(step)
        for optimiser in optimisers:
            optimiser.zero_grad()
        pairs = zip(theirs.model.children(), budget.layers, strict=True)
        for a, b in pairs:
            assert torch.equal(a.lora_E["default"], b.lora_E["default"])
        entries = [layer.lora_E["default"] for layer in budget.layers]
        ranks.append(sum(int(e.count_nonzero()) for e in entries))
    assert ranks[0] == 8
    assert ranks[6:] == [4, 4, 4, 4]


@pytest.mark.slow
def test_fit_prunes_to_the_budget_and_saving_keeps_it(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data", chips=12, size=16)
    torch.manual_seed(0)
    model = make_model("adalora", rank=2, start_rank=4)
    adapter = model.backbone.adapter
    targets = len(live(adapter))
    gk.fit(model, data, epochs=3, progress=False)
    ranks = live(adapter)
    assert sum(ranks) == 2 * targets
    assert len(set(ranks)) > 1  # some layers keep more than others
    expected = output(model.backbone)
    folder = adapter.save(tmp_path / "adapter")
    adapter.detach()
    loaded = gk.load_adapter(model.backbone, folder)
    assert live(loaded) == ranks
    assert torch.equal(output(model.backbone), expected)
    loaded.merge()
    torch.testing.assert_close(output(model.backbone), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_prunes_as_one_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geopeft_kit.training.callbacks import Checkpoint

    data = toy_data(tmp_path / "data", chips=12, size=16)

    def train(folder: str, resume: bool = False) -> Any:
        torch.manual_seed(0)
        model = make_model("adalora", rank=2, start_rank=4)
        where = tmp_path / folder
        gk.fit(model, data, epochs=3, folder=where, resume=resume, progress=False)
        return model.backbone.adapter

    whole = train("whole")
    write = Checkpoint.on_train_epoch_end

    def write_and_die(self: Any, trainer: Any, task: Any) -> None:
        write(self, trainer, task)
        if trainer.current_epoch == 1:
            raise InterruptedError

    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", write_and_die)
    with pytest.raises(InterruptedError):
        train("part")
    monkeypatch.undo()
    resumed = train("part", resume=True)
    for (name, a), b in zip(
        whole.named_parameters(), resumed.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_short_runs_reach_the_budget_too(steps: int) -> None:
    backbone, adapter, _ = small_adalora()
    budget = adapter.training_rule(steps)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        loss = sum(m.square().mean() for m in backbone(image(backbone, seed=step)))
        (loss + budget.penalty()).backward()
        optimiser.step()
        budget.after_step(step)
    assert sum(live(adapter)) == 2 * len(live(adapter))


# --- state-space models -------------------------------------------------------------


def test_efficientvim_gives_its_stem_and_its_stages() -> None:
    import timm

    backbone = make("efficientvim_m1")
    assert backbone.strides == [8, 16, 32, 64]
    assert backbone.channels == [64, 128, 192, 320]
    assert len(backbone.blocks) == 6
    assert not any("norm" == name.split(".")[0] for name in backbone.model.state_dict())
    plain = timm.create_model("efficientvim_m1", num_classes=0).eval()
    plain.load_state_dict(backbone.model.state_dict(), strict=False)
    picture = image(backbone)
    with torch.no_grad():
        maps = backbone(picture)
        stages = plain.forward_intermediates(
            backbone.normalised(picture), intermediates_only=True
        )
    assert [m.shape[1] for m in maps] == backbone.channels
    assert [picture.shape[-1] // m.shape[-1] for m in maps] == backbone.strides
    for ours, theirs in zip(maps[1:], stages, strict=True):
        assert torch.equal(ours, theirs)


SERVED = [("efficientvim_m1", name) for name in ("lora", "ia3", "bias", "norm")]
SERVED += [("mambaout_femto", name) for name in ("lora", "norm")]


@pytest.mark.parametrize(("kind", "name"), SERVED)
def test_methods_serve_state_space_models(kind: str, name: str) -> None:
    backbone = make(kind)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    start = output(backbone)
    adapter = gk.attach(backbone, name)
    torch.testing.assert_close(output(backbone), start, atol=1e-5, rtol=1e-5)
    backbone.train()
    sum(m.square().mean() for m in backbone(image(backbone))).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    backbone.eval()
    stir(adapter)
    changed = output(backbone)
    assert not torch.allclose(changed, start, atol=1e-4)
    adapter.deactivate()
    assert torch.equal(output(backbone), start)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    adapter.activate()
    adapter.merge()
    torch.testing.assert_close(output(backbone), changed, atol=1e-4, rtol=1e-4)


def test_default_targets_of_state_space_models() -> None:
    from geopeft_kit.methods.targets import default_targets

    blocks = make("efficientvim_m1").blocks
    kinds = (nn.Linear, nn.Conv2d, nn.Conv1d)
    assert default_targets(blocks, kinds) == (
        "BCdt_proj.conv",
        "hz_proj.conv",
        "out_proj.conv",
        "fc1.conv",
        "fc2.conv",
    )
    assert default_targets(blocks) == ("fc1.conv", "fc2.conv")  # without Conv1d
    assert default_targets(make("mambaout_femto").blocks) == ("fc1", "fc2")
