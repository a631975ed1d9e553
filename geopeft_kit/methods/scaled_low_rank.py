"""Scaled low-rank adapters (SLR): low rank, between two trained scalings.

Source: Scheibenreif, Mommert and Borth, Parameter Efficient Self-Supervised Geospatial
Domain Adaptation, CVPR 2024. Taught in notebook 05.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Block, Blocks, Config, Method, Options, register
from geopeft_kit.methods.checks import check_switch, check_whole
from geopeft_kit.methods.norm import Norm
from geopeft_kit.methods.replacement import Replacement, Replacements, trained_in
from geopeft_kit.methods.scaled_layers import (
    Layer,
    ScaledLowRank,
    linear_form,
    patch_form,
)
from geopeft_kit.methods.targets import Target, available_targets, find_targets

_PATCHES = "patch_embed.proj"
_TARGETS = ("qkv", "q", "k", "v", "proj", "fc1", "fc2")


@register
class ScaledLowRankAdapters(Method):
    """Low-rank updates between two scalings, and trained norms.

    Default targets are qkv (or q, k, v), proj, fc1 and fc2 of a transformer block, fc1
    and fc2 of a ConvNeXt block. A layer without a bias gets none (ours): there is no
    place to fold it into. The linear form starts at the frozen network and merges.

    With `patch_embedding`, the patch embedding is adapted too. Then the start is not
    the frozen network. A backbone loaded with new_bands="ignore" has bands that it does
    not read, and this adapter reads them all (`all_bands`): that is ours. The authors
    tile the pretrained kernels where the number of bands is a multiple of three and
    drop them otherwise; here bands have names, and each kernel keeps its band.
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
