"""A DEFLECT-style method: spectral bands for a network that learnt on RGB alone.

Confirmed from the paper (Thoreau, Marsocci, Derksen, ICCV 2025, arXiv 2503.09493:
abstract, captions and the repository's README): an RGB-pretrained network is a prior
for the *spatial* structure of multispectral images; its three elements are the
untangled patch embedding (UPE, with spectral indices), untangled attention (uAtt) and
the deflection of embeddings; it competes with LoRA, scaled LoRA, norm tuning, BitFit
and full fine-tuning. Reported by third parties, not confirmed: the auxiliary part is a
pixel-set encoding of indices and statistics; the deflection's size is bounded; the
auxiliary stream's norm is matched to the principal one's.

Neither the paper's equations nor its code could be read. **Every formula here is
ours**, with the sizes and the learning rate. This is therefore not a reproduction, and
its accuracy says nothing about the paper's. Taught in notebook 05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.devices import device_of
from geopeft_kit.indices import available_indices, index_bands
from geopeft_kit.methods.base import Blocks, Config, Method, Options, register
from geopeft_kit.methods.checks import (
    check_above_zero,
    check_choice,
    check_switch,
    check_whole,
)
from geopeft_kit.methods.replacement import (
    Places,
    Replacement,
    Replacements,
    trained_in,
)
from geopeft_kit.methods.two_streams import (
    Deflection,
    Form,
    JoinStreams,
    PixelSetEmbedding,
    TokenBuffer,
    UntangledBlock,
    UntangledSelect,
)

STAGES = ("embedding", "attention", "unbounded", "bounded")
DEFAULT_INDICES = ("NDVI", "NDWI", "NDMI", "NBR")


@register
class Deflect(Method):
    """An RGB network that reads any bands: two streams, one attention, a small turn.

    1. Embedding: a second token a patch from the set of its multispectral pixels
       (`two_streams.py`), with the norm of the RGB token.
    2. Attention: the second stream passes the frozen blocks with the attention map of
       the first.
    3. Deflection: what it gathered there, a, turns the principal tokens s (after the
       attention residual) into the direction e = U ReLU(V a), n = e / |e|:
       additive s + rho |s| n, or polar, |s| (cos(theta) s/|s| + sin(theta) n_orth).
    4. Bound: rho = rho_max tanh(g), theta = theta_max tanh(g), g = 0 at the start.

    `stage` says how far to go, for ablations (ours):

    - "embedding", 1 alone: zP + g zA once, before the first block.
    - "attention", 1 and 2: in each block, s + g a.
    - "unbounded", 1 to 3: s + g U ReLU(V a), or in polar form the angle theta = g.
    - "bounded": everything.

    With g = 0, only g receives a gradient in the first step; `start=0.01` avoids that
    and gives up the exact identity. Blocks outside `layers` work on the principal
    stream alone; the embedding trains in any case. Where the network reads all bands
    already, the second stream adds the indices and a reading without geometry.
    """

    name = "deflect"
    title = "DEFLECT-style (formulas ours)"
    family = "Earth observation"
    note = "DEFLECT-style"
    paper = (
        "Idea: Thoreau, Marsocci, Derksen 2025, Deflecting Embeddings for Finetuning "
        "Latent representations for Earth and Climate Tasks, arXiv 2503.09493"
    )
    trained = (
        "pixel-set embedding (C bands, K indices, m features), V, U and a scalar g a "
        "block"
    )
    count_formula = "(C+K+1)*m + (2m+1)*D + L*(2*h*D + 1)"
    mergeable = False
    identity_at_start = True
    # Ours: of 1e-3, 4e-3 and 1.6e-2 the last was best on validation (simulated
    # floods, docs/results.md).
    learning_rate = 1e-2
    needs = "plain timm ViTs, best loaded with new_bands='ignore'"

    def why_not(self, backbone: Backbone) -> str | None:
        from timm.models.vision_transformer import Attention, Block, VisionTransformer

        if not isinstance(backbone.model, VisionTransformer):
            kind = type(backbone.model).__name__
            return f"two streams need timm's VisionTransformer, and this is a {kind}"
        if backbone.dates > 1:
            return f"it reads one date, and this backbone reads {backbone.dates}"
        for path, block in backbone.blocks:
            attention = getattr(block, "attn", None)
            if type(block) is not Block or type(attention) is not Attention:
                return f"{path} is no plain pre-norm block with one fused qkv"
            if getattr(attention, "gate", None) is not None:
                return f"the attention of {path} is gated"
        return None

    def starts_as_identity(self, config: Config) -> bool:
        """True if g starts at 0."""
        return config["start"] == 0

    def resolve(self, backbone: Backbone, blocks: Blocks, options: Options) -> Options:
        """Name the indices; by default those of the four that the bands allow."""
        bands, names = backbone.bands, options["indices"]
        if names is None:
            available = available_indices(bands)
            names = [name for name in DEFAULT_INDICES if name in available]
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"indices={names!r}; a list is needed, as ('NDVI',).")
        for name in names:
            index_bands(name, bands)
        if names and not backbone.normalise:
            raise ValueError(
                "indices need reflectance, and a backbone loaded with normalise=False "
                "does not know it. Give it reflectance 0-1 and normalise=True, or "
                "indices=()."
            )
        return {**options, "indices": list(names)}

    def build(
        self,
        backbone: Backbone,
        blocks: Blocks,
        *,
        width: int = 8,
        features: int = 32,
        form: Form = "additive",
        rho_max: float = 0.3,
        theta_max: float = 0.3,
        indices: Sequence[str] | None = None,
        stage: str = "bounded",
        start: float = 0.0,
        auxiliary_mlp: bool = True,
    ) -> Replacements:
        """Make the second stream.

        Args:
            width: h, numbers between V and U.
            features: m, width of the pixel-set MLP.
            form: "additive" or "polar".
            rho_max: Largest displacement of the additive form, as a share of |s|.
            theta_max: Largest angle of the polar form in radians, below pi / 2.
            indices: Spectral indices, by name; None for those of NDVI, NDWI, NDMI and
                NBR whose bands the images have.
            stage: "embedding", "attention", "unbounded" or "bounded".
            start: g at the start.
            auxiliary_mlp: Whether the second stream passes the blocks' MLPs too;
                False saves almost half of its time.
        """
        _check_options(backbone, blocks, form, stage, start)
        check_whole("width", width)
        check_whole("features", features)
        check_above_zero("rho_max", rho_max)
        if not check_above_zero("theta_max", theta_max) < math.pi / 2:
            raise ValueError(f"theta_max={theta_max}; it must be below pi / 2 (1.57).")
        check_switch("auxiliary_mlp", auxiliary_mlp)
        buffer = TokenBuffer()
        replacements = [
            _select(backbone, features, indices or (), buffer),
            _join(backbone, start if stage == "embedding" else None, buffer),
        ]
        if stage == "embedding":
            return replacements
        hidden = 0 if stage == "attention" else width
        limit = rho_max if form == "additive" else theta_max
        bound = limit if stage == "bounded" else None
        final, tokens = blocks[-1][0], cast(int, backbone.width)
        for path, block in backbone.blocks:
            deflection = None
            if path in dict(blocks):
                with device_of(block):
                    g = nn.Parameter(torch.tensor(float(start)))
                    deflection = Deflection(g, tokens, hidden, form, bound)
            two = UntangledBlock(block, deflection, path == final, auxiliary_mlp)
            tensors = _tensors(deflection)
            replacements.append(Replacement.at(backbone.model, path, two, tensors))
            if path == final:
                break
        return replacements


def _select(
    backbone: Backbone, features: int, indices: Sequence[str], buffer: TokenBuffer
) -> Replacement:
    """Replace the backbone's own `select`, in front of the network."""
    patch_embed = cast(Any, backbone.model).patch_embed
    with device_of(patch_embed):
        embedding = PixelSetEmbedding(
            inputs=len(backbone.bands) + len(indices),
            features=features,
            width=cast(int, backbone.width),
            patch=patch_embed.patch_size,
        )
    select = UntangledSelect(backbone, embedding, indices, buffer)
    return Replacement("select", backbone, "select", select, trained_in(embedding))


