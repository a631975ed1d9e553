"""Bands, scale, offset and clouds of a STAC item.

A STAC API is a catalogue of satellite scenes on the web. Catalogues spell the same
facts differently; this module knows the spellings.

Source:
    Offset since processing baseline 04.00: ESA SentiWiki, Sentinel-2 products,
    https://sentiwiki.copernicus.eu/web/s2-products. Catalogues that have applied it
    set "earthsearch:boa_offset_applied"; for some scenes that flag is wrong
    (https://github.com/Element84/earth-search/issues/66 and /71).
    Classes of the scene classification (SCL): same page. Bits of Fmask: HLS version 2
    user guide, table of the quality layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geopeft_kit.bands import resolve_bands

if TYPE_CHECKING:
    import pystac

# STAC's common names that the kit's own list of bands does not settle.
COMMON = {
    "nir": "NIR_BROAD", "nir08": "NIR_NARROW", "swir16": "SWIR_1", "swir22": "SWIR_2",
    "nir09": "WATER_VAPOUR",
}  # fmt: skip
SCL_HIDDEN = (0, 1, 3, 8, 9, 10)  # no data, saturated, shadow, cloud, cloud, cirrus
FMASK_HIDDEN = 0b0000_1110  # cloud, next to cloud or shadow, shadow
FMASK_NODATA = 255
WEB = ("https://", "http://", "s3://", "gs://")


@dataclass(frozen=True)
class BandFile:
    """Address of a band; reflectance = stored value * scale + offset."""

    href: str
    scale: float
    offset: float
    nodata: float


def find_item(
    api: str,
    collection: str,
    box: tuple[float, float, float, float],
    dates: tuple[str, str],
    modifier: Callable[[Any], Any] | None = None,
    limit: int = 200,
) -> pystac.Item:
    """The least cloudy of the scenes that cover most of a box (W, S, E, N degrees).

    `dates` are the first and last day, `modifier` is pystac_client's. At most `limit`
    scenes are compared. Raises RuntimeError if the API cannot be reached, LookupError
    if it has no scene there.
    """
    import pystac
    import pystac_client
    import requests
    from pystac_client.exceptions import APIError

    try:
        client = pystac_client.Client.open(api, modifier=modifier)
        search = client.search(
            collections=[collection], bbox=box, datetime="/".join(dates),
            max_items=limit, limit=min(limit, 100),
        )  # fmt: skip
        items = list(search.items())
    except (TypeError, KeyError, ValueError, pystac.STACError) as error:
        raise RuntimeError(
            f"{api} does not answer as a STAC API does ({type(error).__name__}: "
            f"{str(error)[:80]}). Check the address; does it want a login?"
        ) from error
    except (APIError, requests.exceptions.RequestException) as error:
        raise RuntimeError(
            f"The STAC API at {api} cannot be reached ({type(error).__name__}): check "
            "the network and the address, or pass a local GeoTIFF or VRT as source."
        ) from error
    if not items:
        raise LookupError(
            f"{api} has no scene of {collection!r} from {dates[0]} to {dates[1]} in "
            f"the box {tuple(round(v, 4) for v in box)}. Take a longer time or another "
            "collection."
        )
    return min(items, key=lambda item: (-_shown(item, box), _cloud_cover(item)))


def _shown(item: pystac.Item, box: tuple[float, float, float, float]) -> float:
    """Share of the box that the item's footprint covers, in steps of five per cent."""
    import shapely

    if item.geometry is None:  # a scene that does not say where it is
        return 0.0
    frame = shapely.box(*box)
    footprint = shapely.geometry.shape(item.geometry)
    return round(20 * footprint.intersection(frame).area / frame.area) / 20


def _cloud_cover(item: pystac.Item) -> float:
    stated = item.properties.get("eo:cloud_cover")
    return 101.0 if stated is None else float(stated)


def band_files(item: pystac.Item, bands: Sequence[str]) -> dict[str, BandFile]:
    """Band -> file of a STAC item, in the order of `bands`.

    Raises LookupError if the item lacks a band, or does not state how to scale one.
    """
    found: dict[str, pystac.Asset] = {}
    for key, asset in item.assets.items():
        name = _band_of(item, key, asset)
        if name is not None:
            found.setdefault(name, asset)
    missing = [band for band in bands if band not in found]
    if missing:
        raise LookupError(
            f"the scene {item.id} has no {', '.join(missing)}; it has "
            f"{', '.join(sorted(found)) or 'no band that the kit knows'}."
        )
    return {band: _band_file(item, found[band]) for band in bands}


