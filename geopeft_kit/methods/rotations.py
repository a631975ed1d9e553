"""Rotations of a frozen W: OFT and BOFT. Taught in notebook 03.

The layers are those of Hugging Face `peft`, less four faults of version 0.21.2: its OFT
takes the channels-last maps of a Linear (B, H, W, C) for images, and is no identity on
convolutions that look at more than one cell; its BOFT tries to compile a CUDA extension
and goes on with one factor where that fails, and keeps an (in, in) permutation matrix
per factor and layer.

Source: Qiu et al. 2023, OFT, arXiv 2306.07280; Liu et al. 2023, BOFT, arXiv 2311.06243.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.methods.base import Block, Replacement, check_whole
from geopeft_kit.methods.peft_layers import ADAPTER, PeftLayer, wrap
from geopeft_kit.methods.peft_method import PeftMethod
from geopeft_kit.methods.targets import Target, find_targets

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone


OFT_BLOCK, BOFT_BLOCK = 32, 4  # channels; what is chosen where it divides the inputs


class Oft(PeftMethod):
    """W R: the input of W is rotated, block by block of its channels.

    R is block-diagonal and orthogonal, R = (I + S)^-1 (I - S) (Cayley) of a trained
    skew-symmetric S that starts at 0. The inverse is exact (ours; peft's default is a
    series of five terms, which is orthogonal for small S only).
    """

    name = "oft"
    title = "OFT"
    paper = "Qiu et al. 2023, OFT, arXiv 2306.07280"
    trained = "a rotation of each block of b input channels of each target"
    count_formula = "in * (b - 1) / 2 per target"
    learning_rate = 1e-3  # ours
    needs = "networks with Linear layers or 1x1 convolutions in their blocks"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks whose convolutions look at more than one cell."""
        reason = super().why_not(backbone)
        if reason is None and _beyond_pointwise(
            find_targets(backbone.blocks, self.default_targets(backbone.blocks))
        ):
            return "it rotates channels, and its convolutions look at several cells"
        return reason

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        block_size: int | None = None,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's OFT.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            block_size: Channels b that rotate together; must divide all inputs. None
                takes for each layer the largest up to 32 that divides its inputs (the
                smallest above where there is none).
        """
        from peft import OFTConfig

        chosen = find_targets(blocks, targets or (), self.kinds)
        if wide := _beyond_pointwise(chosen):
            raise ValueError(
                f"targets: {wide[0].path} looks at several cells, which peft's OFT "
                "cannot rotate. Choose Linear layers or 1x1 convolutions, or 'boft'."
            )

        def config(size: int) -> OFTConfig:
            return OFTConfig(r=0, oft_block_size=size, use_cayley_neumann=False)

        groups = _by_block_size(block_size, OFT_BLOCK, chosen)
        return _wrap_groups(backbone, groups, config, _flattened)


class Boft(PeftMethod):
    """s * (W R): a product R of m sparse rotations, and a factor s per output channel.

    Each of the m factors rotates blocks of b channels; between them the channels change
    blocks (a butterfly), so that with enough factors every channel reaches every other.
    With one factor it is OFT with s. A convolution's input is in * kernel area.
    """

    name = "boft"
    title = "BOFT"
    paper = "Liu et al. 2023, BOFT, arXiv 2311.06243"
    trained = "m rotations of all blocks of b input channels, and s, of each target"
    count_formula = "m * in * b + out per target"
    learning_rate = 1e-3  # ours

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        block_size: int | None = None,
        factors: int = 1,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's BOFT.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            block_size: Channels b that rotate together; must divide all inputs, and
                with more than one factor b * 2^(m - 1) must, with an even b. None
                takes for each layer the largest up to 4 that fits (the smallest above
                where there is none).
            factors: Number m of rotations.
        """
        from peft import BOFTConfig

        chosen = find_targets(blocks, targets or (), self.kinds)
        check_whole("factors", factors)

        def config(size: int) -> BOFTConfig:
            return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors)

        groups = _by_block_size(block_size, BOFT_BLOCK, chosen, factors)
        with _without_compiler():
            return _wrap_groups(backbone, groups, config, _plain_butterfly)


