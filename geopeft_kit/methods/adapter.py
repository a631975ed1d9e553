"""An attached method: swapped in and out, detached, merged, saved.

Of each replacement one side is outside the module tree: the substitute while the
adapter is inactive, the original while it is active. `backbone.to(...)` cannot reach
that side, so it is moved when the sides next change places. Copies (`copy.deepcopy`) of
a backbone carry copies of its adapters.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods import storage
from geopeft_kit.methods.base import Method, TrainingRule, all_methods
from geopeft_kit.methods.replacement import Replacements, tensors_of

Place = tuple[torch.device, torch.dtype]


@dataclass
class Attachments:
    """The record that a backbone keeps of its adapters."""

    requires_grad: dict[str, bool]  # by parameter name, as before the first `attach`
    adapters: list[Adapter] = field(default_factory=list)


class Adapter:
    """A method on one backbone. Made by `attach` and `load_adapter`.

    Attributes:
        config: `layers` and every option with its value, ready for JSON.
        num_parameters: Trained numbers inside the backbone.
        num_bytes: Bytes of the tensors that `save` writes.
        attached: False after `detach` or `merge`.
        identity_at_start: True if, untrained, it changes no output.
        mergeable: True if `merge` can fold it into plain weights.
    """

    def __init__(
        self,
        method: Method,
        backbone: Backbone,
        replacements: Replacements,
        config: dict[str, Any],
    ) -> None:
        self.method = method
        self.name = method.name
        self.config = config
        self.backbone = backbone
        self.attached = True
        self.identity_at_start = method.starts_as_identity(config)
        self.mergeable = method.can_merge(config)
        self._replacements = replacements
        self._place_outside: Place = _place(backbone)
        self._last_mode: bool | None = None  # new modules come in train mode
        self._trains_batch_norms = any(
            isinstance(entry.owner, _BatchNorm) for entry in replacements
        )
        unique = {id(p): p for p in self._trained().values()}.values()
        saved = {id(t): t for t in method.packed(replacements).values()}.values()
        self.num_parameters = sum(p.numel() for p in unique)
        self.num_bytes = sum(t.numel() * t.element_size() for t in saved)

    @property
    def active(self) -> bool:
        """True while the backbone computes with this adapter."""
        return _active(self.backbone) is self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (dotted path inside `backbone.model`, parameter) of what trains."""
        yield from self._trained().items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trained parameters, as an optimiser wants them."""
        yield from self._trained().values()

    def holders(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name of a tensor, new module that holds it)."""
        for entry in self._entries:
            for leaf, (holder, _) in entry.tensors.items():
                yield f"{entry.path}.{leaf}", holder

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, unpacked: trained tensors, and buffers that move."""
        return tensors_of(self._entries)

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors as `save` writes them."""
        return self.method.packed(self._entries)

    def unpack(self, stored: Mapping[str, Tensor]) -> None:
        """Fill the adapter with the tensors of a file: the opposite of `packed`."""
        with torch.no_grad():
            self.method.unpack(self._entries, stored)

    def training_rule(self, total_steps: int) -> TrainingRule | None:
        """What a run of `total_steps` needs besides gradients; mostly None."""
        return self.method.training_rule(self._entries, self.config, total_steps)

    def substitutes(self) -> dict[str, nn.Module | Tensor]:
        """Return path inside `backbone.model` -> what this adapter puts there."""
        return {entry.path: entry.substitute for entry in self._entries}

    def activate(self) -> None:
        """Let the backbone compute with this adapter; the active one steps aside."""
        self._check()
        if self.active:
            return
        other = _active(self.backbone)
        if other is not None:
            other.deactivate()
        self._move("substitute")
        for replacement in self._entries:
            replacement.swap_in()
        _remember(self.backbone, adapter=self)
        self._sync_modes()

    def deactivate(self) -> None:
        """Let the backbone compute as if no method had ever been attached."""
        self._check()
        if not self.active:
            return
        self._move("original")
        for replacement in reversed(self._entries):
            replacement.swap_out()
        _remember(self.backbone, adapter=None)
        self._sync_modes()

    def detach(self) -> None:
        """End the adapter and leave the backbone bit for bit as it was before it.

        With the last adapter gone, the requires_grad flags from before the first
        `attach` come back too.
        """
        self._check()
        self.deactivate()
        attachments = attachments_of(self.backbone)
        attachments.adapters.remove(self)
        if not attachments.adapters:
            restore_flags(self.backbone, attachments.requires_grad)
        self.attached = False
        self._replacements = []

    def merge(self) -> None:
        """Fold the adapter into the backbone's plain weights, and end the adapter.

        The backbone then computes the same with no adapter. It has other weights, and
        with them another `weights_hash()`: adapters saved before do not load on it.

        Raises ValueError if the method cannot be folded, RuntimeError if other adapters
        are attached, which were made for the weights that this would change.
        """
        self._check()
        if not self.mergeable:
            able = [method.name for method in all_methods() if method.mergeable]
            these = " with these options" if self.method.mergeable else ""
            raise ValueError(
                f"{self.name!r}{these} cannot be merged: it adds more than a change of "
                f"weights. Methods that merge: {', '.join(able)}."
            )
        adapters = attachments_of(self.backbone).adapters
        others = [adapter.name for adapter in adapters if adapter is not self]
        if others:
            raise RuntimeError(
                f"Merging changes the weights that {others} were attached to. Save "
                "and detach them first, then merge."
            )
        was_active = self.active
        self.activate()  # so that every replacement knows its original
        self.deactivate()
        try:
            with torch.no_grad():  # all values first: an error must change nothing
                changes = [
                    pair
                    for entry in self._entries
                    for pair in self.method.folded(entry)
                ]
        except BaseException:
            if was_active:
                self.activate()
            raise
        with torch.no_grad():
            for original, values in changes:
                original.copy_(values)
        self.detach()

    def save(self, folder: str | Path) -> Path:
        """Write the adapter to a folder: adapter.json and adapter.safetensors.

        The folder is made if needed, and an adapter in it is replaced. It is as large
        as the trained tensors plus a few kilobytes, and belongs to this backbone with
        these weights.
        """
        return storage.write_adapter(
            folder,
            method=self.name,
            config=self.config,
            backbone={
                "name": self.backbone.card.name,
                "weights_hash": original_hash(self.backbone),
            },
            tensors=self.packed(),
        )

    def export(self, folder: str | Path) -> Path:
        """Write files that Hugging Face `peft` alone loads onto the plain timm model.

        Raises ValueError where the method has no such format.
        """
        self.method.export(self._entries, self.config, Path(folder))
        return Path(folder)

    def summary(self) -> dict[str, Any]:
        """Return the numbers that describe the adapter, as one row of a table."""
        total = self.backbone.card.parameters or 0
        return {
            "method": self.name,
            "trained": self.num_parameters,
            "share of backbone": self.num_parameters / total if total else None,
            "bytes": self.num_bytes,
            "mergeable": self.mergeable,
            "identity at start": self.identity_at_start,
            "state": "active" if self.active else "inactive",
        }

    def __repr__(self) -> str:
        state = "active" if self.active else "inactive"
        if not self.attached:
            state = "detached"
        return f"Adapter({self.name!r}, {self.num_parameters:,} trained, {state})"

    def _repr_html_(self) -> str:
        rows = {**self.summary(), **self.config}
        rows["trained"] = f"{self.num_parameters:,}"
        if rows["share of backbone"] is not None:
            rows["share of backbone"] = f"{rows['share of backbone']:.2%}"
        rows["bytes"] = f"{self.num_bytes:,}"
        cells = (
            f"<tr><th style='text-align:left'>{html.escape(str(key))}</th>"
            f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
            for key, value in rows.items()
        )
        return f"<table>{''.join(cells)}</table>"

    @property
    def _entries(self) -> Replacements:
        """The replacements, in the order of swapping in."""
        self._check()
        return self._replacements

    def _check(self) -> None:
        if not self.attached:
            raise RuntimeError(
                f"This {self.name!r} adapter was detached or merged. Attach a new one, "
                "or load the saved one with load_adapter(backbone, folder)."
            )

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            name: tensor
            for name, tensor in tensors_of(self._entries).items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }

    def _move(self, side: str) -> None:
        """Move the side outside the tree ("substitute" or "original") to its place."""
        now = _place(self.backbone)
        if now != self._place_outside:
            dtype = now[1] if now[1] != self._place_outside[1] else None
            for entry in self._entries:
                moved = _moved(getattr(entry, side), now[0], dtype)
                setattr(entry, side, moved)
            self._place_outside = now

    def _sync_modes(self) -> None:
        """Give what has just come into the tree the backbone's train or eval mode.

        This walks the whole backbone, so it is skipped where nothing can have changed.
        """
        mode = self.backbone.training
        if mode != self._last_mode or self._trains_batch_norms:
            self.backbone.train(mode)
        self._last_mode = mode


