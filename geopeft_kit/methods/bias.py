"""Bias tuning (BitFit): the bias terms train, nothing else. Taught in notebook 04."""

from __future__ import annotations

from torch import nn

from geopeft_kit.methods.base import register
from geopeft_kit.methods.in_place import ChosenParameters


@register
class Bias(ChosenParameters):
    """All bias terms: of the blocks, the patch embedding and the final norm.

    The bias of a batch norm counts as one; its statistics stay.
    """

    name = "bias"
    title = "Bias tuning (BitFit)"
    paper = "Ben Zaken et al. 2022, BitFit, arXiv 2106.10199"
    trained = "every bias"
    count_formula = "11D per ViT block + 2D (patch embedding, final norm)"
    learning_rate = 1e-3  # ours; biases bear a larger rate than weights
    needs = "any backbone with biases"
    note = "BitFit"
    missing = "it has no bias terms"

    def chooses(self, module: nn.Module, name: str) -> bool:
        """Choose by the parameter's name."""
        return name == "bias" or name.endswith("_bias")
