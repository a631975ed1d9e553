"""QLoRA: the frozen matrices held in 4 bits while LoRA trains beside them, on a GPU.

bitsandbytes' `Linear4bit` takes the place of each frozen linear layer, as `peft` has it
in its own route: the matrix lies in 16 levels (NF4) with a scale for every 64 numbers,
and is turned into bf16 for each product. Written after the library's interface; not
measured on a GPU. Taught in notebook 08.

Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from geopeft_kit.methods import Adapter
from geopeft_kit.model import Model

SCALE_BLOCK = 64  # numbers that share a scale of one byte (double quantisation)


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
    """What 4 bits save on the weights of `frozen_linears`, against their present type.

    Half a byte a number, a byte for every 64 of them.
    """
    weights = {id(layer.weight): layer.weight for *_, layer in frozen_linears(model)}
    return sum(
        w.numel() * w.element_size() - w.numel() // 2 - -(-w.numel() // SCALE_BLOCK)
        for w in weights.values()
    )


@contextmanager
def quantised(model: Model) -> Iterator[None]:
    """Let the frozen linear layers compute from 4 bits inside this context.

    The originals leave the device meanwhile: their numbers wait in main memory.
    """
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
