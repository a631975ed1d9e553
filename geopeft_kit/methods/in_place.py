"""Training existing tensors in place: what full, bias and norm tuning share.

The originals are never written. Copies of the chosen tensors stand in their place, so
that the original weights stay in memory beside the trained ones.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from geopeft_kit.methods.base import Replacement, clone_parameter

Chooser = Callable[[nn.Module, str], bool]
"""(module, name of one of its own parameters) -> train it?"""


def train_copies(
    model: nn.Module, roots: Iterable[str], choose: Chooser
) -> list[Replacement]:
    """Replace chosen parameters by trainable copies; statistics stay where they are.

    Batch norms with a chosen parameter are replaced as a whole by a twin that stays in
    evaluation mode: their running statistics are no parameters and must not move.

    Args:
        model: The inner network.
        roots: Dotted paths of the modules to look into; "" is the whole network.
        choose: Says which parameters train.

    Returns:
        The replacements. A parameter used in two places is copied once.
    """
    copies: dict[int, nn.Parameter] = {}
    replacements = []
    for path, module in _modules_below(model, roots):
        chosen = {
            name: copies.setdefault(id(p), clone_parameter(p))
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


def train_everything(model: nn.Module, roots: Iterable[str]) -> list[Replacement]:
    """Replace all parameters by trainable copies, and buffers that may move by copies.

    Training writes buffers too: batch-norm statistics. Tables that are rebuilt with the
    network (not in its state dict) and index tables stay.
    """
    copies: dict[int, nn.Parameter] = {}
    replacements = []
    for path, module in _modules_below(model, roots):
        tensors: dict[str, Tensor] = {
            name: copies.setdefault(id(p), clone_parameter(p))
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
    """Return a twin of a batch norm with other parameters, always in evaluation mode.

    Args:
        norm: The original; the twin shares its running statistics.
        trained: Name ("weight", "bias") -> the parameter that the twin has instead.
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
