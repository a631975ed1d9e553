"""AdaLoRA: a rank budget that moves to the layers that need it. Taught in notebook 03.

Each update is P diag(e) Q. Training starts with more directions than the budget allows;
the least important entries of e are set to zero, first few, then more, until on average
`rank` directions a target are left. Layers and allocator are those of `peft`.

Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geopeft_kit.methods.base import (
    Block,
    Replacement,
    TrainingRule,
    check_above_zero,
    check_share,
    check_whole,
)
from geopeft_kit.methods.peft_layers import ADAPTER, wrap
from geopeft_kit.methods.peft_method import PeftMethod
from geopeft_kit.methods.targets import find_targets

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone
    from geopeft_kit.methods.adapter import Adapter

WARM_UP, COOL_DOWN = 0.1, 0.3  # shares of a run before and after pruning; ours
ORTHOGONALITY = 0.5  # weight of the penalty; peft's default
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLora(PeftMethod):
    """Low-rank updates W + (alpha / start_rank) P diag(e) Q whose ranks are allocated.

    `fit` prunes: nothing in the first tenth of the steps, then down to the budget,
    which stands for the last 30 % (the shares are ours). A training loop of one's own
    gets the same from `adapter.method.training_rule(adapter, total_steps)`.

    A pruned direction is a zero in e. It stays in the tensors, so an adapter on disk
    has the pruned ranks and the size of the first ones.
    """

    name = "adalora"
    title = "AdaLoRA"
    paper = "Zhang et al. 2023, AdaLoRA, arXiv 2303.10512"
    trained = "Q (rank, in), e (rank) and P (out, rank) beside each target"
    count_formula = "start_rank * (in + out + 1) per target; start_rank = 1.5r"
    learning_rate = 1e-3  # ours

    def resolve(
        self, backbone: Backbone, blocks: list[Block], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Fill in the targets, the paper's start_rank = 1.5 rank, and alpha."""
        if options["start_rank"] is None:
            options["start_rank"] = check_whole("rank", options["rank"]) * 3 // 2
            options["start_rank"] = max(options["start_rank"], options["rank"] + 1)
        if options["alpha"] is None:
            options["alpha"] = options["start_rank"]
        return super().resolve(backbone, blocks, options)

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 16,
        start_rank: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's AdaLoRA.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Average rank after training.
            start_rank: Rank of every target at the start; None for 1.5 rank.
            alpha: Scale of the update, alpha / start_rank; None for start_rank.
            dropout: Rate on the input of Q.
        """
        from peft import AdaLoraConfig

        check_whole("rank", rank)
        most = check_whole("start_rank", start_rank, minimum=rank + 1)
        scale: Any = check_above_zero("alpha", alpha)  # peft declares whole numbers
        config = AdaLoraConfig(
            init_r=most,
            target_r=rank,
            lora_alpha=scale,
            lora_dropout=check_share("dropout", dropout),
            total_step=1,  # the real number comes with the training rule
        )
        return wrap(backbone, find_targets(blocks, targets or (), self.kinds), config)

    def training_rule(self, adapter: Adapter, total_steps: int) -> RankBudget:
        """Return the pruning of one run."""
        return RankBudget(adapter, total_steps)


class RankBudget(TrainingRule):
    """Prunes an AdaLoRA adapter to its budget in one training run.

    Args:
        adapter: The adapter.
        total_steps: Optimiser steps of the run.

    Attributes:
        pattern: Name of each e -> which of its entries live; empty before pruning.
    """

    def __init__(self, adapter: Adapter, total_steps: int) -> None:
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        substitutes = adapter.substitutes().values()
        self.layers = nn.ModuleList(s for s in substitutes if isinstance(s, nn.Module))
        self.last = total_steps - int(total_steps * COOL_DOWN)  # step of the last cut
        config = AdaLoraConfig(
            init_r=adapter.config["start_rank"],
            target_r=adapter.config["rank"],
            tinit=int(total_steps * WARM_UP),
            tfinal=total_steps - self.last,
            total_step=total_steps,
        )
        self.allocator = RankAllocator(self.layers, config, ADAPTER)
        self.pattern: dict[str, list[bool]] = {}

    def penalty(self) -> Tensor:
        """How far P and Q are from orthogonal: mean Frobenius norm of P'P - I, QQ' - I.

        The paper squares the norm (eq. 4); peft does not, and this is peft's.
        """
        norms = []
        for name, tensor in self._trained("lora_A", "lora_B"):
            square = tensor @ tensor.T if "lora_A" in name else tensor.T @ tensor
            identity = torch.eye(len(square), device=tensor.device, dtype=tensor.dtype)
            norms.append(torch.linalg.norm(square - identity))
        return ORTHOGONALITY * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        """Update the importance of each direction and cut to the step's budget.

        Source: AdaLoRA, section 3.2 and algorithm 1, as in peft.
        """
        if step > self.last:
            self.allocator.mask_using_rank_pattern(self.layers, self.pattern)
            return
        if step == self.last:
            if not self.allocator.ipt:  # a run of one step has no earlier scores
                self.allocator.update_ipt(self.layers)
            self.pattern = self._cut(step, final=True)
            self.allocator.reset_ipt()
        elif all(_finite_gradient(tensor) for _, tensor in self._trained("lora_")):
            self.pattern = self._cut(step) or self.pattern

    def _cut(self, step: int, final: bool = False) -> dict[str, list[bool]]:
        _, pattern = self.allocator.update_and_allocate(self.layers, step, final)
        return pattern or {}

    def state(self) -> dict[str, Any]:
        """Return the importance scores and the pattern."""
        scores = {name: dict(getattr(self.allocator, name)) for name in _SCORES}
        return {**scores, "pattern": self.pattern}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up scores and pattern."""
        places = {name: tensor.device for name, tensor in self._trained("lora_")}
        for kind in _SCORES:
            scores = {n: value.to(places[n]) for n, value in state[kind].items()}
            setattr(self.allocator, kind, scores)
        self.pattern = state["pattern"]

    def _trained(self, *kinds: str) -> list[tuple[str, Tensor]]:
        return [
            (name, tensor)
            for name, tensor in self.layers.named_parameters()
            if any(kind in name for kind in kinds)
        ]


def _finite_gradient(tensor: Tensor) -> bool:
    """False where 16-bit training overflowed and skipped the step."""
    return tensor.grad is not None and bool(tensor.grad.isfinite().all())