def _join(backbone: Backbone, start: float | None, buffer: TokenBuffer) -> Replacement:
    """Replace `norm_pre`, between the patch embedding and the first block."""
    model = cast(Any, backbone.model)
    gate = None
    if start is not None:
        gate = nn.Parameter(torch.tensor(float(start), device=device_of(model)))
    join = JoinStreams(model.norm_pre, buffer, gate)
    return Replacement.at(model, "norm_pre", join, trained_in(join, frozen="norm_pre"))


def _tensors(deflection: Deflection | None) -> Places:
    if deflection is None:
        return {}
    layers = {name: (layer, "weight") for name, layer in deflection.named_children()}
    return {"g": (deflection, "g"), **layers}


def _check_options(
    backbone: Backbone, blocks: Blocks, form: str, stage: str, start: float
) -> None:
    check_choice("form", form, ("additive", "polar"))
    check_choice("stage", stage, STAGES)
    if form == "polar" and stage in ("embedding", "attention"):
        raise ValueError(
            f"stage={stage!r} ends before the deflection, so form='polar' has no "
            "effect. Leave form out."
        )
    if stage == "embedding" and len(blocks) < len(backbone.blocks):
        raise ValueError(
            "stage='embedding' touches no block, so layers has no effect. Leave it "
            'at "all".'
        )
    number = isinstance(start, int | float) and not isinstance(start, bool)
    if not number or not math.isfinite(start):
        raise TypeError(f"start={start!r}; a finite number is needed, as 0 or 0.01.")
