"""What the tests of single backbones share: TerraTorch's outputs, thin twins, methods.

The outputs are in `tests/fixtures/`, made by `benchmarks/make_parity_fixtures.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from formula_weights import weight
from method_table import CARDS, ROWS
from safetensors import safe_open
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit import backbones
from geopeft_kit.backbones import Backbone, find_card
from geopeft_kit.backbones.card import BackboneCard

FIXTURES = Path(__file__).parent / "fixtures"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Fixture:
    """One network of the upstream, thin, with weights by formula.

    Attributes:
        outputs: tokens by case, level after level.
        state: the checkpoint in the upstream's keys.
    """

    def __init__(self, name: str) -> None:
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            shapes = json.loads(file.metadata()["shapes"])
        self.state = {key: weight(key, shape) for key, shape in shapes.items()}
        self.outputs: dict[str, list[Tensor]] = {}
        for name, tensor in tensors.items():
            case, _, rest = name.partition("|")
            if case == "buffer":
                self.state[rest] = tensor
            else:
                self.outputs.setdefault(case, []).append(tensor)

    def write(self, folder: Path, **around: Any) -> Path:
        """The checkpoint as the upstream's training scripts write it."""
        path = folder / "upstream.pt"
        content = {"state_dict": self.state, "args": argparse.Namespace(lr=1.0)}
        torch.save({**content, **around}, path)
        return path


def thin(name: str, **changes: Any) -> BackboneCard:
    """A card with other sizes; entries of `architecture` may be given by name."""
    card = find_card(name)
    inside = {key: changes.pop(key) for key in list(changes) if key == "heads"}
    architecture = {**card.architecture, **inside}
    return dataclasses.replace(card, depth=2, architecture=architecture, **changes)


def load(
    monkeypatch: Any, card: BackboneCard, weights: Any, **options: Any
) -> Backbone:
    """`load_backbone` with a card put in the place of the one of its name."""
    monkeypatch.setitem(backbones.CARDS, card.name, card)
    return backbones.load_backbone(card.name, weights=weights, **options)


def as_tokens(maps: list[Tensor], dates: int = 1) -> list[Tensor]:
    """The maps after block 1 and 2 as patch tokens, date by date: (B, T*h*w, D)."""
    kept = (maps[0], maps[-1])  # four maps of two blocks are two, each twice
    return [
        m.unflatten(1, (dates, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3) for m in kept
    ]


def assert_same_tokens(
    maps: list[Tensor], expected: list[Tensor], dates: int = 1
) -> None:
    """The kit's maps are the upstream's patch tokens; prefix tokens are left aside."""
    ours = as_tokens(maps, dates)[-len(expected) :]
    for tokens, theirs in zip(ours, expected, strict=True):
        theirs = theirs[:, -tokens.shape[1] :]
        assert float(theirs.std()) > 0.1, "the fixture is too flat to tell anything"
        torch.testing.assert_close(tokens, theirs, **CLOSE)


def without_gradient(backbone: Backbone, image: Tensor, meta: Any) -> set[str]:
    """Names of the network's own parameters that its maps do not depend on."""
    with torch.enable_grad():
        sum(m.square().mean() for m in backbone(image, meta)).backward()
    parameters = dict(backbone.model.named_parameters())
    names = {name for name, p in parameters.items() if p.grad is None}
    backbone.zero_grad()
    return names


EVERYDAY = ("lora", "vpt", "bias", "norm")


def check_methods(
    backbone: Backbone, image: Tensor, meta: Any = None, names: Any = CARDS
) -> set[str]:
    """Methods of the table: identity where promised, training, exact detach.

    Args:
        backbone: with two blocks or more.
        image: what it reads.
        meta: date and place, or None.
        names: the methods to try.

    Returns:
        Names of the methods that the backbone takes; the others said why not.
    """
    unused = without_gradient(backbone, image, meta)
    with torch.no_grad():
        start = backbone(image, meta)
    state = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    served = set()
    for row in ROWS:
        if row.load or row.name not in names:
            continue
        options = {"interactions": 2} if row.name == "vit_adapter" else {}
        try:
            adapter = gk.attach(backbone, row.name, **row.options, **options)
        except ValueError as error:
            assert backbone.card.name in str(error), "refused without a reason"
            continue
        served.add(row.name)
        with torch.enable_grad():
            maps = backbone(image, meta)
        if row.name != "vit_adapter":  # it makes maps of its own
            assert [m.shape[1] for m in maps] == backbone.channels
        if adapter.identity_at_start:
            for one, other in zip(maps, start, strict=True):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        else:
            assert not torch.equal(maps[-1], start[-1]), row
        if adapter.num_parameters:
            with torch.enable_grad():
                sum(m.square().mean() for m in maps).backward()
            seen = {name: p.grad for name, p in adapter.named_parameters()}
            assert {name for name, grad in seen.items() if grad is None} <= unused
            assert any(g.any() for g in seen.values() if g is not None), row
        adapter.detach()
        with torch.no_grad():
            for one, other in zip(backbone(image, meta), start, strict=True):
                assert torch.equal(one, other), row
        after = backbone.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[key], state[key]) for key in state), row
    return served
