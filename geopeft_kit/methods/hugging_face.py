"""LoRA and DoRA, computed by Hugging Face `peft`. Taught in notebook 03.

Their relatives are in `adalora.py`, `additive.py`, `rotations.py` and `ia3.py`; how
layers of `peft` get into a backbone is in `peft_layers.py`.

Of peft's further starts of LoRA, those that read data first (EVA, CorDA, LoRA-GA) and
LoftQ, which needs quantised weights, are left out: `attach` sees no data.

Source: Hu et al. 2021, LoRA, arXiv 2106.09685; Liu et al. 2024, DoRA, arXiv 2402.09353;
targets and rank as in the PEFT study of GFMs, arXiv 2504.17397. Options of LoRA:
Kalajdzievski 2023, rsLoRA, arXiv 2312.03732; Meng et al. 2024, PiSSA, arXiv 2404.02948;
Buyukakyuz 2024, OLoRA, arXiv 2406.01775.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from geopeft_kit.methods.base import (
    Block,
    Replacement,
    check_above_zero,
    check_share,
    check_whole,
)
from geopeft_kit.methods.peft_layers import wrap
from geopeft_kit.methods.peft_method import PeftMethod
from geopeft_kit.methods.targets import Target, find_targets

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone
    from geopeft_kit.methods.adapter import Adapter

INITS: dict[str, Any] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
}
SHIFTING = ("pissa", "olora")  # starts that make peft change the frozen weight
LINEAR_ONLY = ("orthogonal", *SHIFTING)


class _LowRank(PeftMethod):
    """What LoRA and DoRA share: options, injection, export."""

    needs = "networks with Linear or ungrouped convolutions in their blocks"
    kinds = (nn.Linear, nn.Conv2d, nn.Conv1d)

    def export(self, adapter: Adapter, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` of peft.

        Raises:
            ValueError: The adapter starts from a changed copy of the frozen weights.
        """
        from geopeft_kit.methods.peft_files import write_peft_files

        init = adapter.config.get("init", "default")
        if init in SHIFTING:
            raise ValueError(
                f"init={init!r} subtracts the start from a copy of the frozen weights, "
                "and the plain timm model has no such copy. merge() the adapter and "
                "save the merged model, or attach with init='default'."
            )
        write_peft_files(adapter.substitutes(), folder)

    def _build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        targets: Sequence[str] | None,
        *,
        rank: int,
        alpha: float | None,
        dropout: float,
        init: str,
        rslora: bool = False,
        dora: bool = False,
    ) -> list[Replacement]:
        from peft import LoraConfig

        check_whole("rank", rank)
        check_share("dropout", dropout)
        check_above_zero("alpha", alpha)
        if init not in INITS:
            raise ValueError(f"init={init!r}; it can be {', '.join(INITS)}.")
        if not isinstance(rslora, bool):
            raise TypeError(f"rslora={rslora!r}; True or False is needed.")
        chosen = find_targets(blocks, targets or (), self.kinds)
        if init in LINEAR_ONLY:
            _check_linear(chosen, init)
        if init == "orthogonal" and rank % 2:
            raise ValueError(f"rank={rank}; init='orthogonal' needs an even rank.")
        scale: Any = alpha  # peft declares whole numbers and computes with any
        config = LoraConfig(
            r=rank,
            lora_alpha=scale,
            lora_dropout=dropout,
            init_lora_weights=INITS[init],
            use_rslora=rslora,
            use_dora=dora,
        )
        return wrap(backbone, chosen, config, own_copies=init in SHIFTING)


class Lora(_LowRank):
    """Low-rank updates W + (alpha / rank) B A of frozen matrices; B starts at zero.

    Default targets are q, v, fc1 and fc2 of a transformer block, fc1 and fc2 of a
    ConvNeXt block, the 1x1 convolutions of a ResNet-50 block, the 3x3 ones of a
    ResNet-18 block, the projections of a state-space block. On a fused qkv, q and v
    have their own A and B.

    `init`: "default" and "gaussian" start at the frozen network exactly. "orthogonal"
    starts A and B off zero with B A = 0 (peft's; no paper). "pissa" and "olora" start A
    and B with the strongest directions of W and subtract them from a copy of it, which
    is the frozen network up to rounding, and costs that copy.
    """

    name = "lora"
    title = "LoRA"
    paper = "Hu et al. 2021, LoRA, arXiv 2106.09685"
    trained = "A (rank, in) and B (out, rank) beside each target"
    count_formula = "r * (in + out) per target; 14rD per ViT block by default"
    # The study's 15 LoRA runs chose 3.9e-4 to 9.8e-4, their median is 8.5e-4.
    learning_rate = 8e-4

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "default",
    ) -> list[Replacement]:
        """Wrap the target layers with peft's LoRA.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Rank r of the update.
            alpha: Scale of the update, alpha / rank; None for alpha = rank.
            dropout: Rate on the input of A.
            rslora: Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
            init: "default", "gaussian", "orthogonal", "pissa" (arXiv 2404.02948) or
                "olora" (arXiv 2406.01775); the last three for Linear layers.
        """
        return self._build(
            backbone,
            blocks,
            targets,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            init=init,
            rslora=rslora,
        )


class Dora(_LowRank):
    """LoRA on the direction of W, and a trained length for each of its output rows.

    Targets, rank, alpha and dropout as for LoRA. Each row starts with its own length,
    so that nothing changes at the start.
    """

    name = "dora"
    title = "DoRA"
    paper = "Liu et al. 2024, DoRA, arXiv 2402.09353"
    trained = "LoRA's A and B, and one length per output row of each target"
    count_formula = "r * (in + out) + out per target"
    learning_rate = 8e-4  # as LoRA; ours

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's DoRA.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Rank r of the update.
            alpha: Scale of the update, alpha / rank; None for alpha = rank.
            dropout: Rate on the input of A.
        """
        return self._build(
            backbone,
            blocks,
            targets,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            init="default",
            dora=True,
        )


def _check_linear(targets: list[Target], init: str) -> None:
    for target in targets:
        if not isinstance(target.layer, nn.Linear):
            raise ValueError(
                f"init={init!r} is for Linear layers, and {target.path} is a "
                f"{type(target.layer).__name__}. Use init='default' or 'gaussian'."
            )
