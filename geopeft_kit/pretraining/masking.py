"""Masked image modelling: hide cells of an image, paint them again.

Hidden cells are not left out, as in MAE: a learned token stands in for their patch
embeddings, so that windows and strides of a hierarchical network keep their form.

Source: SimMIM, Xie et al. 2022 (arXiv 2111.09886), section 3; GFM, Mendieta et al. 2023
(arXiv 2302.04476), eq. 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.backbones.grouped import GroupedViTBackbone


def draw_cells(image: Tensor, unit: int, ratio: float) -> Tensor:
    """Draw the cells to hide: (B, H / unit, W / unit), True where hidden.

    In every image ceil(ratio * N) of the N cells are hidden. `unit` is the side of a
    cell in pixels; H and W must be multiples of it.
    """
    rows, columns = (side // unit for side in image.shape[-2:])
    if (rows * unit, columns * unit) != tuple(image.shape[-2:]):
        raise ValueError(
            f"images of {image.shape[-2]} x {image.shape[-1]} px cannot be cut into "
            f"cells of {unit} px. Pass a mask_unit that divides both sides, or crop."
        )
    count = math.ceil(round(ratio * rows * columns, 6))
    order = torch.rand(len(image), rows * columns, device=image.device).argsort(1)
    hidden = order.argsort(1) < count  # (B, N)
    return hidden.unflatten(1, (rows, columns))


def enlarged(cells: Tensor, factor: int) -> Tensor:
    """Repeat each cell, (B, h, w) -> (B, h * factor, w * factor)."""
    return cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


@contextmanager
def hidden_tokens(
    backbone: Backbone, cells: Tensor, unit: int, mask_token: Tensor
) -> Iterator[None]:
    """Put `mask_token` (D,) in place of hidden patches' embeddings, in this context.

    `cells` is from `draw_cells`; `unit`, in pixels, is a multiple of the patch size.
    """
    patches = enlarged(cells, unit // backbone.strides[0])  # (B, h, w)

    def replace(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
        hidden = patches.reshape(tokens.shape[:-1]).unsqueeze(-1)  # (B, h, w or N, 1)
        return torch.where(hidden, mask_token.to(tokens.dtype), tokens)

    handle = backbone.module("patch_embed").register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def masked_l1(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over hidden pixels and all bands, normalised; eq. 2 of GFM.

    Images are (B, C, H, W), `hidden` is (B, H, W); 0 where nothing is hidden.
    """
    error = (prediction - target).abs().mean(1)  # (B, H, W)
    return (error * hidden).sum() / (hidden.sum() + 1e-5)


def embedding_width(backbone: Backbone) -> int:
    """Width D of the patch embedding, the length of the mask token.

    Raises ValueError for a backbone whose tokens cannot be hidden one by one.
    """
    if isinstance(backbone, GroupedViTBackbone):
        raise ValueError(
            f"masked modelling hides one token per patch; {backbone.card.name!r} "
            "makes several. Take a plain ViT or a Swin."
        )
    strides = backbone.strides
    if backbone.width is not None and len(set(strides)) == 1:
        return backbone.width
    if backbone.layout == "swin":
        return backbone.channels[0]
    raise ValueError(
        f"masked modelling is written for plain ViTs and Swins; {backbone.card.name!r} "
        f"is a {backbone.layout} with maps at strides {strides}. Take a backbone whose "
        "layout is 'vit' or 'swin', and no neck or adapter that makes its own maps."
    )
