"""How layers of Hugging Face `peft` get into a backbone.

`peft` wraps layers in place. Here it is given a container with the target layers, and
the wrapped layers become substitutes. Parts of a fused qkv matrix are presented to it
as layers that read their rows of the weight. Taught in notebook 03.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from geopeft_kit.methods.replacement import Places, Replacement, Replacements
from geopeft_kit.methods.targets import Target, Targets

PeftLayer = Any
"""A layer that `peft` wrapped; its attributes carry no types."""

Wrapped = list[tuple[Target, PeftLayer]]

ADAPTER = "default"  # the name that peft gives an adapter inside its layers


class Rows(nn.Linear):
    """Rows `first` to `last - 1` of a Linear, seen as a Linear of its own.

    Weight and bias are read from the source at every access, so they follow its device
    and number type. They are detached, because peft sets flags on them.
    """

    def __init__(self, source: nn.Linear, first: int, last: int) -> None:
        nn.Module.__init__(self)
        self._source = [source]  # in a list: no child, or state dicts would hold it
        self.first, self.last = first, last
        self.in_features, self.out_features = source.in_features, last - first

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rows of the source's weight, (last - first, in_features)."""
        return self._source[0].weight.detach()[self.first : self.last]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The rows of the source's bias."""
        bias = self._source[0].bias
        return None if bias is None else bias.detach()[self.first : self.last]


class FusedProjection(nn.Module):
    """A fused qkv Linear of which some parts ("q", "k", "v") are layers of `peft`.

    Plain LoRA adds its delta to the rows of the fused output, so the large product is
    computed once, not in three. Other methods compute their rows themselves.
    """

    def __init__(self, base_layer: nn.Linear, parts: dict[str, PeftLayer]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = nn.ModuleDict(parts)
        third = base_layer.out_features // 3
        self.frozen = nn.ModuleDict(
            {
                part: Rows(base_layer, i * third, (i + 1) * third)
                for i, part in enumerate("qkv")
                if part not in parts
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project (..., in_features) to (..., out_features)."""
        if all(_adds_delta(layer) for layer in self.parts.values()):
            out = self.base_layer(x)
            parts: Any = self.parts.values()
            for layer in parts:
                rows = layer.get_base_layer()
                delta = _delta(layer, x).to(out.dtype)
                out[..., rows.first : rows.last] += delta  # nothing saved for backward
            return out
        layers: dict[str, Any] = {**self.frozen, **self.parts}
        return torch.cat([layers[part](x) for part in "qkv"], dim=-1)


def wrap(
    targets: Targets,
    config: Any,
    own_copies: bool = False,
    inject_with: Callable[..., Any] | None = None,
    refine: Callable[[PeftLayer], PeftLayer] | None = None,
) -> Wrapped:
    """Let `peft` wrap target layers.

    With `own_copies`, peft gets copies of the frozen layers, because it changes them.
    `refine` is applied to each wrapped layer.
    """
    layers = inject(config, [_presented(t, own_copies) for t in targets], inject_with)
    if refine is not None:
        layers = [refine(layer) for layer in layers]
    return list(zip(targets, layers, strict=True))


def inject(
    config: Any,
    layers: Sequence[nn.Module],
    inject_with: Callable[..., Any] | None = None,
) -> list[PeftLayer]:
    """Let `peft` wrap layers, which stay as they are; return the wrapped ones.

    `inject_with` is a tuner's class, needed where layers share state; the default is
    peft's `inject_adapter_in_model`.
    """
    from peft import inject_adapter_in_model

    container = nn.ModuleDict({slot(i): layer for i, layer in enumerate(layers)})
    config.target_modules = list(container)
    # peft reads the device from the first parameter, and `Rows` have none of their own.
    place = torch.empty(0, device=cast(Tensor, layers[0].weight).device)
    container.register_parameter("place", nn.Parameter(place))
    if inject_with is None:
        inject_adapter_in_model(config, container, adapter_name=ADAPTER)
    else:
        inject_with(container, config, ADAPTER)
    wrapped: list[PeftLayer] = [container[name] for name in config.target_modules]
    for layer in wrapped:
        for name, child in layer.named_children():
            if name != "base_layer":
                # Master weights of a half-precision backbone's adapter are in float32.
                child._apply(_at_least_float32)
    return wrapped


@functools.cache
def mixed(mixin: type, kind: type) -> type:
    """Return peft's class of a layer with some of its methods replaced."""
    return type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def slot(number: int) -> str:
    """Return the name that `inject` gives to layer 0, 1, ..."""
    return f"layer_{number}"


def merged_tensors(layer: PeftLayer) -> dict[str, Tensor]:
    """Return the merged weight and bias of a wrapped layer, which stays as it is.

    Raises:
        ValueError: A merged number is not finite.
    """
    base = layer.get_base_layer()
    plain = _own_copy(base)
    layer.base_layer = plain
    try:
        layer.merge(safe_merge=True)
        return {name: tensor.data for name, tensor in plain.named_parameters()}
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()


def trained_tensors(layer: PeftLayer) -> Places:
    """Return readable name -> (holder, attribute) of what a wrapped layer trains."""
    tensors = {}
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind, None)
        if held is None or ADAPTER not in held:
            continue
        if isinstance(held, nn.ModuleDict):
            tensors[kind] = (held[ADAPTER], "weight")
        else:  # a ParameterDict, as other tuners than LoRA use
            tensors[kind] = (held, ADAPTER)
    return tensors


def replacements(model: nn.Module, wrapped: Wrapped) -> Replacements:
    """Turn wrapped layers into replacements; parts of a fused layer share one."""
    groups: dict[str, Wrapped] = {}
    for target, layer in wrapped:
        groups.setdefault(target.path, []).append((target, layer))
    entries = []
    for path, members in groups.items():
        target, substitute = members[0]
        tensors = trained_tensors(substitute)
        if target.part is not None:
            parts = {str(t.part): layer for t, layer in members}
            substitute = FusedProjection(cast(nn.Linear, target.layer), parts)
            tensors = {
                f"{part}.{leaf}": place
                for part, layer in parts.items()
                for leaf, place in trained_tensors(layer).items()
            }
        entries.append(Replacement.at(model, path, substitute, tensors))
    return entries


def _presented(target: Target, own_copy: bool) -> nn.Module:
    """Return the layer that peft gets to see; a copy if peft is going to change it."""
    layer: nn.Module = target.layer
    if target.part is not None:
        layer = Rows(cast(nn.Linear, layer), *target.rows)
    return _own_copy(layer) if own_copy else layer


def _own_copy(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, Rows):
        return copy.deepcopy(layer)
    bias = layer.bias
    plain = nn.Linear(
        layer.in_features, layer.out_features, bias=bias is not None, device="meta"
    )
    plain.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _adds_delta(layer: PeftLayer) -> bool:
    """True for plain LoRA on rows of the frozen weight itself."""
    variants = getattr(layer, "lora_variant", None)
    rows = isinstance(layer.get_base_layer(), Rows)
    return rows and variants == {} and isinstance(layer.lora_A, nn.ModuleDict)


def _delta(layer: PeftLayer, x: Tensor) -> Tensor:
    """What plain LoRA adds to the output of its rows."""
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    x = layer.lora_dropout[ADAPTER](x.to(down.weight.dtype))
    return up(down(x)) * layer.scaling[ADAPTER]