@contextmanager
def original_backbone(backbone: Backbone) -> Iterator[dict[str, bool]]:
    """Deactivate the active adapter; an error inside brings everything back.

    Yields parameter name -> requires_grad flag of the backbone.
    """
    active = _active(backbone)
    if active is not None:
        active.deactivate()
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    try:
        yield flags
    except BaseException:
        restore_flags(backbone, flags)
        if active is not None:
            active.activate()
        raise


def original_hash(backbone: Backbone) -> str:
    """Return the hash of the backbone's own weights, whatever is active."""
    active = _active(backbone)
    if active is None:
        return backbone.weights_hash()
    active.deactivate()
    try:
        return backbone.weights_hash()
    finally:
        active.activate()


def record(adapter: Adapter, flags: dict[str, bool]) -> None:
    """Freeze the backbone and add a new adapter, not active yet, to its record.

    `flags` are the backbone's requires_grad flags before anything was attached.
    """
    backbone = adapter.backbone
    attachments = attachments_of(backbone)
    if not attachments.adapters:
        attachments.requires_grad = flags
    attachments.adapters.append(adapter)
    backbone.requires_grad_(False)
    backbone.train(backbone.training)  # a frozen batch norm computes in eval mode


def attachments_of(backbone: Backbone) -> Attachments:
    """Return the backbone's record of its adapters, empty where there are none."""
    if "_attachments" not in backbone.__dict__:
        _remember(backbone, _attachments=Attachments({}))
    return cast(Attachments, backbone.__dict__["_attachments"])