class FlattenedOft:
    """Mixed into peft's OFT of a Linear: takes inputs with any leading axes."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = super().forward(x.flatten(0, -2))  # type: ignore[misc]
        return out.unflatten(0, x.shape[:-1])


class PlainButterfly:
    """Mixed into peft's BOFT layers: the product in plain PyTorch, on any device.

    Attributes:
        boft_P: (m, in) whole numbers: the order of the channels for each factor, where
            peft has permutation matrices (m, in, in).
    """

    boft_P: Tensor
    boft_R: Any
    boft_s: Any
    cayley_batch: Any
    get_base_layer: Any

    def rotate(self, weight: Tensor, adapter: str) -> Tensor:
        """Return W R of a matrix W, (rows, in), factor by factor and block by block."""
        parameters = self.boft_R[adapter]  # (m, n, b, b)
        blocks = self.cayley_batch(parameters.flatten(0, 1)).view_as(parameters)
        for factor, order in zip(blocks, self.boft_P, strict=True):
            sorted_in = weight[:, order.argsort()].unflatten(1, factor.shape[:2])
            turned = torch.einsum("rnk,njk->rnj", sorted_in, factor)  # (rows, n, b)
            weight = turned.flatten(1)[:, order]
        return weight

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the rotation (in, in) and the factors (out, 1), for peft's merging."""
        kept = self.boft_R[adapter]
        identity = torch.eye(self.boft_P.shape[1], device=kept.device, dtype=kept.dtype)
        return self.rotate(identity, adapter).T, self.boft_s[adapter].view(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its rotated and scaled weight."""
        base = self.get_base_layer()
        scale = self.boft_s[ADAPTER].view(-1, 1)
        weight = base.weight.flatten(1).to(scale.dtype)
        weight = (self.rotate(weight, ADAPTER) * scale).view(base.weight.shape)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        if isinstance(base, nn.Linear):
            return F.linear(x, weight.to(x.dtype), bias)
        return base._conv_forward(x, weight.to(x.dtype), bias)


def _flattened(layer: PeftLayer) -> PeftLayer:
    if isinstance(layer.get_base_layer(), nn.Linear):
        layer.__class__ = _mixed(FlattenedOft, layer.__class__)
    return layer


def _plain_butterfly(layer: PeftLayer) -> PeftLayer:
    layer.__class__ = _mixed(PlainButterfly, layer.__class__)
    order = layer.boft_P.argmax(-1)  # (m, in, in) -> (m, in)
    layer.boft_P = order.to(layer.get_base_layer().weight.device)
    return layer


@functools.cache
def _mixed(mixin: type, kind: type) -> type:
    return type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep peft from compiling its CUDA extension, and from dropping factors."""
    from peft.tuners.boft import layer as module

    layer: Any = module
    before = layer._FBD_CUDA
    layer._FBD_CUDA = True  # stands for the extension; `PlainButterfly` needs none
    try:
        yield
    finally:
        layer._FBD_CUDA = before


def _beyond_pointwise(targets: Sequence[Target]) -> list[Target]:
    kernels = ((t, getattr(t.layer, "kernel_size", (1,))) for t in targets)
    return [target for target, kernel in kernels if set(kernel) != {1}]


def _by_block_size(
    size: int | None, usual: int, targets: Sequence[Target], factors: int = 1
) -> dict[int, list[Target]]:
    """Block size -> its targets; peft would change sizes that do not fit, or fail.

    Args:
        size: For all targets; None chooses one that fits for each.
        usual: The largest that is chosen, where one up to it fits.
        targets: Layers to rotate.
        factors: Number m of rotations.

    Raises:
        ValueError: `size` does not fit a target; the sizes that do are named.
    """
    if size is not None:
        check_whole("block_size", size, minimum=2)
    reach = 2 ** (factors - 1)
    groups: dict[int, list[Target]] = {}
    for target in targets:
        kernel = getattr(target.layer, "kernel_size", (1,))
        inputs = target.layer.weight[0].numel()
        fitting = [
            b
            for b in range(2, inputs // reach + 1)
            if inputs % (b * reach) == 0 and (factors == 1 or b % 2 == 0)
        ]
        if len(set(kernel)) > 1:
            raise ValueError(
                f"targets: {target.path} has a {kernel} kernel; square ones are "
                "served. Leave it out of targets."
            )
        if not fitting or size not in (None, *fitting):
            raise ValueError(
                f"block_size={size}; {target.path} has {inputs} inputs, which take "
                f"{fitting or 'none'} with factors={factors}."
            )
        small = [b for b in fitting if b <= usual]
        groups.setdefault(size or max(small or fitting[:1]), []).append(target)
    return groups


def _wrap_groups(
    backbone: Backbone,
    groups: dict[int, list[Target]],
    config: Callable[[int], Any],
    refine: Callable[[PeftLayer], PeftLayer],
) -> list[Replacement]:
    """Let peft wrap each group with the configuration of its block size."""
    return [
        replacement
        for size, targets in groups.items()
        for replacement in wrap(backbone, targets, config(size), refine=refine)
    ]
