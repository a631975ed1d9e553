"""APLA: random rows of the attention's output projection train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import BlockMethod, register
from geopeft_kit.methods.checks import check_whole
from geopeft_kit.methods.replacement import (
    Replacement,
    Replacements,
    trained_in,
)
from geopeft_kit.methods.targets import available_targets

PROJECTION = "attn.proj"


class PartlyTrained(nn.Module):
    """A frozen Linear of which some rows of weight and bias train, in copies."""

    rows: Tensor
    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, rows: Tensor) -> None:
        super().__init__()
        self.base, self.out_features = base, base.out_features
        self.register_buffer("rows", rows, persistent=False)  # (r,) row numbers
        self.weight = nn.Parameter(base.weight.detach()[rows].float())  # (r, in)
        bias = None if base.bias is None else base.bias.detach()[rows].float()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); the trained rows replace the frozen ones."""
        out = self.base(x)
        trained = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return out.index_copy(-1, self.rows, trained.to(out.dtype))


@register
class Apla(BlockMethod):
    """Rows of the output projection of each attention train, chosen at random.

    Nothing is added to the network. The row numbers are drawn from the seed, other ones
    in each block, and never saved.
    """

    name = "apla"
    title = "APLA"
    family = "existing weights"
    paper = "Sorkhei et al. 2025, APLA, arXiv 2503.11335"
    trained = "r random rows, with their biases, of each attention's output projection"
    count_formula = "r * (D + 1) per block"
    mergeable = True
    identity_at_start = True
    linear = True
    learning_rate = 1e-4  # as full; ours
    needs = "networks with attention (ViT, Swin)"

    def why_not(self, backbone: Backbone) -> str | None:
        for path, block in backbone.blocks:
            if PROJECTION not in available_targets([(path, block)], (nn.Linear,)):
                return f"its block {path} has no {PROJECTION} that it calls"
        return None

    def in_block(
        self,
        backbone: Backbone,
        path: str,
        block: Any,
        *,
        rows: int = 64,
        seed: int = 0,
    ) -> Replacements:
        """Train `rows` rows of a block's projection, drawn from `seed`."""
        check_whole("rows", rows)
        base = block.get_submodule(PROJECTION)
        if rows > base.out_features:
            raise ValueError(
                f"rows={rows}, but {path}.{PROJECTION} has {base.out_features}."
            )
        check_whole("seed", seed, 0)
        number = backbone.block_paths.index(path)
        generator = torch.Generator("cpu").manual_seed(1000 * seed + number)
        order = torch.randperm(base.out_features, generator=generator, device="cpu")
        partly = PartlyTrained(base, order[:rows].sort().values.to(base.weight.device))
        tensors = trained_in(partly, "rows", frozen="base")
        return [Replacement.at(backbone.model, f"{path}.{PROJECTION}", partly, tensors)]

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield weight and bias with the trained rows in place."""
        original: Any = replacement.original
        partly: Any = replacement.substitute
        for name in ("weight", "bias"):
            frozen, rows = getattr(original, name), getattr(partly, name)
            if rows is not None:
                yield frozen, frozen.index_copy(0, partly.rows, rows.to(frozen.dtype))
