"""UPetu-style: quantised adapters and context-aware prompts on hierarchical networks.

Only the paper's abstract could be read. From it: there is an efficient quantisation
adapter module (EQAM) of quantised linear layers and non-linear activations, and a
context-aware prompt module (CAPM) that puts trainable prompts into features of several
scales; they complement each other; 0.73 % of the parameters of ConvNeXt-B train; tasks
are scene classification, segmentation and change detection. Not confirmed, and ours
here: the bits, where the modules stand, their widths, the activation, every formula of
CAPM. Q-Linear itself is that of Jie et al. 2023 (arXiv 2307.16867), which has the same
name. Our count on ConvNeXt-B, 641,444 or 0.7325 %, meets 0.73 % because we chose the
widths so; it is no evidence that the paper did the same. Taught in notebook 06.

Source: Dong, Gu and Liu 2024, UPetu, IEEE TGRS, DOI 10.1109/TGRS.2024.3382734.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.methods.base import Block, Replacement, check_whole
from geopeft_kit.methods.block_parts import device_of, trained_in
from geopeft_kit.methods.bottleneck import Parallel
from geopeft_kit.methods.quantised import (
    QuantisedLinear,
    QuantisedMethod,
    start_small,
)

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone

CHANNEL_AXES = {"convnext": 1, "swin": -1}  # of what a block reads and gives


class QuantisationAdapter(nn.Module):
    """EQAM: s * Q2(GELU(Q1(LN x))), with s learned and 1 at the start.

    The norm has no parameters. It stands beside a whole block, block(x) + EQAM(x), so
    that no layer scale of the block makes it smaller. Q2 starts as in
    `quantised_adapter`: at small random numbers, at 32 bits at zero.

    Args:
        channels: Channels C of input and output.
        width: Channels h in the middle.
        bits: Bits per weight of Q1 and Q2.
        channel_axis: Axis of the input that holds the channels.
        device: Where the parameters are made.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        bits: int,
        channel_axis: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.down = QuantisedLinear(channels, width, bits, device)
        self.up = start_small(QuantisedLinear(width, channels, bits, device))
        self.scale = nn.Parameter(torch.ones((), device=device))
        self.channel_axis = channel_axis

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape; computes in float32, also on half-precision input."""
        x = x.to(self.scale.dtype).movedim(self.channel_axis, -1)
        x = F.layer_norm(x, x.shape[-1:])
        x = self.scale * self.up(F.gelu(self.down(x)))
        return x.movedim(-1, self.channel_axis)


class ContextPrompts(nn.Module):
    """CAPM: what it adds to the features F of a stage.

    With P prompts p_i and the context c = mean over the map of Down F:

        a = softmax(P c / sqrt(d)),  p = sum of a_i p_i,
        added = gamma * Up(GELU(Down F + p)),

    so each image mixes its own prompt, by what is in it. gamma is one number per
    channel and 0 at the start: nothing is added then. With `earlier`, the context of
    the stage before is put behind c; prompts have twice the numbers, of which the first
    half are added to the features. No gradient goes to the earlier stage that way.

    The prompts start from N(0, 1), Down and Up as torch's `nn.Linear`.

    Args:
        channels: Channels C of the features.
        width: d.
        prompts: Number of prompts P.
        channel_axis: Axis of the features that holds the channels.
        earlier: The module of the stage before, or None.
        device: Where the parameters are made.

    Attributes:
        context: (B, d) of the last forward pass.
        attention: (B, P) weights a of the last forward pass.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        prompts: int,
        channel_axis: int,
        earlier: ContextPrompts | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width, bias=False, device=device)
        self.up = nn.Linear(width, channels, bias=False, device=device)
        length = width if earlier is None else 2 * width
        self.prompts = nn.Parameter(torch.randn(prompts, length, device=device))
        self.gamma = nn.Parameter(torch.zeros(channels, device=device))
        self.channel_axis = channel_axis
        self._earlier = (earlier,)  # in a tuple: it is no part of this module
        self.context: Tensor | None = None
        self.attention: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Features of a stage, channels where the network has them; keeps the shape."""
        x = features.to(self.gamma.dtype).movedim(self.channel_axis, -1)  # (B, H, W, C)
        x = self.down(x)  # (B, H, W, d)
        added = self.gamma * self.up(F.gelu(x + self._prompt(x.mean(dim=(1, 2)))))
        return added.movedim(-1, self.channel_axis)

    def _prompt(self, context: Tensor) -> Tensor:
        """The mixed prompt of each image: (B, d) -> (B, 1, 1, d)."""
        self.context = context.detach()
        (earlier,) = self._earlier
        if earlier is not None and earlier.context is not None:
            context = torch.cat([context, earlier.context], dim=1)  # (B, 2d)
        scores = context @ self.prompts.T / self.prompts.shape[1] ** 0.5
        weights = scores.softmax(dim=1)  # (B, P)
        self.attention = weights.detach()
        prompt = weights @ self.prompts[:, : self.down.out_features]
        return prompt[:, None, None]


class PromptedBlock(nn.Module):
    """The last block of a stage, and context-aware prompts on what it gives."""

    def __init__(self, block: nn.Module, prompts: ContextPrompts) -> None:
        super().__init__()
        self.block = block
        self.prompts = prompts

    def forward(self, x: Tensor) -> Tensor:
        """The block's own shapes."""
        y = self.block(x)
        return y + self.prompts(y).to(y.dtype)


