"""Which kernel of the patch embedding each band of *your* image meets, by name.

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.cards import STATISTICS
from geopeft_kit.bands import BANDS, resolve_bands

NewBands = Literal["error", "random", "copy_nearest", "share_nearest", "ignore"]
NEW_BANDS: tuple[str, ...] = get_args(NewBands)
WORLD = STATISTICS["ssl4eo_s12_sentinel2"]  # Sentinel-2 L1C, all over the world
NEAREST = ("copy_nearest", "share_nearest")


@dataclass(frozen=True)
class BandPlan:
    """Which kernel each band of an image meets.

    Args:
        bands: the C channels of the image, canonical names in the user's order.
        read: positions among those C that the embedding reads (all of them, except
            under ``new_bands="ignore"``).
        kernels: for each position in ``read``, the index of the card's kernel, or
            None for a random one.
        mean: C values in the card's unit.
        std: C values in the card's unit.
        new_bands: the policy that led to this plan.
    """

    bands: tuple[str, ...]
    read: tuple[int, ...]
    kernels: tuple[int | None, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    new_bands: NewBands

    @property
    def read_bands(self) -> tuple[str, ...]:
        """Names of the bands that the embedding reads."""
        return tuple(self.bands[position] for position in self.read)

    def share(self, kernel: int | None) -> float:
        """Factor on a kernel: 1/n where n bands share it under "share_nearest"."""
        shared = self.new_bands == "share_nearest"
        return 1 / self.kernels.count(kernel) if shared else 1.0


def plan_bands(
    card: BackboneCard,
    bands: str | Sequence[str] | None = None,
    new_bands: NewBands = "error",
) -> BandPlan:
    """Match the bands of an image with the kernels of a backbone, by name.

    Args as for `load_backbone`. A band that the card does not know gets the statistics
    of the known band nearest in wavelength, except under ``"share_nearest"``; a band
    without a wavelength (radar) is passed on unchanged.

    ``"share_nearest"`` keeps the pretrained response: n bands that meet one kernel take
    1/n of it each. A new band gets statistics of its own, so that it has the mean and
    spread of its neighbour after normalisation: those of SSL4EO-S12 (Sentinel-2 L1C,
    places all over the world), brought into the card's unit by way of the neighbour.

    Raises:
        ValueError: an unknown policy, a band that needs one, a band without a
            wavelength under a nearest policy, one without statistics under
            ``"share_nearest"``, or no known band at all.
    """
    if new_bands not in NEW_BANDS:
        raise ValueError(f"new_bands={new_bands!r}: allowed are {', '.join(NEW_BANDS)}")
    names = tuple(card.bands if bands is None else resolve_bands(bands))
    known = (*card.bands, *card.also_reads)
    unknown = [name for name in names if name not in known]
    if unknown and new_bands == "error":
        raise ValueError(
            f"{card.name} does not know {', '.join(unknown)}; it knows "
            f"{', '.join(known)}. Leave them out, or choose new_bands='random', "
            "'share_nearest', 'copy_nearest' or 'ignore'"
        )
    if len(unknown) == len(names) and new_bands != "random":
        raise ValueError(
            f"{card.name} knows none of {', '.join(names)}; it knows "
            f"{', '.join(known)}. Choose another backbone, or new_bands='random'"
        )
    read = tuple(
        position
        for position, name in enumerate(names)
        if name in known or new_bands != "ignore"
    )
    kernels = tuple(_kernel(card, names[position], new_bands) for position in read)
    statistics = [_statistics(card, name, new_bands) for name in names]
    mean, std = zip(*statistics, strict=True)
    return BandPlan(names, read, kernels, mean, std, new_bands)


def _kernel(card: BackboneCard, name: str, new_bands: NewBands) -> int | None:
    """Index of the kernel that a band meets; None for a random one."""
    if name in card.bands:
        return card.bands.index(name)
    if new_bands not in NEAREST:
        return None
    nearest = _nearest(card, name)
    if nearest is None and name not in card.also_reads:
        raise ValueError(
            f"{name} has no wavelength, so no band of {card.name} is nearest to "
            "it; choose new_bands='random' or 'ignore'"
        )
    return nearest


def _statistics(
    card: BackboneCard, name: str, new_bands: NewBands
) -> tuple[float, float]:
    """Mean and standard deviation of a band in the card's unit."""
    if name in card.also_reads:
        return card.also_reads[name]
    nearest = _nearest(card, name)
    if nearest is None:
        return 0.0, 1.0
    if new_bands == "share_nearest" and name not in card.bands:
        return _own_statistics(card, name, nearest)
    return card.normalisation.mean[nearest], card.normalisation.std[nearest]


def _nearest(card: BackboneCard, name: str) -> int | None:
    """Index of the card's band nearest in wavelength to ``name``; itself if known."""
    if name in card.bands:
        return card.bands.index(name)
    target = BANDS[name].wavelength_um
    known = [(i, w) for i, w in enumerate(card.wavelengths) if w is not None]
    if target is None or not known:
        return None
    return min(known, key=lambda pair: abs(pair[1] - target))[0]


def _own_statistics(card: BackboneCard, name: str, nearest: int) -> tuple[float, float]:
    """Mean and deviation that bring a band to where its neighbour arrives."""
    neighbour = card.bands[nearest]
    missing = [band for band in (name, neighbour) if band not in WORLD.bands]
    if missing:
        raise ValueError(
            f"no statistics of {', '.join(missing)} are published, so {name} cannot "
            f"be brought to the range of {neighbour}; choose "
            "new_bands='copy_nearest', 'random' or 'ignore'"
        )
    scale = card.normalisation.scale / WORLD.scale
    (mean, std), (other_mean, other_std) = WORLD.bands[name], WORLD.bands[neighbour]
    spread = std / other_std
    offset = scale * other_mean - card.normalisation.mean[nearest]
    return scale * mean - offset * spread, card.normalisation.std[nearest] * spread
