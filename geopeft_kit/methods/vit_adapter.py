"""ViT-Adapter: a small convolutional network beside a frozen ViT. Notebook 07.

A plain ViT has one scale. Here a side network reads the image at strides 4 to 32, the
ViT's tokens read from it (injectors), it reads from them (extractors), and it hands out
four maps at strides 4, 8, 16 and 32. No operator is compiled.

Source: Chen et al. 2023, Vision Transformer Adapter for Dense Predictions, ICLR, arXiv
2205.08534, section 3; settings as in the PEFT study of GFMs, arXiv 2504.17397.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.decoders.neck import group_norm
from geopeft_kit.methods.base import (
    Block,
    Method,
    Replacement,
    check_above_zero,
    check_whole,
)
from geopeft_kit.methods.deformable import DeformableAttention, Size, centres

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone, TokenGrid

STRIDES = (4, 8, 16, 32)
SCALES = ("quarter", "eighth", "sixteenth", "coarsest")


class Passage:
    """What the parts of the side network hand on within one forward pass.

    Spatial tokens are kept per interaction, since a block that is recomputed in the
    backward pass reads them again. They go with the next pass, or at the end of a pass
    without gradients. Copies start empty.

    Attributes:
        finest: The map of the spatial prior at stride 4, (B, D, H/4, W/4).
        sizes: (h, w) of its maps at strides 8, 16 and 32.
        spatial: Interaction number -> spatial tokens (B, S, D) in front of it.
    """

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type[Passage], tuple[()]]:
        return Passage, ()

    def clear(self) -> None:
        """Forget everything."""
        self.finest: Tensor | None = None
        self.sizes: list[Size] = []
        self.spatial: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}

    def begin(self, maps: Sequence[Tensor], levels: Tensor) -> None:
        """Start a pass with the four maps of the prior and the code of each level."""
        self.clear()
        self.finest = maps[0]
        self.sizes = [(m.shape[2], m.shape[3]) for m in maps[1:]]
        tokens = [
            m.flatten(2).transpose(1, 2) + level  # (B, h*w, D)
            for m, level in zip(maps[1:], levels, strict=True)
        ]
        self.spatial[0] = torch.cat(tokens, dim=1)  # (B, S, D)

    def before(self, interaction: int, place: int, tokens: Tensor) -> Tensor:
        """The spatial tokens that belong to a block's input.

        Args:
            interaction: Number of the interaction.
            place: Position of the block among those that interact.
            tokens: The block's input, (B, N, D).

        Raises:
            RuntimeError: The input belongs to no pass, or to an earlier one.
        """
        if interaction not in self.spatial:
            raise RuntimeError(
                "A block of a ViT-Adapter was called outside a forward pass of its "
                "backbone. Call backbone(image), not backbone.model."
            )
        if place not in self._seen:
            self._seen[place] = tokens.detach()
        elif not _same(self._seen[place], tokens):
            raise RuntimeError(
                "A block of a ViT-Adapter was called again with other tokens, after "
                "its forward pass. With recomputed blocks (gradient checkpointing), "
                "run backward before the next forward pass."
            )
        return self.spatial[interaction]

    def after(self, interaction: int, spatial: Tensor) -> None:
        """Keep what an interaction leaves; of a recomputed one, the first stays."""
        self.spatial.setdefault(interaction + 1, spatial)


class SpatialPrior(nn.Module):
    """Convolutions that see the image first: four maps of the ViT's width.

    Args:
        select: What stood in this place; the ViT still gets what it gives.
        channels: Bands of the image; all of them are read.
        inner: Channels of the stem; the coarser maps have two and four times as many.
        width: Token width D.
        passage: Shared by the parts.
    """

    def __init__(
        self,
        select: nn.Module,
        channels: int,
        inner: int,
        width: int,
        passage: Passage,
    ) -> None:
        super().__init__()
        self.select = select
        self.passage = passage
        self.stem = nn.Sequential(
            OrderedDict(
                first=_convolution(channels, inner, 2),
                second=_convolution(inner, inner, 1),
                third=_convolution(inner, inner, 1),
                pool=nn.MaxPool2d(3, 2, 1),
            )
        )  # stride 4
        self.eighth = _convolution(inner, 2 * inner, 2)
        self.sixteenth = _convolution(2 * inner, 4 * inner, 2)
        self.coarsest = _convolution(4 * inner, 4 * inner, 2)
        shares = zip(SCALES, (1, 2, 4, 4), strict=True)
        self.project = nn.ModuleDict(
            {name: nn.Conv2d(share * inner, width, 1) for name, share in shares}
        )
        self.levels = nn.Parameter(torch.randn(3, width))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> what the ViT gets; starts a pass on the way."""
        maps = [self.stem(image.to(self.levels.dtype))]
        for stage in (self.eighth, self.sixteenth, self.coarsest):
            maps.append(stage(maps[-1]))
        projected = [
            self.project[name](m) for name, m in zip(SCALES, maps, strict=True)
        ]
        self.passage.begin(projected, self.levels)
        return self.select(image)


