"""SSF: scale and shift the output of every operation. Taught in notebook 04."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Blocks, Method, register
from geopeft_kit.methods.in_place import roots_of
from geopeft_kit.methods.replacement import Replacement, Replacements, trained_in
from geopeft_kit.methods.targets import available_targets

# Galileo's patch embeddings read the weight of their convolution without calling it,
# so that the embedding as a whole is the operation.
_EMBEDDINGS = "space_time_embed"
_KINDS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)


class ScaleShift(nn.Module):
    """A frozen operation, then scale * y + shift on each of its C output channels.

    `layer` is the layer in it that holds weight (C, ...) and bias; `axis` is the
    channel axis of the output.
    """

    def __init__(self, op: nn.Module, layer: Any, axis: int) -> None:
        super().__init__()
        self.op = op
        self.shape = (-1, 1, 1) if axis == 1 else (-1,)
        channels, device = layer.weight.shape[0], layer.weight.device
        self.scale = nn.Parameter(torch.ones(channels, device=device))
        shift = torch.zeros(channels, device=device)
        self.shift = None if layer.bias is None else nn.Parameter(shift)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """Run the operation, then scale and shift; the shape is the operation's."""
        out = self.op(*inputs)
        scaled = out * self.scale.to(out.dtype).view(self.shape)
        if self.shift is None:
            return scaled
        return scaled + self.shift.to(out.dtype).view(self.shape)


@register
class ScaleShiftFeatures(Method):
    """A scale (1 at the start) and a shift (0) after each Linear, convolution and norm.

    On a ViT these are the two norms, qkv, proj, fc1 and fc2 of each block, the patch
    embedding and the last norm. With `layers` given, those inside the blocks only. A
    layer without a bias gets a scale only (ours): it has no place to fold a shift into.
    Layers whose weight is read without calling them are left out.
    """

    name = "ssf"
    title = "Scale and shift (SSF)"
    family = "existing weights"
    paper = "Lian et al. 2022, Scaling & Shifting Your Features, arXiv 2210.08823"
    trained = "one scale and one shift per output channel of every layer"
    count_formula = "22D per ViT block + 4D (patch embedding, final norm)"
    mergeable = True
    linear = True
    identity_at_start = True
    learning_rate = 1e-3  # ours
    needs = "any backbone whose norms have one gain per channel"

    def why_not(self, backbone: Backbone) -> str | None:
        for path, module in backbone.model.named_modules():
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                return f"its norm {path} has a gain for every pixel, not per channel"
        return None

    def build(self, backbone: Backbone, blocks: Blocks) -> Replacements:
        """Wrap the operations of the whole network, or of the chosen blocks."""
        model = backbone.model
        return [
            _scaled(model, f"{root}.{path}".lstrip("."), module)
            for root in roots_of(backbone, blocks)
            for path, module in _operations(model.get_submodule(root))
        ]

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield weight * scale and bias * scale + shift; rows are output channels."""
        layer = _layer(replacement.original)
        ours: Any = replacement.substitute
        rows = (-1, *[1] * (layer.weight.ndim - 1))
        yield layer.weight, layer.weight * ours.scale.view(rows)
        if ours.shift is not None:
            yield layer.bias, layer.bias * ours.scale + ours.shift


def _scaled(model: nn.Module, path: str, op: nn.Module) -> Replacement:
    layer = _layer(op)
    # Conv2d, BatchNorm2d and timm's LayerNorm2d see (B, C, H, W), others (..., C), and
    # so do patch embeddings of Galileo.
    axis = 1 if op is layer and "2d" in type(op).__name__ else -1
    substitute = ScaleShift(op, layer, axis).train(op.training)
    tensors = trained_in(substitute, frozen="op")
    return Replacement.at(model, path, substitute, tensors)


def _operations(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of what gets a scale and a shift."""
    layers = set(available_targets([("", parent)], _KINDS))
    for path, module in parent.named_modules():
        owner = path.rpartition(".")[0]
        whole = owner == _EMBEDDINGS
        inside = owner.startswith(f"{_EMBEDDINGS}.")
        if whole or (
            path in layers and not inside and _layer(module).weight is not None
        ):
            yield path, module


def _layer(op: Any) -> Any:
    """The layer that holds an operation's weight: `proj` of a patch embedding."""
    return getattr(op, "proj", op)
