"""The contract of a PEFT method: what it replaces, what it trains, whom it fits.

A method reads a frozen backbone and answers with a list of replacements: (owner
module, attribute, original, substitute). Pointing the attributes at the substitutes
activates the method, pointing them back restores the backbone exactly; nothing else
ever touches it. `adapter.py` does the pointing, each method's file makes the
substitutes. Taught in notebooks 03 and 04.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone
    from geopeft_kit.methods.adapter import Adapter

Block = tuple[str, nn.Module]
"""One block of a backbone: its dotted path inside `backbone.model`, and the module."""

Layers = str | Sequence[int]
"""Which blocks a method works on: "all", "last:4", or a list of block numbers."""


@dataclass(frozen=True)
class MethodCard:
    """What a method is, before it is attached.

    Attributes:
        name: The key for `attach`.
        title: The name used in prose and tables.
        paper: Authors, year, title and arXiv id; a dash where there is none.
        trained: Which tensors train.
        count_formula: Trained numbers as a formula. D: width, L: blocks, r: rank.
        mergeable: True where `merge` can fold the method into plain weights.
        identity_at_start: True where the untrained method changes no output.
        learning_rate: Default of `fit` for what trains inside the backbone; None
            where nothing does.
        needs: Which backbones it serves, in words.
        options: Option -> type and default, as spelt in the method's signature.
    """

    name: str
    title: str
    paper: str
    trained: str
    count_formula: str
    mergeable: bool
    identity_at_start: bool
    learning_rate: float | None
    needs: str
    options: dict[str, str] = field(repr=False)
    reason: Callable[[Backbone], str | None] = field(repr=False, compare=False)

    def why_not(self, backbone: Backbone) -> str | None:
        """Return why the method cannot serve this backbone, or None if it can."""
        return self.reason(backbone)

    def supports(self, backbone: Backbone) -> bool:
        """Return True if the method can be attached to this backbone."""
        return self.why_not(backbone) is None


@dataclass(eq=False)
class Replacement:
    """One attribute of one module that an adapter points elsewhere.

    Attributes:
        path: Dotted path of the attribute inside `backbone.model`.
        owner: The module that holds the attribute.
        attribute: The attribute's name in the owner.
        substitute: The module, parameter or buffer that takes the place.
        tensors: Name below `path` -> (module that holds the tensor, its attribute), for
            every tensor that is trained or otherwise has to be saved. Left empty for a
            tensor substitute, which is itself what is saved.
        original: What stood there; known from the first activation on.
        active: True while the attribute points at the substitute.
    """

    path: str
    owner: nn.Module
    attribute: str
    substitute: nn.Module | Tensor
    tensors: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    original: nn.Module | Tensor | None = None
    active: bool = False

    @classmethod
    def at(
        cls,
        model: nn.Module,
        path: str,
        substitute: nn.Module | Tensor,
        tensors: Mapping[str, tuple[nn.Module, str]] | None = None,
    ) -> Replacement:
        """Make the replacement of what stands at a dotted path of a model."""
        parent, _, attribute = path.rpartition(".")
        owner = model.get_submodule(parent)
        return cls(path, owner, attribute, substitute, dict(tensors or {}))

    @property
    def table(self) -> dict[str, Any]:
        """The owner's own dictionary that holds the attribute.

        Re-pointing a key that exists keeps the order of the state dict, which
        `setattr` would not promise.
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
        """Point the attribute back at the original.

        The substitute is read back first: `Module.to` makes new buffer objects.
        """
        table = self.table
        self.substitute = table[self.attribute]
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


class TrainingRule(ABC):
    """What a method does in training besides gradient steps, for one run of `fit`."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return a scalar that is added to the loss."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Act after an optimiser step, while its gradients are still there.

        Args:
            step: Number of steps done, from 1.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers, lists and dicts."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of an interrupted run."""


