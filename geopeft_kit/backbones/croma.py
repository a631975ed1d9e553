"""CROMA: a ViT without a position table, whose attention falls with distance.

Each head subtracts a multiple of the distance between two patches from its scores
(ALiBi in two dimensions), so that positions fit any image size. The blocks are timm's
with that one change; the tokens equal those of torchgeo's class. The optical and the
radar encoder are separate backbones; the joint encoder is not offered.

Sources: Fuller et al. 2023, CROMA, arXiv 2311.00566; torchgeo (MIT); pixel values from
the authors' README; ALiBi from Press et al., arXiv 2108.12409.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import TokenGrid, adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import ViTBackbone, vit_network
from geopeft_kit.backbones.weights import State, filled, strip_prefixes

# torchgeo's names of the layers of a block -> timm's.
_LAYERS = {
    "0.input_norm": "norm1",
    "0.to_qkv": "attn.qkv",
    "0.to_out": "attn.proj",
    "1.input_norm": "norm2",
    "1.net.0": "mlp.fc1",
    "1.net.3": "mlp.fc2",
}
_BLOCK = re.compile(r"transformer\.layers\.(\d+)\.(.+)\.(weight|bias)")


class DistanceBias:
    """The distance term of the attention scores, made once per grid for all blocks."""

    def __init__(self, heads: int, grid: TokenGrid) -> None:
        self.slopes = alibi_slopes(heads)
        self.grid = grid
        self._made: tuple[Any, Tensor | None] = (None, None)

    def table(self, tokens: Tensor) -> Tensor:
        """The bias for (B, N, D) tokens, (1, heads, N, N) in their number type.

        Tokens before the patches (prompts) have no position: their distance is 0.
        """
        length = tokens.shape[1]
        key = (self.grid.height, self.grid.width, length, tokens.device, tokens.dtype)
        if key != self._made[0]:
            self._made = (key, self._make(length).to(tokens))
        made = self._made[1]
        assert made is not None
        return made

    def _make(self, length: int) -> Tensor:
        height, width = self.grid.height, self.grid.width
        rows, columns = torch.arange(height), torch.arange(width)
        places = torch.cartesian_prod(rows, columns).float()  # (h*w, 2)
        distance = torch.zeros(length, length)
        first = length - height * width
        distance[first:, first:] = torch.cdist(places, places)
        slopes = torch.tensor(self.slopes).view(1, -1, 1, 1)
        return -slopes * distance  # (1, heads, N, N)


def alibi_slopes(heads: int) -> list[float]:
    """A geometric series that ends at 2**-8: 2**(-8/n), 2**(-16/n), ... for n heads."""
    return [2 ** (-8 * (head + 1) / heads) for head in range(heads)]


class DistanceAttention(Attention):
    """timm's attention with a bias that falls with distance.

    Attributes:
        bias: shared by all blocks; set by `build`.
    """

    bias: DistanceBias

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return super().forward(x, attn_mask=self.bias.table(x))


@register("croma")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
) -> ViTBackbone:
    """Build CROMA's optical encoder, or the radar one for the radar cards.

    Checkpoints have the authors' or torchgeo's keys.
    """
    kept = None
    if state is not None:
        kept = encoder_state(state, card.architecture["encoder"], card.patch)
    network = partial(
        vit_network,
        card,
        epsilon=1e-5,
        pos_embed="none",
        class_token=False,
        global_pool="",
        qkv_bias=False,
        attn_layer=DistanceAttention,
    )
    model = filled(network, kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    backbone = ViTBackbone(card, model, plan)
    bias = DistanceBias(card.architecture["heads"], backbone.grid)
    for block in model.blocks:
        block.attn.bias = bias
    return backbone


def encoder_state(state: State, encoder: str, patch: int) -> State:
    """One encoder of a CROMA file, s1_encoder or s2_encoder, in timm's names.

    The layers behind the mean over all patches (``..._GAP_FFN``) are left out.
    """
    kept = {}
    for key, tensor in strip_prefixes(state, ("module.",)).items():
        if not key.startswith(f"{encoder}."):
            continue
        key = key.removeprefix(f"{encoder}.")
        found = _BLOCK.fullmatch(key)
        if found:
            number, layer, kind = found.groups()
            key = f"blocks.{number}.{_LAYERS.get(layer, layer)}.{kind}"
        elif key == "linear_input.weight":  # (D, C * patch * patch)
            tensor = tensor.unflatten(1, (-1, patch, patch))
        key = key.replace("linear_input.", "patch_embed.proj.")
        kept[key.replace("transformer.norm_out.", "norm.")] = tensor
    return kept
