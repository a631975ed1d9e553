"""(IA)^3: one trained factor per channel. Taught in notebook 03.

The layers are those of Hugging Face `peft`.

Source: Liu et al. 2022, (IA)^3, arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from geopeft_kit.methods.base import Block, Replacement
from geopeft_kit.methods.peft_layers import slot, wrap
from geopeft_kit.methods.peft_method import PeftMethod
from geopeft_kit.methods.targets import available_targets, find_targets

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone


class Ia3(PeftMethod):
    """One trained factor per channel, 1 at the start: l * (W x + b), or W (l * x) + b.

    Factors stand on the output of a target. Those of an MLP's second layer, fc2, stand
    on its input, the activations between the two layers, as in the paper. Its
    targets k, v and these activations are the default where there are such layers.
    """

    name = "ia3"
    title = "(IA)^3"
    paper = "Liu et al. 2022, (IA)^3, arXiv 2205.05638"
    trained = "one factor per output channel of each target, or input channel of fc2"
    count_formula = "out per target (in for fc2); 6D per ViT block by default"
    learning_rate = 5e-3  # ours

    def default_targets(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Return k, v and fc2, or what the architecture has instead."""
        usual = super().default_targets(blocks)
        if "fc2" not in usual:
            return usual
        present = available_targets(blocks)
        return (*(name for name in ("k", "v") if _found(name, present)), "fc2")

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's (IA)^3.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
        """
        from peft import IA3Config

        chosen = find_targets(blocks, targets or (), self.kinds)
        config = IA3Config(feedforward_modules=[])
        config.feedforward_modules = [
            slot(i)
            for i, target in enumerate(chosen)
            if "fc2" in target.path.split(".")
        ]
        return wrap(backbone, chosen, config)


def _found(name: str, present: Sequence[str]) -> bool:
    return any(p == name or p.endswith(f".{name}") for p in present)
