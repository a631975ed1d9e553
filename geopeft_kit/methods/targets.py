"""Which layers of a block a method works on: "q", "v", "fc1", "proj", ...

Networks name the same thing differently: one fused `attn.qkv`, or `attn.q`, `attn.k`
and `attn.v`. Methods ask for targets by short names and get layers back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from geopeft_kit.methods.base import Block

Layer = nn.Linear | nn.Conv2d | nn.Conv1d
Kinds = tuple[type[nn.Module], ...]
"""Types of layer that a method can work on."""

LINEAR_CONV2D: Kinds = (nn.Linear, nn.Conv2d)
FUSED = ("qkv", "to_qkv")
_ATTENTION = ("q", "k", "v")
# fc1_g and fc1_x are the two halves of a gated MLP's first layer (SwiGLU).
_TOKEN_DEFAULTS = ("q", "v", "fc1", "fc1_g", "fc1_x", "fc2")


@dataclass(frozen=True)
class Target:
    """A layer at a path in `backbone.model`, or the "q", "k" or "v" rows of it."""

    path: str
    layer: Layer
    part: str | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """First and one past the last output row."""
        outputs = self.layer.weight.shape[0]
        if self.part is None:
            return 0, outputs
        third, number = outputs // 3, _ATTENTION.index(self.part)
        return number * third, (number + 1) * third


Targets = list[Target]


def default_targets(
    blocks: Sequence[Block], kinds: Kinds = LINEAR_CONV2D
) -> tuple[str, ...]:
    """Return the targets that suit an architecture.

    Transformers get q, v, fc1, fc2 (as in the PEFT study, arXiv 2504.17397), networks
    with an MLP only (ConvNeXt) its fc1 and fc2, other ones their Linear layers and 1x1
    convolutions (ResNet-50, state-space blocks), and where a block has none (ResNet-18)
    all its ungrouped convolutions. Shortcuts and squeeze-excite layers are left alone.
    """
    layers = _layers_of(blocks, kinds)
    known = {_short(name) for name in layers if _in_attention_or_mlp(name)}
    if known & set(FUSED):
        known |= set(_ATTENTION)
    names = tuple(name for name in _TOKEN_DEFAULTS if name in known)
    if names:
        return names
    plain = {
        name: layer
        for name, layer in layers.items()
        if not _grouped(layer) and not _aside(name)
    }
    pointwise = [name for name, layer in plain.items() if _pointwise(layer)]
    return tuple(dict.fromkeys(_unmistakable(n, layers) for n in pointwise or plain))


def find_targets(
    blocks: Sequence[Block], targets: Sequence[str], kinds: Kinds = LINEAR_CONV2D
) -> Targets:
    """Find the layers that short names mean, block by block.

    Names are "q", "k", "v" (own layers, or rows of a fused one), "qkv" (the fused
    matrix), or the end of a layer's path in the block, as "mlp.fc1". A block without a
    layer of that name is skipped; a name that no block has is an error.
    """
    names = _checked(targets)
    found: dict[str, list[Target]] = {name: [] for name in names}
    in_order = []
    for path, block in blocks:
        layers = _layers_of([(path, block)], kinds)
        for name in names:
            for target in _in_block(path, layers, name):
                found[name].append(target)
                in_order.append(target)
    missing = [name for name in names if not found[name]]
    if missing:
        words = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"targets {missing} are in none of the chosen blocks. Of the layers that "
            f"the method works on ({words}) these blocks have: "
            f"{', '.join(available_targets(blocks, kinds)) or 'none'}."
        )
    _check_overlap(in_order)
    return in_order


def available_targets(
    blocks: Sequence[Block], kinds: Kinds = LINEAR_CONV2D
) -> list[str]:
    """Return every name that `find_targets` understands for these blocks."""
    layers = _layers_of(blocks, kinds)
    parts = _ATTENTION if {_short(name) for name in layers} & set(FUSED) else ()
    return [*parts, *(name for name in layers if name not in parts)]


def _in_block(path: str, layers: Mapping[str, Any], name: str) -> Targets:
    hits = [rel for rel in layers if rel == name or rel.endswith(f".{name}")]
    if hits:
        return [Target(f"{path}.{rel}", layers[rel]) for rel in hits]
    if name not in _ATTENTION:
        return []
    fused = [rel for rel in layers if _short(rel) in FUSED]
    for rel in fused:
        if layers[rel].weight.shape[0] % 3:
            raise ValueError(
                f"{path}.{rel} has {layers[rel].weight.shape[0]} rows, which are not "
                f'three equal parts, so {name!r} has no rows of its own; use "qkv".'
            )
    return [Target(f"{path}.{rel}", layers[rel], name) for rel in fused]


def _layers_of(blocks: Sequence[Block], kinds: Kinds) -> dict[str, Any]:
    """Path inside the block -> layer of one of the kinds, over all blocks.

    A layer whose weight is read without calling it would hide its substitute: these are
    left out (see `_bypassed`).
    """
    layers: dict[str, Any] = {}
    for _, block in blocks:
        for name, module in block.named_modules():
            parent = block.get_submodule(name.rpartition(".")[0])
            if (
                name
                and not _bypassed(parent, _short(name))
                and isinstance(module, kinds)
            ):
                layers[name] = module
    return layers


def _bypassed(parent: nn.Module, name: str) -> bool:
    """True if the parent reads the weight of this layer without calling the layer.

    So do torch's MultiheadAttention, torchvision's window attention, and attentions
    with separate q and v biases (BEiT, Swin V2).
    """
    if isinstance(parent, ShiftedWindowAttention):
        return name in ("qkv", "proj")
    if isinstance(parent, nn.MultiheadAttention):
        return True
    return name in FUSED and getattr(parent, "q_bias", None) is not None


def _checked(targets: Sequence[str]) -> list[str]:
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TypeError(
            f'targets={targets!r}; a list of names is needed, for instance ("q", "v").'
        )
    names = list(targets)
    if not names or any(not isinstance(name, str) or not name for name in names):
        raise TypeError(
            f'targets={targets!r}; at least one name is needed, for instance ("q",).'
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"targets={names}: {repeated} are given twice.")
    return names


def _check_overlap(targets: Targets) -> None:
    seen: dict[str, set[str | None]] = {}
    for target in targets:
        parts = seen.setdefault(target.path, set())
        if target.part in parts or None in parts or (parts and target.part is None):
            raise ValueError(
                f"{target.path} is meant by two of the targets. Use the fused matrix "
                "or its q, k, v parts, and one name for a layer."
            )
        parts.add(target.part)
        if not _pointwise(target.layer) and _border_padded(target.layer):
            raise ValueError(
                f"{target.path} pads with the values at its border, and the layers of "
                "peft pad with zeros. Leave it out of targets."
            )
        if _grouped(target.layer):
            raise ValueError(
                f"{target.path} is a convolution with {target.layer.groups} groups; "
                "this method serves ungrouped ones. Leave it out of targets."
            )


def _grouped(layer: Any) -> bool:
    return getattr(layer, "groups", 1) > 1


def _border_padded(layer: Any) -> bool:
    return getattr(layer, "padding_mode", "zeros") != "zeros"


def _pointwise(layer: Any) -> bool:
    """A Linear, or a convolution that looks at one cell only."""
    return set(getattr(layer, "kernel_size", (1,))) == {1}


def _aside(name: str) -> bool:
    """Shortcuts (downsample) and squeeze-excite layers (se, squeeze)."""
    return bool({"downsample", "se", "squeeze"} & set(name.split(".")))


def _unmistakable(name: str, layers: Mapping[str, Any]) -> str:
    """The shortest end of a path that means no grouped convolution as well."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        meant = [n for n in layers if n == end or n.endswith(f".{end}")]
        if not any(_grouped(layers[n]) for n in meant):
            return end
    return name


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _in_attention_or_mlp(name: str) -> bool:
    """Keep squeeze-excite layers, which are called fc1 and fc2 too, out of defaults."""
    return bool({"attn", "mlp"} & set(name.split(".")[:-1]))
