"""The table of the methods that Hugging Face `peft` computes; one class is one row.

LoRA, AdaLoRA, OFT and BOFT need more than a row and have files of their own:
`low_rank.py`, `rank_budget.py`, `rotations.py`. Taught in notebook 03.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Block, Blocks, Config, Options, register
from geopeft_kit.methods.checks import check_above_zero, check_whole
from geopeft_kit.methods.peft.layers import (
    ADAPTER,
    PeftLayer,
    Wrapped,
    mixed,
    slot,
    wrap,
)
from geopeft_kit.methods.peft.method import (
    CONVOLUTIONS,
    LINEAR,
    WITH_CONV1D,
    Option,
    PeftMethod,
    alpha,
    dropout,
    rank,
    seed,
)
from geopeft_kit.methods.targets import Target, Targets, available_targets


def _factor(name: str, value: Any) -> int:
    return -1 if value is None else check_whole(name, value)


@register
class Vera(PeftMethod):
    """dW = diag(b) B diag(d) A: A and B are random, frozen, and the same everywhere.

    Every target takes the corner that it needs of one A and one B, which are drawn on
    the CPU and never saved. An adapter on disk holds only the vectors b, which starts
    at 0, and d, which starts at `start`.
    """

    name = "vera"
    title = "VeRA"
    paper = "Kopiczko et al. 2023, VeRA, arXiv 2310.11454"
    trained = "two vectors beside each target: d (rank) and b (out)"
    count_formula = "r + out per target"
    learning_rate = 5e-3  # ours
    needs = LINEAR
    kinds = (nn.Linear,)
    config = "VeraConfig"
    own = {
        "rank": rank(256),
        "start": Option("float", 0.1, "d_initial", check_above_zero),
        "dropout": dropout("vera_dropout"),
        "seed": seed("projection_prng_key"),
    }
    fixed = {"save_projection": False}
    tuner = "VeraModel"


@register
class RandLora(PeftMethod):
    """dW = (alpha / rank) sum_j B_j diag(l_j) A diag(g_j), n = ceil(D / rank) terms.

    A and the B_j are random, frozen, never saved, and the same everywhere; together the
    terms reach full rank. Each l_j (rank) starts at 0. A *smaller* rank trains more. D
    is the smaller side of a target.

    The matrices are the paper's sparse ones, with -1, 0 and 1 drawn on the CPU: peft
    draws its dense ones in a number type that depends on the machine, so that the same
    seed would mean another adapter elsewhere.
    """

    name = "randlora"
    title = "RandLoRA"
    paper = "Albert et al. 2025, RandLoRA, arXiv 2502.00987"
    trained = "diagonals l (rank) and g (smaller side) of n random products per target"
    count_formula = "n * (r + min(in, out)) per target, n = min(in, out) / r rounded up"
    note = "full rank"
    learning_rate = 1e-3  # ours
    needs = LINEAR
    kinds = (nn.Linear,)
    config = "RandLoraConfig"
    own = {
        "rank": rank(32),
        "alpha": alpha("randlora_alpha"),
        "dropout": dropout("randlora_dropout"),
        "seed": seed("projection_prng_key"),
    }
    fixed = {"save_projection": False, "sparse": True}
    tuner = "RandLoraModel"

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Put alpha = 20 rank, which peft recommends, in the config."""
        if options["alpha"] is None:
            options["alpha"] = 20 * check_whole("rank", options["rank"])
        return super().resolve(backbone, blocks, options)


@register
class Shira(PeftMethod):
    """Some entries of W train, at random places: as many as LoRA of the same rank has.

    The update is sparse and of high rank. The places are drawn on the CPU from the
    seed, the same for targets of one shape, and never saved.
    """

    name = "shira"
    title = "SHiRA"
    paper = "Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv 2406.13175"
    trained = "r * (in + out) entries of each target, at random places"
    count_formula = "r * (in + out) per target"
    note = "sparse"
    learning_rate = 1e-3  # ours
    needs = LINEAR
    linear = True
    kinds = (nn.Linear,)
    config = "ShiraConfig"
    own = {"rank": rank(16), "seed": seed("random_seed")}

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets, and give each layer its places."""
        for target in targets:
            _check_fits(values["rank"], target)
        config = self.configuration(**fields)
        config.mask_fn = None  # peft's makes a mask of the weight's size
        place = functools.partial(_with_places, seed=values["seed"])
        return wrap(targets, config, refine=place)


class DenseUpdate:
    """Mixed into peft's SHiRA layer: the update as an ordinary tensor.

    Memory estimates and mixed precision cannot read peft's sparse one.
    """

    shira_weight: Any
    shira_indices: Any
    out_features: int
    in_features: int

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update, (out, in)."""
        values = self.shira_weight[adapter]
        zeros = values.new_zeros(self.out_features, self.in_features)
        return zeros.index_put(tuple(self.shira_indices[adapter]), values)


@register
class DeLora(PeftMethod):
    """dW = (l / rank) B diag(1 / (|a_i| |b_i|)) A diag(|w_j|): a bounded length.

    a_i and b_i are rows of A and columns of B, |w_j| the length of column j of the
    frozen W. Each direction counts by its direction alone, so that the trained l bounds
    how far W moves. B starts at 0, l at `bound`.
    """

    name = "delora"
    title = "DeLoRA"
    paper = "Bini et al. 2025, DeLoRA, arXiv 2503.18225"
    trained = "A (rank, in), B (out, rank) and the bound l beside each target"
    count_formula = "r * (in + out) + 1 per target"
    note = "bounded"
    learning_rate = 1e-3  # ours
    needs = LINEAR
    kinds = (nn.Linear,)
    config = "DeloraConfig"
    own = {
        "rank": rank(8),
        "bound": Option("float", 15.0, "delora_lambda", check_above_zero),
        "dropout": dropout("module_dropout"),
    }


