"""Transformer blocks from a state dict by PyTorch functions alone.

Shared by the tests of backbone families. Nothing here is taken from the package's own
networks, so that two independent computations are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
State = dict[str, Tensor]


def random_state(shapes: dict[str, Sequence[int]]) -> State:
    """Random tensors by name: gains around 1, everything else around 0."""
    state = {}
    for name, shape in shapes.items():
        gain = "norm" in name and name.endswith("weight")
        fan = math.prod(shape[1:]) if len(shape) > 1 else 25
        state[name] = float(gain) + torch.randn(*shape) / math.sqrt(fan)
    return state


def block_shapes(prefix: str, width: int, split: bool) -> dict[str, Sequence[int]]:
    """Names and shapes of a pre-norm block with an MLP of four times the width."""
    attention = {"q": width, "k": width, "v": width} if split else {"qkv": 3 * width}
    layers = {f"attn.{name}": (rows, width) for name, rows in attention.items()}
    layers |= {
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    shapes: dict[str, Sequence[int]] = {}
    for name in ("norm1", "norm2"):
        shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    for name, shape in layers.items():
        shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    return shapes


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def block(state: State, prefix: str, x: Tensor, heads: int, eps: float) -> Tensor:
    """One pre-norm transformer block, (B, N, D) -> (B, N, D)."""
    y = norm(state, f"{prefix}norm1", x, eps)
    if f"{prefix}attn.qkv.weight" in state:
        parts = linear(state, f"{prefix}attn.qkv", y).chunk(3, dim=-1)
    else:
        parts = [linear(state, f"{prefix}attn.{name}", y) for name in "qkv"]
    q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    x = x + linear(state, f"{prefix}attn.proj", mixed)
    y = norm(state, f"{prefix}norm2", x, eps)
    y = F.gelu(linear(state, f"{prefix}mlp.fc1", y))
    return x + linear(state, f"{prefix}mlp.fc2", y)


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def stirred(module: nn.Module) -> nn.Module:
    """Move zero biases, unit gains and constant tokens, so that each one shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()
