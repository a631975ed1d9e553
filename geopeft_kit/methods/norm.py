"""Norm tuning: gains and shifts of the normalisation layers. Taught in notebook 04."""

from __future__ import annotations

from torch import nn

from geopeft_kit.methods.base import register
from geopeft_kit.methods.in_place import ChosenParameters


@register
class Norm(ChosenParameters):
    """Weight and bias of every normalisation layer, the final one included.

    Running statistics of a batch norm stay: it computes with the frozen ones, in
    training too.
    """

    name = "norm"
    title = "Norm tuning"
    paper = "Basu et al. 2024, LayerNorm tuning, arXiv 2304.01917"
    trained = "weight and bias of every normalisation layer"
    count_formula = "4D per ViT block + 2D (final norm)"
    learning_rate = 1e-3  # ours
    needs = "any backbone with affine normalisation layers"
    missing = "it has no normalisation layer with a weight or bias"

    def chooses(self, module: nn.Module, name: str) -> bool:
        """Choose by the class's name: LayerNorm, BatchNormAct2d, RmsNorm, ..."""
        return "norm" in type(module).__name__.lower()
