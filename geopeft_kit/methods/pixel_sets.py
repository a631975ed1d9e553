"""The untangled patch embedding of the DEFLECT-style method: radiometry, no geometry.

A patch is read twice: by the frozen RGB patch embedding, which knows shapes, and as a
*set* of multispectral pixels, whose mean and spread know colours. Shuffling the pixels
of a patch changes nothing in the second reading. Taught in notebook 05; what is from
the paper and what is ours: see `deflect.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.indices import spectral_indices

EPSILON = 1e-6


class TokenBuffer:
    """Keeps the auxiliary tokens (B, N, D) past the frozen patch embedding, once.

    Empty before and after each forward pass; a copy starts empty.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    def take(self) -> Tensor:
        """Return the tokens and forget them."""
        tokens, self.tokens = self.tokens, None
        if tokens is None:
            raise RuntimeError(
                "there are no auxiliary tokens: the DEFLECT-style method starts at the "
                "image. Call backbone(image), not backbone.model or forward_maps."
            )
        return tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenBuffer:
        return TokenBuffer()


class PixelSetEmbedding(nn.Module):
    """One token of width D per patch, from the set of its pixels.

    A one-layer MLP with ReLU reads the C bands and K indices of each pixel; mean and
    biased standard deviation over the patch (height and width in pixels) forget the
    order; a linear layer leads to D.
    """

    def __init__(
        self, inputs: int, features: int, width: int, patch: tuple[int, int]
    ) -> None:
        super().__init__()
        self.patch = patch
        self.pixel = nn.Linear(inputs, features)
        self.token = nn.Linear(2 * features, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C + K, H, W) -> (B, N, D), patches row by row."""
        height, width = self.patch
        sets = pixels.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        # (B, C + K, h, p, w, p) -> (B, h, w, p, p, C + K) -> (B, N, p * p, C + K)
        sets = sets.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        hidden = torch.relu(self.pixel(sets))  # (B, N, p * p, m)
        spread, mean = torch.std_mean(hidden, dim=2, correction=0)  # (B, N, m) each
        return self.token(torch.cat([mean, spread], dim=-1))


class UntangledSelect(nn.Module):
    """Takes the place of `backbone.select`, and makes the auxiliary tokens as well.

    Indices are computed from reflectance, so the backbone's normalisation is undone
    for them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        embedding: PixelSetEmbedding,
        indices: Sequence[str],
        buffer: TokenBuffer,
    ) -> None:
        super().__init__()
        self.select = backbone.select
        self.embedding = embedding
        self.indices = tuple(indices)
        self.bands = tuple(backbone.bands)
        self.buffer = buffer
        self.scale = backbone.card.normalisation.scale
        for name in ("mean", "std"):
            statistic = getattr(backbone, name).detach().clone()
            self.register_buffer(name, statistic, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image (B, C, H, W) -> the channels that the network reads."""
        weight = self.embedding.pixel.weight
        self.buffer.tokens = self.embedding(self.describe(image.to(weight.dtype)))
        return self.select(image)

    def describe(self, image: Tensor) -> Tensor:
        """Standardised bands and indices of each pixel, (B, C + K, H, W)."""
        if not self.indices:
            return image
        reflectance = (image * self.std + self.mean) / self.scale
        indices = spectral_indices(reflectance, self.bands, self.indices)
        return torch.cat([image, indices.to(image.dtype)], dim=1)


class JoinStreams(nn.Module):
    """Takes the place of `model.norm_pre`: puts the auxiliary tokens in front.

    Each gets the length (Euclidean norm) of the principal token at its place; the
    auxiliary class token, and registers if there are any, are zero. With a scalar
    `gate` (ablation "embedding") they are added to the principal ones instead.
    """

    gate: nn.Parameter | None

    def __init__(
        self, norm_pre: nn.Module, buffer: TokenBuffer, gate: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.norm_pre = norm_pre
        self.buffer = buffer
        self.register_parameter("gate", gate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, 2 * (P + N), D); with a gate, the same shape."""
        tokens = self.norm_pre(tokens)
        auxiliary = match_norm(self.buffer.take(), tokens)  # (B, P + N, D)
        if self.gate is not None:
            return tokens + self.gate.to(tokens.dtype) * auxiliary
        return torch.cat([auxiliary, tokens], dim=1)


def match_norm(auxiliary: Tensor, principal: Tensor) -> Tensor:
    """Give auxiliary tokens (B, N, D) the norm of the principal ones (B, P + N, D).

    Returns (B, P + N, D) in the principal tokens' number type; the first P, where the
    prefix tokens are, are zero.
    """
    count = auxiliary.shape[1]
    wide = auxiliary.to(torch.promote_types(principal.dtype, torch.float32))
    target = principal[:, -count:].to(wide.dtype)
    target = torch.linalg.vector_norm(target, dim=-1, keepdim=True)  # (B, N, 1)
    matched = nn.functional.normalize(wide, dim=-1, eps=EPSILON) * target
    prefix = principal.new_zeros(principal[:, :-count].shape)
    return torch.cat([prefix, matched.to(principal.dtype)], dim=1)
