"""Spatial tokens that the parts of a ViT-Adapter share within one forward pass.

A frozen network calls the parts at different places and passes nothing between them.
Used by `side_network.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geopeft_kit.methods.deformable import Size


class SharedTokens:
    """The spatial tokens of one forward pass, kept per interaction.

    A block that is recomputed in the backward pass reads them again. They are dropped
    by the next pass, or at the end of a pass without gradients. Copies start empty.

    Attributes:
        finest: The map of the spatial prior at stride 4, (B, D, H/4, W/4).
        sizes: (h, w) of its maps at strides 8, 16 and 32.
        spatial: Interaction number -> spatial tokens (B, S, D) in front of it.
    """

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type[SharedTokens], tuple[()]]:
        return SharedTokens, ()

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
        """The spatial tokens for the input (B, N, D) of an interacting block.

        `place` is the block's position among those that interact.

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
        """Keep an interaction's output; recomputing does not replace the first."""
        self.spatial.setdefault(interaction + 1, spatial)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, equal_nan=True)
