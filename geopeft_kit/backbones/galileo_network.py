"""Galileo's encoder: tokens of channel groups, fixed codes, kernels that are resized.

A short module for single dates of Sentinel-2, written from the formulas; its tokens
equal those of the published code. Two details of that code matter: kernels are resized
with an antialiased bicubic filter, and the frequencies of all fixed codes fall four
times more slowly than in the usual sine-cosine table.

Sources: Tseng et al., Galileo, arXiv 2502.09356 and github.com/nasaharvest/galileo;
patch resizing from Beyer et al., FlexiViT, arXiv 2212.08013, section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from geopeft_kit.backbones.vit import sines_and_cosines

# In the order of the rows of the channel embedding.
GROUPS: dict[str, tuple[str, ...]] = {
    "S1": ("VV", "VH"),
    "S2_RGB": ("BLUE", "GREEN", "RED"),
    "S2_Red_Edge": ("RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3"),
    "S2_NIR_10m": ("NIR_BROAD",),
    "S2_NIR_20m": ("NIR_NARROW",),
    "S2_SWIR": ("SWIR_1", "SWIR_2"),
    "NDVI": ("NDVI",),
}
MAX_PATCH = 8  # side of the kernels as trained
_DATES = 24


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        query, key, value = (
            layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )  # each (B, heads, N, D / heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block, with timm's attribute names."""

    def __init__(self, width: int, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchEmbedding(nn.Module):
    """Patches of one channel group to tokens, at any patch size up to 8 pixels."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, MAX_PATCH, MAX_PATCH)

    def forward(self, image: Tensor, resize: Tensor | None) -> Tensor:
        """(B, c, H, W) -> (B, h, w, D); ``resize`` as `kernel_resize` gives it."""
        if resize is None:
            return self.proj(image).permute(0, 2, 3, 1)
        kernel = self.proj.weight.flatten(2) @ resize  # (D, c, patch*patch)
        kernel = kernel.unflatten(2, (self.patch, self.patch))
        tokens = F.conv2d(image, kernel, self.proj.bias, stride=self.patch)
        return tokens.permute(0, 2, 3, 1)


class _Table(nn.Module):
    """A fixed table under the name ``weight``, as the file calls it."""

    weight: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", table)


class Galileo(nn.Module):
    """The part of Galileo's encoder that processes single Sentinel-2 dates."""

    pos_embed: Tensor

    def __init__(
        self, width: int, depth: int, heads: int, groups: Sequence[str], patch: int
    ) -> None:
        super().__init__()
        quarter = width // 4
        self.space_time_embed = nn.ModuleDict(
            {name: PatchEmbedding(len(GROUPS[name]), width, patch) for name in groups}
        )
        self.s_t_channel_embed = nn.Parameter(torch.randn(len(GROUPS), quarter) * 0.02)
        self.register_buffer("pos_embed", fixed_code(quarter, torch.arange(_DATES)))
        self.month_embed = _Table(_month_table(quarter))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def encodings(
        self, height: int, breadth: int, month: Tensor, step: float
    ) -> Tensor:
        """What is added to the tokens, (B, h, w, N, D) for N channel groups.

        Each encoding has a quarter of the width. `month` is (B,), from 0; `step` is the
        distance of two patches in units of 10 m.
        """
        rows = [list(GROUPS).index(name) for name in self.space_time_embed]
        group = self.s_t_channel_embed[rows]  # (N, D/4)
        shape = (month.shape[0], height, breadth, len(rows), -1)
        quarter = group.shape[1]
        places = torch.arange(max(height, breadth), device=month.device) * step
        code = fixed_code(quarter // 2, places)  # (max(h, w), D/8)
        return torch.cat(
            [
                group.expand(shape),
                self.pos_embed[0].expand(shape),
                self.month_embed.weight[month][:, None, None, None].expand(shape),
                code[:breadth, None].expand(shape),
                code[:height, None, None].expand(shape),
            ],
            dim=-1,
        )


def fixed_code(size: int, places: Tensor) -> Tensor:
    """Sines, then cosines (n, size), at frequencies 10000^(-i / (2 size))."""
    steps = torch.arange(size // 2, device=places.device, dtype=torch.float32)
    return sines_and_cosines(places.float(), 10000 ** (-steps / (2 * size)))


def _month_table(size: int) -> Tensor:
    """Sine and cosine of the month as an angle, (12, size)."""
    angles = (2 * math.pi / 12 * torch.arange(12))[:, None].expand(12, size // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def kernel_resize(old: int, new: int) -> Tensor:
    """Matrix (old * old, new * new) that resizes flat patch kernels.

    If B resizes a patch, tokens stay the same when the kernel is multiplied by the
    pseudo-inverse of B transposed.

    Source: FlexiViT, arXiv 2212.08013, section 3.4.
    """
    basis = torch.eye(old * old).unflatten(1, (1, old, old))  # (old*old, 1, old, old)
    resized = F.interpolate(
        basis, size=(new, new), mode="bicubic", antialias=True
    )  # (old*old, 1, new, new)
    return torch.linalg.pinv(resized.flatten(1)).T
