"""Several adapters as one: the weighted sum of what they change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from method_table import CARDS, SMALL, make, output, stir
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.methods import Adapter
from geopeft_kit.methods.adapter import attachments_of
from geopeft_kit.methods.base import combining

COMBINE = combining()


def two(name: str, backbone: Backbone, *options: dict[str, Any]) -> list[Adapter]:
    """Two different adapters of one method."""
    adapters = []
    for number, own in enumerate(options or ({}, {})):
        adapter = gk.attach(backbone, name, **(SMALL[name] | own))
        stir(adapter)
        for parameter in adapter.parameters():
            parameter.data.mul_(1 + 0.3 * number)
        adapters.append(adapter)
    return adapters


def merged(backbone: Backbone, number: int) -> dict[str, Tensor]:
    """The weights after merging one of the adapters, in a copy."""
    twin = copy.deepcopy(backbone)
    for other, adapter in enumerate(list(attachments_of(twin).adapters)):
        if other != number:
            adapter.detach()
    attachments_of(twin).adapters[0].merge()
    return twin.state_dict()


@pytest.mark.parametrize("name", sorted(set(COMBINE) - {"frozen"}))
def test_weights_change_by_the_weighted_sum(name: str) -> None:
    backbone = make("fused")
    frozen = make("fused").state_dict()
    options = [{}, {"rank": 3, "alpha": 7, "rslora": True}] if name == "lora" else []
    adapters = two(name, backbone, *options)
    changes = [merged(backbone, number) for number in range(2)]
    joint = gk.combine(adapters, [0.7, -0.2])
    assert joint.active
    assert all(adapter.attached for adapter in adapters)
    for adapter in adapters:
        adapter.detach()
    joint.merge()
    moved = 0.0
    for key, value in backbone.state_dict().items():
        first, second = (change[key] - frozen[key] for change in changes)
        expected = frozen[key] + 0.7 * first - 0.2 * second
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        moved = max(moved, float((value - frozen[key]).abs().max()))
    assert moved > 1e-4


def test_the_default_is_the_mean_and_one_adapter_is_itself(tmp_path) -> None:
    backbone = make("fused")
    first, second = two("bias", backbone)
    joint = gk.combine([first, second])
    for name, tensor in joint.tensors().items():
        mean = (first.tensors()[name] + second.tensors()[name]) / 2
        torch.testing.assert_close(tensor, mean)
    first.activate()
    expected = output(backbone)
    gk.combine([first])
    torch.testing.assert_close(output(backbone), expected, atol=1e-5, rtol=1e-5)
    folder = joint.save(tmp_path / "joint")
    joint.activate()
    other = make("fused")
    gk.load_adapter(other, folder)
    assert torch.equal(output(other), output(backbone))


@pytest.mark.parametrize("name", sorted(set(CARDS) - set(COMBINE) - {"upetu"}))
def test_methods_whose_changes_do_not_add_up_are_refused(name: str) -> None:
    kind = "convnext" if name == "conv_adapter" else "fused"
    load = {"bands": "hls", "new_bands": "ignore"} if name == "deflect" else {}
    backbone = make(kind, load)
    adapter = gk.attach(backbone, name, **SMALL[name])
    with pytest.raises(ValueError, match="cannot be combined.*full.*lora"):
        gk.combine([adapter, adapter])
    assert backbone.adapter is adapter


def test_what_does_not_belong_together_is_refused() -> None:
    backbone = make("fused")
    lora, other = two("lora", backbone, {}, {"targets": ["fc1"]})
    bias = gk.attach(backbone, "bias")
    elsewhere = gk.attach(make("fused"), "bias")
    faults = {
        "same targets": ([lora, other], None),
        r"one method.*\['bias', 'lora'\]": ([lora, bias], None),
        "one backbone object": ([bias, elsewhere], None),
        "or more adapters": ([], None),
        "a finite number for each of the 1": ([bias], [1.0, 2.0]),
        "weights=.nan": ([bias], [float("nan")]),
    }
    for message, (adapters, weights) in faults.items():
        with pytest.raises(ValueError, match=message):
            gk.combine(adapters, weights)
    pissa = gk.attach(backbone, "lora", rank=2, init="pissa")
    with pytest.raises(ValueError, match="cannot be combined"):
        gk.combine([pissa, pissa])
