"""Multi-scale deformable attention in plain PyTorch, with no compiled operator.

Source: Zhu et al. 2021, Deformable DETR, arXiv 2010.04159, section 4.1 and equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]
"""(rows h, columns w) of a map."""


class DeformableAttention(nn.Module):
    """Each query reads a few points of each map, and chooses them itself.

    A head of a query at place p reads each level at K points p + offset, bilinearly and
    zero outside the map. Weights sum to 1 over levels and points. Offsets, in cells,
    start as a ring around p (one direction per head, one step further per point) with
    almost equal weights. Equal ones, as in the source, would leave a layer behind a
    zero gate without gradient until the third step.
    """

    def __init__(
        self, width: int, levels: int, heads: int, points: int, inner: int
    ) -> None:
        super().__init__()
        self.shape = (heads, levels, points)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)
        for layer in (self.offsets, self.weights):
            nn.init.normal_(layer.weight, std=1e-3)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(_ring(heads, levels, points).flatten())

    def forward(
        self, queries: Tensor, places: Tensor, values: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """Attend from queries (B, Q, D) to values (B, S, D) -> (B, Q, D).

        `places` (Q, 2) are x and y of the queries, from 0 to 1 across the image. Values
        are the cells of all levels, row by row; `sizes` are (h, w) of each level.
        """
        heads = self.shape[0]
        # Places need float32: bfloat16 has no more than 256 steps between 0.5 and 1.
        offsets = self.offsets(queries).float().unflatten(2, (*self.shape, 2))
        weights = self.weights(queries).float().unflatten(2, (heads, -1)).softmax(-1)
        weights = weights.unflatten(3, self.shape[1:])  # (B, Q, H, L, K)
        cells = self.value(values).float().unflatten(2, (heads, -1))  # (B, S, H, d)
        levels = cells.split([h * w for h, w in sizes], dim=1)
        mixed: Tensor | float = 0.0
        for level, (height, width) in enumerate(sizes):
            steps = offsets.new_tensor([width, height])  # cells across the image
            points = places[:, None, None] + offsets[:, :, :, level] / steps
            grid = 2 * points - 1  # (B, Q, H, K, 2), -1 to 1 as grid_sample counts
            maps = levels[level].permute(0, 2, 3, 1).flatten(0, 1)  # (B*H, d, h*w)
            sampled = F.grid_sample(
                maps.unflatten(2, (height, width)),
                grid.transpose(1, 2).flatten(0, 1),
                align_corners=False,
            )  # (B*H, d, Q, K)
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*H, Q, K)
            mixed = mixed + (sampled * share[:, None]).sum(3)  # (B*H, d, Q)
        assert isinstance(mixed, Tensor)
        heads_apart = mixed.unflatten(0, (-1, heads)).flatten(1, 2)  # (B, r*D, Q)
        return self.out(heads_apart.transpose(1, 2).to(self.out.weight.dtype))


def centres(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Centres of the cells of maps, (S, 2): x and y from 0 to 1, float32."""
    places = []
    for height, width in sizes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        places.append(torch.stack([columns, rows], dim=2).flatten(0, 1))  # (h*w, 2)
    return torch.cat(places)


def _ring(heads: int, levels: int, points: int) -> Tensor:
    """Initial offsets, (H, L, K, 2): a direction per head, a distance per point."""
    angles = torch.arange(heads) * (2 * math.pi / heads)
    ring = torch.stack([angles.cos(), angles.sin()], dim=1)  # (H, 2)
    ring = ring / ring.abs().amax(dim=1, keepdim=True)  # onto a square of side 2
    far = torch.arange(1, points + 1, dtype=torch.float32)
    steps = ring[:, None, None] * far[:, None]  # (H, 1, K, 2)
    return steps.expand(heads, levels, points, 2)
