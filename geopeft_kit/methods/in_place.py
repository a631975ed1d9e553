"""Training existing tensors: all, the last blocks, biases, norms, or none.

The originals are never written: trained copies take the place of the chosen tensors,
and the original weights stay in memory. Taught in notebooks 02 and 04.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Blocks, Method, register
from geopeft_kit.methods.checks import check_whole
from geopeft_kit.methods.replacement import Replacement, Replacements

Chooser = Callable[[nn.Module, str], bool]
"""(module, name of one of its own parameters) -> train it?"""


class ChosenParameters(Method):
    """Trains copies of the parameters that `chooses` picks.

    Where `layers` is not "all", only those inside the blocks.
    """

    family = "existing weights"
    mergeable = True
    linear = True
    identity_at_start = True
    missing: ClassVar[str]  # why a network without such parameters is refused

    def chooses(self, module: nn.Module, name: str) -> bool:
        """Return whether a module's own parameter of this name trains."""
        raise NotImplementedError

    def why_not(self, backbone: Backbone) -> str | None:
        for module in backbone.model.modules():
            own = module.named_parameters(recurse=False)
            if any(self.chooses(module, name) for name, _ in own):
                return None
        return self.missing

    def build(self, backbone: Backbone, blocks: Blocks) -> Replacements:
        """Copy the parameters of the whole network, or of the chosen blocks."""
        roots = roots_of(backbone, blocks)
        return train_copies(backbone.model, roots, self.chooses)


def roots_of(backbone: Backbone, blocks: Blocks) -> list[str]:
    """Paths of the chosen blocks; "", the whole network, where all are chosen."""
    everything = len(blocks) == len(backbone.blocks)
    return [""] if everything else [path for path, _ in blocks]


def train_copies(
    model: nn.Module, roots: Iterable[str], choose: Chooser
) -> Replacements:
    """Replace chosen parameters below the roots (dotted paths) by trainable copies.

    Batch norms with a chosen parameter are replaced as a whole by a twin that stays in
    evaluation mode, so that their running statistics do not move. A parameter used in
    two places is copied once.
    """
    copies: dict[int, nn.Parameter] = {}
    replacements = []
    for path, module in _modules_below(model, roots):
        chosen = {
            name: copies.setdefault(id(p), _clone(p))
            for name, p in module.named_parameters(recurse=False)
            if choose(module, name)
        }
        if chosen and isinstance(module, _BatchNorm):
            twin = fixed_statistics(module, chosen)
            tensors = {name: (twin, name) for name in chosen}
            replacements.append(Replacement.at(model, path, twin, tensors))
            continue
        for name, parameter in chosen.items():
            full = f"{path}.{name}" if path else name
            replacements.append(Replacement(full, module, name, parameter))
    return replacements


def train_everything(model: nn.Module, roots: Iterable[str]) -> Replacements:
    """Replace all parameters by trainable copies, and buffers that may move by copies.

    Batch-norm statistics move. Index tables stay, and so does what is rebuilt with the
    network (not in its state dict).
    """
    copies: dict[int, nn.Parameter] = {}
    replacements = []
    for path, module in _modules_below(model, roots):
        tensors: dict[str, Tensor] = {
            name: copies.setdefault(id(p), _clone(p))
            for name, p in module.named_parameters(recurse=False)
        }
        tensors |= {
            name: buffer.detach().clone()
            for name, buffer in module.named_buffers(recurse=False)
            if _may_move(module, name, buffer)
        }
        for name, tensor in tensors.items():
            full = f"{path}.{name}" if path else name
            replacements.append(Replacement(full, module, name, tensor))
    return replacements


def fixed_statistics(norm: _BatchNorm, trained: dict[str, nn.Parameter]) -> _BatchNorm:
    """Return a twin of a batch norm with other parameters ("weight", "bias").

    It shares the running statistics and is always in evaluation mode.
    """
    twin = copy.copy(norm)
    kind: Any = type(norm)
    twin.__class__ = _fixed_class(kind)
    twin._parameters = {**norm._parameters, **trained}
    twin._buffers = dict(norm._buffers)
    twin._modules = dict(norm._modules)
    return twin.train(False)


class FixedStatistics:
    """Mixed into a batch norm: its own statistics never move, whatever the mode."""

    def train(self, mode: bool = True) -> FixedStatistics:
        """Stay in evaluation mode."""
        return super().train(False)  # type: ignore[misc]


