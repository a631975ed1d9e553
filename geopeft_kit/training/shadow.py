"""A shadow of a model: its shapes without its numbers, to rehearse a training step.

PyTorch's fake tensors have a shape, a number type and a device, but no memory. One
training step on them runs the code of the real one and shows what it would keep, for a
model of any size on any laptop. Taught in notebook 08.

Source: PyTorch's fake tensors, https://docs.pytorch.org/docs/stable/
torch.compiler_fake_tensor.html
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geopeft_kit.data.batch import Batch
from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import checkpointed
from geopeft_kit.training.hardware import autocast
from geopeft_kit.training.step import make_loss, rule_of, step
from geopeft_kit.training.tracker import count_saved_bytes, gradient_bytes

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Key of a batch -> shape, batch axis included, and number type."""


@dataclass(frozen=True)
class Rehearsal:
    """What one rehearsed training step takes, in bytes.

    `trained` has the size of each tensor that got a gradient; `peak` is the most that
    was alive at once besides weights.
    """

    trained: list[int]
    gradients: int
    activations: int
    peak: int


class Shadow:
    """A copy of a model that has shapes only, in training mode.

    The model may be on a CPU, a GPU or the meta device. `beside` counts the bytes that
    adapters hold outside the network.
    """

    def __init__(self, model: Model) -> None:
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        copier = _ShapeCopy(self.fakes)
        with copier:
            self.model: Model = copy.deepcopy(model)
        inside = [*self.model.parameters(), *self.model.buffers()]
        self.beside = copier.bytes - sum(t.numel() * t.element_size() for t in inside)
        self.model.train(True)

    def rehearse(
        self, batch: Shapes, precision: str, checkpointing: str | None
    ) -> Rehearsal:
        """Run one training step without numbers, for the shapes of a batch."""
        parameters = list(self.model.parameters())
        loss, rule = make_loss(self.model.task), rule_of(self.model)
        live = _LiveBytes(parameters)
        with self.fakes, checkpointed(self.model, checkpointing), live:
            fakes = {n: torch.empty(s, dtype=kind) for n, (s, kind) in batch.items()}
            with autocast(precision, "cpu"), count_saved_bytes(self.model) as saved:
                value = step(self.model, Batch.of(fakes), loss, rule=rule)
            value.backward()
        found = Rehearsal(
            trained=[p.numel() for p in parameters if p.grad is not None],
            gradients=gradient_bytes(self.model),
            activations=sum(saved.values()),
            peak=live.highest,
        )
        self.model.zero_grad(set_to_none=True)
        return found


class _ShapeCopy(TorchFunctionMode):
    """Lets `copy.deepcopy` make fake tensors of all tensors that it meets."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes
        self.bytes = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            if func not in (torch.Tensor.clone, torch.Tensor.__deepcopy__):
                return func(*args, **(kwargs or {}))
            tensor = args[0]
            self.bytes += tensor.numel() * tensor.element_size()
            with self.fakes:
                # always on the CPU: its rules are the ones we can check everywhere
                fake = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            if func is torch.Tensor.__deepcopy__:
                args[1][id(tensor)] = fake.requires_grad_(tensor.requires_grad)
            return fake


_QUESTIONS = (
    torch.ops.aten.allclose.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._local_scalar_dense.default,
)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of new storages while they live; those of `known` do not count.

    It also answers where code asks for a number that nobody has: two tensors agree
    (what is recomputed is what was there), a layer that a draw might drop stays.
    """

    def __init__(self, known: list[Any]) -> None:
        super().__init__()
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)
        self.now = self.highest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS:
            return True
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._forget, size)
        self.now += size
        self.highest = max(self.highest, self.now)

    def _forget(self, size: int) -> None:
        self.now -= size
