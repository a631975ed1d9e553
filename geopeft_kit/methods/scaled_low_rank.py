"""Scaled low-rank adapters (SLR): low rank, between two trained scalings.

Source: Scheibenreif, Mommert and Borth, Parameter Efficient Self-Supervised Geospatial
Domain Adaptation, CVPR 2024. Taught in notebook 05.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Block, Blocks, Config, Method, Options, register
from geopeft_kit.methods.checks import check_switch, check_whole
from geopeft_kit.methods.in_place import Norm
from geopeft_kit.methods.replacement import Replacement, Replacements, trained_in
from geopeft_kit.methods.targets import Target, available_targets, find_targets

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


_PATCHES = "patch_embed.proj"
_TARGETS = ("qkv", "q", "k", "v", "proj", "fc1", "fc2")


@register
class ScaledLowRankAdapters(Method):
    """Low-rank updates between two scalings, and trained norms.

    Default targets are qkv (or q, k, v), proj, fc1 and fc2 of a transformer block, fc1
    and fc2 of a ConvNeXt block. A layer without a bias gets none (ours): there is no
    place to fold it into. The linear form starts at the frozen network and merges.

    With `patch_embedding`, the patch embedding is adapted too, and the start is not the
    frozen network. On a backbone loaded with new_bands="ignore", this adapter reads all
    bands (`all_bands`). That is ours: the authors tile the pretrained kernels where the
    number of bands is a multiple of three and drop them otherwise.
    """

    name = "slr"
    title = "Scaled low-rank adapters (SLR)"
    family = "low rank"
    note = "made for GFMs"
    paper = (
        "Scheibenreif et al. 2024, Parameter Efficient Self-Supervised Geospatial "
        "Domain Adaptation, CVPR 2024"
    )
    trained = "scalings before and after each target, a low-rank path, the norms"
    count_formula = "in + out + r * (in + out) + r + out per target, and the norms"
    mergeable = True
    identity_at_start = True
    learning_rate = 1e-4  # the authors' for their self-supervised step
    needs = "transformers and ConvNeXt (layers called qkv, proj, fc1, fc2)"

    def why_not(self, backbone: Backbone) -> str | None:
        if _default_targets(backbone.blocks):
            return None
        return "its blocks have no attention and no MLP"

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Put the targets, and whether unread bands are read, into the config."""
        if options["targets"] is None:
            options["targets"] = _default_targets(blocks)
        if options["all_bands"] is None:
            options["all_bands"] = options["patch_embedding"] and _ignores(backbone)
        return options

    def starts_as_identity(self, config: Config) -> bool:
        """True for the linear form; the patch form starts at random."""
        return not config["patch_embedding"]

    def can_merge(self, config: Config) -> bool:
        """True unless new bands are read, for which the frozen kernel has no place."""
        return not config["all_bands"]

    def build(
        self,
        backbone: Backbone,
        blocks: Blocks,
        *,
        targets: Sequence[str] | None = None,
        rank: int = 16,
        norms: bool = True,
        patch_embedding: bool = False,
        all_bands: bool | None = None,
    ) -> Replacements:
        """Wrap the targets.

        Args:
            targets: Short names of layers; None for the architecture's default.
            rank: Rank of the low-rank path; 16 in the authors' settings.
            norms: Train the normalisation layers too, as the authors do.
            patch_embedding: Adapt the patch embedding too, with the same rank.
            all_bands: Let the patch embedding's adapter read the bands that the frozen
                one ignores; None for yes where there are such bands.
        """
        check_whole("rank", rank)
        check_switch("norms", norms)
        check_switch("all_bands", all_bands)
        replacements = []
        if check_switch("patch_embedding", patch_embedding):
            _check_all_blocks(backbone, blocks)
            replacements += _patches(backbone, rank, bool(all_bands))
        elif all_bands:
            raise ValueError("all_bands=True needs patch_embedding=True as well.")
        for target in find_targets(blocks, targets or ()):
            adapted = linear_form(_checked(target), rank)
            replacements.append(_swap(backbone.model, target.path, adapted))
        return replacements + (Norm().build(backbone, blocks) if norms else [])

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each frozen tensor and its merged values."""
        substitute = replacement.substitute
        if isinstance(substitute, ScaledLowRank):
            yield from substitute.folded()
        else:
            yield from super().folded(replacement)


def _patches(backbone: Backbone, rank: int, all_bands: bool) -> Replacements:
    """Replace the patch embedding and, to read every band, the choice before it."""
    conv = _patch_embedding(backbone)
    if not all_bands:
        adapted = patch_form(conv, rank, conv.in_channels)
        return [_swap(backbone.model, _PATCHES, adapted)]
    if not _ignores(backbone):
        raise ValueError(
            f"all_bands=True, and {backbone.card.name!r} reads every band of the image "
            "as it is. Leave the option out, or load the backbone with all your bands "
            "and new_bands='ignore'."
        )
    adapted = patch_form(conv, rank, len(backbone.bands), backbone.select)
    return [
        Replacement("select", backbone, "select", nn.Identity()),
        _swap(backbone.model, _PATCHES, adapted),
    ]


def _patch_embedding(backbone: Backbone) -> nn.Conv2d:
    try:
        conv = backbone.model.get_submodule(_PATCHES)
    except AttributeError:
        conv = None
    if (
        not isinstance(conv, nn.Conv2d)
        or conv.kernel_size != conv.stride
        or len(set(conv.kernel_size)) > 1
        or conv.groups > 1
    ):
        raise ValueError(
            f"patch_embedding=True: {backbone.card.name!r} has no {_PATCHES} that is a "
            "convolution over square patches. Use patch_embedding=False."
        )
    return conv


def _ignores(backbone: Backbone) -> bool:
    """True if the image has bands that the frozen patch embedding does not read."""
    return not isinstance(backbone.select, nn.Identity)


def _check_all_blocks(backbone: Backbone, blocks: Blocks) -> None:
    if len(blocks) < len(backbone.blocks):
        raise ValueError(
            "patch_embedding=True with some of the layers: the patch embedding is "
            "outside those blocks. Use layers='all', or patch_embedding=False."
        )


def _default_targets(blocks: Sequence[Block]) -> tuple[str, ...]:
    found = set()
    for path in available_targets(blocks):
        *parents, name = path.split(".")
        if {"attn", "mlp"} & set(parents):
            found.add(name)
    return tuple(name for name in _TARGETS if name in found)


def _checked(target: Target) -> Layer:
    layer: Any = target.layer
    if target.part is not None:
        raise ValueError(
            f"{target.part!r} is a part of {target.path}. SLR scales the input and "
            "output of whole layers; use 'qkv'."
        )
    pointwise = ((1, 1), (1, 1))
    if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride) != pointwise:
        raise ValueError(
            f"{target.path} is a convolution over {layer.kernel_size} cells in steps "
            f"of {layer.stride}; SLR serves Linear layers and plain 1x1 convolutions. "
            "Leave it out of targets."
        )
    return layer


def _swap(model: nn.Module, path: str, adapted: ScaledLowRank) -> Replacement:
    """Replace a layer; all parameters of its substitute but the layer's own train."""
    return Replacement.at(model, path, adapted, trained_in(adapted, frozen="base"))
