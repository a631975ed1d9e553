"""The small convolutional network that a ViT-Adapter adds to a frozen ViT.

Source: Chen et al. 2023, Vision Transformer Adapter for Dense Predictions, ICLR, arXiv
2205.08534, section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.base import TokenGrid
from geopeft_kit.decoders.neck import group_norm
from geopeft_kit.methods.deformable import DeformableAttention, Size, centres


class SharedTokens:
    """The spatial tokens of one forward pass, kept per interaction.

    A frozen network calls the parts of a ViT-Adapter and passes nothing between them. A
    block that is recomputed in the backward pass reads the tokens again; the next pass,
    or the end of one without gradients, drops them. Copies start empty.
    """

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type[SharedTokens], tuple[()]]:
        return SharedTokens, ()

    def clear(self) -> None:
        """Forget everything."""
        self.finest: Tensor | None = None  # (B, D, H/4, W/4)
        self.sizes: list[Size] = []  # (h, w) at strides 8, 16 and 32
        self.spatial: dict[int, Tensor] = {}  # interaction -> (B, S, D) in front of it
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
        """The spatial tokens for the input (B, N, D) of an interacting block.

        `place` is the block's position among those that interact.
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
        """Keep an interaction's output; recomputing does not replace the first."""
        self.spatial.setdefault(interaction + 1, spatial)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, equal_nan=True)


STRIDES = (4, 8, 16, 32)
SCALES = ("quarter", "eighth", "sixteenth", "coarsest")


class SpatialPrior(nn.Module):
    """Convolutions over all bands of the image: four maps of the ViT's width D.

    `inner` is the width of the stem; the coarser maps have two and four times as many
    channels. The ViT still gets the output of `select`.
    """

    def __init__(
        self,
        select: nn.Module,
        channels: int,
        inner: int,
        width: int,
        shared: SharedTokens,
    ) -> None:
        super().__init__()
        self.select = select
        self.shared = shared
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
        self.shared.begin(projected, self.levels)
        return self.select(image)


class Injector(nn.Module):
    """The ViT's patch tokens read from the spatial tokens; nothing at the start.

    ``tokens + gamma * attention(norm(tokens), norm(spatial))``, equation 1. Of several
    tokens per patch (Galileo) each is a query, at the place of its patch.
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

    Equations 2 and 3. Of several tokens per patch (Galileo) the mean is read. `hidden`
    is the width of the network, f*D.
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

    `place` is the block's position among those that interact.
    """

    def __init__(
        self,
        block: nn.Module,
        interaction: int,
        place: int,
        injector: Injector | None,
        extractors: dict[str, nn.Module],
        shared: SharedTokens,
    ) -> None:
        super().__init__()
        self.block = block
        self.interaction, self.place = interaction, place
        self.injector = injector
        self.extractors = nn.ModuleDict(extractors)
        self.shared = shared

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        spatial = self.shared.before(self.interaction, self.place, tokens)
        sizes = self.shared.sizes
        if self.injector is not None:
            tokens = self.injector(tokens, spatial, sizes)
        tokens = self.block(tokens, *args, **kwargs)
        for extractor in self.extractors.values():
            spatial = extractor(spatial, tokens, sizes)
        if self.extractors:
            self.shared.after(self.interaction, spatial)
        return tokens


class FourScales(nn.Module):
    """The spatial tokens as four maps, joined with the ViT's own.

    Each of the ViT's four maps is resized to its scale and added; then a norm.
    """

    def __init__(self, width: int, interactions: int, shared: SharedTokens) -> None:
        super().__init__()
        self.channels, self.strides = [width] * 4, list(STRIDES)
        self.interactions = interactions
        self.shared = shared
        self.enlarge = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norm = nn.ModuleDict({name: group_norm(width) for name in SCALES})

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) of the ViT -> four of strides 4, 8, 16 and 32."""
        spatial, finest = self.shared.spatial[self.interactions], self.shared.finest
        coarser = as_maps(spatial, self.shared.sizes)
        if not torch.is_grad_enabled():
            self.shared.clear()
        scales = [cast(Tensor, finest) + self.enlarge(coarser[0]), *coarser]
        joined = []
        for name, own, seen in zip(SCALES, scales, maps, strict=True):
            seen = seen.to(self.enlarge.weight.dtype)
            size = own.shape[-2:]
            seen = F.interpolate(seen, size, mode="bilinear", align_corners=False)
            joined.append(self.norm[name](own + seen))
        return joined


def as_maps(tokens: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Tokens (B, S, D) of several levels -> one map (B, D, h, w) a level."""
    levels = tokens.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
    return [m.unflatten(2, size) for m, size in zip(levels, sizes, strict=True)]


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            norm=group_norm(outputs),
            act=nn.ReLU(inplace=True),
        )
    )
