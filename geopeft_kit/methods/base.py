"""The contract of a PEFT method, the register of methods, and the choice of blocks.

A method reads a frozen backbone and returns replacements. Pointing attributes at the
substitutes activates the method, pointing them back restores the backbone exactly;
`adapter.py` does the pointing. Taught in notebooks 03 and 04.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.devices import device_of
from geopeft_kit.methods.replacement import Replacement, Replacements, tensors_of
from geopeft_kit.plots.colours import add_method_colour

Block = tuple[str, nn.Module]
"""One block of a backbone: its dotted path inside `backbone.model`, and the module."""

Blocks = list[Block]
Options = dict[str, Any]
"""Option -> value, as given to `attach` and completed by the method."""

Config = Mapping[str, Any]
"""`layers` and the completed options of an adapter, ready for JSON."""

Layers = str | Sequence[int]
"""Which blocks a method works on: "all", "last:4", or a list of block numbers."""

FAMILIES = (
    "ends",
    "existing weights",
    "low rank",
    "prompts",
    "adapters",
    "side networks",
    "Earth observation",
)
"""Families of methods, in the order of all tables."""


@dataclass(frozen=True)
class MethodCard:
    """What a method is, before it is attached.

    Attributes:
        name: The key for `attach`.
        title: The name used in prose and tables.
        family: One of `FAMILIES`.
        paper: Authors, year, title and arXiv id; a dash where there is none.
        trained: Which tensors train.
        count_formula: Trained numbers as a formula. D: width, L: blocks, r: rank.
        mergeable: True where `merge` can fold the method into plain weights.
        identity_at_start: True where the untrained method changes no output.
        learning_rate: Default of `fit` for what trains inside the backbone; None
            where nothing does.
        needs: Which backbones it serves, in words.
        note: A few words for the tables of README and cheat-sheet.
        options: Option -> type and default.
    """

    name: str
    title: str
    family: str
    paper: str
    trained: str
    count_formula: str
    mergeable: bool
    identity_at_start: bool
    learning_rate: float | None
    needs: str
    note: str
    options: dict[str, str] = field(repr=False)
    reason: Callable[[Backbone], str | None] = field(repr=False, compare=False)

    def why_not(self, backbone: Backbone) -> str | None:
        """Return why the method cannot serve this backbone, or None if it can."""
        return self.reason(backbone)

    def supports(self, backbone: Backbone) -> bool:
        """Return True if the method can be attached to this backbone."""
        return self.why_not(backbone) is None


class TrainingRule(ABC):
    """What a method does in training besides gradient steps, for one run of `fit`."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return a scalar that is added to the loss."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Act after optimiser step 1, 2, ..., while its gradients are still there."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers, lists and dicts."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the state of an interrupted run."""


class Method(ABC):
    """One PEFT method. A subclass states the card's facts and builds substitutes.

    Options are the keyword-only arguments of `build`, with their defaults.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    trained: ClassVar[str]
    count_formula: ClassVar[str]
    mergeable: ClassVar[bool]
    identity_at_start: ClassVar[bool]
    learning_rate: ClassVar[float | None]
    needs: ClassVar[str] = "any backbone"
    note: ClassVar[str] = ""
    linear: ClassVar[bool] = False
    """True where the change of the weights is linear in the trained tensors."""
    kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Types of layer it works on, where it takes `targets`."""

    @abstractmethod
    def build(self, backbone: Backbone, blocks: Blocks) -> Replacements:
        """Make the substitutes for the chosen blocks, without touching the backbone.

        No adapter is active at this moment. The order is that of swapping in.
        """

    def why_not(self, backbone: Backbone) -> str | None:
        """Return why the method cannot serve this backbone, or None if it can."""
        return None

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Fill in what the user left to the method, so that the config says it."""
        return options

    def starts_as_identity(self, config: Config) -> bool:
        """Return whether these options leave the untrained network's output alone."""
        return self.identity_at_start

    def can_merge(self, config: Config) -> bool:
        """Return whether these options can be folded into plain weights."""
        return self.mergeable

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (original tensor, the values that merging writes): here, of copies."""
        original = replacement.original
        if isinstance(original, Tensor):
            yield original, cast(Tensor, replacement.substitute)
            return
        for leaf, (holder, attribute) in replacement.tensors.items():
            yield getattr(original, leaf), getattr(holder, attribute)

    def joint_config(self, configs: Sequence[Config]) -> Options:
        """Return the config of a weighted sum of adapters, or say why there is none."""
        if not self.linear:
            raise ValueError(
                f"{self.name!r} adapters cannot be combined: the sum of their changes "
                f"is not an adapter of this method. Methods that combine: "
                f"{', '.join(combining())}."
            )
        check_equal(configs)
        return dict(configs[0])

    def join(
        self,
        start: Mapping[str, Tensor],
        parts: Sequence[tuple[Config, Mapping[str, Tensor]]],
        weights: Sequence[float],
    ) -> dict[str, Tensor]:
        """Return the tensors of a weighted sum: start + sum of w (tensor - start).

        `start` are those of an untrained adapter; `parts` are configs and tensors.
        """
        return {
            name: first
            + sum(
                weight * (tensors[name] - first)
                for weight, (_, tensors) in zip(weights, parts, strict=True)
            )
            for name, first in start.items()
        }

    def packed(self, replacements: Replacements) -> dict[str, Tensor]:
        """Return name -> tensor as `save` writes them: here, all as they are."""
        return tensors_of(replacements)

    def unpack(self, replacements: Replacements, stored: Mapping[str, Tensor]) -> None:
        """Fill new replacements from a file: the opposite of `packed`."""
        for name, tensor in tensors_of(replacements).items():
            tensor.copy_(stored[name])

    def training_rule(
        self, replacements: Replacements, config: Config, total_steps: int
    ) -> TrainingRule | None:
        """Return what training needs besides gradient steps; None for most methods."""
        return None

    def export(self, replacements: Replacements, config: Config, folder: Path) -> None:
        """Write the adapter in another library's format."""
        raise ValueError(
            f"{self.name!r} has no format that another library reads. Methods that "
            "export (as Hugging Face peft files): lora, dora. adapter.save(folder) "
            "works for every method."
        )

    @classmethod
    def parameters(cls) -> dict[str, tuple[str, Any]]:
        """Option -> (type in words, default), read from the signature of `build`."""
        return _keywords(cls.build)

    @classmethod
    def options(cls) -> dict[str, str]:
        """Option -> "type = default"."""
        pairs = cls.parameters().items()
        return {name: f"{kind} = {default!r}" for name, (kind, default) in pairs}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Option -> default value."""
        return {name: default for name, (_, default) in cls.parameters().items()}

    def card(self) -> MethodCard:
        """Return the method's card."""
        facts = {f.name: getattr(self, f.name) for f in fields(MethodCard)[:-2]}
        return MethodCard(**facts, options=self.options(), reason=self.why_not)


