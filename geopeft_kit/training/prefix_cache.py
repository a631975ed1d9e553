"""Prefix cache: the frozen blocks before the first trained one, computed once.

With ``attach(..., layers="last:4")`` nothing trains before the last four blocks. What
reaches them is the same in every epoch, so it is stored, and the blocks before them are
left out of every step. Taught in notebook 08.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.data.batch import Batch
from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import replaced_forward


class Prefix:
    """The frozen blocks of a model before the first trained one.

    It stores the outputs that anything later reads: of the last frozen block, of the
    last one of each stage, and of those where a map is taken. In replay these blocks
    return what was stored and the others pass on their input. Raises ValueError if no
    block is frozen before the first trained tensor, or the model reads pairs of images.
    """

    def __init__(self, model: Model) -> None:
        if model.task == "change":
            raise ValueError(
                "cache_prefix=True does not serve task 'change' yet: a pair of images "
                "passes the blocks as two. Leave cache_prefix at False."
            )
        self.model = model
        paths = [path for path, _ in model.backbone.blocks]
        first = first_trained_block(model)
        taps = getattr(model.backbone, "taps", ())
        stages = [path.rpartition(".")[0] for path in paths]
        self.frozen = list(range(first))
        self.kept = [
            i
            for i in self.frozen
            if i == first - 1 or i in taps or stages[i] != stages[i + 1]
        ]
        self.checked = False

    def record(self, batch: Batch) -> list[Tensor]:
        """The kept blocks' outputs for a batch; ValueError if a replay differs."""
        blocks = [block for _, block in self.model.backbone.blocks]
        found: dict[int, Tensor] = {}
        hooks = [blocks[i].register_forward_hook(_keep(found, i)) for i in self.kept]
        try:
            maps = self.model.features(batch.image, batch.meta)
        finally:
            for hook in hooks:
                hook.remove()
        stored = [found[i] for i in self.kept]
        if not self.checked:
            self._check(maps, self.features(stored, batch.size))
        return stored

    def features(self, stored: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """The model's features of images (H, W) from what `record` stored of them."""
        backbone = self.model.backbone
        blocks = [block for _, block in backbone.blocks]
        functions: dict[nn.Module, Callable[..., Any]] = {
            blocks[i]: _hand_on for i in self.frozen
        }
        for index, tensor in zip(self.kept, stored, strict=True):
            functions[blocks[index]] = _hand_out(tensor)
        # The embedding runs on nothing: no later block reads what it gives.
        blank = torch.zeros((), device=stored[0].device)
        with replaced_forward(functions):
            return self.model.features(
                blank.expand(len(stored[0]), len(backbone.bands), *size)
            )

    def _check(self, maps: list[Tensor], again: list[Tensor]) -> None:
        """Raise where replay gives other features than the images did."""
        for one, two in zip(maps, again, strict=True):
            if not torch.allclose(one, two, rtol=1e-4, atol=1e-5):
                raise ValueError(
                    f"cache_prefix=True does not serve {self.model.backbone.card.name}"
                    " with this method: something after the frozen blocks reads the "
                    "image or the embedding. Leave cache_prefix at False."
                )
        self.checked = True


def first_trained_block(model: Model) -> int:
    """Number of the first block with a trained tensor.

    Raises ValueError if it is the first of all, or something outside the blocks trains.
    """
    backbone = model.backbone
    paths = [f"model.{path}." for path, _ in backbone.blocks]
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
    places = {
        name: next((i for i, path in enumerate(paths) if name.startswith(path)), None)
        for name in trained
    }
    outside = [name for name, place in places.items() if place is None]
    if outside or not places or min(p for p in places.values() if p is not None) == 0:
        reason = (
            f"{outside[0]!r} trains outside the blocks"
            if outside
            else "the first block trains"
            if places
            else "nothing trains in the backbone, which cache_features=True serves"
        )
        raise ValueError(
            f"cache_prefix=True needs frozen blocks in front, but {reason}. Attach the "
            'method with layers="last:4", say, or leave cache_prefix at False.'
        )
    return min(place for place in places.values() if place is not None)


def _keep(found: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[index] = output

    return hook


def _hand_on(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _hand_out(tensor: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: tensor
