"""TerraTorch's outputs, for the tests of single backbones.

The outputs are in `tests/fixtures/`, made by `benchmarks/make_parity_fixtures.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from formula_weights import weight
from safetensors import safe_open
from torch import Tensor

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