class BlockMethod(Method):
    """A method that treats every block alike; options are those of `in_block`."""

    @abstractmethod
    def in_block(self, backbone: Backbone, path: str, block: Any) -> Replacements:
        """Make the substitutes for one block; new tensors are made on its device."""

    def build(self, backbone: Backbone, blocks: Blocks, **options: Any) -> Replacements:
        """Make the substitutes block by block."""
        replacements: Replacements = []
        for path, block in blocks:
            with device_of(block):
                replacements += self.in_block(backbone, path, block, **options)
        return replacements

    @classmethod
    def parameters(cls) -> dict[str, tuple[str, Any]]:
        """Option -> (type in words, default), read from the signature of `in_block`."""
        return _keywords(cls.in_block)


METHODS: dict[str, Method] = {}
"""Name -> method, filled by `register`."""

Kind = TypeVar("Kind", bound=type[Method])


def register(kind: Kind) -> Kind:
    """Class decorator: give a method its place in `list_methods` and its colour."""
    name, old = kind.name, METHODS.get(kind.name)
    if kind.family not in FAMILIES:
        raise ValueError(
            f"{name!r} has family={kind.family!r}; the families are "
            f"{', '.join(FAMILIES)}."
        )
    home = (kind.__module__, kind.__qualname__)
    # running a cell or module again replaces its own method
    if old and home != (type(old).__module__, type(old).__qualname__):
        raise ValueError(f"The name {name!r} belongs to {type(old)}. Choose another.")
    METHODS[name] = kind()
    add_method_colour(name, kind.family)
    return kind


def all_methods() -> list[Method]:
    """Return every method, family by family."""
    return sorted(METHODS.values(), key=lambda method: FAMILIES.index(method.family))


def check_equal(configs: Sequence[Config], apart_from: Sequence[str] = ()) -> None:
    """Refuse to combine adapters whose configs differ in other options than these."""
    for name in set(configs[0]) - set(apart_from):
        values = [config[name] for config in configs]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"Adapters to combine need the same {name}; they have {values}."
            )


def _keywords(function: Callable[..., Any]) -> dict[str, tuple[str, Any]]:
    """Keyword-only argument -> (type in words, default)."""
    return {
        p.name: (inspect.formatannotation(p.annotation).strip("'"), p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }


def combining() -> list[str]:
    """Names of the methods whose adapters add up; LoRA's do because ranks can grow."""
    return [m.name for m in all_methods() if m.linear or m.name == "lora"]


def linear_only() -> list[str]:
    """Names of the methods that serve no convolutions."""
    return [m.name for m in all_methods() if m.kinds == (nn.Linear,)]


def select_blocks(blocks: Sequence[Block], layers: Layers) -> list[Block]:
    """Choose blocks, in the backbone's order: "all", "last:k", or numbers from 0."""
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
