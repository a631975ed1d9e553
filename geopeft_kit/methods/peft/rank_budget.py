"""AdaLoRA: a rank budget that moves to the layers that need it. Taught in notebook 03.

Each update is P diag(e) Q. Training starts with more directions than the budget allows;
the least important entries of e are set to zero, until on average `rank` are left.

Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Blocks, Config, Options, TrainingRule, register
from geopeft_kit.methods.checks import check_above_zero, check_whole
from geopeft_kit.methods.peft.layers import ADAPTER, Wrapped
from geopeft_kit.methods.peft.method import Option, PeftMethod, dropout
from geopeft_kit.methods.replacement import Replacements
from geopeft_kit.methods.targets import Targets

WARM_UP, COOL_DOWN = 0.1, 0.3  # shares of a run before and after pruning; ours
ORTHOGONALITY = 0.5  # weight of the penalty; peft's default
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@register
class AdaLora(PeftMethod):
    """Low-rank updates W + (alpha / start_rank) P diag(e) Q whose ranks are allocated.

    `fit` prunes: nothing in the first tenth of the steps, then down to an average of
    `rank` per target, which is fixed for the last 30 % (the shares are ours). Your own
    training loop gets the same from `adapter.training_rule(total_steps)`. A pruned
    direction is a zero in e, so the file does not get smaller.
    """

    name = "adalora"
    title = "AdaLoRA"
    paper = "Zhang et al. 2023, AdaLoRA, arXiv 2303.10512"
    trained = "Q (rank, in), e (rank) and P (out, rank) beside each target"
    count_formula = "start_rank * (in + out + 1) per target; start_rank = 1.5r"
    learning_rate = 1e-3  # ours
    config = "AdaLoraConfig"
    own = {
        "rank": Option("int", 16, "target_r", check_whole),
        "start_rank": Option("int | None", None, "init_r", check_whole),
        "alpha": Option("float | None", None, "lora_alpha", check_above_zero),
        "dropout": dropout("lora_dropout"),
    }
    fixed = {"total_step": 1}  # the real number comes with the training rule

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Fill in the targets, the paper's start_rank = 1.5 rank, and alpha."""
        if options["start_rank"] is None:
            options["start_rank"] = check_whole("rank", options["rank"]) * 3 // 2
            options["start_rank"] = max(options["start_rank"], options["rank"] + 1)
        if options["alpha"] is None:
            options["alpha"] = options["start_rank"]
        return super().resolve(backbone, blocks, options)

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets, if there is something to prune."""
        check_whole("start_rank", values["start_rank"], minimum=values["rank"] + 1)
        return super().inject(targets, fields, values)

    def training_rule(
        self, replacements: Replacements, config: Config, total_steps: int
    ) -> RankBudget:
        """Return the pruning of one run."""
        return RankBudget(replacements, config, total_steps)


class RankBudget(TrainingRule):
    """Prunes an AdaLoRA adapter to its budget in one training run."""

    def __init__(
        self, replacements: Replacements, config: Config, total_steps: int
    ) -> None:
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        layers = (replacement.substitute for replacement in replacements)
        self.layers = nn.ModuleList(s for s in layers if isinstance(s, nn.Module))
        self.last = total_steps - int(total_steps * COOL_DOWN)  # step of the last cut
        schedule = AdaLoraConfig(
            init_r=config["start_rank"],
            target_r=config["rank"],
            tinit=int(total_steps * WARM_UP),
            tfinal=total_steps - self.last,
            total_step=total_steps,
        )
        self.allocator = RankAllocator(self.layers, schedule, ADAPTER)
        self.pattern: dict[str, list[bool]] = {}  # name of e -> which entries live

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