class Injector(nn.Module):
    """The ViT's patch tokens read from the spatial tokens; nothing at the start.

    ``tokens + gamma * attention(norm(tokens), norm(spatial))``, equation 1. Of several
    tokens per patch (Galileo) each asks for itself, at the place of its patch.

    Args:
        width: Token width D.
        grid: Where the patch tokens lie.
        attention: heads, points and inner width of the attention.
    """

    def __init__(self, width: int, grid: TokenGrid, **attention: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm_tokens = nn.LayerNorm(width, eps=1e-6)
        self.norm_spatial = nn.LayerNorm(width, eps=1e-6)
        self.attention = DeformableAttention(width, 3, **attention)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor, spatial: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Tokens (B, P + h*w*N, D) and spatial tokens (B, S, D) -> tokens."""
        size, groups = (self.grid.height, self.grid.width), self.grid.groups
        count = size[0] * size[1] * groups
        first, patches = tokens[:, :-count], tokens[:, -count:]
        places = centres([size], tokens.device).repeat_interleave(groups, dim=0)
        queries = self.norm_tokens(patches.to(self.gamma.dtype))
        read = self.attention(queries, places, self.norm_spatial(spatial), sizes)
        patches = patches + (self.gamma * read).to(patches.dtype)
        return torch.cat([first, patches], dim=1)


class Extractor(nn.Module):
    """The spatial tokens read from the ViT's patch tokens, then a small network.

    Equations 2 and 3. Of several tokens per patch (Galileo) the mean is read.

    Args:
        width: Token width D.
        grid: Where the patch tokens lie.
        hidden: Channels of the network, f*D.
        attention: heads, points and inner width of the attention.
    """

    def __init__(
        self, width: int, grid: TokenGrid, hidden: int, **attention: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.norm_spatial = nn.LayerNorm(width, eps=1e-6)
        self.norm_tokens = nn.LayerNorm(width, eps=1e-6)
        self.attention = DeformableAttention(width, 1, **attention)
        self.norm_network = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, spatial: Tensor, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Spatial tokens (B, S, D) and tokens (B, P + h*w*N, D) -> spatial tokens."""
        size, groups = (self.grid.height, self.grid.width), self.grid.groups
        patches = tokens[:, -size[0] * size[1] * groups :].unflatten(1, (-1, groups))
        patches = patches.mean(2).to(self.fc1.weight.dtype)  # (B, h*w, D)
        read = self.attention(
            self.norm_spatial(spatial),
            centres(sizes, tokens.device),
            self.norm_tokens(patches),
            [size],
        )
        spatial = spatial + read
        hidden = self.fc1(self.norm_network(spatial))  # (B, S, f*D)
        mixed = [self.conv(m).flatten(2) for m in as_maps(hidden, sizes)]
        hidden = F.gelu(torch.cat(mixed, dim=2).transpose(1, 2))  # (B, S, f*D)
        return spatial + self.fc2(hidden)


class InteractingBlock(nn.Module):
    """A frozen block with an injector in front of it, extractors behind it, or both.

    Args:
        block: The frozen block.
        interaction: Number of the interaction it belongs to.
        place: Its position among the blocks that interact.
        injector: In front, or None.
        extractors: Behind; by name, in order.
        passage: Shared by the parts.
    """

    def __init__(
        self,
        block: nn.Module,
        interaction: int,
        place: int,
        injector: Injector | None,
        extractors: dict[str, nn.Module],
        passage: Passage,
    ) -> None:
        super().__init__()
        self.block = block
        self.interaction, self.place = interaction, place
        self.injector = injector
        self.extractors = nn.ModuleDict(extractors)
        self.passage = passage

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        spatial = self.passage.before(self.interaction, self.place, tokens)
        sizes = self.passage.sizes
        if self.injector is not None:
            tokens = self.injector(tokens, spatial, sizes)
        tokens = self.block(tokens, *args, **kwargs)
        for extractor in self.extractors.values():
            spatial = extractor(spatial, tokens, sizes)
        if self.extractors:
            self.passage.after(self.interaction, spatial)
        return tokens


class FourScales(nn.Module):
    """The spatial tokens as four maps, joined with the ViT's own.

    Each of the ViT's four maps is resized to its scale and added; then a norm.

    Args:
        width: Token width D.
        interactions: How many there are.
        passage: Shared by the parts.

    Attributes:
        channels: Channels of the four maps.
        strides: Pixels per cell of the four maps.
    """

    def __init__(self, width: int, interactions: int, passage: Passage) -> None:
        super().__init__()
        self.channels, self.strides = [width] * 4, list(STRIDES)
        self.interactions = interactions
        self.passage = passage
        self.enlarge = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norm = nn.ModuleDict({name: group_norm(width) for name in SCALES})

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) of the ViT -> four of strides 4, 8, 16 and 32."""
        spatial, finest = self.passage.spatial[self.interactions], self.passage.finest
        coarser = as_maps(spatial, self.passage.sizes)
        if not torch.is_grad_enabled():
            self.passage.clear()
        scales = [cast(Tensor, finest) + self.enlarge(coarser[0]), *coarser]
        joined = []
        for name, own, seen in zip(SCALES, scales, maps, strict=True):
            seen = seen.to(self.enlarge.weight.dtype)
            size = own.shape[-2:]
            seen = F.interpolate(seen, size, mode="bilinear", align_corners=False)
            joined.append(self.norm[name](own + seen))
        return joined


class VitAdapter(Method):
    """A side network that turns a plain ViT into a network of four scales.

    The chosen blocks are cut into groups, as evenly as the four maps are taken; with
    all blocks and four interactions a group ends where a map is taken. Each group has
    an injector in front and an extractor behind; the last one has three extractors in a
    row. The injectors start at zero, so the ViT's tokens start unchanged; the maps that
    leave are the side network's, so the output does not.

    Stated by the study: 4 interactions, 64 channels of the prior, 4 points. As we know
    the authors' released settings for ViT-B and ViT-L, not confirmed on our sheets:
    D/64 heads, values of D/2, a network of D/4, three extractors at the end. Ours:
    group normalisation of the same size instead of synchronised batch normalisation
    (nothing to freeze, alike for one image and many); all bands of the image are read,
    also those that the patch embedding ignores; the final norm and the class token of
    the ViT stay; no stochastic depth.

    `build_model` has to come after `attach`: the four scales change the decoder.
    """

    name = "vit_adapter"
    title = "ViT-Adapter"
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
    # The median of the study's five runs, 2.6e-4 to 9.7e-4.
    learning_rate = 7e-4
    needs = "plain ViTs whose patch size divides 32"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks without tokens, and patches that share no grid with 32."""
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

    def resolve(
        self, backbone: Backbone, blocks: list[Block], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Choose the heads: one for 64 channels."""
        if options["heads"] is None:
            return {**options, "heads": max(1, cast(int, backbone.width) // 64)}
        return options

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        width: int = 64,
        interactions: int = 4,
        heads: int | None = None,
        points: int = 4,
        value_ratio: float = 0.5,
        network_ratio: float = 0.25,
        last_extractors: int = 3,
    ) -> list[Replacement]:
        """Put the prior before the network, interactions around blocks, maps behind.

        Args:
            backbone: A plain ViT.
            blocks: The blocks that take part.
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
        passage, grid = Passage(), backbone.grid
        with next(blocks[0][1].parameters()).device:
            prior = SpatialPrior(
                backbone.select, len(backbone.bands), width, dim, passage
            )
            scales = FourScales(dim, interactions, passage)
            replacements = [_replacement(backbone, "select", prior, "select.")]
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
                    passage,
                ).train(frozen.training)
                tensors = _trained(wrapped, "block.")
                replacements.append(
                    Replacement.at(backbone.model, path, wrapped, tensors)
                )
        return [*replacements, _replacement(backbone, "refine", scales, "")]


