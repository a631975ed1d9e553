"""A replacement: one attribute of a frozen network, and what takes its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Places = dict[str, tuple[nn.Module, str]]
"""Readable name -> (module that holds a tensor, its attribute)."""


@dataclass(eq=False)
class Replacement:
    """One attribute of one module that an adapter points elsewhere."""

    path: str  # dotted path of the attribute inside `backbone.model`
    owner: nn.Module
    attribute: str
    substitute: nn.Module | Tensor
    tensors: Places = field(default_factory=dict)  # trained or saved, below `path`
    original: nn.Module | Tensor | None = None  # known from the first activation on
    active: bool = False

    @classmethod
    def at(
        cls,
        model: nn.Module,
        path: str,
        substitute: nn.Module | Tensor,
        tensors: Mapping[str, tuple[nn.Module, str]] | None = None,
    ) -> Replacement:
        """Make the replacement for a dotted path of a model."""
        parent, _, attribute = path.rpartition(".")
        owner = model.get_submodule(parent)
        return cls(path, owner, attribute, substitute, dict(tensors or {}))

    @property
    def table(self) -> dict[str, Any]:
        """The owner's dictionary of the attribute.

        Setting its key keeps the order of the state dict; `setattr` might not.
        """
        if isinstance(self.substitute, nn.Module):
            return self.owner._modules
        if isinstance(self.substitute, nn.Parameter):
            return self.owner._parameters
        return self.owner._buffers

    def swap_in(self) -> None:
        """Point the attribute at the substitute."""
        table = self.table
        self.original = table[self.attribute]
        table[self.attribute] = self.substitute
        self.active = True

    def swap_out(self) -> None:
        """Point the attribute back at the original."""
        table = self.table
        self.substitute = table[self.attribute]  # `Module.to` makes new buffer objects
        table[self.attribute] = self.original
        self.active = False

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (readable name, tensor) of everything trained or saved here."""
        if isinstance(self.substitute, nn.Module):
            for leaf, (holder, attribute) in self.tensors.items():
                yield f"{self.path}.{leaf}", getattr(holder, attribute)
        else:
            live = self.table[self.attribute] if self.active else self.substitute
            yield self.path, live


Replacements = list[Replacement]
"""What a method changes, in the order in which it is swapped in."""


def tensors_of(replacements: Replacements) -> dict[str, Tensor]:
    """Return everything trained or saved, by readable name."""
    return dict(pair for entry in replacements for pair in entry.named_tensors())


def trained_in(module: nn.Module, name: str = "", frozen: str = "") -> Places:
    """Places of all parameters of a new module but those of its child `frozen`.

    `name` is put in front of each readable name.
    """
    places: Places = {}
    for path, _ in module.named_parameters():
        holder, _, attribute = path.rpartition(".")
        if not frozen or path.partition(".")[0] != frozen:
            readable = f"{name}.{path}".lstrip(".")
            places[readable] = (module.get_submodule(holder), attribute)
    return places
