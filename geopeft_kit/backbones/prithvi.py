"""Prithvi-EO 1.0 and 2.0, and the kit's own tiny model of the same build.

Prithvi differs from timm's defaults in two points that raise no error when missed:
layer norms with eps 1e-5, and a position table that is computed, not learned. The
patch embedding, published as a 3-D convolution over time, has a time step of one and
becomes a plain 2-D one that sees date after date. The TL models also add sines and
cosines of date and place to the patch tokens, each times one learned number.

Sources: Prithvi-EO 1.0, arXiv 2310.18660; Prithvi-EO 2.0, arXiv 2412.02732.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta, adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.metadata import dates_of, lonlat_of
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import (
    ViTBackbone,
    fix_positions,
    prepended,
    sines_and_cosines,
    vit_network,
    with_class_row,
)
from geopeft_kit.backbones.weights import State, filled, strip_prefixes

# Learned by the TL ("time and location") models: weight of date and of place.
METADATA_SCALES = ("temporal_embed_enc.scale", "location_embed_enc.scale")
_PREFIXES = ("module.", "model.", "encoder.", "_timm_module.")
_NOT_ENCODER = ("decoder.", "decoder_", "mask_token", "neck.", "head.", "aux_heads.")


class PrithviBackbone(ViTBackbone):
    """A ViT with Prithvi's fixed position table, for one date or several.

    Tokens are in the order row, column, date. Attention does not depend on the order,
    and methods on the token grid see each date as a grid. `scales` are the numbers that
    a TL model learned for date and place; without them metadata is ignored.
    """

    model: Any  # a VisionTransformer that does have a class token and a table

    def __init__(
        self,
        card: BackboneCard,
        model: Any,
        plan: BandPlan,
        dates: int = 1,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(card, model, plan)
        self.dates = self.grid.groups = dates
        self.channels = [model.embed_dim * dates] * 4
        for key, number in (scales or {}).items():
            path, _, name = key.rpartition(".")  # the upstream's own key
            setattr(self, path, nn.ParameterDict({name: number}))
            self.beside += (path,)

    @property
    def metadata_scales(self) -> State:
        """The weight of date and of place, by key; empty without metadata."""
        keys = METADATA_SCALES if self.beside else ()
        return {key: self.get_parameter(key).detach() for key in keys}

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B * T, C, H, W) -> four maps (B, T*D, h, w)."""
        patches = self.model.patch_embed(image)  # (B * T, h, w, D)
        size = (patches.shape[1], patches.shape[2])
        patches = patches.unflatten(0, (-1, self.dates)).permute(0, 2, 3, 1, 4)
        added = self.positions(size)  # (h, w, T, D)
        patches = patches + added.to(patches.dtype)  # (B, h, w, T, D)
        for term in self.metadata_terms(image, meta):
            patches = patches + term.to(patches.dtype)
        tokens = patches.flatten(1, 3)  # (B, h*w*T, D)
        return self.read_blocks(prepended(self.model.cls_token, tokens), *size)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """The position table for h x w patches, (h, w, T, D)."""
        grid = tuple(self.model.patch_embed.grid_size)
        table = self.model.pos_embed[0, 1:]  # the class token's row is zero
        table = table.unflatten(0, (self.dates, -1))  # (T, N, D)
        if size != grid:
            table = resize_table(table, grid, size)  # (T, h*w, D)
        return table.unflatten(1, size).permute(1, 2, 0, 3)

    def metadata_terms(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """What date and place add to each token, broadcast to (B, h, w, T, D).

        Half of the width codes the year or the latitude, the other half the day of the
        year or the longitude, which comes first in `meta` and second in Prithvi.

        Source: Prithvi-EO 2.0, arXiv 2412.02732; formulas as in TerraTorch.
        """
        if not self.beside:
            return []
        terms = []
        date = dates_of(meta, image, self.dates)  # (B, T, 2)
        if date is not None:
            code = _pair_code(date, self.width)[:, None, None]  # (B, 1, 1, T, D)
            terms.append(self.get_parameter(METADATA_SCALES[0]) * code)
        lonlat = lonlat_of(meta, image, self.dates)  # (B, 2)
        if lonlat is not None:
            code = _pair_code(lonlat.flip(1), self.width)[:, None, None, None]
            terms.append(self.get_parameter(METADATA_SCALES[1]) * code)
        return terms

    def to_map(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The last h*w*T tokens of (B, N, D) as a map (B, T*D, h, w), date-major."""
        shape = (height, width, self.dates)
        patches = tokens[:, -math.prod(shape) :].unflatten(1, shape)
        return patches.permute(0, 3, 4, 1, 2).flatten(1, 2)  # (B, T*D, h, w)


def _pair_code(pairs: Tensor, width: int | None) -> Tensor:
    """Sines and cosines of two numbers, half of the width each: (..., 2) -> (..., D).

    In single precision throughout, as upstream: a year of 2020 is an angle so large
    that more digits would give other values.
    """
    quarter = cast(int, width) // 4
    steps = torch.arange(quarter, device=pairs.device, dtype=torch.float32)
    rates = 1.0 / 10000 ** (steps / quarter)
    angles = pairs.float()[..., None] * rates  # (..., 2, D/4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def sine_cosine_table(width: int, height: int, breadth: int, dates: int = 1) -> Tensor:
    """Prithvi's fixed position table, (T * height * breadth, D): dates, rows, columns.

    Each axis has a one-dimensional code: all sines, then all cosines, base 10000. The
    codes are concatenated: x (6/16 of the width), y (6/16), time (4/16). The width must
    be a multiple of 16.

    Source: Prithvi-EO 2.0, arXiv 2412.02732.
    """
    if width % 16:
        raise ValueError(f"width={width}: Prithvi's table needs a multiple of 16")
    shape = (dates, height, breadth, -1)
    x = _code(width * 6 // 16, breadth)[None, None].expand(shape)
    y = _code(width * 6 // 16, height)[None, :, None].expand(shape)
    t = _code(width * 4 // 16, dates)[:, None, None].expand(shape)
    return torch.cat([x, y, t], dim=-1).flatten(0, 2)  # (T * height * breadth, D)


def _code(size: int, count: int) -> Tensor:
    """Positions 0 .. count-1 as sines and cosines, (count, size)."""
    half = size // 2
    rates = 10000 ** -(torch.arange(half, dtype=torch.float64) / half)
    return sines_and_cosines(torch.arange(count, dtype=torch.float64), rates).float()


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position table (T, h*w, D) as Prithvi does: bicubic, corners aligned."""
    grid = table.transpose(1, 2).unflatten(2, old)  # (T, D, h, w)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=True)
    return grid.flatten(2).transpose(1, 2)  # (T, h'*w', D)


@register("prithvi")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    dates: int = 1,
    metadata: bool | None = None,
) -> PrithviBackbone:
    """Build a Prithvi-like ViT.

    Args:
        card, plan, state: as for every builder.
        dates: dates T of an image, 1 or more, whatever the pretraining had: positions
            are computed. The maps have T times the channels.
        metadata: whether date and place of `meta` are added to the tokens; None for
            what the card says. False leaves them out of a TL model.
    """
    if type(dates) is not int or dates < 1:
        raise ValueError(f"dates={dates!r}: a whole number of dates, 1 or more")
    able = bool(card.architecture["metadata"])
    if metadata and not able:
        raise ValueError(
            f"metadata=True: {card.name} learned no weight for date and place; the "
            "models whose names end in _tl did"
        )
    wanted = METADATA_SCALES if able else ()
    kept, scales = None, {key: torch.full((1,), 0.1) for key in wanted}
    if state is not None:
        kept, scales = encoder_state(state, wanted)
    network = partial(vit_network, card, epsilon=1e-5, pos_embed="none")
    model = filled(network, kept, card.name)
    if state is None:
        _initialise(model)
    side = card.image_size // card.patch
    table = sine_cosine_table(card.width, side, side, dates)  # (T * side * side, D)
    fix_positions(model, with_class_row(table))
    adapt_kernels(model.patch_embed.proj, plan)
    used = {} if metadata is False else scales
    return PrithviBackbone(card, model, plan, dates, used)


def _initialise(model: Any) -> None:
    """Prithvi's random start: Xavier for matrices, normal 0.02 for the class token."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.detach().flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.cls_token, std=0.02)


def encoder_state(state: State, metadata: Sequence[str] = ()) -> tuple[State, State]:
    """A Prithvi checkpoint as (weights in timm's names, metadata scalars).

    Files of 2.0 prefix ``encoder.`` and ``decoder.``, the file of 1.0 is flat, old
    fine-tuned ones carry ``_timm_module.``. Decoder and position table are dropped.
    Raises ValueError if a scalar is missing or the patch embedding spans several dates.
    """
    kept = {
        key: tensor
        for key, tensor in strip_prefixes(state, _PREFIXES).items()
        if not key.startswith(_NOT_ENCODER) and key != "pos_embed"
    }
    missing = [key for key in metadata if key not in kept]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {', '.join(missing)}: it is not one of a TL model; "
            "take the name without _tl"
        )
    scales = {key: kept.pop(key).detach().float().clone() for key in metadata}
    kernel = kept.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 5:  # (D, C, t, kh, kw)
        if kernel.shape[2] != 1:
            raise ValueError(
                f"patch_embed.proj.weight {tuple(kernel.shape)} spans "
                f"{kernel.shape[2]} dates; only kernels of one date are known"
            )
        kept["patch_embed.proj.weight"] = kernel.squeeze(2)  # (D, C, kh, kw)
    return kept, scales
