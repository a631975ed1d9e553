"""Frozen backbone, last blocks, full fine-tuning.

Taught in notebook 02.
"""

from __future__ import annotations

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Blocks, Method, register
from geopeft_kit.methods.checks import check_whole
from geopeft_kit.methods.in_place import train_everything
from geopeft_kit.methods.replacement import Replacements


@register
class Frozen(Method):
    """Nothing inside the backbone trains: the probe."""

    name = "frozen"
    title = "Frozen backbone (probe)"
    family = "ends"
    paper = "-"
    trained = "nothing in the backbone; the decoder on top alone"
    count_formula = "0"
    mergeable = True
    linear = True
    identity_at_start = True
    learning_rate = None

    def build(self, backbone: Backbone, blocks: Blocks) -> Replacements:
        """Replace nothing."""
        return []


@register
class Full(Method):
    """Every parameter trains, in copies; the original weights are kept.

    Batch-norm statistics move during training, in copies as well, and are saved. With
    `layers` given, only what is inside those blocks trains.
    """

    name = "full"
    title = "Full fine-tuning"
    family = "ends"
    paper = "-"
    trained = "all parameters; batch-norm statistics move"
    count_formula = "all"
    mergeable = True
    linear = True
    identity_at_start = True
    # The 15 full runs of the PEFT study (arXiv 2504.17397, its released settings) chose
    # 2.2e-5 to 9.9e-4, larger models the smaller ones.
    learning_rate = 1e-4

    def build(self, backbone: Backbone, blocks: Blocks) -> Replacements:
        """Copy all parameters and moving buffers, or those of the chosen blocks."""
        if len(blocks) < len(backbone.blocks):
            return train_everything(backbone.model, [path for path, _ in blocks])
        inside = train_everything(backbone.model, [""])
        return inside + train_everything(backbone, backbone.beside)


@register
class LastBlocks(Method):
    """The last blocks train, in copies; everything before them is frozen.

    Nothing before the first trained block needs a backward pass. If `layers` chooses
    blocks, exactly those train and `number` is not used.
    """

    name = "last_blocks"
    title = "Last blocks"
    family = "ends"
    paper = "-"
    trained = "all parameters of the last `number` blocks"
    count_formula = "number * block (plain ViT block: 12D^2 + 13D)"
    mergeable = True
    linear = True
    identity_at_start = True
    learning_rate = 1e-4  # as full; ours

    def build(
        self, backbone: Backbone, blocks: Blocks, *, number: int = 2
    ) -> Replacements:
        """Copy every parameter and buffer of the last blocks.

        Raises:
            ValueError: `number` is not between 1 and the number of blocks.
        """
        check_whole("number", number)
        if number > len(backbone.blocks):
            raise ValueError(
                f"number={number}, but the backbone has {len(backbone.blocks)} blocks."
            )
        if len(blocks) == len(backbone.blocks):
            blocks = blocks[-number:]
        return train_everything(backbone.model, [path for path, _ in blocks])
