"""The memory estimate agrees with what the tracker measures, and touches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import geopeft_kit as gk
from geopeft_kit.training.memory import CARDS, usable_mib
from geopeft_kit.training.optimisers import make_optimiser, optimiser_state_bytes
from geopeft_kit.training.tracker import optimiser_bytes
from tests.toy import BANDS, toy_data

SLOW = pytest.mark.slow


def build(name: str, method: str, decoder: str, task: str = "segmentation"):
    torch.manual_seed(0)
    options = {} if name.startswith("geopeft") else {"new_bands": "random"}
    backbone = gk.load_backbone(name, BANDS, weights=None, **options)
    gk.attach(backbone, method)
    return gk.build_model(backbone, decoder=decoder, task=task)


def check_against_run(model, data: gk.ChipData, **levers) -> None:
    """Weights, gradients, optimiser exactly; activations within a tenth."""
    estimate = gk.estimate_memory(
        model, data.batch_size, image_size=data.image_size, **levers
    )
    found = gk.fit(
        model, data, 1, head_start="none", progress=False, **levers
    ).resources
    for cause in ("weights", "gradients", "optimiser"):
        predicted = getattr(estimate, f"{cause}_mib")
        assert predicted == pytest.approx(getattr(found, f"{cause}_mib"), abs=1e-9)
    assert estimate.activations_mib == pytest.approx(found.activations_mib, rel=0.1)


@pytest.mark.parametrize(
    "method",
    [
        "bias",
        *(pytest.param(m, marks=SLOW) for m in ("full", "frozen", "lora", "vpt")),
    ],
)
def test_estimate_is_what_the_run_takes(method: str, tmp_path: Path) -> None:
    check_against_run(build("geopeft_tiny", method, "linear"), toy_data(tmp_path))


@SLOW
@pytest.mark.parametrize("name", ["timm:resnet18", "timm:convnext_atto"])
@pytest.mark.parametrize("decoder", ["unet", "upernet"])
def test_estimate_of_convolutional_networks(
    name: str, decoder: str, tmp_path: Path
) -> None:
    data = toy_data(tmp_path, size=64, chips=12)
    check_against_run(build(name, "full", decoder), data)


@SLOW
@pytest.mark.parametrize(
    "levers",
    [
        {"checkpointing": "blocks"},
        {"checkpointing": "mlp"},
        {"precision": "bf16-mixed"},
        {"frozen_precision": "bf16"},
        {"frozen_precision": "bf16", "checkpointing": "blocks"},
        {"optimiser": "fused"},
    ],
    ids=str,
)
def test_estimate_knows_the_levers(levers: dict, tmp_path: Path) -> None:
    model = build("geopeft_tiny", "lora", "unet")
    check_against_run(model, toy_data(tmp_path), **levers)


@SLOW
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_estimate_of_other_tasks(task: str, tmp_path: Path) -> None:
    decoder = "linear"
    check_against_run(
        build("geopeft_tiny", "lora", decoder, task), toy_data(tmp_path, task)
    )


def test_the_model_is_left_alone() -> None:
    model = build("geopeft_tiny", "bias", "linear").eval()
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    gk.estimate_memory(model, 2, checkpointing="blocks", frozen_precision="bf16")
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())
    for name, tensor in model.state_dict().items():
        address, value = before[name]
        assert tensor.data_ptr() == address and torch.equal(tensor, value), name


@SLOW
def test_a_model_without_numbers_has_the_same_estimate() -> None:
    estimates = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = build("geopeft_tiny", "lora", "unet")
        estimates.append(gk.estimate_memory(model, 2))
    assert estimates[0] == estimates[1]


@SLOW
def test_full_keeps_the_originals_and_lora_does_not() -> None:
    """`attach(..., "full")` trains copies, so that detach can bring all back."""
    full = gk.estimate_memory(build("geopeft_tiny", "full", "linear"), 2)
    lora = gk.estimate_memory(build("geopeft_tiny", "lora", "linear"), 2)
    network = gk.load_backbone("geopeft_tiny", weights=None).model
    trained = sum(p.numel() * 4 for p in network.parameters()) / 2**20
    assert full.originals_mib == pytest.approx(trained, rel=0.02)
    assert lora.originals_mib == 0


@SLOW
def test_largest_batch_is_the_largest() -> None:
    model = build("geopeft_tiny", "lora", "linear")
    estimate = gk.estimate_memory(model, 2)
    gib = 0.5
    largest = estimate.largest_batch(gib)
    assert gk.estimate_memory(model, largest).fits(gib)
    assert not gk.estimate_memory(model, int(1.03 * largest) + 1).fits(gib)
    assert estimate.largest_batch(0.001) == 0


def test_words_and_tables() -> None:
    estimate = gk.estimate_memory(build("geopeft_tiny", "frozen", "linear"), 2)
    assert "fits a 16 GB T4 at batch 2" in str(estimate)
    assert "does not fit" in estimate.sentence(0.001)
    assert f"{estimate.total_mib:,.1f}" in estimate._repr_html_()
    assert estimate.to_dict()["total_mib"] == estimate.total_mib
    assert all(usable_mib(card) < CARDS[card][1] * 1024 for card in CARDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "1 or more"),
        ({"checkpointing": "all"}, "allowed are None, blocks, mlp"),
        ({"frozen_precision": "int3"}, "allowed are None, 'bf16', 'nf4'"),
        ({"frozen_precision": "bf16", "precision": "32-true"}, "needs precision="),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.estimate_memory(build("geopeft_tiny", "lora", "linear"), **arguments)


def test_unknown_cards() -> None:
    with pytest.raises(ValueError, match="known are T4"):
        usable_mib("T5")
    with pytest.raises(ValueError, match="above 0"):
        usable_mib(-1)


def test_optimiser_state_is_counted_to_the_byte() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 3))
    optimiser = make_optimiser([{"params": list(layers.parameters())}], "fused")
    layers(torch.randn(2, 70)).sum().backward()
    optimiser.step()
    sizes = [p.numel() for p in layers.parameters()]
    assert optimiser_state_bytes(sizes) == optimiser_bytes(optimiser)
