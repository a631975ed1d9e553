"""Norm tuning: gains and shifts of the normalisation layers. Taught in notebook 04.

Source: Basu et al. 2024, Strong Baselines for Parameter-Efficient Few-Shot
Fine-Tuning, arXiv 2304.01917 (LayerNorm tuning of ViTs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from geopeft_kit.methods.base import Block, Method, Replacement
from geopeft_kit.methods.in_place import train_copies

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone


class Norm(Method):
    """Weight and bias of every normalisation layer, the final one included.

    With `layers` given, only those inside the blocks. Running statistics of a batch
    norm stay: it computes with the frozen ones, in training too.
    """

    name = "norm"
    title = "Norm tuning"
    paper = "Basu et al. 2024, LayerNorm tuning, arXiv 2304.01917"
    trained = "weight and bias of every normalisation layer"
    count_formula = "4D per ViT block + 2D (final norm)"
    mergeable = True
    identity_at_start = True
    learning_rate = 1e-3  # ours
    needs = "any backbone with affine normalisation layers"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse a network whose normalisation layers have no parameters."""
        for module in backbone.model.modules():
            for name, _ in module.named_parameters(recurse=False):
                if _belongs_to_norm(module, name):
                    return None
        return "it has no normalisation layer with a weight or bias"

    def build(self, backbone: Backbone, blocks: list[Block]) -> list[Replacement]:
        """Copy the norms' parameters of the whole network, or of the chosen blocks."""
        everything = len(blocks) == len(backbone.blocks)
        roots = [""] if everything else [path for path, _ in blocks]
        return train_copies(backbone.model, roots, _belongs_to_norm)


def _belongs_to_norm(module: nn.Module, name: str) -> bool:
    """LayerNorm, BatchNormAct2d, RmsNorm, ...: told by the class's name."""
    return "norm" in type(module).__name__.lower()
