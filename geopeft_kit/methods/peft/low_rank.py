"""LoRA and DoRA. Taught in notebook 03.

Of peft's starts of LoRA, those that read data first (EVA, CorDA, LoRA-GA) and LoftQ,
which needs quantised weights, are left out: `attach` sees no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.methods.base import Config, Options, check_equal, register
from geopeft_kit.methods.checks import check_choice, check_switch
from geopeft_kit.methods.peft.files import write_peft_files
from geopeft_kit.methods.peft.layers import Wrapped, wrap
from geopeft_kit.methods.peft.method import (
    CONVOLUTIONS,
    WITH_CONV1D,
    Option,
    PeftMethod,
    alpha,
    dropout,
    rank,
)
from geopeft_kit.methods.replacement import Replacements
from geopeft_kit.methods.targets import Target, Targets

INITS: Mapping[str, Any] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
}
SHIFTING = ("pissa", "olora")  # starts that make peft change the frozen weight
LINEAR_ONLY = ("orthogonal", *SHIFTING)


def _init(name: str, value: Any) -> Any:
    return INITS[check_choice(name, value, list(INITS))]


@register
class Lora(PeftMethod):
    """Low-rank updates W + (alpha / rank) B A of frozen matrices; B starts at zero.

    Default targets are q, v, fc1 and fc2 of a transformer block, fc1 and fc2 of a
    ConvNeXt block, the 1x1 convolutions of a ResNet-50 block, the 3x3 ones of a
    ResNet-18 block, the projections of a state-space block. On a fused qkv, q and v
    have their own A and B. Targets and rank are those of the PEFT study of GFMs, arXiv
    2504.17397. `rslora` scales by alpha / sqrt(rank) (arXiv 2312.03732).

    `init`: "default" and "gaussian" start at the frozen network exactly. "orthogonal"
    starts with B A = 0, neither zero (peft's; no paper). "pissa" (arXiv 2404.02948) and
    "olora" (arXiv 2406.01775) start with the strongest directions of W and subtract
    them from a copy of it. The last three are for Linear layers.
    """

    name = "lora"
    title = "LoRA"
    paper = "Hu et al. 2021, LoRA, arXiv 2106.09685"
    trained = "A (rank, in) and B (out, rank) beside each target"
    count_formula = "r * (in + out) per target; 14rD per ViT block by default"
    note = "rsLoRA, PiSSA, OLoRA by option"
    # The study's 15 LoRA runs chose 3.9e-4 to 9.8e-4, their median is 8.5e-4.
    learning_rate = 8e-4
    needs = CONVOLUTIONS
    kinds = WITH_CONV1D
    config = "LoraConfig"
    own = {
        "rank": rank(16),
        "alpha": alpha("lora_alpha"),
        "dropout": dropout("lora_dropout"),
        "rslora": Option("bool", False, "use_rslora", check_switch),
        "init": Option("str", "default", "init_lora_weights", _init),
    }

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets, or copies of them where the start changes the weight."""
        init = values.get("init", "default")
        if init in LINEAR_ONLY:
            _check_linear(targets, init)
        if init == "orthogonal" and values["rank"] % 2:
            raise ValueError(
                f"rank={values['rank']}; init='orthogonal' needs an even rank."
            )
        config = self.configuration(**fields)
        return wrap(targets, config, own_copies=init in SHIFTING)

    def joint_config(self, configs: Sequence[Config]) -> Options:
        """Return the config of the sum: the ranks add up, and alpha is the rank."""
        if self.name != "lora":
            return super().joint_config(configs)
        if shifted := {config["init"] for config in configs} & set(SHIFTING):
            raise ValueError(
                f"Adapters with init={shifted} cannot be combined: each subtracts its "
                "start from its own copy of the frozen weights."
            )
        check_equal(configs, ("rank", "alpha", "rslora", "dropout", "init"))
        total = sum(config["rank"] for config in configs)
        plain = {"rslora": False, "dropout": 0.0, "init": "default"}
        return {**configs[0], "rank": total, "alpha": total, **plain}

    def join(
        self,
        start: Mapping[str, Tensor],
        parts: Sequence[tuple[Config, Mapping[str, Tensor]]],
        weights: Sequence[float],
    ) -> dict[str, Tensor]:
        """Stack all A, and all B times weight and scale: w1 s1 B1 A1 + w2 s2 B2 A2."""
        joined = {}
        for name in start:
            factors = [tensors[name] for _, tensors in parts]
            if name.endswith("lora_B"):
                factors = [
                    weight * scaling(config) * up
                    for weight, (config, _), up in zip(
                        weights, parts, factors, strict=True
                    )
                ]
            joined[name] = torch.cat(factors, dim=int(name.endswith("lora_B")))
        return joined

    def export(self, replacements: Replacements, config: Config, folder: Path) -> None:
        """Write peft's files, unless the start changed a copy of the frozen weights."""
        init = config.get("init", "default")
        if init in SHIFTING:
            raise ValueError(
                f"init={init!r} subtracts the start from a copy of the frozen weights, "
                "and the plain timm model has no such copy. merge() the adapter and "
                "save the merged model, or attach with init='default'."
            )
        write_peft_files({r.path: r.substitute for r in replacements}, folder)


@register
class Dora(Lora):
    """LoRA on the direction of W, and a trained length for each of its output rows.

    Each row starts with its own length, so that nothing changes at the start.
    """

    name = "dora"
    title = "DoRA"
    paper = "Liu et al. 2024, DoRA, arXiv 2402.09353"
    trained = "LoRA's A and B, and one length per output row of each target"
    count_formula = "r * (in + out) + out per target"
    note = ""
    learning_rate = 8e-4  # as LoRA; ours
    own = {name: Lora.own[name] for name in ("rank", "alpha", "dropout")}
    fixed = {"use_dora": True}


def scaling(config: Config) -> float:
    """The factor on B A."""
    return config["alpha"] / config["rank"] ** (0.5 if config["rslora"] else 1)


def _check_linear(targets: list[Target], init: str) -> None:
    for target in targets:
        if not isinstance(target.layer, nn.Linear):
            raise ValueError(
                f"init={init!r} is for Linear layers, and {target.path} is a "
                f"{type(target.layer).__name__}. Use init='default' or 'gaussian'."
            )
