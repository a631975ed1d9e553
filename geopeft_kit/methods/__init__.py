"""PEFT methods: a frozen backbone, and a few trainable tensors swapped into it.

`attach` puts a method on a backbone, `load_adapter` a saved one, `combine` adds several
up; `list_methods` returns their cards. Each method is one short file, or a row of
`peft/table.py`; importing this package imports them all. Taught in notebooks 02 to 06.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.devices import device_of, moved
from geopeft_kit.methods.adapter import (
    Adapter,
    original_backbone,
    original_hash,
    record,
)
from geopeft_kit.methods.base import (
    METHODS,
    Layers,
    Method,
    MethodCard,
    all_methods,
    select_blocks,
)
from geopeft_kit.methods.peft.files import is_peft_folder, padded, read_peft_files
from geopeft_kit.methods.storage import SavedAdapter, read_adapter

__all__ = [
    "Adapter",
    "MethodCard",
    "attach",
    "combine",
    "list_methods",
    "load_adapter",
]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)  # each method registers itself


def list_methods() -> list[MethodCard]:
    """Return the card of every method, family by family."""
    return [method.card() for method in all_methods()]


def attach(
    backbone: Backbone,
    method: str,
    layers: Layers = "all",
    targets: Sequence[str] | None = None,
    **options: Any,
) -> Adapter:
    """Put a PEFT method on a backbone and make it the active one.

    The backbone is frozen, and the adapter that was active steps aside. An error leaves
    the backbone as it was. Call `torch.manual_seed` first to repeat a random start.

    Args:
        backbone: From `load_backbone`.
        method: A name from `list_methods`.
        layers: The blocks to work on: "all", "last:k", or a list of numbers from 0.
            With less than "all", nothing outside those blocks trains.
        targets: Layers inside the blocks, for methods that have this option, as
            ("q", "v", "fc1", "fc2"); None for the method's default.
        **options: The method's own, listed on its card.

    Returns:
        The active adapter.

    Raises:
        ValueError: Unknown method, an option out of range, or a method that does not
            fit the backbone.
        TypeError: Unknown option, or one of the wrong type.
    """
    if targets is not None:
        options["targets"] = targets
    with original_backbone(backbone) as flags:
        adapter = _build(backbone, method, {"layers": layers, **options})
    return _activated(adapter, flags)


def load_adapter(backbone: Backbone, folder: str | Path) -> Adapter:
    """Put a saved adapter on the backbone it was made for, and make it the active one.

    LoRA and DoRA folders of Hugging Face `peft` load too. They do not say which weights
    they were trained on, so this is not checked; what they hold besides (a classifier)
    is left out with a warning. An error leaves the backbone exactly as it was.

    Args:
        backbone: The same backbone with the same weights as when it was saved.
        folder: Written by `Adapter.save`, or by `save_pretrained` of `peft`.

    Returns:
        The active adapter.

    Raises:
        FileNotFoundError: The folder or one of its files is not there.
        ValueError: Another backbone, other weights, an unknown method, a truncated or
            changed file, missing or unexpected tensors.
    """
    if is_peft_folder(folder):
        method, config, given = read_peft_files(Path(folder), backbone)
    else:
        saved = read_adapter(folder)
        _check_backbone(backbone, saved, folder)
        method, config, given = saved.method, saved.config, saved.tensors
    with original_backbone(backbone) as flags, torch.random.fork_rng(devices=[]):
        adapter = _build(backbone, method, config)
        if is_peft_folder(folder):
            given = padded(given, adapter.packed())
        _fill(adapter, given, folder)
    return _activated(adapter, flags)


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None
) -> Adapter:
    """Make one adapter that changes the weights by the weighted sum of several changes.

    The adapters are of one method, on one backbone, with the same options. They stay as
    they are. Methods whose change is linear in what they train combine (full,
    last_blocks, bias, norm, ssf, ia3, fourierft, shira, apla), and so does lora, where
    the ranks add up and may differ. Averaged weights are not averaged predictions:
    evaluate the result.

    Args:
        adapters: One or more adapters of the backbone.
        weights: A factor for each; None for the mean. They need not sum to 1.

    Returns:
        The active adapter.

    Raises:
        ValueError: Another method, backbone or options, or one whose changes do not add
            up.
    """
    if not adapters or len({id(adapter.backbone) for adapter in adapters}) > 1:
        raise ValueError("combine takes one or more adapters of one backbone object.")
    names = sorted({adapter.name for adapter in adapters})
    if len(names) > 1:
        raise ValueError(f"combine takes adapters of one method; these are {names}.")
    factors = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters) or not all(map(math.isfinite, factors)):
        raise ValueError(
            f"weights={weights}; a finite number for each of the {len(adapters)} "
            "adapters is needed."
        )
    first = adapters[0]
    here = device_of(first.backbone)  # tensors of inactive adapters may be elsewhere
    parts = [(a.config, moved(a.tensors(), here)) for a in adapters]
    config = first.method.joint_config([adapter.config for adapter in adapters])
    with original_backbone(first.backbone) as flags, torch.no_grad():
        joint = _build(first.backbone, first.name, config)
        tensors = joint.tensors()
        for name, value in first.method.join(tensors, parts, factors).items():
            tensors[name].copy_(value)
    return _activated(joint, flags)


def _activated(adapter: Adapter, flags: dict[str, bool]) -> Adapter:
    record(adapter, flags)
    adapter.activate()
    return adapter


def _build(backbone: Backbone, name: str, config: Mapping[str, Any]) -> Adapter:
    """Make an adapter for a backbone that has none active, without touching it.

    `config` is `layers`, for all blocks where it is missing, and the options.
    """
    if name not in METHODS:
        names = ", ".join(method.name for method in all_methods())
        raise ValueError(f"There is no method {name!r}. Methods: {names}.")
    method = METHODS[name]
    options = dict(config)
    layers = options.pop("layers", "all")
    _check_options(method, options)
    reason = method.why_not(backbone)
    if reason is not None:
        fitting = [card.name for card in list_methods() if card.supports(backbone)]
        raise ValueError(
            f"{name!r} does not fit the backbone {backbone.card.name!r}: {reason}. "
            f"Methods that fit: {', '.join(fitting)}."
        )
    blocks = select_blocks(backbone.blocks, layers)
    options = method.resolve(backbone, blocks, {**method.defaults(), **options})
    replacements = method.build(backbone, blocks, **options)
    made = {key: _plain(v) for key, v in {"layers": layers, **options}.items()}
    return Adapter(method, backbone, replacements, made)


def _check_options(method: Method, options: dict[str, Any]) -> None:
    known = method.options()
    unknown = [option for option in options if option not in known]
    if not unknown:
        return
    listed = ", ".join(f"{name}: {text}" for name, text in known.items())
    raise TypeError(
        f"{method.name!r} has no option {', '.join(map(repr, unknown))}. Its options "
        f"are {listed or 'none'}, and layers: str | Sequence[int] = 'all'."
    )


def _check_backbone(
    backbone: Backbone, saved: SavedAdapter, folder: str | Path
) -> None:
    wanted, name = saved.backbone["name"], backbone.card.name
    if wanted != name:
        raise ValueError(
            f"{folder} holds a {saved.method!r} adapter for the backbone {wanted!r}, "
            f"and this one is {name!r}. Load it with load_backbone({wanted!r})."
        )
    wanted, found = saved.backbone["weights_hash"], original_hash(backbone)
    if wanted != found:
        raise ValueError(
            f"{folder} was made for {name!r} with other weights: their hash is "
            f"{wanted[:12]}, this backbone's is {found[:12]}. Load the backbone with "
            "the same weights, bands, image_size and number type as then; a merged "
            "adapter changes the weights too."
        )


def _fill(adapter: Adapter, saved: dict[str, Tensor], folder: str | Path) -> None:
    """Copy saved numbers into an adapter, if names, shapes and kinds agree."""
    wanted = adapter.packed()
    missing = sorted(set(wanted) - set(saved))
    unexpected = sorted(set(saved) - set(wanted))
    if missing or unexpected:
        raise ValueError(
            f"The tensors in {folder} are not this method's. Missing: {missing}. "
            f"Unexpected: {unexpected}. Save the adapter again."
        )
    for name, tensor in wanted.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(saved[name].shape)}, and here it "
                f"must be {tuple(tensor.shape)}."
            )
        if tensor.is_floating_point() != saved[name].is_floating_point():
            raise ValueError(
                f"{folder}: {name} holds {saved[name].dtype}, and here it must be "
                f"{tensor.dtype}. Save the adapter again."
            )
    adapter.unpack(saved)


def _plain(value: Any) -> Any:
    """Turn tuples and ranges into lists, as JSON has no others."""
    return list(value) if isinstance(value, tuple | range) else value