@functools.cache
def _fixed_class(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Fixed{kind.__name__}", (FixedStatistics, kind), {})


def _clone(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=True)


def _may_move(module: nn.Module, name: str, buffer: Tensor) -> bool:
    if name in module._non_persistent_buffers_set:
        return False
    return buffer.is_floating_point() or isinstance(module, _NormBase)


def _modules_below(
    model: nn.Module, roots: Iterable[str]
) -> Iterable[tuple[str, nn.Module]]:
    """Yield (dotted path, module) of the roots and all below them."""
    for root in roots:
        yield from model.get_submodule(root).named_modules(prefix=root)


@register
class Bias(ChosenParameters):
    """All bias terms: of the blocks, the patch embedding and the final norm.

    The bias of a batch norm counts as one; its statistics stay.
    """

    name = "bias"
    title = "Bias tuning (BitFit)"
    paper = "Ben Zaken et al. 2022, BitFit, arXiv 2106.10199"
    trained = "every bias"
    count_formula = "11D per ViT block + 2D (patch embedding, final norm)"
    learning_rate = 1e-3  # ours; biases bear a larger rate than weights
    needs = "any backbone with biases"
    note = "BitFit"
    missing = "it has no bias terms"

    def chooses(self, module: nn.Module, name: str) -> bool:
        """Choose by the parameter's name."""
        return name == "bias" or name.endswith("_bias")


@register
class Norm(ChosenParameters):
    """Weight and bias of every normalisation layer, the final one included.

    Running statistics of a batch norm stay: it computes with the frozen ones, in
    training too.
    """

    name = "norm"
    title = "Norm tuning"
    paper = "Basu et al. 2024, LayerNorm tuning, arXiv 2304.01917"
    trained = "weight and bias of every normalisation layer"
    count_formula = "4D per ViT block + 2D (final norm)"
    learning_rate = 1e-3  # ours
    needs = "any backbone with affine normalisation layers"
    missing = "it has no normalisation layer with a weight or bias"

    def chooses(self, module: nn.Module, name: str) -> bool:
        """Choose by the class's name: LayerNorm, BatchNormAct2d, RmsNorm, ..."""
        return "norm" in type(module).__name__.lower()


@register
class Frozen(Method):
    """Nothing inside the backbone trains: the probe."""

    name = "frozen"
    title = "Frozen backbone (probe)"
    family = "ends"
    paper = "-"
    trained = "nothing in the backbone; the decoder on top alone"
    count_formula = "0"
    mergeable = True
    linear = True
    identity_at_start = True
    learning_rate = None

    def build(self, backbone: Backbone, blocks: Blocks) -> Replacements:
        """Replace nothing."""
        return []


@register
class Full(Method):
    """Every parameter trains, in copies; the original weights are kept.

    Batch-norm statistics move during training, in copies as well, and are saved. With
    `layers` given, only what is inside those blocks trains.
    """

    name = "full"
    title = "Full fine-tuning"
    family = "ends"
    paper = "-"
    trained = "all parameters; batch-norm statistics move"
    count_formula = "all"
    mergeable = True
    linear = True
    identity_at_start = True
    # The 15 full runs of the PEFT study (arXiv 2504.17397, its released settings) chose
    # 2.2e-5 to 9.9e-4, larger models the smaller ones.
    learning_rate = 1e-4

    def build(self, backbone: Backbone, blocks: Blocks) -> Replacements:
        """Copy all parameters and moving buffers, or those of the chosen blocks."""
        if len(blocks) < len(backbone.blocks):
            return train_everything(backbone.model, [path for path, _ in blocks])
        inside = train_everything(backbone.model, [""])
        return inside + train_everything(backbone, backbone.beside)


@register
class LastBlocks(Method):
    """The last blocks train, in copies; everything before them is frozen.

    Nothing before the first trained block needs a backward pass. If `layers` chooses
    blocks, exactly those train and `number` is not used.
    """

    name = "last_blocks"
    title = "Last blocks"
    family = "ends"
    paper = "-"
    trained = "all parameters of the last `number` blocks"
    count_formula = "number * block (plain ViT block: 12D^2 + 13D)"
    mergeable = True
    linear = True
    identity_at_start = True
    learning_rate = 1e-4  # as full; ours

    def build(
        self, backbone: Backbone, blocks: Blocks, *, number: int = 2
    ) -> Replacements:
        """Copy every parameter and buffer of the last `number` blocks."""
        check_whole("number", number)
        if number > len(backbone.blocks):
            raise ValueError(
                f"number={number}, but the backbone has {len(backbone.blocks)} blocks."
            )
        if len(blocks) == len(backbone.blocks):
            blocks = blocks[-number:]
        return train_everything(backbone.model, [path for path, _ in blocks])
