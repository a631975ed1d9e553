"""Backbone cards: what a model expects, what it is, and where it comes from.

A card is plain data: bands, normalisation, licence, and where the weights are.

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from html import escape
from typing import Any

from geopeft_kit.bands import BANDS


@dataclass(frozen=True)
class Normalisation:
    """``(image * scale - mean) / std`` per band of the card, image as reflectance 0-1.

    `scale` is the factor from reflectance to the unit of `mean` and `std`.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class WeightFile:
    """Where one file of weights is published; packaged with the kit if nowhere.

    Args:
        file: file name, also the name in the local cache; "" where torchgeo names it.
        repo: ``owner/name`` on the Hugging Face hub, or None.
        revision: branch, tag or commit of ``repo``.
        url: full address where the file is not on the hub.
        sha256: checksum, only where it was computed from the real file.
        torchgeo: member of torchgeo's weights that names file, repo and revision, as
            ``"DOFABase16_Weights.DOFA_MAE"``; read when the weights are loaded.
    """

    file: str = ""
    repo: str | None = None
    revision: str = "main"
    url: str | None = None
    sha256: str | None = None
    torchgeo: str | None = None


@dataclass(frozen=True)
class BackboneCard:
    """Everything that is known about a backbone before it is built.

    Args:
        name: the name that `load_backbone` takes.
        family: which builder makes it (``"prithvi"``, ``"timm"``, ...).
        bands: canonical band names, in the order of the published kernels.
        patch: patch size in pixels; of a hierarchical network, the stride of its
            first map.
        width: token width of a ViT, or the width of the last stage.
        depth: number of blocks.
        parameters: of the network that `load_backbone` builds with the card's own
            bands, without classifier, decoder, fixed position tables and the metadata
            scalars that ``notes`` names.
        image_size: height and width in pixels of the pretraining images.
        normalisation: applied inside the backbone's forward and nowhere else.
        licence_weights: licence of the published weights (SPDX where there is one).
        licence_code: licence of the code that runs them here.
        source: web page of the model.
        weights: files by tag; ``"default"`` is what `load_backbone` takes.
        architecture: sizes that the builder needs (depth, heads, ...).
        paper: title or arXiv id.
        notes: what it is, in a sentence or two.
        cannot: what it does not do.
        obtain: how to download weights by hand; empty where `load_backbone` does it.
        also_reads: further bands that the network can read, because it makes kernels
            from wavelengths: name -> (mean, standard deviation) in the unit of
            ``normalisation``.
    """

    name: str
    family: str
    bands: tuple[str, ...]
    patch: int
    width: int
    depth: int
    parameters: int
    image_size: int
    normalisation: Normalisation
    licence_weights: str
    licence_code: str
    source: str
    weights: Mapping[str, WeightFile] = field(default_factory=dict, hash=False)
    architecture: Mapping[str, Any] = field(default_factory=dict, hash=False)
    paper: str = ""
    notes: str = ""
    cannot: str = ""
    obtain: str = ""
    also_reads: Mapping[str, tuple[float, float]] = field(
        default_factory=dict, hash=False
    )

    @property
    def wavelengths(self) -> tuple[float | None, ...]:
        """Central wavelength of each band in micrometres; None for radar."""
        return tuple(BANDS[band].wavelength_um for band in self.bands)

    @property
    def licence(self) -> str:
        """Licence of the weights: the one that decides what you may do."""
        return self.licence_weights

    @property
    def revision(self) -> str | None:
        """Revision of the default weight file; None where the card holds none."""
        file = self.weights.get("default")
        return file.revision if file and not file.torchgeo else None

    @property
    def sha256(self) -> str | None:
        """Checksum of the default weight file where it was computed, else None."""
        file = self.weights.get("default")
        return file.sha256 if file else None

    def _repr_html_(self) -> str:
        """A small table for notebooks; every value is escaped."""
        rows = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "weights":
                files = {tag: w.torchgeo or w.file for tag, w in value.items()}
                value = ", ".join(f"{tag}: {file}" for tag, file in files.items())
            elif item.name == "parameters":
                value = f"{value:,}"
            elif item.name in ("bands", "also_reads"):
                value = ", ".join(value)
            rows.append(
                f"<tr><th style='text-align:left'>{escape(item.name)}</th>"
                f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
            )
        return f"<table>{''.join(rows)}</table>"
