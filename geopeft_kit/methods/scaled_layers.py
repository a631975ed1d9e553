"""The layers of SLR: a frozen one, a parallel low-rank path, and two scalings.

Source: Scheibenreif, Mommert and Borth, Parameter Efficient Self-Supervised Geospatial
Domain Adaptation, CVPR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


class ScaledLowRank(nn.Module):
    """y = scale_out * (base(x) + up(down(x))), x scaled by scale_in before.

    `base` is a frozen Linear, 1x1 convolution or patch embedding; `down` and `up` lead
    to the rank and back. Both scalings start at one; a patch embedding has no scale_in.
    Where `down` reads more bands than `base`, `select` chooses those of `base`.
    """

    def __init__(
        self,
        base: Layer,
        down: Layer,
        up: Layer,
        scales_input: bool = True,
        select: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.base, self.down, self.up, self.select = base, down, up, select
        self.shape = (-1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)
        outputs, inputs = base.weight.shape[:2]
        ones = torch.ones(outputs, device=base.weight.device)
        self.scale_out = nn.Parameter(ones)
        self.scale_in = None
        if scales_input:
            self.scale_in = nn.Parameter(torch.ones(inputs, device=ones.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), or (B, in, H, W) -> (B, out, H / p, W / p)."""
        if self.scale_in is not None:
            x = x * self.scale_in.to(x.dtype).view(self.shape)
        out = self.base(x if self.select is None else self.select(x))
        out = out + self.up(self.down(x.to(self.down.weight.dtype))).to(out.dtype)
        return out * self.scale_out.to(out.dtype).view(self.shape)

    def folded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the frozen weight and bias, and what they become: the form is affine.

        Two convolutions whose steps do not overlap are one over whole patches.
        """
        weight, bias = self.base.weight, self.base.bias
        down, up = (
            w if w.ndim == 4 else w[..., None, None]  # a Linear is a 1x1 convolution
            for w in (self.down.weight, self.up.weight)
        )
        product = torch.einsum("orij,rcuv->ociujv", up, down)
        product = product.flatten(4, 5).flatten(2, 3)  # (out, in, p, p)
        merged = weight + product.view_as(weight)
        if self.scale_in is not None:
            merged = merged * self.scale_in.view(-1, *[1] * (weight.ndim - 2))
        yield weight, merged * self.scale_out.view(-1, *[1] * (weight.ndim - 1))
        if bias is not None:
            inner, outer = cast(Tensor, self.down.bias), cast(Tensor, self.up.bias)
            shift = up.sum((2, 3)) @ inner + outer  # (out,)
            yield bias, (bias + shift) * self.scale_out


def linear_form(base: Layer, rank: int) -> ScaledLowRank:
    """Adapt a Linear or 1x1 convolution.

    `down` starts at N(0, 1), `up` at zero, and so does the bias of both (that of `down`
    is ours), so that nothing changes at the start.
    """
    outputs, inputs = base.weight.shape[:2]
    down, up = _layer_like(base, inputs, rank), _layer_like(base, rank, outputs)
    nn.init.normal_(down.weight)
    nn.init.zeros_(up.weight)
    for layer in (down, up):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return ScaledLowRank(base, down, up)


def patch_form(
    base: nn.Conv2d, rank: int, channels: int, select: nn.Module | None = None
) -> ScaledLowRank:
    """Adapt a patch embedding by two small convolutions in series.

    Their steps multiply to the patch size: 4 and 4 for 16 pixels, as published; for
    other sizes the two closest factors, the larger one first (ours: 4 and 2 for 8, 7
    and 2 for 14). Both start as torch starts convolutions: this is no identity.
    """
    first, second = factors(base.kernel_size[0])
    down = _layer_like(base, channels, rank, first)
    up = _layer_like(base, rank, base.out_channels, second)
    return ScaledLowRank(base, down, up, scales_input=False, select=select)


def factors(patch: int) -> tuple[int, int]:
    """Return the two closest whole numbers whose product is `patch`, larger first."""
    second = next(n for n in range(math.isqrt(patch), 0, -1) if patch % n == 0)
    return patch // second, second


def _layer_like(base: Layer, inputs: int, outputs: int, step: int = 1) -> Layer:
    """A layer of the kind of `base`, with a bias if it has one."""
    bias, device = base.bias is not None, base.weight.device
    if isinstance(base, nn.Conv2d):
        return nn.Conv2d(inputs, outputs, step, step, bias=bias, device=device)
    return nn.Linear(inputs, outputs, bias=bias, device=device)
