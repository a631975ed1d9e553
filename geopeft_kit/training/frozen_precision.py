"""Frozen weights held in fewer bits, while what trains stays in 32.

Mixed precision computes a matrix product in bf16 but holds the matrix in 32 bits, and
keeps a bf16 copy of it for the backward pass besides. A frozen matrix needs neither:
held in bf16 it takes half, and the product is the same bit for bit. Taught in
notebook 08.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from geopeft_kit.model import Model
from geopeft_kit.training.quantised_weights import quantised

FROZEN_PRECISIONS = ("bf16", "nf4")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_frozen_precision(how: str | None, precision: str) -> None:
    """Raise ValueError for an unknown word, or a precision without such weights."""
    if how is None:
        return
    if how not in FROZEN_PRECISIONS:
        raise ValueError(
            f"frozen_precision is {how!r}; allowed are None, "
            f"{', '.join(map(repr, FROZEN_PRECISIONS))}."
        )
    if precision != "bf16-mixed":
        raise ValueError(
            f"frozen_precision={how!r} needs precision='bf16-mixed', which computes "
            f"with such weights; precision is {precision!r}."
        )


def frozen_weights(model: Model) -> list[nn.Parameter]:
    """Weights and biases of the backbone's frozen layers that compute in bf16.

    Those are matrices and kernels. Norms, positions and the like are small, and mixed
    precision computes with them in 32 bits.
    """
    found = {}
    for module in model.backbone.modules():
        if isinstance(module, _LAYERS):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    found[id(parameter)] = parameter
    return list(found.values())


@contextmanager
def frozen_held_in(model: Model, how: str | None) -> Iterator[None]:
    """Hold frozen matrices and kernels in fewer bits inside this context.

    With "bf16" the 32-bit originals wait in a temporary file of the size of the weights
    (OSError if there is no room); "nf4" is `quantised`. Methods that read a frozen
    matrix themselves (DoRA, OFT, SLR, ...) read the rounded one.
    """
    if how == "nf4":
        with quantised(model):
            yield
        return
    weights = frozen_weights(model) if how else []
    if not weights:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="geopeft_") as folder:
        path = Path(folder) / "frozen.safetensors"
        save_file({str(i): w.data.contiguous() for i, w in enumerate(weights)}, path)
        to_bf16(weights)
        try:
            yield
        finally:
            with safe_open(path, "pt") as file:
                for index, weight in enumerate(weights):
                    weight.data = file.get_tensor(str(index)).to(weight.device).clone()


def to_bf16(weights: list[nn.Parameter]) -> None:
    """Turn parameters into bf16 where they are."""
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
