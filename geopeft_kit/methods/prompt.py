"""Visual prompt tuning (VPT): learnt tokens among the image's. Taught in notebook 04.

Source: Jia et al. 2022, Visual Prompt Tuning, arXiv 2203.12119, section 3.2; placement
and cut-off as in the PEFT study of GFMs, arXiv 2504.17397.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.devices import device_of
from geopeft_kit.methods.base import Blocks, Method, register
from geopeft_kit.methods.checks import check_share, check_switch, check_whole
from geopeft_kit.methods.replacement import Replacement, Replacements


class PromptedBlock(nn.Module):
    """A transformer block that inserts prompts (1, n, D), removes some after, or both.

    `prefix` tokens (class token, ...) stay in front of the prompts.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: int,
        prompts: nn.Parameter | None,
        remove: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.block = block
        self.prefix = prefix
        self.register_parameter("prompts", prompts)
        self.remove = remove
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, N, D); other N where prompts stay for later blocks."""
        p = self.prefix
        if self.prompts is not None:
            prompts = self.dropout(self.prompts).to(tokens.dtype)
            prompts = prompts.expand(tokens.shape[0], -1, -1)  # (B, n, D)
            tokens = torch.cat([tokens[:, :p], prompts, tokens[:, p:]], dim=1)
        tokens = self.block(tokens, *args, **kwargs)
        if self.remove:
            tokens = torch.cat([tokens[:, :p], tokens[:, p + self.remove :]], dim=1)
        return tokens


@register
class VisualPrompts(Method):
    """Prompt tokens after the prefix tokens.

    Deep: every chosen block has its own, put in before it and cut off after it.
    Shallow: one set, put in before the first chosen block, carried through all of them
    and taken off after the last; the blocks must follow one another.

    The start is uniform in +-sqrt(6 / (3 * patch**2 + D)), the rule of the paper's
    code, whatever the bands are. Prompts change the output from the first step on:
    attention shares its weight with them. A dropout of 0.1 is the study's.
    """

    name = "vpt"
    title = "Visual prompt tuning (VPT)"
    family = "prompts"
    note = "shallow and deep"
    paper = "Jia et al. 2022, Visual Prompt Tuning, arXiv 2203.12119"
    trained = "n prompt tokens, in every block (deep) or once (shallow)"
    count_formula = "deep n*L*D, shallow n*D"
    mergeable = False
    identity_at_start = False
    # The study's 15 VPT runs chose 1e-4 to 1e-3, their median is 5.6e-4.
    learning_rate = 5e-4
    needs = "plain ViTs (token sequences)"

    def why_not(self, backbone: Backbone) -> str | None:
        if backbone.width is None:
            return f"prompts need a token sequence; its layout is {backbone.layout!r}"
        return None

    def build(
        self,
        backbone: Backbone,
        blocks: Blocks,
        *,
        tokens: int = 100,
        deep: bool = True,
        dropout: float = 0.1,
    ) -> Replacements:
        """Wrap the chosen blocks; `tokens` is n, `dropout` works on the prompts."""
        check_whole("tokens", tokens)
        check_share("dropout", dropout)
        if not check_switch("deep", deep):
            _check_contiguous(backbone, blocks)
        replacements = []
        for position, (path, block) in enumerate(blocks):
            first, last = position == 0, position == len(blocks) - 1
            if not (deep or first or last):
                continue
            prompts = _new_prompts(backbone, block, tokens) if deep or first else None
            wrapped = PromptedBlock(
                block,
                backbone.num_prefix_tokens,
                prompts,
                tokens if deep or last else 0,
                dropout,
            ).train(block.training)
            tensors = {"prompts": (wrapped, "prompts")} if prompts is not None else {}
            replacements.append(Replacement.at(backbone.model, path, wrapped, tensors))
        return replacements


def _new_prompts(backbone: Backbone, block: nn.Module, tokens: int) -> nn.Parameter:
    patch, width = backbone.strides[-1], cast(int, backbone.width)
    prompts = torch.empty(1, tokens, width, device=device_of(block))
    bound = math.sqrt(6 / (3 * patch * patch + width))
    return nn.Parameter(nn.init.uniform_(prompts, -bound, bound))


def _check_contiguous(backbone: Backbone, blocks: Blocks) -> None:
    numbers = [backbone.block_paths.index(path) for path, _ in blocks]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(
            f"layers={numbers} with deep=False: shallow prompts are carried from block "
            "to block, so they must follow one another. Use deep=True, or a range."
        )
