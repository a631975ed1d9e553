"""Read the cards of the named backbones and the statistics of pixels: `cards.toml`.

An entry that is ``like`` another repeats only the fields that differ.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.bands import BANDS

PATH = Path(__file__).with_name("cards.toml")
# Fields of an entry that are not fields of a card.
_OWN = {"like", "statistics", "two_spreads", "by_wavelength"}
_COMPUTED = {"name", "normalisation"}
_FIELDS = {field.name: field for field in fields(BackboneCard)}
_ALLOWED = (_FIELDS.keys() - _COMPUTED) | _OWN
_NEEDED = {
    name
    for name, field in _FIELDS.items()
    if field.default is MISSING and field.default_factory is MISSING
} - _COMPUTED - {"bands"} | {"statistics"}


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation by band; `scale` leads from reflectance to them."""

    scale: float
    bands: Mapping[str, tuple[float, float]]

    def normalisation(
        self, bands: Iterable[str], two_spreads: bool = False
    ) -> Normalisation:
        """For these bands; `two_spreads`: mean - 2 std becomes 0, mean + 2 std 1."""
        rows = [self.bands[band] for band in bands]
        if two_spreads:
            rows = [(mean - 2 * std, 4 * std) for mean, std in rows]
        mean, std = zip(*rows, strict=True)
        return Normalisation(self.scale, mean, std)


def read_statistics(content: Mapping[str, Any]) -> dict[str, Statistics]:
    """The tables ``[statistics.NAME]``."""
    return {
        name: Statistics(
            table["scale"], {band: (mean, std) for band, mean, std in table["bands"]}
        )
        for name, table in content["statistics"].items()
    }


def read_cards(
    content: Mapping[str, Any], statistics: Mapping[str, Statistics]
) -> dict[str, BackboneCard]:
    """The tables ``[card.NAME]``, in their order.

    Raises ValueError for an unknown or a missing field, and for an entry, a statistics
    table or a band that does not exist.
    """
    entries: dict[str, dict[str, Any]] = {}
    cards = {}
    for name, own in content["card"].items():
        entries[name] = _inherited(name, own, entries)
        try:
            cards[name] = _card(name, entries[name], statistics)
        except (KeyError, TypeError) as error:
            raise ValueError(f"card {name!r}: there is no {error}") from error
    return cards


def _inherited(
    name: str, own: Mapping[str, Any], entries: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The fields of an entry, those of the entry it is like among them."""
    like = own.get("like", "")
    if like and like not in entries:
        raise ValueError(f"card {name!r} is like {like!r}, which is not above it")
    parent = entries.get(like, {})
    sizes = _merged(parent.get("architecture", {}), own.get("architecture", {}))
    entry = {**parent, **own, "architecture": sizes}
    unknown, missing = entry.keys() - _ALLOWED, _NEEDED - entry.keys()
    if unknown or missing:
        raise ValueError(
            f"card {name!r}: unknown fields {sorted(unknown)}, missing fields "
            f"{sorted(missing)}. The fields are {', '.join(sorted(_ALLOWED))}"
        )
    return entry


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Table `old` with the values of `new`, table by table; lists become tuples."""
    merged = dict(old)
    for key, value in new.items():
        if isinstance(value, Mapping):
            value = _merged(merged.get(key, {}), value)
        merged[key] = tuple(value) if isinstance(value, list) else value
    return merged


def _card(
    name: str, entry: dict[str, Any], statistics: Mapping[str, Statistics]
) -> BackboneCard:
    known = statistics[entry["statistics"]]
    bands = tuple(entry.get("bands", known.bands))
    further = _by_wavelength(known, bands, entry.get("by_wavelength", ()))
    further |= {band: tuple(row) for band, row in entry.get("also_reads", {}).items()}
    computed = {
        "name": name,
        "bands": bands,
        "normalisation": known.normalisation(bands, entry.get("two_spreads", False)),
        "also_reads": further,
        "weights": _weights(entry.get("weights", {})),
    }
    kept = {key: value for key, value in entry.items() if key not in _OWN}
    return BackboneCard(**(kept | computed))


def _weights(tags: Mapping[str, Any]) -> dict[str, WeightFile]:
    """Files by tag; a text instead of a table is the tag that has the same file."""
    return {
        tag: WeightFile(**(tags[file] if isinstance(file, str) else file))
        for tag, file in tags.items()
    }


def _by_wavelength(
    known: Statistics, bands: tuple[str, ...], kinds: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """Statistics of further bands of these kinds that have a wavelength.

    A reflectance takes those of the nearest band; a temperature is passed on as it is.
    """
    waves = {band: BANDS[band].wavelength_um or 0.0 for band in bands}
    found = {}
    for band in BANDS.values():
        wave = band.wavelength_um
        if band.name in bands or band.kind not in kinds or wave is None:
            continue
        nearest = min(waves, key=lambda name: abs(waves[name] - wave))
        thermal = band.kind == "thermal"
        found[band.name] = (0.0, known.scale) if thermal else known.bands[nearest]
    return found


_CONTENT = tomllib.loads(PATH.read_text(encoding="utf-8"))
STATISTICS = read_statistics(_CONTENT)
CARDS = read_cards(_CONTENT, STATISTICS)
