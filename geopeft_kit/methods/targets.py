"""Which layers of a block a method works on: "q", "v", "fc1", "proj", ...

Networks name the same thing differently: one fused `attn.qkv`, or `attn.q`, `attn.k`
and `attn.v`. Methods ask for targets by short names and get layers back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from geopeft_kit.methods.base import Block

Layer = nn.Linear | nn.Conv2d
FUSED = ("qkv", "to_qkv")
_ATTENTION = ("q", "k", "v")
_TOKEN_DEFAULTS = ("q", "v", "fc1", "fc2")


@dataclass(frozen=True)
class Target:
    """A layer, or a third of the rows of a fused one.

    Attributes:
        path: Dotted path of the layer inside `backbone.model`.
        layer: The Linear or Conv2d.
        part: "q", "k" or "v" where only these rows of a fused layer are meant.
    """

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


def default_targets(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Return the targets that suit an architecture.

    Transformers get q, v, fc1, fc2 (as in the PEFT study, arXiv 2504.17397), networks
    with an MLP only (ConvNeXt) its fc1 and fc2, other convolutional ones their 1x1
    convolutions (conv1 and conv3 of a ResNet-50 block), and where a block has none
    (ResNet-18) all its ungrouped convolutions. Shortcuts are left alone.
    """
    layers = _layers_of(blocks)
    known = {_short(name) for name in layers if _in_attention_or_mlp(name)}
    if known & set(FUSED):
        known |= set(_ATTENTION)
    names = tuple(name for name in _TOKEN_DEFAULTS if name in known)
    if names:
        return names
    convolutions = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and "downsample" not in name
    }
    pointwise = [n for n, conv in convolutions.items() if conv.kernel_size == (1, 1)]
    return tuple(dict.fromkeys(_short(name) for name in pointwise or convolutions))


def find_targets(blocks: Sequence[Block], targets: Sequence[str]) -> list[Target]:
    """Find the layers that short names mean, in every block.

    Args:
        blocks: The chosen blocks.
        targets: "q", "k", "v" (own layers, or rows of a fused one), "qkv" (the fused
            matrix as one), or the end of a layer's path in the block, as "mlp.fc1".

    Returns:
        The targets, block by block. A block without a layer of that name is skipped.

    Raises:
        ValueError: A name that no block has, that is given twice, or a grouped
            convolution.
        TypeError: Not a list of names.
    """
    names = _checked(targets)
    found: dict[str, list[Target]] = {name: [] for name in names}
    in_order = []
    for path, block in blocks:
        layers = _layers_of([(path, block)])
        for name in names:
            for target in _in_block(path, layers, name):
                found[name].append(target)
                in_order.append(target)
    missing = [name for name in names if not found[name]]
    if missing:
        raise ValueError(
            f"targets {missing} are in none of the chosen blocks, which have: "
            f"{', '.join(available_targets(blocks))}."
        )
    _check_overlap(in_order)
    return in_order


def available_targets(blocks: Sequence[Block]) -> list[str]:
    """Return every name that `find_targets` understands for these blocks."""
    layers = _layers_of(blocks)
    parts = list(_ATTENTION) if {_short(name) for name in layers} & set(FUSED) else []
    return list(dict.fromkeys(parts + [name for name in layers]))


def _in_block(path: str, layers: Mapping[str, Layer], name: str) -> list[Target]:
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


def _layers_of(blocks: Sequence[Block]) -> dict[str, Layer]:
    """Path inside the block -> Linear or Conv2d, over all blocks.

    Layers whose weight is read without calling them are left out: a substitute would
    stand there with no effect. That is `out_proj` of torch's MultiheadAttention, and
    the qkv of attentions with separate q and v biases (BEiT, Swin V2).
    """
    layers: dict[str, Layer] = {}
    for _, block in blocks:
        for name, module in block.named_modules():
            parent = block.get_submodule(name.rpartition(".")[0])
            bypassed = isinstance(parent, nn.MultiheadAttention) or (
                _short(name) in FUSED and getattr(parent, "q_bias", None) is not None
            )
            if name and not bypassed and isinstance(module, nn.Linear | nn.Conv2d):
                layers[name] = module
    return layers


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


def _check_overlap(targets: list[Target]) -> None:
    seen: dict[str, set[str | None]] = {}
    for target in targets:
        parts = seen.setdefault(target.path, set())
        if target.part in parts or None in parts or (parts and target.part is None):
            raise ValueError(
                f"{target.path} is meant by two of the targets. Use the fused matrix "
                "or its q, k, v parts, and one name for a layer."
            )
        parts.add(target.part)
        groups = getattr(target.layer, "groups", 1)
        if groups > 1:
            raise ValueError(
                f"{target.path} is a convolution with {groups} groups; low-rank "
                "methods serve ungrouped ones. Leave it out of targets."
            )


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _in_attention_or_mlp(name: str) -> bool:
    """Keep squeeze-excite layers, which are called fc1 and fc2 too, out of defaults."""
    return bool({"attn", "mlp"} & set(name.split(".")[:-1]))
