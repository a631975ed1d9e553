"""Bias tuning (BitFit): the bias terms train, nothing else. Taught in notebook 04.

Source: Ben Zaken et al. 2022, arXiv 2106.10199.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from geopeft_kit.methods.base import Block, Method, Replacement
from geopeft_kit.methods.in_place import train_copies

if TYPE_CHECKING:
    from torch import nn

    from geopeft_kit.backbones.base import Backbone


class Bias(Method):
    """All bias terms: of the blocks, the patch embedding and the final norm.

    With `layers` given, only the biases inside those blocks. The bias of a batch norm
    counts as one; its statistics stay.
    """

    name = "bias"
    title = "Bias tuning (BitFit)"
    paper = "Ben Zaken et al. 2022, BitFit, arXiv 2106.10199"
    trained = "every bias"
    count_formula = "11D per ViT block + 2D (patch embedding, final norm)"
    mergeable = True
    identity_at_start = True
    learning_rate = 1e-3  # ours; biases bear a larger rate than weights
    needs = "any backbone with biases"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse a network without a single bias."""
        if any(_is_bias(None, name) for name, _ in _leaves(backbone.model)):
            return None
        return "it has no bias terms"

    def build(self, backbone: Backbone, blocks: list[Block]) -> list[Replacement]:
        """Copy the biases of the whole network, or of the chosen blocks."""
        everything = len(blocks) == len(backbone.blocks)
        roots = [""] if everything else [path for path, _ in blocks]
        return train_copies(backbone.model, roots, _is_bias)


def _is_bias(module: nn.Module | None, name: str) -> bool:
    return name == "bias" or name.endswith("_bias")


def _leaves(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.rpartition(".")[2], p) for name, p in model.named_parameters()]