def _check_fits(rank: int, target: Target) -> None:
    first, last = target.rows
    outputs, inputs = last - first, target.layer.weight.shape[1]
    largest = outputs * inputs // (outputs + inputs)
    if rank > largest:
        raise ValueError(
            f"rank={rank} is too large for {target.path} with {inputs} inputs and "
            f"{outputs} outputs: rank * (in + out) entries are to train. Use a rank up "
            f"to {largest}, or leave it out of targets."
        )


def _with_places(layer: PeftLayer, seed: int) -> PeftLayer:
    """Draw rows and columns of the entries that train, (2, entries), as peft does."""
    from peft.tuners._buffer_dict import BufferDict

    generator = torch.Generator("cpu").manual_seed(seed)
    size, columns = layer.get_base_layer().weight.numel(), layer.in_features
    order = torch.randperm(size, generator=generator, device="cpu")
    chosen = order[: layer.shira_weight[ADAPTER].numel()].sort().values
    chosen = chosen.to(layer.shira_weight[ADAPTER].device)
    places = torch.stack([chosen // columns, chosen % columns])
    layer.shira_indices = BufferDict({ADAPTER: places}, persistent=False)
    layer.__class__ = mixed(DenseUpdate, layer.__class__)
    return layer


@register
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
    needs = CONVOLUTIONS
    kinds = WITH_CONV1D
    config = "LoHaConfig"
    own = {"rank": rank(8), "alpha": alpha("alpha")}


@register
class LoKr(PeftMethod):
    """dW = (alpha / rank) C (x) (B A), a Kronecker product of two small matrices.

    With out = a*b and in = c*d, C is (a, c), B (b, rank) and A (rank, d). peft takes
    the factors nearest to the square roots (`factor` sets the largest a and c), and a
    full (b, d) matrix in place of B A where the rank is at least half of the larger of
    b and d. C starts at 0.
    """

    name = "lokr"
    title = "LoKr"
    paper = "Yeh et al. 2023, LyCORIS, arXiv 2309.14859"
    trained = "C, B and A of a Kronecker product beside each target"
    count_formula = "a*c + r * (b + d) per target, out = a*b, in = c*d"
    learning_rate = 8e-4  # as LoRA; ours
    needs = CONVOLUTIONS
    kinds = WITH_CONV1D
    config = "LoKrConfig"
    own = {
        "rank": rank(8),
        "alpha": alpha("alpha"),
        "factor": Option("int | None", None, "decompose_factor", _factor),
    }


@register
class FourierFT(PeftMethod):
    """dW = scale * the real part of the inverse FFT of a sparse spectrum.

    The trained coefficients are at random places of the spectrum, the same in all
    layers of one shape, and never saved. They start at 0 (ours; peft's default is a
    random start, which changes the output).
    """

    name = "fourierft"
    title = "FourierFT"
    paper = "Gao et al. 2024, FourierFT, arXiv 2405.03003"
    trained = "n coefficients of a spectrum beside each target"
    count_formula = "n per target"
    # Ours: of 1.25e-2, 5e-2, 2e-1 and 8e-1 the smallest was best on validation
    # (EuroSAT, docs/results.md). A coefficient moves a weight by scale / (in * out).
    learning_rate = 1e-2
    needs = LINEAR
    kinds = (nn.Linear,)
    linear = True
    config = "FourierFTConfig"
    own = {
        "frequencies": Option("int", 1000, "n_frequency", check_whole),
        "scale": Option("float", 150.0, "scaling", check_above_zero),
        "seed": seed("random_loc_seed"),
    }
    fixed = {"init_weights": True}

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets, if each has as many weights as there are coefficients."""
        smallest = min(t.layer.weight[slice(*t.rows)].numel() for t in targets)
        if values["frequencies"] > smallest:
            raise ValueError(
                f"frequencies={values['frequencies']}; the smallest target has "
                f"{smallest} weights, and no more coefficients than that."
            )
        return super().inject(targets, fields, values)


@register
class Ia3(PeftMethod):
    """One trained factor per channel, 1 at the start: l * (W x + b), or W (l * x) + b.

    Factors multiply the output of a target. Those of an MLP's second layer, fc2,
    multiply its input, the activations between the two layers, as in the paper. Its
    targets k, v and these activations are the default where there are such layers.
    """

    name = "ia3"
    title = "(IA)^3"
    family = "existing weights"
    linear = True
    paper = "Liu et al. 2022, (IA)^3, arXiv 2205.05638"
    trained = "one factor per output channel of each target, or input channel of fc2"
    count_formula = "out per target (in for fc2); 6D per ViT block by default"
    learning_rate = 5e-3  # ours
    config = "IA3Config"

    def default_targets(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Return k, v and fc2, or what the architecture has instead."""
        usual = super().default_targets(blocks)
        if "fc2" not in usual:
            return usual
        names = {path.rpartition(".")[2] for path in available_targets(blocks)}
        return (*(name for name in ("k", "v") if name in names), "fc2")

    def inject(self, targets: Targets, fields: Options, values: Config) -> Wrapped:
        """Wrap the targets, with the factors of fc2 on its input."""
        config = self.configuration(feedforward_modules=[])
        config.feedforward_modules = [
            slot(i) for i, t in enumerate(targets) if "fc2" in t.path.split(".")
        ]
        return wrap(targets, config)