def _band_of(item: pystac.Item, key: str, asset: pystac.Asset) -> str | None:
    """The kit's name of an asset, None for previews, masks and the like."""
    if asset.roles and "data" not in asset.roles and "reflectance" not in asset.roles:
        return None
    if "jp2" in key.lower():  # the same band a second time, in the original format
        return None
    prefix = "L30:" if re.search(r"L30", item.id) else ""
    plain = re.sub(r"_\d+m$", "", key)
    listed = asset.extra_fields.get("eo:bands") or asset.extra_fields.get("bands") or []
    if len(listed) > 1:  # a picture of several bands
        return None
    names = [prefix + plain, plain]
    for band in listed:
        names += [str(band.get("name", "")), str(band.get("common_name", ""))]
    for name in names:
        if name in COMMON:
            return COMMON[name]
        try:
            return resolve_bands([name])[0]
        except ValueError:
            continue
    return None


def _band_file(item: pystac.Item, asset: pystac.Asset) -> BandFile:
    fields = asset.extra_fields
    stated = dict((fields.get("raster:bands") or fields.get("bands") or [{}])[0])
    for name in ("scale", "offset", "nodata"):
        for spelling in (f"raster:{name}", name):  # STAC 1.1 has the first
            for holder in (fields, dict(stated)):
                if holder.get(spelling) is not None:
                    stated[name] = holder[spelling]
    stated = {name: value for name, value in stated.items() if value is not None}
    sentinel = "sentinel-2" in (item.collection_id or "").lower()
    hls = "hls" in (item.collection_id or item.id).lower()
    if "scale" not in stated and not (sentinel or hls):
        raise LookupError(
            f"the scene {item.id} does not say how its numbers become reflectance "
            "(raster:scale). Download it, and pass the file with scale=."
        )
    scale = _number(item, "scale", stated.get("scale", 1e-4))
    offset = stated.get("offset")
    if _offset_is_applied(item):
        offset = 0.0
    elif offset is None:
        offset = -1000 * scale if sentinel and _baseline(item) >= 4 else 0.0
    offset = _number(item, "offset", offset)
    if not scale or not np.isfinite([scale, offset]).all():
        raise ValueError(
            f"the scene {item.id} states scale={scale}, offset={offset}. Take another "
            "scene, or download it and pass scale=."
        )
    nodata = _number(item, "nodata", stated.get("nodata", -9999 if hls else 0))
    return BandFile(address_of(item, asset), scale, offset, nodata)


def _number(item: pystac.Item, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the scene {item.id} states {name}={value!r}, which is no number. Take "
            "another scene, or download it and pass scale=."
        ) from error


def address_of(item: pystac.Item, asset: pystac.Asset) -> str:
    """Where a file is; only the web is read, never a file of this machine."""
    href = asset.get_absolute_href() or asset.href
    if not href.startswith(WEB):
        raise ValueError(
            f"the scene {item.id} points to {href[:80]!r}; only addresses that begin "
            f"with {', '.join(WEB)} are read."
        )
    return href


def _offset_is_applied(item: pystac.Item) -> bool:
    spellings = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
    return any(item.properties.get(name) is True for name in spellings)


def _baseline(item: pystac.Item) -> float:
    """Processing baseline of a Sentinel-2 item, 0 where it is not stated."""
    spellings = ("s2:processing_baseline", "sentinel:processing_baseline",
                 "processing:version")  # fmt: skip
    for name in spellings:
        match = re.match(r"\d+(\.\d+)?", str(item.properties.get(name, "")))
        if match:
            return float(match[0])
    return 0.0


def cloud_file(item: pystac.Item) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Address of an item's cloud band, and its values -> whether they mean cloud.

    Raises LookupError if it has none.
    """
    for key, asset in item.assets.items():
        plain = re.sub(r"_\d+m$", "", key).lower()
        if plain == "scl":
            return address_of(item, asset), scl_hides
        if plain == "fmask":
            return address_of(item, asset), fmask_hides
    raise LookupError(
        f"the scene {item.id} has neither SCL nor Fmask, so clouds cannot be masked. "
        "Pass mask_clouds=False to keep them."
    )


def scl_hides(values: np.ndarray) -> np.ndarray:
    """Whether Sentinel-2's scene classification says cloud, shadow, or nothing."""
    return np.isin(values, SCL_HIDDEN)


def fmask_hides(values: np.ndarray) -> np.ndarray:
    """Whether HLS' quality layer (uint8) says cloud, near cloud, shadow, or nodata."""
    values = np.asarray(values, dtype=np.uint8)
    return ((values & FMASK_HIDDEN) > 0) | (values == FMASK_NODATA)
