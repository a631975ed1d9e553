"""Plain vision transformers on timm's `VisionTransformer`.

They share patches, positions, blocks one by one, and four maps. A family with positions
of its own overrides `add_positions` or `forward_maps`.

Source: Dosovitskiy et al., arXiv 2010.11929; timm.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone, Meta, tap_points, tapped_tokens
from geopeft_kit.backbones.card import BackboneCard


def vit_network(
    card: BackboneCard,
    kind: type[VisionTransformer] = VisionTransformer,
    epsilon: float = 1e-6,
    **options: Any,
) -> Any:
    """A ViT with the sizes of its card and without a head; `options` are timm's."""
    sizes: dict[str, Any] = {
        "img_size": card.image_size,
        "patch_size": card.patch,
        "in_chans": len(card.bands),
        "num_classes": 0,
        "embed_dim": card.width,
        "depth": card.depth,
        "num_heads": card.architecture["heads"],
        "norm_layer": partial(nn.LayerNorm, eps=epsilon),
        "dynamic_img_size": True,
    }
    return kind(**(sizes | options))


def sines_and_cosines(places: Tensor, rates: Tensor) -> Tensor:
    """Code of (n,) places at (k,) rates, (n, 2k): all sines, then all cosines."""
    angles = torch.outer(places, rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def fixed_table(
    width: int,
    height: int,
    breadth: int,
    spacing: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """MAE's position table (height * breadth, D): half columns, half rows; base 10000.

    `spacing` is the distance of two patches in units of the code.
    """
    quarter = width // 4
    steps = torch.arange(quarter, dtype=torch.float64, device=device)

    def code(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float64, device=device) * spacing
        return sines_and_cosines(places, 10000 ** (-steps / quarter)).float()

    columns = code(breadth).expand(height, -1, -1)  # (h, w, D/2)
    rows = code(height)[:, None].expand(-1, breadth, -1)  # (h, w, D/2)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


def with_class_row(table: Tensor) -> Tensor:
    """A position table (N, D) as (1, 1 + N, D), with zeros for the class token."""
    return torch.cat([torch.zeros(1, table.shape[1]), table])[None]


def fix_positions(model: nn.Module, table: Tensor) -> None:
    """Replace timm's learned position table with a fixed one (1, N, D).

    It is a buffer under timm's name: the plain model runs alone, and nothing trains it.
    """
    del model.pos_embed
    model.register_buffer("pos_embed", table, persistent=False)


def prepended(token: Tensor, tokens: Tensor) -> Tensor:
    """Tokens (1, P, D) in front of each sequence (B, N, D), (B, P + N, D)."""
    first = token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
    return torch.cat([first, tokens], dim=1)


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """The last h*w of (B, N, D) tokens as a map (B, D, h, w)."""
    patches = tokens[:, -height * width :]  # (B, h*w, D)
    return patches.transpose(1, 2).unflatten(2, (height, width))  # (B, D, h, w)


class ViTBackbone(Backbone):
    """A plain ViT: four maps at patch stride, from four depths.

    The patch tokens are the last h*w tokens of a block's output: what a method adds
    (prompts) comes before them.
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

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, D, h, w)."""
        patches = self.model.patch_embed(image)  # (B, h, w, D)
        tokens = self.add_positions(patches)  # (B, prefix + h*w, D)
        return self.read_blocks(tokens, *patches.shape[1:3])

    def read_blocks(self, tokens: Tensor, height: int, width: int) -> list[Tensor]:
        """Tokens (B, prefix + h*w, D) -> four maps (B, D, h, w), the last normed."""
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
    """A hook that passes DINOv3's rotations to an attention; blocks can be wrapped.

    Prompts are not rotated, like the class and register tokens. `rotations`
    (N, 2 * head width) holds sines, then cosines, for the grid of the last image.
    """

    rotations: Tensor

    def __call__(
        self, attention: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The arguments of `attention` with its rotations among them."""
        added = args[0].shape[1] - attention.num_prefix_tokens - len(self.rotations)
        still = torch.zeros_like(self.rotations[:1]).expand(added, -1).clone()
        still[:, still.shape[1] // 2 :] = 1  # sine 0, cosine 1
        return args, kwargs | {"rope": torch.cat([still, self.rotations])}


class RotaryViTBackbone(ViTBackbone):
    """DINOv3: queries and keys are rotated by their positions; there is no table."""

    model: Any

    def __init__(self, card: BackboneCard, model: Any, plan: BandPlan) -> None:
        super().__init__(card, model, plan)
        self.rotary = RotaryPositions()
        for block in model.blocks:
            block.attn.register_forward_pre_hook(self.rotary, with_kwargs=True)

    def add_positions(self, patches: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, prefix + h*w, D), and the rotations for the blocks."""
        tokens, self.rotary.rotations = self.model._pos_embed(patches)
        return tokens
