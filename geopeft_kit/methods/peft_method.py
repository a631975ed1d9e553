"""What the methods around Hugging Face `peft` share: default targets and merging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from geopeft_kit.methods.base import Block, Method, Replacement
from geopeft_kit.methods.peft_layers import FusedProjection, PeftLayer, merged_tensors
from geopeft_kit.methods.targets import LINEAR_CONV2D, Kinds, default_targets

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone


class PeftMethod(Method):
    """A method whose substitutes are layers of `peft`.

    Attributes:
        kinds: Types of layer that the method's peft layers exist for.
    """

    mergeable = True
    identity_at_start = True
    needs = "networks with Linear or ungrouped Conv2d layers in their blocks"
    kinds: ClassVar[Kinds] = LINEAR_CONV2D

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks whose blocks hold no layer that peft can wrap."""
        if self.default_targets(backbone.blocks):
            return None
        words = " or ".join(kind.__name__ for kind in self.kinds)
        return f"its blocks hold no {words} layer for it (grouped ones do not count)"

    def default_targets(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Return the short names of the layers that suit the method."""
        return default_targets(blocks, self.kinds)

    def resolve(
        self, backbone: Backbone, blocks: list[Block], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Put the architecture's default targets, and alpha = rank, in the config."""
        if options["targets"] is None:
            options["targets"] = self.default_targets(blocks)
        if "alpha" in options and options["alpha"] is None:
            options["alpha"] = options["rank"]
        return options

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each frozen tensor, or its q, k, v rows, and the merged values."""
        original: Any = replacement.original
        substitute: PeftLayer = replacement.substitute
        if not isinstance(substitute, FusedProjection):
            for name, values in merged_tensors(substitute).items():
                yield getattr(original, name), values
            return
        for part, layer in substitute.parts.items():
            for name, values in merged_tensors(layer).items():
                thirds = getattr(original, name).chunk(3)  # views: written through
                yield thirds["qkv".index(part)], values