class Method(ABC):
    """One PEFT method. A subclass states the card's facts and builds substitutes.

    `build` spells the method's options as keyword-only arguments with defaults; that
    signature is the single place where options are declared.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    trained: ClassVar[str]
    count_formula: ClassVar[str]
    mergeable: ClassVar[bool]
    identity_at_start: ClassVar[bool]
    learning_rate: ClassVar[float | None]
    needs: ClassVar[str] = "any backbone"

    @abstractmethod
    def build(self, backbone: Backbone, blocks: list[Block]) -> list[Replacement]:
        """Make the substitutes for the chosen blocks, without touching the backbone.

        Args:
            backbone: The backbone, as it is with no adapter active.
            blocks: The blocks chosen by `layers`, in order.

        Returns:
            The replacements, in the order in which they are swapped in.
        """

    def why_not(self, backbone: Backbone) -> str | None:
        """Return why the method cannot serve this backbone, or None if it can."""
        return None

    def resolve(
        self, backbone: Backbone, blocks: list[Block], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Fill in what the user left to the method, so that the config says it.

        Args:
            backbone: The backbone.
            blocks: The chosen blocks.
            options: Every option of the method with its value.
        """
        return options

    def starts_as_identity(self, config: Mapping[str, Any]) -> bool:
        """Return whether these options leave the untrained network's output alone."""
        return self.identity_at_start

    def can_merge(self, config: Mapping[str, Any]) -> bool:
        """Return whether these options can be folded into plain weights."""
        return self.mergeable

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (original tensor, the values that merging writes into it).

        This default serves methods that train copies of existing tensors.
        """
        original = replacement.original
        if isinstance(original, Tensor):
            yield original, cast(Tensor, replacement.substitute)
            return
        for leaf, (holder, attribute) in replacement.tensors.items():
            yield getattr(original, leaf), getattr(holder, attribute)

    def packed(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return name -> tensor as `save` writes them: here, all as they are."""
        return adapter.tensors()

    def unpack(self, adapter: Adapter, stored: Mapping[str, Tensor]) -> None:
        """Fill an adapter from a file: the opposite of `packed`.

        Args:
            adapter: A new one, with the options that the file names.
            stored: Names, shapes and kinds of number as `packed` gives them.
        """
        for name, tensor in adapter.tensors().items():
            tensor.copy_(stored[name])

    def training_rule(self, adapter: Adapter, total_steps: int) -> TrainingRule | None:
        """Return what training needs besides gradient steps; None for most methods.

        Args:
            adapter: The active adapter.
            total_steps: Optimiser steps of the whole run.
        """
        return None

    def export(self, adapter: Adapter, folder: Path) -> None:
        """Write the adapter in another library's format."""
        raise ValueError(
            f"{self.name!r} has no format that another library reads. Methods that "
            "export (as Hugging Face peft files): lora, dora. adapter.save(folder) "
            "works for every method."
        )

    @classmethod
    def options(cls) -> dict[str, str]:
        """Option -> "type = default", read from the signature of `build`."""
        parameters = inspect.signature(cls.build).parameters.values()
        return {
            p.name: f"{p.annotation} = {p.default!r}"
            for p in parameters
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Option -> default value."""
        parameters = inspect.signature(cls.build).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def card(self) -> MethodCard:
        """Return the method's card."""
        return MethodCard(
            name=self.name,
            title=self.title,
            paper=self.paper,
            trained=self.trained,
            count_formula=self.count_formula,
            mergeable=self.mergeable,
            identity_at_start=self.identity_at_start,
            learning_rate=self.learning_rate,
            needs=self.needs,
            options=self.options(),
            reason=self.why_not,
        )


def select_blocks(blocks: Sequence[Block], layers: Layers) -> list[Block]:
    """Choose blocks of a backbone.

    Args:
        blocks: All blocks, in order.
        layers: "all", "last:k" for the last k, or a list of numbers counted from 0.

    Returns:
        The chosen blocks, in the order of the backbone.

    Raises:
        ValueError: An unknown word, an empty, repeated or out-of-range choice.
        TypeError: Neither a word nor whole numbers.
    """
    count = len(blocks)
    allowed = f'"all", "last:k" with k from 1 to {count}, or a list of 0..{count - 1}'
    if isinstance(layers, str):
        if layers == "all":
            return list(blocks)
        word, _, number = layers.partition(":")
        if word == "last" and number.isdecimal() and 1 <= int(number) <= count:
            return list(blocks[count - int(number) :])
        raise ValueError(f"layers={layers!r}; this backbone takes {allowed}.")
    listed = isinstance(layers, Sequence)
    chosen: list[int] = [*layers] if listed else []
    if not listed or any(type(i) is not int for i in chosen):
        raise TypeError(f"layers={layers!r}; this backbone takes {allowed}.")
    outside = [i for i in chosen if not 0 <= i < count]
    if outside or not chosen or len(set(chosen)) < len(chosen):
        fault = f"{outside} are out of range" if outside else "empty or repeated"
        raise ValueError(f"layers={chosen}: {fault}; this backbone takes {allowed}.")
    return [blocks[i] for i in sorted(chosen)]


def check_whole(option: str, value: Any, minimum: int = 1) -> int:
    """Return a whole number option, or raise with its name and the allowed range."""
    if type(value) is not int:
        raise TypeError(f"{option}={value!r}; a whole number is needed.")
    if value < minimum:
        raise ValueError(f"{option}={value}; it must be {minimum} or more.")
    return value


def check_share(option: str, value: Any) -> float:
    """Return an option in [0, 1), such as a dropout rate, or raise with its name."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option}={value!r}; a number from 0 up to 1 is needed.")
    if not 0 <= value < 1:
        raise ValueError(f"{option}={value}; it must be at least 0 and below 1.")
    return float(value)


def check_above_zero(option: str, value: Any) -> float:
    """Return a finite number above 0, or raise with the option's name."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option}={value!r}; a number above 0 is needed.")
    if not 0 < value < float("inf"):
        raise ValueError(f"{option}={value}; it must be finite and above 0.")
    return value


def clone_parameter(parameter: Tensor) -> nn.Parameter:
    """Return a trainable copy of a parameter."""
    return nn.Parameter(parameter.detach().clone(), requires_grad=True)
