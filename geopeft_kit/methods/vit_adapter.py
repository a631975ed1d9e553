"""ViT-Adapter: a convolutional side network of a frozen ViT. Taught in notebook 07.

The side network reads the image at strides 4 to 32, the ViT's tokens read from it
(injectors), and it reads from them (extractors). No operator is compiled.

Source: Chen et al. 2023, Vision Transformer Adapter for Dense Predictions, ICLR, arXiv
2205.08534, section 3; settings as in the PEFT study of GFMs, arXiv 2504.17397.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.devices import device_of
from geopeft_kit.methods.base import Blocks, Method, Options, register
from geopeft_kit.methods.checks import check_above_zero, check_whole
from geopeft_kit.methods.replacement import Replacement, Replacements, trained_in
from geopeft_kit.methods.side_network import (
    Extractor,
    FourScales,
    Injector,
    InteractingBlock,
    SharedTokens,
    SpatialPrior,
)


@register
class VitAdapter(Method):
    """A side network that turns a plain ViT into a network of four scales.

    The chosen blocks are cut into groups, as evenly as the four maps are taken; with
    all blocks and four interactions a group ends where a map is taken. Each group has
    an injector in front and an extractor behind; the last one has three extractors in a
    row. The injectors start at zero, so the ViT's tokens start unchanged; the maps that
    leave are the side network's, so the output does not.

    Stated by the study: 4 interactions, 64 channels of the prior, 4 points. Not
    confirmed, from memory of the authors' settings for ViT-B and ViT-L: D/64 heads,
    values of D/2, a network of D/4, three extractors at the end. Ours: group instead of
    synchronised batch normalisation; all bands of the image are read, also those that
    the patch embedding ignores; no stochastic depth.

    `build_model` has to come after `attach`: the four scales change the decoder.
    """

    name = "vit_adapter"
    title = "ViT-Adapter"
    family = "side networks"
    note = "four scales, in plain PyTorch"
    paper = (
        "Chen et al. 2023, Vision Transformer Adapter for Dense Predictions, arXiv "
        "2205.08534"
    )
    trained = "spatial prior, injectors, extractors, norms of the four maps"
    count_formula = (
        "252w^2+(11D+9C+26)w+4D^2+16D + N(A(3)+5D) + (N+2)(A(1)+7D+2fD^2+11fD), "
        "A(l)=2vD^2+(v+1)D+3HlK(D+1); width w, C bands, N interactions, H heads, K "
        "points, value_ratio v, network_ratio f"
    )
    mergeable = False
    identity_at_start = False
    learning_rate = 7e-4  # median of the study's five runs, 2.6e-4 to 9.7e-4
    needs = "plain ViTs whose patch size divides 32"

    def why_not(self, backbone: Backbone) -> str | None:
        if backbone.width is None or len(set(backbone.strides)) > 1:
            return (
                "it gives four scales to a plain ViT, and this network has them "
                f"already; its layout is {backbone.layout!r}"
            )
        if backbone.dates > 1:
            return f"it reads one date, and this backbone reads {backbone.dates}"
        if 32 % backbone.strides[-1]:
            return (
                f"its patches of {backbone.strides[-1]} px do not divide the coarsest "
                "stride, 32 px, so that tokens and maps have no common image size"
            )
        return None

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Choose the heads: one for 64 channels."""
        if options["heads"] is None:
            return {**options, "heads": max(1, cast(int, backbone.width) // 64)}
        return options

    def build(
        self,
        backbone: Backbone,
        blocks: Blocks,
        *,
        width: int = 64,
        interactions: int = 4,
        heads: int | None = None,
        points: int = 4,
        value_ratio: float = 0.5,
        network_ratio: float = 0.25,
        last_extractors: int = 3,
    ) -> Replacements:
        """Put the prior before the network, interactions around blocks, maps behind.

        Args:
            width: Channels w of the prior's stem.
            interactions: Groups N of blocks.
            heads: Heads H of the deformable attention; None means D / 64.
            points: Points K that a head reads in each map.
            value_ratio: Width of the attention's values, as a share of D.
            network_ratio: Width of the extractors' networks, as a share of D.
            last_extractors: Extractors behind the last group.
        """
        check_whole("width", width)
        check_whole("last_extractors", last_extractors)
        dim = cast(int, backbone.width)
        attention = {
            "heads": check_whole("heads", heads),
            "points": check_whole("points", points),
            "inner": _share(dim, "value_ratio", value_ratio),
        }
        if attention["inner"] % attention["heads"]:
            raise ValueError(
                f"heads={heads} do not divide the {attention['inner']} channels of the "
                f"values ({dim} x value_ratio={value_ratio}). Choose a divisor."
            )
        hidden = _share(dim, "network_ratio", network_ratio)
        groups = cut(len(blocks), check_whole("interactions", interactions))
        shared, grid = SharedTokens(), backbone.grid
        with device_of(blocks[0][1]):
            prior = SpatialPrior(
                backbone.select, len(backbone.bands), width, dim, shared
            )
            scales = FourScales(dim, interactions, shared)
            replacements = [_replacement(backbone, "select", prior)]
            for place, (number, block, first, last) in enumerate(_roles(groups)):
                path, frozen = blocks[block]
                many = last_extractors if number == interactions - 1 else 1
                wrapped = InteractingBlock(
                    frozen,
                    number,
                    place,
                    Injector(dim, grid, **attention) if first else None,
                    {
                        _ordinal(i): Extractor(dim, grid, hidden, **attention)
                        for i in range(many if last else 0)
                    },
                    shared,
                ).train(frozen.training)
                tensors = trained_in(wrapped, frozen="block")
                replacements.append(
                    Replacement.at(backbone.model, path, wrapped, tensors)
                )
        return [*replacements, _replacement(backbone, "refine", scales)]


def cut(blocks: int, groups: int) -> list[range]:
    """Cut blocks into groups as evenly as the four maps of a ViT are taken."""
    if groups > blocks:
        raise ValueError(
            f"interactions={groups}, and there are {blocks} blocks: each interaction "
            f"needs one of its own. Choose at most {blocks}, or more layers."
        )
    ends = [-(-blocks * (i + 1) // groups) for i in range(groups)]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _roles(groups: Sequence[range]) -> list[tuple[int, int, bool, bool]]:
    """(interaction, block, is its first, is its last) of all blocks that interact."""
    return [
        (number, block, block == group[0], block == group[-1])
        for number, group in enumerate(groups)
        for block in sorted({group[0], group[-1]})
    ]


def _ordinal(number: int) -> str:
    return "extractor" if number == 0 else f"extractor_{number + 1}"


def _share(width: int, option: str, ratio: float) -> int:
    """Channels that are a share of the token width, at least 1."""
    return max(1, round(width * check_above_zero(option, ratio)))


def _replacement(
    backbone: Backbone, attribute: str, substitute: nn.Module
) -> Replacement:
    """The replacement of an attribute of the backbone itself."""
    tensors = trained_in(substitute, frozen=attribute)
    return Replacement(attribute, backbone, attribute, substitute, tensors)