class Upetu(QuantisedMethod):
    """EQAM beside every block, CAPM on what the last block of a stage gives.

    With `layers` less than "all", a stage whose last block is not chosen has no CAPM.
    EQAM is no identity at the start, CAPM is; with 32 bits both are.
    """

    name = "upetu"
    title = "UPetu-style (EQAM + CAPM)"
    paper = "Dong et al. 2024, UPetu, IEEE TGRS, 10.1109/TGRS.2024.3382734 (abstract)"
    trained = "b-bit bottleneck beside each block, prompts on each stage"
    count_formula = "2Ch + 1 per block, 2Cd + Pd + C per stage"
    needs = "hierarchical networks with layer norms (ConvNeXt, Swin)"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse all but ConvNeXt and Swin."""
        if backbone.layout not in CHANNEL_AXES:
            return (
                "it needs the stages of a ConvNeXt or Swin; its layout is "
                f"{backbone.layout!r}"
            )
        return None

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        width: int = 16,
        bits: int = 1,
        prompts: int = 8,
        prompt_width: int = 16,
        cross_scale: bool = False,
    ) -> list[Replacement]:
        """Put an EQAM beside each block and a CAPM behind each stage.

        Args:
            backbone: A ConvNeXt or Swin.
            blocks: The blocks that get adapters.
            width: Channels h in the middle of an EQAM.
            bits: Bits per weight of EQAM: 1, 2, 4, 8, or 32 for none saved.
            prompts: Number of prompts P per stage.
            prompt_width: Length d of a prompt.
            cross_scale: Let the context of the stage before choose prompts too.
        """
        for name, value in (
            ("width", width),
            ("prompts", prompts),
            ("prompt_width", prompt_width),
        ):
            check_whole(name, value)
        if not isinstance(cross_scale, bool):
            raise TypeError(f"cross_scale={cross_scale!r}; True or False is needed.")
        axis, channels = CHANNEL_AXES[backbone.layout], _channels(backbone)
        ends = set(_last_blocks(backbone))
        replacements = []
        earlier: ContextPrompts | None = None
        for path, block in blocks:
            count, device = channels[path], device_of(block)
            adapter = QuantisationAdapter(count, width, bits, axis, device)
            tensors = trained_in(adapter, "adapter")
            substitute: nn.Module = Parallel(block, adapter)
            if path in ends:
                capm = ContextPrompts(
                    count, prompt_width, prompts, axis, earlier, device
                )
                tensors |= trained_in(capm, "prompts")
                substitute = PromptedBlock(substitute, capm)
                earlier = capm if cross_scale else None
            replacements.append(
                Replacement.at(backbone.model, path, substitute, tensors)
            )
        return replacements


def _channels(backbone: Backbone) -> dict[str, int]:
    """Path of each block -> channels of its stage."""
    stages = list(dict.fromkeys(_stage(path) for path in backbone.block_paths))
    width = dict(zip(stages, backbone.channels, strict=True))
    return {path: width[_stage(path)] for path in backbone.block_paths}


def _last_blocks(backbone: Backbone) -> list[str]:
    """Path of the last block of each stage."""
    return list({_stage(path): path for path in backbone.block_paths}.values())


def _stage(path: str) -> str:
    """Path of the stage of a block: stages.2 for stages.2.blocks.5."""
    return path.rpartition(".blocks.")[0]
