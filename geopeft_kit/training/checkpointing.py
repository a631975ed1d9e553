"""Gradient checkpointing: forget what a block computed, and compute it again.

Training keeps what each layer computed until the backward pass has used it. A
checkpointed block keeps only its input and runs a second time in the backward pass:
less memory, more time, the same numbers. Taught in notebook 08.

Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost,
arXiv 1604.06174; `torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from geopeft_kit.model import Model

CHECKPOINTING = ("blocks", "mlp")


@contextmanager
def checkpointed(model: Model, how: str | None) -> Iterator[None]:
    """Recompute parts of the backbone in the backward pass, inside this context.

    Gradients are those of the plain model bit for bit: the same kernels run on the same
    numbers, dropout repeats its draw, and batch-norm statistics move once. "blocks"
    recomputes whole blocks, "mlp" the MLP of each block, whose two wide layers keep the
    most.
    """
    parts = parts_to_recompute(model, how)
    with replaced_forward({part: _recomputed(part, part.forward) for part in parts}):
        yield


@contextmanager
def replaced_forward(
    functions: Mapping[nn.Module, Callable[..., Any]],
) -> Iterator[None]:
    """Let modules compute with other functions inside this context."""
    before = [(module, module.__dict__.get("forward")) for module in functions]
    for module, function in functions.items():
        module.__dict__["forward"] = function
    try:
        yield
    finally:
        for module, forward in before:
            del module.__dict__["forward"]  # the class's own shows again
            if forward is not None:
                module.__dict__["forward"] = forward


def parts_to_recompute(model: Model, how: str | None) -> list[nn.Module]:
    """The modules that `checkpointed` wraps: blocks, or the MLPs inside them."""
    if how is None:
        return []
    if how not in CHECKPOINTING:
        raise ValueError(
            f"checkpointing is {how!r}; allowed are None, {', '.join(CHECKPOINTING)}."
        )
    blocks = [block for _, block in model.backbone.blocks]
    if how == "blocks":
        return blocks
    found = [_outermost_mlp(block) for block in blocks]
    parts = [part for part in found if part is not None]
    if not parts:
        raise ValueError(
            f"checkpointing='mlp', but the blocks of {model.backbone.card.name} "
            f"({model.backbone.layout}) have no MLP. Choose checkpointing='blocks'."
        )
    return parts


def _outermost_mlp(block: nn.Module) -> nn.Module | None:
    """The outermost module called "mlp" of a block, adapters included."""
    named = block.named_modules()  # parents come before their children
    return next((m for name, m in named if name.split(".")[-1] == "mlp"), None)


def _recomputed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The module's forward, checkpointed wherever it would keep anything."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _keeps_anything(module, [*args, *kwargs.values()]):
            return forward(*args, **kwargs)
        contexts = lambda: (nullcontext(), _statistics_at_rest(module))  # noqa: E731
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=contexts, **kwargs
        )

    return wrapped


def _keeps_anything(module: nn.Module, inputs: Sequence[Any]) -> bool:
    """False before the first trained tensor, where autograd keeps nothing anyway."""
    if not torch.is_grad_enabled():
        return False
    reached = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    return reached or any(p.requires_grad for p in module.parameters())


@contextmanager
def _statistics_at_rest(module: nn.Module) -> Iterator[None]:
    """While recomputing, batch norms must not count the same batch a second time."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
