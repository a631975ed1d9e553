"""Updates W + dW written with few numbers: VeRA, LoHa, LoKr, FourierFT.

The layers are those of Hugging Face `peft`. All of them merge into W, and all of them
start with dW = 0. Taught in notebook 03.

Source: Kopiczko et al. 2023, VeRA, arXiv 2310.11454; Hyeon-Woo et al. 2021, FedPara
(LoHa), arXiv 2108.06098; Yeh et al. 2023, LyCORIS (LoKr), arXiv 2309.14859; Gao et al.
2024, FourierFT, arXiv 2405.03003.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
from geopeft_kit.methods.targets import Kinds, find_targets

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone

WITH_CONV1D: Kinds = (nn.Linear, nn.Conv2d, nn.Conv1d)


class Vera(PeftMethod):
    """dW = diag(b) B diag(d) A: A and B are random, frozen, and the same everywhere.

    Every target takes the corner that it needs of one A and one B, which are drawn from
    `seed` and never saved: an adapter on disk holds only the vectors b (which starts at
    0) and d. The draw is torch's on the CPU.
    """

    name = "vera"
    title = "VeRA"
    paper = "Kopiczko et al. 2023, VeRA, arXiv 2310.11454"
    trained = "two vectors beside each target: d (rank) and b (out)"
    count_formula = "r + out per target"
    learning_rate = 5e-3  # ours
    needs = "networks with Linear layers in their blocks"
    kinds = (nn.Linear,)

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 256,
        start: float = 0.1,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's VeRA.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Rank r of the shared matrices.
            start: Value that d starts with.
            dropout: Rate on the input of A.
            seed: Of the shared matrices; another seed is another adapter.
        """
        from peft import VeraConfig, VeraModel

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*to not save vera_A and vera_B.*")
            config = VeraConfig(
                r=check_whole("rank", rank),
                d_initial=check_above_zero("start", start),
                vera_dropout=check_share("dropout", dropout),
                projection_prng_key=check_whole("seed", seed, minimum=0),
                save_projection=False,
            )
        chosen = find_targets(blocks, targets or (), self.kinds)
        return wrap(backbone, chosen, config, inject_with=VeraModel)


class LoHa(PeftMethod):
    """dW = (alpha / rank) (B1 A1) * (B2 A2), elementwise: rank up to r squared.

    A convolution's kernel counts as a matrix (out, in * kernel area). A2 starts at 0.
    """

    name = "loha"
    title = "LoHa"
    paper = "Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098"
    trained = "two pairs of A (rank, in) and B (out, rank) beside each target"
    count_formula = "2r * (in + out) per target"
    learning_rate = 8e-4  # as LoRA; ours
    needs = "networks with Linear or ungrouped convolutions in their blocks"
    kinds = WITH_CONV1D

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 8,
        alpha: float | None = None,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's LoHa.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Rank r of each of the two products.
            alpha: Scale of the update, alpha / rank; None for alpha = rank.
        """
        from peft import LoHaConfig

        scale: Any = check_above_zero("alpha", alpha)  # peft declares whole numbers
        config = LoHaConfig(r=check_whole("rank", rank), alpha=scale)
        chosen = find_targets(blocks, targets or (), self.kinds)
        return wrap(backbone, chosen, config)


class LoKr(PeftMethod):
    """dW = (alpha / rank) C (x) (B A), a Kronecker product of two small matrices.

    With out = a*b and in = c*d, C is (a, c), B (b, rank) and A (rank, d). peft takes
    the factors nearest to the square roots, and a full (b, d) matrix in place of B A
    where the rank is at least half of the larger of b and d. C starts at 0.
    """

    name = "lokr"
    title = "LoKr"
    paper = "Yeh et al. 2023, LyCORIS, arXiv 2309.14859"
    trained = "C, B and A of a Kronecker product beside each target"
    count_formula = "a*c + r * (b + d) per target, out = a*b, in = c*d"
    learning_rate = 8e-4  # as LoRA; ours
    needs = "networks with Linear or ungrouped convolutions in their blocks"
    kinds = WITH_CONV1D

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 8,
        alpha: float | None = None,
        factor: int | None = None,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's LoKr.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Rank r of B A.
            alpha: Scale of the update, alpha / rank; None for alpha = rank.
            factor: Largest a and c; None for the square roots.
        """
        from peft import LoKrConfig

        scale: Any = check_above_zero("alpha", alpha)  # peft declares whole numbers
        config = LoKrConfig(
            r=check_whole("rank", rank),
            alpha=scale,
            decompose_factor=-1 if factor is None else check_whole("factor", factor),
        )
        chosen = find_targets(blocks, targets or (), self.kinds)
        return wrap(backbone, chosen, config)


class FourierFT(PeftMethod):
    """dW = scale * the real part of the inverse FFT of a sparse spectrum.

    The trained coefficients stand at random places of the spectrum, the same ones in
    all layers of one shape, drawn from `seed` and never saved. They start at 0 (ours;
    peft's default is a random start, which changes the output).
    """

    name = "fourierft"
    title = "FourierFT"
    paper = "Gao et al. 2024, FourierFT, arXiv 2405.03003"
    trained = "n coefficients of a spectrum beside each target"
    count_formula = "n per target"
    # Ours: of 1.25e-2, 5e-2, 2e-1 and 8e-1 the smallest was best on validation
    # (EuroSAT, docs/results.md). A coefficient moves a weight by scale / (in * out).
    learning_rate = 1e-2
    needs = "networks with Linear layers in their blocks"
    kinds = (nn.Linear,)

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        frequencies: int = 1000,
        scale: float = 150.0,
        seed: int = 0,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's FourierFT.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            frequencies: Number n of trained coefficients.
            scale: Factor on the update.
            seed: Of the places; another seed is another adapter.
        """
        from peft import FourierFTConfig

        chosen = find_targets(blocks, targets or (), self.kinds)
        check_whole("frequencies", frequencies)
        smallest = min(t.layer.weight[slice(*t.rows)].numel() for t in chosen)
        if frequencies > smallest:
            raise ValueError(
                f"frequencies={frequencies}; the smallest target has {smallest} "
                "weights, and no more coefficients than that."
            )
        config = FourierFTConfig(
            n_frequency=frequencies,
            scaling=check_above_zero("scale", scale),
            random_loc_seed=check_whole("seed", seed, minimum=0),
            init_weights=True,
        )
        return wrap(backbone, chosen, config)
