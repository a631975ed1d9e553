"""Plain vision transformers on timm's `VisionTransformer`.

What all of them share: patches, positions, blocks one by one, four maps. A family
with its own positions (Prithvi) overrides one method.

Source: Dosovitskiy et al., arXiv 2010.11929; timm.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone, Meta, tap_points, tapped_tokens
from geopeft_kit.backbones.card import BackboneCard


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """The last h*w of (B, N, D) tokens as a map (B, D, h, w)."""
    patches = tokens[:, -height * width :]  # (B, h*w, D)
    return patches.transpose(1, 2).unflatten(2, (height, width))  # (B, D, h, w)


class ViTBackbone(Backbone):
    """A plain ViT: four maps at patch stride, from four depths.

    The blocks are called one by one, so a method may replace any of them. The patch
    tokens are the last h*w tokens of a block's output: whatever a method adds
    (prompts) stands before them.
    """

    layout = "vit"
    model: VisionTransformer

    def __init__(
        self, card: BackboneCard, model: VisionTransformer, plan: BandPlan
    ) -> None:
        super().__init__(card, model, plan)
        self.width = model.embed_dim
        self.num_prefix_tokens = model.num_prefix_tokens
        self.channels = [model.embed_dim] * 4
        self.strides = [model.patch_embed.patch_size[0]] * 4
        self.taps = tap_points(len(model.blocks))

    @property
    def block_paths(self) -> list[str]:
        """``blocks.0`` ... in order."""
        return [f"blocks.{i}" for i in range(len(self.model.blocks))]

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, D, h, w)."""
        patches = self.model.patch_embed(image)  # (B, h, w, D)
        tokens = self.add_positions(patches)  # (B, prefix + h*w, D)
        return self.read_blocks(tokens, *patches.shape[1:3])

    def read_blocks(self, tokens: Tensor, height: int, width: int) -> list[Tensor]:
        """Run the blocks on tokens (B, prefix + h*w, D); four maps (B, D, h, w).

        The last map is normed.
        """
        self.grid.height, self.grid.width = height, width
        tokens = self.model.norm_pre(tokens)
        tapped = tapped_tokens(self.model, tokens, self.taps)
        return [self.to_map(each, height, width) for each in tapped]

    def add_positions(self, patches: Tensor) -> Tensor:
        """Patches (B, h, w, D), positions added -> tokens (B, prefix + h*w, D)."""
        return self.model._pos_embed(patches)

    def to_map(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The last h*w of (B, N, D) tokens as a map (B, D, h, w)."""
        return tokens_to_map(tokens, height, width)


class RotaryPositions:
    """Passes the rotations of DINOv3's positions to an attention when it is called.

    A hook does it, not an argument of the block, so that a method may wrap the block.
    Tokens that a method adds before the patches (prompts) are not rotated, like the
    class and register tokens. `turns` (N, 2 * head width) holds sines, then cosines, of
    the last image.
    """

    turns: Tensor

    def __call__(
        self, attention: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The arguments of `attention` with its rotations among them."""
        added = args[0].shape[1] - attention.num_prefix_tokens - len(self.turns)
        still = torch.zeros_like(self.turns[:1]).expand(added, -1).clone()
        still[:, still.shape[1] // 2 :] = 1  # sine 0, cosine 1
        return args, kwargs | {"rope": torch.cat([still, self.turns])}


class RotaryViTBackbone(ViTBackbone):
    """A ViT that turns queries and keys by their positions (DINOv3).

    There is no position table: the rotations are computed for the grid of each image.
    """

    model: Any

    def __init__(self, card: BackboneCard, model: Any, plan: BandPlan) -> None:
        super().__init__(card, model, plan)
        self.rotary = RotaryPositions()
        for block in model.blocks:
            block.attn.register_forward_pre_hook(self.rotary, with_kwargs=True)

    def add_positions(self, patches: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, prefix + h*w, D), and the rotations for the blocks."""
        tokens, self.rotary.turns = self.model._pos_embed(patches)
        return tokens