def cut(blocks: int, groups: int) -> list[range]:
    """Cut blocks into groups as evenly as the four maps of a ViT are taken.

    Raises:
        ValueError: There are fewer blocks than groups.
    """
    if groups > blocks:
        raise ValueError(
            f"interactions={groups}, and there are {blocks} blocks: each interaction "
            f"needs one of its own. Choose at most {blocks}, or more layers."
        )
    ends = [-(-blocks * (i + 1) // groups) for i in range(groups)]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def as_maps(tokens: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Tokens (B, S, D) of several levels -> one map (B, D, h, w) a level."""
    levels = tokens.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
    return [m.unflatten(2, size) for m, size in zip(levels, sizes, strict=True)]


def _roles(groups: Sequence[range]) -> list[tuple[int, int, bool, bool]]:
    """(interaction, block, is its first, is its last) of all blocks that interact."""
    return [
        (number, block, block == group[0], block == group[-1])
        for number, group in enumerate(groups)
        for block in sorted({group[0], group[-1]})
    ]


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            norm=group_norm(outputs),
            act=nn.ReLU(inplace=True),
        )
    )


def _ordinal(number: int) -> str:
    return "extractor" if number == 0 else f"extractor_{number + 1}"


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, equal_nan=True)


def _share(width: int, option: str, ratio: float) -> int:
    """Channels that are a share of the token width, at least 1."""
    return max(1, round(width * check_above_zero(option, ratio)))


def _trained(module: nn.Module, frozen: str) -> dict[str, tuple[nn.Module, str]]:
    """Name -> (holder, attribute) of all parameters but those of a frozen child."""
    return {
        f"{path}.{name}".lstrip("."): (holder, name)
        for path, holder in module.named_modules()
        for name, _ in holder.named_parameters(recurse=False)
        if not frozen or not f"{path}.".startswith(frozen)
    }


def _replacement(
    backbone: Backbone, attribute: str, substitute: nn.Module, frozen: str
) -> Replacement:
    """The replacement of an attribute of the shell itself."""
    tensors = _trained(substitute, frozen)
    return Replacement(attribute, backbone, attribute, substitute, tensors)