def restore_flags(backbone: Backbone, flags: dict[str, bool]) -> None:
    """Set the requires_grad flags of the backbone's own parameters."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    backbone.train(backbone.training)  # a batch norm may move again


def _active(backbone: Backbone) -> Adapter | None:
    return cast("Adapter | None", backbone.__dict__.get("adapter"))


def _remember(backbone: Backbone, **attributes: Any) -> None:
    """Set plain attributes: not parameters, not modules, not in the state dict."""
    for name, value in attributes.items():
        object.__setattr__(backbone, name, value)


def _place(backbone: Backbone) -> Place:
    """Device and floating dtype of the backbone, read from its first parameter.

    The active adapter's own stay in float32 on a backbone of lower precision, so they
    tell it only where there is no other, as under "full".
    """
    active = _active(backbone)
    new = {id(p) for p in active._trained().values()} if active else set()
    floating = [p for p in backbone.model.parameters() if p.is_floating_point()]
    if not floating:
        raise ValueError("The backbone has no floating point parameter.")
    first = next((p for p in floating if id(p) not in new), floating[0])
    return first.device, first.dtype


def _moved(
    value: nn.Module | Tensor, device: torch.device, dtype: torch.dtype | None
) -> nn.Module | Tensor:
    """Move as `Module.to` does: parameters keep their identity, buffers do not."""
    if isinstance(value, nn.Module):
        return value.to(device=device, dtype=dtype)
    carrier = nn.Module()
    if isinstance(value, nn.Parameter):
        carrier.register_parameter("value", value)
    else:
        carrier.register_buffer("value", value)
    return carrier.to(device=device, dtype=dtype).value
