"""The tracker counts what autograd keeps, to the byte, and times what it says."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import geopeft_kit as gk
from geopeft_kit.training.hardware import PeakMemory
from geopeft_kit.training.tracker import (
    Tracker,
    count_saved_bytes,
    optimiser_bytes,
    weight_bytes,
)
from tests.test_training import make_model
from tests.toy import toy_data


def test_saved_bytes_by_hand() -> None:
    """Linear keeps its input, ReLU its output; the weights do not count."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    image = torch.randn(32, 8)
    with count_saved_bytes(model) as saved:
        model(image).sum().backward()
    hidden = 32 * 16 * 4  # ReLU's output is the second layer's input: one storage
    assert sum(saved.values()) == 32 * 8 * 4 + hidden


def test_counting_lets_go_of_a_step_that_failed() -> None:
    """Without a backward pass nothing else would break the graph's circles."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))
    with count_saved_bytes(model):
        hidden = model[1](model[0](torch.randn(4, 8)))
        output = model[2](hidden)
    storage = weakref.ref(hidden.untyped_storage())
    del hidden, output
    gc.collect()
    assert storage() is None


def test_nothing_is_saved_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).requires_grad_(False)
    with count_saved_bytes(model) as saved:
        model(torch.randn(4, 8))
    assert not saved


def test_saved_bytes_grow_with_the_batch() -> None:
    sizes = []
    model = make_model("lora")
    for batch in (1, 2):
        with count_saved_bytes(model) as saved:
            model(torch.rand(batch, 6, 32, 32)).sum()
        sizes.append(sum(saved.values()))
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)


def test_optimiser_state_is_two_moments() -> None:
    model = nn.Linear(10, 10)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 10)).sum().backward()
    optimiser.step()
    steps = 2 * 4  # AdamW also keeps a step counter per tensor
    assert optimiser_bytes(optimiser) == 2 * weight_bytes(model) + steps


def test_peak_memory_sees_a_block_come_and_go() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    block = torch.ones(64 * 2**20 // 4)  # 64 MiB, touched
    memory.sample()
    del block
    assert memory.peak() - memory.floor > 48 * 2**20


@pytest.mark.parametrize(
    "method",
    ["frozen", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "full"))],
)
def test_resources_of_a_run(method: str, tmp_path: Path) -> None:
    data = toy_data(tmp_path)
    model = make_model(method)
    run = gk.fit(model, data, epochs=2, progress=False)
    resources = run.resources
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 / 2**20
    assert resources.gradients_mib == pytest.approx(trained)
    assert resources.optimiser_mib == pytest.approx(2 * trained, rel=0.01)
    assert resources.weights_mib == pytest.approx(weight_bytes(model) / 2**20)
    assert 0 < resources.step_ms <= resources.step_ms_p90
    assert resources.timed_steps == 8 - Tracker().warmup
    assert resources.samples_per_second == pytest.approx(4000 / resources.step_ms)
    assert resources.peak_mib > resources.weights_mib


@pytest.mark.slow
def test_activations_order_is_probe_lora_full(tmp_path: Path) -> None:
    data = toy_data(tmp_path)
    kept = [
        gk.fit(make_model(m), data, 1, progress=False).resources.activations_mib
        for m in ("frozen", "lora", "full")
    ]
    assert kept[0] < 0.2 * kept[1]
    assert kept[1] < kept[2]


def test_no_step_no_resources() -> None:
    with pytest.raises(RuntimeError, match="saw no training step"):
        Tracker().resources()
