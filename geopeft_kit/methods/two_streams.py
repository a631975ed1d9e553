"""Two token streams in one frozen ViT: radiometry, shared attention, the deflection.

The frozen RGB patch embedding knows shapes. A second token of each patch comes from the
*set* of its multispectral pixels, whose mean and spread know colours; shuffling the
pixels changes nothing there. All formulas are ours, see `deflect.py`. Notebook 05.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.indices import spectral_indices

Form = Literal["additive", "polar"]
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


def add_bounded(tokens: Tensor, direction: Tensor, rho: Tensor | float) -> Tensor:
    """Additive form: move tokens by a share of their own length.

    s + rho |s| n, with n the unit vector along `direction` (ours). The displacement is
    exactly |rho| |s|, and the angle between old and new obeys sin(angle) <= |rho|.
    Tokens and direction are (..., D); where the direction is zero nothing moves.
    """
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens + rho * length * F.normalize(direction, dim=-1, eps=EPSILON)


def rotate(tokens: Tensor, direction: Tensor, theta: Tensor) -> Tensor:
    """Polar form: rotate tokens by theta radians towards a direction, both (..., D).

    |s| (cos(theta) s/|s| + sin(theta) m), with m the unit part of `direction` that is
    orthogonal to s (ours). The norm is kept, and the angle is exactly |theta|. Where
    the direction is zero or along s, nothing rotates.
    """
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    ahead = tokens / length.clamp(min=EPSILON)
    aside = F.normalize(direction, dim=-1, eps=EPSILON)
    aside = aside - (aside * ahead).sum(-1, keepdim=True) * ahead
    aside = F.normalize(aside, dim=-1, eps=EPSILON)
    rotated = torch.cos(theta) * tokens + torch.sin(theta) * length * aside
    # The norm is kept already, except of tokens that have nowhere to rotate.
    norm = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True)
    return rotated * (length / norm.clamp(min=EPSILON))


class Deflection(nn.Module):
    """Moves principal tokens along a direction read from the auxiliary ones.

    e = U ReLU(V a), D -> h -> D without biases; the size is limit * tanh(g). h = 0 is
    the ablation "attention", which adds g * a; no limit is the ablation "unbounded".
    """

    def __init__(
        self,
        g: nn.Parameter,
        width: int,
        hidden: int,
        form: Form,
        limit: float | None,
    ) -> None:
        super().__init__()
        self.form, self.limit = form, limit
        self.g = g
        if hidden:
            self.V = nn.Linear(width, hidden, bias=False)
            self.U = nn.Linear(hidden, width, bias=False)

    @property
    def size(self) -> Tensor:
        """The signed rho (additive) or theta in radians (polar), a scalar."""
        return self.g if self.limit is None else self.limit * torch.tanh(self.g)

    def forward(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Deflect s, the principal tokens after the attention residual, by a.

        a is the output of the shared attention for the auxiliary stream. All (B, N, D).
        """
        direction = attended.to(self.g.dtype)
        if hasattr(self, "U"):
            direction = self.U(torch.relu(self.V(direction)))
        # Lengths and angles need single precision, under autocast too.
        precise = torch.promote_types(tokens.dtype, torch.float32)
        s, direction, size = (x.to(precise) for x in (tokens, direction, self.size))
        if self.form == "polar":
            moved = rotate(s, direction, size)
        elif self.limit is None:
            moved = s + size * direction
        else:
            moved = add_bounded(s, direction, size)
        return moved.to(tokens.dtype)


class UntangledBlock(nn.Module):
    """A frozen pre-norm `Block` of timm with two streams, auxiliary tokens in front.

    All weights of the block serve both streams. The attention map comes from the
    principal stream alone: where to look is the prior that was learnt on RGB. Without
    a deflection (block not chosen) only the principal stream passes the block. The
    auxiliary stream ends in the `last` block.
    """

    def __init__(
        self,
        block: Any,
        deflection: Deflection | None,
        last: bool,
        auxiliary_mlp: bool,
    ) -> None:
        super().__init__()
        self.block = block
        self.deflection = deflection
        self.last = last
        self.auxiliary_mlp = auxiliary_mlp

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 2n, D), n auxiliary tokens first -> the same; (B, n, D) if last."""
        block = self.block
        if self.deflection is None:
            auxiliary, principal = tokens.chunk(2, dim=1)  # (B, n, D) each
            return torch.cat([auxiliary, block(principal)], dim=1)
        attended = shared_attention(block.attn, block.norm1(tokens))
        attended = block.drop_path1(block.ls1(attended))
        auxiliary, principal = (tokens + attended).chunk(2, dim=1)  # (B, n, D) each
        principal = self.deflection(principal, attended.chunk(2, dim=1)[0])
        if self.last:
            return self._mlp(principal)
        if self.auxiliary_mlp:
            return self._mlp(torch.cat([auxiliary, principal], dim=1))
        return torch.cat([auxiliary, self._mlp(principal)], dim=1)

    def _mlp(self, tokens: Tensor) -> Tensor:
        block = self.block
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def shared_attention(attention: Any, tokens: Tensor) -> Tensor:
    """Run timm's attention on two streams with one map, softmax(q k^T / sqrt(d)).

    Queries and keys come from the principal tokens, values from both, concatenated so
    that the map is computed once. Tokens (B, 2n, D) after the block's first norm,
    auxiliary first -> (B, 2n, D) after the output projection.
    """
    auxiliary, principal = tokens.chunk(2, dim=1)  # (B, n, D) each
    heads = attention.num_heads
    qkv = attention.qkv(principal)  # (B, n, 3 * A)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(
        2, 0, 3, 1, 4
    )  # (B, heads, n, d)
    q, k = attention.q_norm(q), attention.k_norm(k)
    first = 2 * attention.qkv.out_features // 3
    bias = None if attention.qkv.bias is None else attention.qkv.bias[first:]
    other = F.linear(auxiliary, attention.qkv.weight[first:], bias)
    other = other.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, heads, n, d)
    seen = F.scaled_dot_product_attention(
        q,
        k,
        torch.cat([other, v], dim=-1),  # (B, heads, n, 2 * d)
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
        scale=attention.scale,
    )
    # (B, heads, n, 2 * d) -> (B, 2, n, heads, d) -> (B, 2n, A)
    seen = seen.unflatten(3, (2, -1)).permute(0, 3, 2, 1, 4).flatten(3).flatten(1, 2)
    norm = getattr(attention, "norm", None)  # only with timm's scale_norm
    seen = seen if norm is None else norm(seen)
    return attention.proj_drop(attention.proj(seen))
