"""Frozen weights held in fewer bits, while what trains stays in 32.

Mixed precision computes a matrix product in bf16 but holds the matrix in 32 bits, and
keeps a bf16 copy of it for the backward pass besides. A frozen matrix needs neither:
held in bf16 it takes half, and the product is the same bit for bit.

"nf4" is QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3): bitsandbytes'
`Linear4bit` replaces each frozen linear layer. It holds the matrix in 16 levels with a
scale for every 64 numbers, and turns it into bf16 for each product. Not measured on a
GPU. Taught in notebook 08.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from geopeft_kit.methods import Adapter
from geopeft_kit.model import Model

FROZEN_PRECISIONS = ("bf16", "nf4")
SCALE_BLOCK = 64  # numbers that share a scale of one byte (double quantisation)
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

    Norms, positions and the like are small, and computed with in 32 bits.
    """
    layers = (m for m in model.backbone.modules() if isinstance(m, _LAYERS))
    found = (p for layer in layers for p in layer.parameters(recurse=False))
    return list({id(p): p for p in found if not p.requires_grad}.values())


@contextmanager
def frozen_held_in(model: Model, how: str | None) -> Iterator[None]:
    """Hold frozen matrices and kernels in fewer bits inside this context.

    With "bf16" the 32-bit originals go to a temporary file of the size of the weights
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


def check_quantised(model: Model, device: torch.device) -> None:
    """Raise ValueError without CUDA or bitsandbytes, or for a method but LoRA."""
    adapter: Adapter | None = getattr(model.backbone, "adapter", None)
    if adapter is None or adapter.name != "lora":
        name = "full" if adapter is None else adapter.name
        raise ValueError(
            f"frozen_precision='nf4' serves 'lora'; {name!r} reads or trains the "
            "matrices themselves. Attach 'lora', or choose frozen_precision='bf16'."
        )
    if device.type != "cuda":
        raise ValueError(
            "frozen_precision='nf4' (QLoRA) needs a CUDA device, and this run is on "
            f"a {device.type}. Choose frozen_precision='bf16' here."
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "frozen_precision='nf4' needs bitsandbytes, which is not installed. "
            "`pip install bitsandbytes`, or choose frozen_precision='bf16'."
        ) from error


def frozen_linears(model: Model) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(owner, name, layer) of the backbone's plain frozen linear layers."""
    return [
        (owner, name, layer)
        for owner in model.backbone.modules()
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear and not layer.weight.requires_grad
    ]


def saved_bytes(model: Model) -> int:
    """Bytes that 4 bits a number, and a byte for every 64, save on `frozen_linears`."""
    weights = {id(layer.weight): layer.weight for *_, layer in frozen_linears(model)}
    return sum(
        w.numel() * w.element_size() - w.numel() // 2 - -(-w.numel() // SCALE_BLOCK)
        for w in weights.values()
    )


@contextmanager
def quantised(model: Model) -> Iterator[None]:
    """Let frozen linear layers compute from 4 bits; main memory holds the originals."""
    places = frozen_linears(model)
    kept = [layer.weight.data for *_, layer in places]
    try:
        for index, (owner, name, layer) in enumerate(places):
            owner._modules[name] = _four_bits(layer)
            kept[index] = layer.weight.data.to("cpu")
            layer.weight.data = layer.weight.data.new_empty(0)  # the device's copy goes
        yield
    finally:
        for (owner, name, layer), data in zip(places, kept, strict=True):
            layer.weight.data = data.to(layer.weight.device)
            owner._modules[name] = layer


def _four_bits(layer: nn.Linear) -> Any:
    """The layer of bitsandbytes with the same numbers, rounded to NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    new.weight = Params4bit(
        layer.weight.data.to(torch.bfloat16).clone(),
        requires_grad=False,
        quant_type="nf4",
        module=new,
    )
    if layer.bias is not None:  # a copy: the library turns it into bf16 where it is
        new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    # LoRA adds into the output in place, which autograd forbids on a custom function's
    # own output; peft clones it likewise.
    new.register_forward_hook(lambda module, inputs, output: output.clone())
    return new.to(layer.weight.device)  # the numbers are rounded on the way
