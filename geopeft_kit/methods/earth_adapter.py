"""Earth-Adapter-style: three bottlenecks for three frequency bands, mixed by a router.

Written from the published formulas. Source: Hu et al. 2025, Earth-Adapter, arXiv
2504.06220. Taught in notebook 04.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone, TokenGrid
from geopeft_kit.methods.base import BlockMethod, Blocks, Options, register
from geopeft_kit.methods.bottleneck import Bottleneck
from geopeft_kit.methods.checks import check_above_zero, check_whole
from geopeft_kit.methods.replacement import (
    Places,
    Replacement,
    Replacements,
    trained_in,
)

_START = 0.1  # of the learned scale of the update


class FrequencyAdapter(nn.Module):
    """A block, then x + scale * delta on its patch tokens; other tokens pass.

    With frequency bands delta = r1 M1(x) + r2 M2(low) + r3 M3(high), where the weights
    r are a softmax over a Linear layer of x; without them delta = M1(x). M is a
    bottleneck with ReLU that does not start at zero. `ratio` is the share of the
    frequencies of an axis that are low; None means no bands.
    """

    def __init__(
        self,
        block: nn.Module,
        grid: TokenGrid,
        channels: int,
        width: int,
        ratio: float | None,
    ) -> None:
        super().__init__()
        self.block, self.grid, self.ratio = block, grid, ratio
        bands = ("full",) if ratio is None else ("full", "low", "high")
        self.bottlenecks = nn.ModuleDict(
            {band: _bottleneck(channels, width) for band in bands}
        )
        self.router = None
        if ratio is not None:
            self.router = nn.Linear(channels, len(bands))
        self.scale = nn.Parameter(torch.full((1,), _START))

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block and adapt its output, (B, N, D) both."""
        tokens = self.block(tokens, *args, **kwargs)
        first, maps = self.grid.split(tokens)  # maps (B*N, D, h, w)
        patches = maps.permute(0, 2, 3, 1).to(self.scale.dtype)  # (B*N, h, w, D)
        delta = self.scale * self.delta(patches)
        return self.grid.join(first, maps + delta.permute(0, 3, 1, 2).to(maps.dtype))

    def delta(self, patches: Tensor) -> Tensor:
        """The update before its scale, (..., h, w, D) both."""
        update = self.bottlenecks["full"](patches)
        if self.router is None or self.ratio is None:
            return update
        low, high = split_frequencies(patches, self.ratio)
        weights = self.router(patches).softmax(-1)  # (..., h, w, 3)
        updates = [update, self.bottlenecks["low"](low), self.bottlenecks["high"](high)]
        return (torch.stack(updates, -1) * weights.unsqueeze(-2)).sum(-1)


