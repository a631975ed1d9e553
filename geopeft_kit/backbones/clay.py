"""Clay 1.0 and 1.5: any bands by their wavelength, at any ground sampling distance.

Clay has no kernels of its own: a small transformer makes them from the wavelength of
each band, in every forward pass. The rest is a plain pre-norm ViT, so its blocks are
timm's under timm's names, and PEFT methods find what they know. Three points raise no
error when missed: query, key and value have no bias; the position code is multiplied
by the ground size of a pixel; and its frequencies, as published, hardly differ.

Sources: Clay Foundation, github.com/Clay-foundation/model (Apache-2.0): key names,
sizes, wavelengths and statistics (`metadata.yaml`); the kernels from wavelengths are
DOFA's idea, arXiv 2403.15356.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.clay_embedding import WavelengthEmbedding
from geopeft_kit.backbones.metadata import dates_of, lonlat_of
from geopeft_kit.backbones.vit import ViTBackbone
from geopeft_kit.backbones.weights import State, load_strictly
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

    def axis(count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, device=device).float(), rates)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (count, size / 2)

    columns = axis(breadth).expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, breadth, -1)
    return torch.cat([columns, rows], dim=2)


def week_of(year: float, day: float) -> int:
    """ISO week of a day of the year counted from 0."""
    first = datetime.date(int(year), 1, 1)
    return (first + datetime.timedelta(int(day))).isocalendar().week


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
        first = self.model.cls_token.expand(len(tokens), -1, -1)  # (B, 1, D)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
        return self.read_blocks(tokens, height, breadth)

    def metadata_code(self, image: Tensor, meta: Meta | None) -> Tensor:
        """Sine and cosine of week, hour, latitude, longitude (B, 8); 0 if unknown.

        Clay saw zeros for a fifth of its pretraining chips.
        """
        code = torch.zeros(len(image), _METADATA, device=image.device)
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


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    resolution: float = 10.0,
    hour: float = 0.0,
) -> ClayBackbone:
    """Build Clay's encoder, without the teacher of its pretraining.

    Args:
        card: sizes and bands.
        plan: the bands of the user's images.
        state: checkpoint in the upstream's key layout, or None for random weights.
        resolution: ground size of a pixel in metres (Clay's "gsd").
        hour: hour of the day in UTC, 0 to 24, for dates of `meta`, which have no time.

    Raises:
        ValueError: for an option out of range, a band without a wavelength, or a
            checkpoint that does not fit.
    """
    if not 0 < resolution < float("inf"):
        raise ValueError(f"resolution={resolution!r}: metres per pixel, above 0")
    if not 0 <= hour <= 24:
        raise ValueError(f"hour={hour!r}: 0 to 24 are allowed")
    waves = [_wavelength(card, band) for band in plan.read_bands]
    if state is None:
        model = _network(card, waves)
    else:
        with torch.device("meta"):  # no memory and no time for random numbers
            model = _network(card, waves)
        model.patch_embed.waves = torch.tensor(waves)
        load_strictly(model, encoder_state(state), card.name)
    backbone = ClayBackbone(card, model, plan)
    backbone.resolution, backbone.hour = float(resolution), float(hour)
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
    model: Any = VisionTransformer(
        img_size=card.image_size,
        patch_size=card.patch,
        in_chans=1,
        num_classes=0,
        embed_dim=card.width,
        depth=card.depth,
        num_heads=card.architecture["heads"],
        qkv_bias=False,
        pos_embed="none",
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        dynamic_img_size=True,
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


def encoder_state(state: Mapping[str, Tensor]) -> State:
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


# Sentinel-2 L2A in Clay's metadata: wavelength, mean, standard deviation (x 10000)
_BANDS = {
    "BLUE": (0.493, 1105.0, 1809.0),
    "GREEN": (0.560, 1355.0, 1757.0),
    "RED": (0.665, 1552.0, 1888.0),
    "RED_EDGE_1": (0.704, 1887.0, 1870.0),
    "RED_EDGE_2": (0.740, 2422.0, 1732.0),
    "RED_EDGE_3": (0.783, 2630.0, 1697.0),
    "NIR_BROAD": (0.842, 2743.0, 1742.0),
    "NIR_NARROW": (0.865, 2785.0, 1648.0),
    "SWIR_1": (1.610, 2388.0, 1470.0),
    "SWIR_2": (2.190, 1835.0, 1379.0),
}
# Sentinel-1 in decibels. Its wavelengths are names, no physics: both are 5.6 cm.
_RADAR = {"VV": (3.5, -12.113, 8.314), "VH": (4.0, -18.673, 8.017)}
_SCALE = 1e4


def _clay_card(
    name: str,
    repo: str,
    file: str,
    width: int,
    depth: int,
    heads: int,
    parameters: int,
    radar: Mapping[str, tuple[float, float, float]],
) -> BackboneCard:
    others = {
        band.name: _nearest(band.wavelength_um)
        for band in BANDS.values()
        if band.kind == "optical" and band.name not in _BANDS and band.wavelength_um
    }
    others |= {band: (m * _SCALE, s * _SCALE) for band, (_, m, s) in radar.items()}
    waves = {band: wave for band, (wave, _, _) in {**_BANDS, **radar}.items()}
    return BackboneCard(
        name=name,
        family="clay",
        bands=tuple(_BANDS),
        patch=8,
        width=width,
        depth=depth,
        parameters=parameters,
        image_size=256,
        normalisation=Normalisation(
            _SCALE,
            tuple(mean for _, mean, _ in _BANDS.values()),
            tuple(std for _, _, std in _BANDS.values()),
        ),
        licence_weights="Apache-2.0",
        licence_code="Apache-2.0",
        source=f"https://huggingface.co/{repo}",
        weights={"default": WeightFile(file, repo=repo)},
        architecture={"heads": heads, "waves": waves},
        notes="Masked autoencoder on Sentinel-1 and 2, Landsat, MODIS, aerial images; "
        "kernels are made from wavelengths, so any optical band is read. Adds week, "
        "hour and place of meta to the tokens; resolution is the ground size of a "
        "pixel. The hub page said OpenRAIL before it said Apache-2.0: look there.",
        cannot="The published file was not at hand: key names come from the authors' "
        "code. Bands that Sentinel-2 L2A lacks get the statistics of the nearest band."
        + ("" if radar else " No radar."),
        also_reads=others,
    )


def _nearest(wave: float) -> tuple[float, float]:
    """Mean and standard deviation of the band nearest in wavelength."""
    return min(_BANDS.values(), key=lambda row: abs(row[0] - wave))[1:]


CLAY_V1 = _clay_card(
    "clay_v1",
    "made-with-clay/Clay-legacy",
    "v1/clay-v1-base.ckpt",
    768,
    12,
    12,
    92_102_144,
    {},
)
CLAY_V1_5 = _clay_card(
    "clay_v1_5",
    "made-with-clay/Clay",
    "v1.5/clay-v1.5.ckpt",
    1024,
    24,
    16,
    311_442_944,
    _RADAR,
)
CARDS = (CLAY_V1, CLAY_V1_5)
