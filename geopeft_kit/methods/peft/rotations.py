"""Rotations of a frozen W: OFT and BOFT. Taught in notebook 03.

The layers are those of Hugging Face `peft` without four faults of version 0.21.2. Its
OFT takes the channels-last maps of a Linear (B, H, W, C) for images, and is not an
identity on convolutions that look at more than one cell. Its BOFT tries to compile a
CUDA extension and continues with one factor where that fails, and it keeps an (in, in)
permutation matrix per factor and layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Config, Options, register
from geopeft_kit.methods.checks import check_whole
from geopeft_kit.methods.peft.layers import ADAPTER, PeftLayer, Wrapped, mixed, wrap
from geopeft_kit.methods.peft.method import Option, PeftMethod
from geopeft_kit.methods.targets import Target, Targets, find_targets


def _block_size(name: str, value: Any) -> int | None:
    return None if value is None else check_whole(name, value, minimum=2)


class Rotation(PeftMethod):
    """What both share: layers are wrapped in groups of one block size."""

    learning_rate = 1e-3  # ours
    usual: ClassVar[int]  # largest block size, in channels, that is chosen by default
    size_field: ClassVar[str]  # of peft's configuration, for the block size

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Let peft wrap each group with the configuration of its block size."""
        size, factors = values["block_size"], values.get("factors", 1)
        wrapped: Wrapped = []
        for block, group in by_block_size(size, self.usual, targets, factors).items():
            config = self.configuration(**{**fields, self.size_field: block})
            wrapped += wrap(group, config, refine=self.refine)
        return wrapped

    def refine(self, layer: PeftLayer) -> PeftLayer:
        """Mend a layer that peft made."""
        raise NotImplementedError


@register
class Oft(Rotation):
    """W R: the input of W is rotated, block by block of its channels.

    R is block-diagonal and orthogonal, R = (I + S)^-1 (I - S) (Cayley) of a trained
    skew-symmetric S that starts at 0. The inverse is exact (ours; peft's default is a
    series of five terms, which is orthogonal for small S only).

    `block_size` b must divide all inputs. None takes for each layer the largest up to
    32 that divides its inputs, or the smallest above where there is none.
    """

    name = "oft"
    title = "OFT"
    paper = "Qiu et al. 2023, OFT, arXiv 2306.07280"
    trained = "a rotation of each block of b input channels of each target"
    count_formula = "in * (b - 1) / 2 per target"
    needs = "networks with Linear layers or 1x1 convolutions in their blocks"
    config, size_field, usual = "OFTConfig", "oft_block_size", 32
    own = {"block_size": Option("int | None", None, size_field, _block_size)}
    fixed = {"r": 0, "use_cayley_neumann": False}

    def why_not(self, backbone: Backbone) -> str | None:
        reason = super().why_not(backbone)
        if reason is None and _beyond_pointwise(
            find_targets(backbone.blocks, self.default_targets(backbone.blocks))
        ):
            return "it rotates channels, and its convolutions look at several cells"
        return reason

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets, if each looks at one cell only."""
        if wide := _beyond_pointwise(targets):
            raise ValueError(
                f"targets: {wide[0].path} looks at several cells, which peft's OFT "
                "cannot rotate. Choose Linear layers or 1x1 convolutions, or 'boft'."
            )
        return super().inject(targets, fields, values)

    def refine(self, layer: PeftLayer) -> PeftLayer:
        """Let a Linear take inputs with any leading axes."""
        if isinstance(layer.get_base_layer(), nn.Linear):
            layer.__class__ = mixed(FlattenedOft, layer.__class__)
        return layer


@register
class Boft(Rotation):
    """s * (W R): a product R of m sparse rotations, and a factor s per output channel.

    Each of the m `factors` rotates blocks of b channels; between them the channels
    change blocks (a butterfly), so that with enough factors every channel reaches every
    other. With one factor it is OFT with s. A convolution's input is in * kernel area.

    `block_size` b must divide all inputs; with more than one factor b * 2^(m - 1) must,
    and b is even. None takes for each layer the largest up to 4 that fits, or the
    smallest above where there is none.
    """

    name = "boft"
    title = "BOFT"
    paper = "Liu et al. 2023, BOFT, arXiv 2311.06243"
    trained = "m rotations of all blocks of b input channels, and s, of each target"
    count_formula = "m * in * b + out per target"
    config, size_field, usual = "BOFTConfig", "boft_block_size", 4
    own = {
        "block_size": Option("int | None", None, size_field, _block_size),
        "factors": Option("int", 1, "boft_n_butterfly_factor", check_whole),
    }

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets without peft's CUDA extension."""
        with _without_compiler():
            return super().inject(targets, fields, values)

    def refine(self, layer: PeftLayer) -> PeftLayer:
        """Let the layer compute its product in plain PyTorch."""
        layer.__class__ = mixed(PlainButterfly, layer.__class__)
        order = layer.boft_P.argmax(-1)  # (m, in, in) -> (m, in)
        layer.boft_P = order.to(layer.get_base_layer().weight.device)
        return layer


class FlattenedOft:
    """Mixed into peft's OFT of a Linear: takes inputs with any leading axes."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = super().forward(x.flatten(0, -2))  # type: ignore[misc]
        return out.unflatten(0, x.shape[:-1])


class PlainButterfly:
    """Mixed into peft's BOFT layers: the product in plain PyTorch, on any device."""

    boft_P: Tensor  # (m, in) order of channels, where peft has matrices (m, in, in)
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


def by_block_size(
    size: int | None, usual: int, targets: Sequence[Target], factors: int = 1
) -> dict[int, list[Target]]:
    """Block size -> its targets; peft would change sizes that do not fit, or fail.

    `size` None chooses for each target the largest up to `usual` that fits.
    """
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
