"""What all methods of Hugging Face `peft` share: a row of options, targets, merging.

A subclass is a row of a table: the card, the configuration class of `peft`, and for
each option the field of that configuration. `build` does the rest; a method that needs
more overrides `inject`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Block, Blocks, Config, Method, Options
from geopeft_kit.methods.checks import check_above_zero, check_share, check_whole
from geopeft_kit.methods.peft.layers import (
    FusedProjection,
    PeftLayer,
    Wrapped,
    merged_tensors,
    replacements,
    wrap,
)
from geopeft_kit.methods.replacement import Replacement, Replacements
from geopeft_kit.methods.targets import (
    LINEAR_CONV2D,
    Kinds,
    Targets,
    default_targets,
    find_targets,
)

WITH_CONV1D: Kinds = (nn.Linear, nn.Conv2d, nn.Conv1d)
CONVOLUTIONS = "networks with Linear or ungrouped convolutions in their blocks"
LINEAR = "networks with Linear layers in their blocks"


@dataclass(frozen=True)
class Option:
    """One option of a peft method."""

    type: str  # as the card shows it
    default: Any
    field: str  # of peft's configuration
    check: Callable[[str, Any], Any]  # (name, value) -> the field's value, or an error


def rank(default: int) -> Option:
    """Rank r of the update."""
    return Option("int", default, "r", check_whole)


def alpha(field: str) -> Option:
    """Scale of the update, alpha / rank; None for alpha = rank."""
    return Option("float | None", None, field, check_above_zero)


def dropout(field: str) -> Option:
    """Dropout rate on the input of the update."""
    return Option("float", 0.0, field, check_share)


def seed(field: str) -> Option:
    """Seed of what is drawn and never saved; another seed is another adapter."""
    return Option("int", 0, field, lambda name, value: check_whole(name, value, 0))


class PeftMethod(Method):
    """A method whose substitutes are layers of `peft`. Subclasses are rows."""

    family = "low rank"
    mergeable = True
    identity_at_start = True
    needs = "networks with Linear or ungrouped Conv2d layers in their blocks"
    kinds: ClassVar[Kinds] = LINEAR_CONV2D  # that peft has layers of the method for
    config: ClassVar[str]  # name of the configuration class in peft
    own: ClassVar[Mapping[str, Option]] = {}  # options besides `targets`
    fixed: ClassVar[Mapping[str, Any]] = {}  # the same fields in every adapter
    tuner: ClassVar[str | None] = None  # name in peft, where layers share tensors

    @classmethod
    def parameters(cls) -> dict[str, tuple[str, Any]]:
        """Option -> (type in words, default), read from the row."""
        own = {name: (o.type, o.default) for name, o in cls.own.items()}
        return {"targets": ("Sequence[str] | None", None)} | own

    def why_not(self, backbone: Backbone) -> str | None:
        if self.default_targets(backbone.blocks):
            return None
        words = " or ".join(kind.__name__ for kind in self.kinds)
        return f"its blocks hold no {words} layer for it (grouped ones do not count)"

    def default_targets(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Return the short names of the layers that suit the method."""
        return default_targets(blocks, self.kinds)

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Put the architecture's default targets, and alpha = rank, in the config."""
        if options["targets"] is None:
            options["targets"] = self.default_targets(blocks)
        if "alpha" in options and options["alpha"] is None:
            options["alpha"] = options["rank"]
        return options

    def build(
        self,
        backbone: Backbone,
        blocks: Blocks,
        *,
        targets: Sequence[str] | None = None,
        **values: Any,
    ) -> Replacements:
        """Check the options, find the target layers, and let peft wrap them."""
        fields = {
            option.field: option.check(name, values[name])
            for name, option in self.own.items()
        }
        chosen = find_targets(blocks, targets or (), self.kinds)
        wrapped = self.inject(chosen, {**self.fixed, **fields}, values)
        return replacements(backbone.model, wrapped)

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets; `fields` are those of the configuration."""
        import peft

        tuner = None if self.tuner is None else getattr(peft, self.tuner)
        return wrap(targets, self.configuration(**fields), inject_with=tuner)

    def configuration(self, **fields: Any) -> Any:
        """Make peft's configuration."""
        import peft

        with warnings.catch_warnings():
            # random matrices are drawn from a seed, and not saved on purpose
            warnings.filterwarnings("ignore", ".*to not save .*within the state dict.*")
            return getattr(peft, self.config)(**fields)

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each frozen tensor, or its q, k, v rows, and the merged values."""
        original: Any = replacement.original
        substitute: PeftLayer = replacement.substitute
        if not isinstance(substitute, FusedProjection):
            for name, values in merged_tensors(substitute).items():
                yield getattr(original, name), values
            return
        for part, layer in substitute.parts.items():
            for name, values in merged_tensors(layer).items():
                thirds = getattr(original, name).chunk(3)  # views: written through
                yield thirds["qkv".index(part)], values
