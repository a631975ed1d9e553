"""Clay 1.0 and 1.5: any bands by their wavelength, at any ground sampling distance.

A small transformer makes the kernels from the wavelength of each band, in every forward
pass. The rest is a plain pre-norm ViT on timm's blocks. Three mistakes raise no error:
query, key and value have no bias; the position code is multiplied by the ground size of
a pixel; and its frequencies, as published, hardly differ.

Sources: Clay Foundation, github.com/Clay-foundation/model (Apache-2.0): key names,
sizes, wavelengths and statistics (`metadata.yaml`); the kernels from wavelengths are
DOFA's idea, arXiv 2403.15356.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.metadata import dates_of, ground_size, lonlat_of
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import (
    ViTBackbone,
    prepended,
    sines_and_cosines,
    vit_network,
)
from geopeft_kit.backbones.weights import State, filled
from geopeft_kit.bands import BANDS

_METADATA = 8  # of the token width: four numbers for the time, four for the place


def place_code(
    height: int, breadth: int, size: int, resolution: float, device: torch.device
) -> Tensor:
    """Clay's position code (height, breadth, size): sines and cosines, columns first.

    `resolution` is the ground size of a pixel in metres.
    """
    steps = torch.arange(size // 4, device=device) / (size // 4 - 1)
    rates = 10000.0 ** -(2 * steps / size) * resolution

    def axis(count: int) -> Tensor:  # (count, size / 2)
        return sines_and_cosines(torch.arange(count, device=device).float(), rates)

    columns = axis(breadth).expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, breadth, -1)
    return torch.cat([columns, rows], dim=2)


def week_of(year: float, day: float) -> int:
    """ISO week of a day of the year counted from 0."""
    first = datetime.date(int(year), 1, 1)
    return (first + datetime.timedelta(int(day))).isocalendar().week


_CODE, _LATENTS = 128, 128  # width of the wavelength's code, and latent tokens


class ResidualMlp(nn.Module):
    """``x + GELU(l2(GELU(l1 x)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, width)
        self.l2 = nn.Linear(width, width)

    def forward(self, codes: Tensor) -> Tensor:
        """(C, width) -> (C, width)."""
        return codes + F.gelu(self.l2(F.gelu(self.l1(codes))))


class WeightGenerator(nn.Module):
    """A transformer over one token per band, which computes the kernel of each.

    `width` is the length of a wavelength's code, `outputs` of a kernel, `tokens` of the
    bias (D); `latents` learned tokens precede the bands.
    """

    def __init__(self, width: int, latents: int, outputs: int, tokens: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.fc_weight = nn.Linear(width, outputs)
        self.fc_bias = nn.Linear(width, tokens)
        self.weight_tokens = nn.Parameter(torch.randn(latents, width) * 0.02)
        self.bias_token = nn.Parameter(torch.randn(1, width) * 0.02)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (C, width) -> kernels (C, outputs) and bias (D,)."""
        sequence = torch.cat([self.weight_tokens, codes, self.bias_token])
        seen = self.encoder(sequence)  # (latents + C + 1, width)
        bands = slice(len(self.weight_tokens), -1)
        return self.fc_weight(seen[bands] + sequence[bands]), self.fc_bias(seen[-1])


class WavelengthEmbedding(nn.Module):
    """Patches to tokens; kernels are made from wavelengths in micrometres."""

    waves: Tensor

    def __init__(self, waves: Sequence[float], patch: int, width: int) -> None:
        super().__init__()
        self.patch_size = (patch, patch)
        self.fclayer = ResidualMlp(_CODE)
        self.weight_generator = WeightGenerator(
            _CODE, _LATENTS, width * patch**2, width
        )
        self.register_buffer("waves", torch.tensor(waves), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h, w, D)."""
        dtype = self.weight_generator.bias_token.dtype  # a method may wrap layers
        steps = torch.arange(_CODE // 2, device=image.device) / (_CODE // 2 - 1)
        code = sines_and_cosines(self.waves.float(), 10000.0**-steps)  # (C, 128)
        codes = self.fclayer(code.to(dtype))
        kernels, bias = self.weight_generator(codes)
        shape = (-1, *self.patch_size)
        kernels = kernels.unflatten(1, shape).transpose(0, 1)  # (D, C, p, p)
        tokens = F.conv2d(image, kernels * 0.02, bias, stride=self.patch_size)
        return tokens.permute(0, 2, 3, 1)


class ClayBackbone(ViTBackbone):
    """Clay's encoder: four maps at patch stride.

    Attributes:
        resolution: ground size of a pixel in metres; may be changed at any time.
        hour: hour of the day (UTC) of all images.
    """

    model: Any
    resolution: float
    hour: float

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, D, h, w)."""
        patches = self.model.patch_embed(image)  # (B, h, w, D)
        height, breadth = patches.shape[1:3]
        width = cast(int, self.width)
        places = place_code(
            height, breadth, width - _METADATA, self.resolution, image.device
        )
        places = F.pad(places, (0, _METADATA))  # (h, w, D)
        known = self.metadata_code(image, meta)[:, None, None]  # (B, 1, 1, 8)
        added = places + F.pad(known, (width - _METADATA, 0))  # (B, h, w, D)
        tokens = (patches + added.to(patches.dtype)).flatten(1, 2)  # (B, h*w, D)
        tokens = prepended(self.model.cls_token, tokens)  # (B, 1 + h*w, D)
        return self.read_blocks(tokens, height, breadth)

    def metadata_code(self, image: Tensor, meta: Meta | None) -> Tensor:
        """Sine and cosine of week, hour, latitude, longitude (B, 8); 0 if unknown.

        Clay saw zeros for a fifth of its pretraining chips.
        """
        code = torch.zeros(image.shape[0], _METADATA, device=image.device)
        date = dates_of(meta, image)  # (B, 1, 2)
        if date is not None:
            weeks = [week_of(*pair) for pair in date[:, 0].tolist()]
            angles = torch.tensor([[week / 52, self.hour / 24] for week in weeks])
            code[:, :4] = _circle(2 * math.pi * angles.to(image.device))
        lonlat = lonlat_of(meta, image)  # (B, 2)
        if lonlat is not None:
            code[:, 4:] = _circle(lonlat.flip(1).deg2rad())  # latitude first
        return code


def _circle(angles: Tensor) -> Tensor:
    """(B, n) -> (B, 2n): sine and cosine of each angle side by side."""
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


@register("clay")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    resolution: float = 10.0,
    hour: float = 0.0,
) -> ClayBackbone:
    """Build Clay's encoder, without the teacher of its pretraining.

    Args:
        card, plan, state: as for every builder.
        resolution: ground size of a pixel in metres (Clay's "gsd").
        hour: hour of the day in UTC, 0 to 24, for dates of `meta`, which have no time.
    """
    resolution = ground_size(resolution)
    if not 0 <= hour <= 24:
        raise ValueError(f"hour={hour!r}: 0 to 24 are allowed")
    waves = [_wavelength(card, band) for band in plan.read_bands]
    kept = None if state is None else encoder_state(state)
    model = filled(lambda: _network(card, waves), kept, card.name)
    model.patch_embed.waves = torch.tensor(waves)  # no part of the checkpoint
    backbone = ClayBackbone(card, model, plan)
    backbone.resolution, backbone.hour = resolution, float(hour)
    return backbone


def _wavelength(card: BackboneCard, band: str) -> float:
    """Micrometres, as Clay was told them; the kit's own for bands it never saw."""
    found = card.architecture["waves"].get(band, BANDS[band].wavelength_um)
    if found is None:
        raise ValueError(
            f"{card.name} reads bands by their wavelength, and {band} has none: leave "
            "it out, or take new_bands='ignore'"
        )
    return float(found)


def _network(card: BackboneCard, waves: Sequence[float]) -> Any:
    model = vit_network(
        card, in_chans=1, qkv_bias=False, pos_embed="none", epsilon=1e-5
    )
    for block in model.blocks:  # timm's proj_bias would take those of the MLP too
        block.attn.proj.register_parameter("bias", None)
    model.patch_embed = WavelengthEmbedding(waves, card.patch, card.width)
    for module in model.patch_embed.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.cls_token, std=0.02)
    return model


# Clay's names -> timm's; a block is a pair of attention (0) and MLP (1).
_RENAMED = (
    (r"^patch_embedding\.", "patch_embed."),
    (r"^transformer\.norm\.", "norm."),
    (r"^transformer\.layers\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.0\.norm\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.0\.to_qkv\.", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.0\.to_out\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.1\.net\.0\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.1\.net\.1\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.1\.net\.3\.", r"\1.mlp.fc2."),
)


def encoder_state(state: State) -> State:
    """A Clay checkpoint in timm's names; decoder, teacher and projection dropped.

    Keys start with ``model.encoder.`` in the published file; a file of the encoder
    alone has no prefix.
    """
    prefix = "model.encoder."
    own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    kept = {}
    for key, tensor in (own or state).items():
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        kept[key] = tensor
    return kept