@register
class EarthAdapter(BlockMethod):
    """A bottleneck after each block; in some blocks one each for low and high as well.

    The frequencies are those of the token grid. Blocks without frequency bands have one
    bottleneck and no router. The paper chooses the blocks per data set (the first or
    last 3 or 6 of 24); our default is the first quarter of the chosen blocks. How the
    layers start is not stated; torch's own start gives the first update the size that
    it has in the authors' code.
    """

    name = "earth_adapter"
    title = "Earth-Adapter-style"
    family = "Earth observation"
    note = "Earth-Adapter-style"
    paper = "Hu et al. 2025, Earth-Adapter, arXiv 2504.06220"
    trained = "a bottleneck after each block; in some, one for each frequency band"
    count_formula = (
        "2Dh + h + D + 1 per block; 3(2Dh + h + D) + 3D + 4 with frequency bands"
    )
    mergeable = False
    identity_at_start = False
    learning_rate = 1e-4  # the paper's
    needs = "plain ViTs (tokens on a grid)"

    def why_not(self, backbone: Backbone) -> str | None:
        if backbone.width is None:
            return f"it adapts tokens of a plain ViT; the layout is {backbone.layout!r}"
        return None

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Put the numbers of the blocks with frequency bands into the config."""
        chosen = _frequency_blocks(backbone, blocks, options["frequency_layers"])
        options["frequency_layers"] = chosen
        return options

    def in_block(
        self,
        backbone: Backbone,
        path: str,
        block: Any,
        *,
        width: int = 24,
        frequency_layers: str | Sequence[int] | None = None,
        ratio: float = 0.3,
    ) -> Replacements:
        """Wrap a block.

        Args:
            width: Width h of the bottlenecks; 16, 24, 32 or 64 in the paper.
            frequency_layers: Which of these blocks have frequency bands: "all",
                "first:k", "last:k", a list of block numbers (which may be empty), or
                None for the first quarter.
            ratio: Share of the frequencies of the shorter axis that count as low, above
                0 and up to 1; 0.2 or 0.3 in the paper.
        """
        check_whole("width", width)
        if check_above_zero("ratio", ratio) > 1:
            raise ValueError(f"ratio={ratio}; it must be above 0 and at most 1.")
        banded = backbone.block_paths.index(path) in (frequency_layers or ())
        channels = cast(int, backbone.width)
        wrapped = FrequencyAdapter(
            block, backbone.grid, channels, width, ratio if banded else None
        ).train(block.training)
        return [Replacement.at(backbone.model, path, wrapped, _tensors(wrapped))]


def split_frequencies(x: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Split maps into low and high spatial frequencies, which sum to them.

    Low is a centred square of the shifted spectrum, of half-width
    floor(min(h, w) * ratio / 2). Where that is 0, on small grids, low is the mean of
    the map, so that the band is never empty (ours). High is the rest. Both are shaped
    as `x`, (..., h, w, D); half precision is computed in float32, as FFTs need.
    """
    sides = x.shape[-3:-1]
    half = int(min(sides) * ratio / 2)
    box = [slice(n // 2 - half, n // 2 + max(half, 1)) for n in sides]
    kept = torch.zeros(sides, device=x.device)
    kept[box[0], box[1]] = 1
    kept = torch.fft.ifftshift(kept).unsqueeze(-1)  # (h, w, 1), zero frequency first
    exact = x if x.dtype == torch.float64 else x.float()
    spectrum = torch.fft.fft2(exact, dim=(-3, -2), norm="ortho") * kept
    low = torch.fft.ifft2(spectrum, dim=(-3, -2), norm="ortho").real.to(x.dtype)
    return low, x - low


def _bottleneck(channels: int, width: int) -> Bottleneck:
    bottleneck = Bottleneck(channels, width, nn.ReLU())
    bottleneck.up.reset_parameters()  # not from zero
    return bottleneck


def _frequency_blocks(
    backbone: Backbone, blocks: Blocks, choice: str | Sequence[int] | None
) -> list[int]:
    """Return the numbers, in the backbone, of the blocks with frequency bands."""
    numbers = [backbone.block_paths.index(path) for path, _ in blocks]
    if choice is None:
        return numbers[: max(len(numbers) // 4, 1)]
    if choice == "all":
        return numbers
    if isinstance(choice, str):
        word, _, count = choice.partition(":")
        number = int(count) if count.isdecimal() else 0
        if word in ("first", "last") and 1 <= number <= len(numbers):
            return numbers[:number] if word == "first" else numbers[-number:]
    elif isinstance(choice, Sequence) and len(set(choice)) == len(choice):
        listed = [number for number in numbers if number in choice]
        if len(listed) == len(choice) and all(type(i) is int for i in choice):
            return listed
    raise ValueError(
        f'frequency_layers={choice!r}; it can be "all", "first:k" or "last:k" with k '
        f"from 1 to {len(numbers)}, or a list of different numbers out of {numbers}."
    )


def _tensors(wrapped: FrequencyAdapter) -> Places:
    """Places of what trains; nothing of the block."""
    tensors: Places = {"scale": (wrapped, "scale")}
    for band, bottleneck in wrapped.bottlenecks.items():
        tensors |= trained_in(bottleneck, band)
    if wrapped.router is not None:
        tensors |= trained_in(wrapped.router, "router")
    return tensors
