"""Band names: aliases, sensors, and what is said about names that do not fit."""

from __future__ import annotations

import pytest

from geopeft_kit.bands import BANDS, SENSORS, band_indices, resolve_bands, wavelengths


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("red", "RED"),
        ("B4", "RED"),
        ("B04", "RED"),
        ("b8a", "NIR_NARROW"),
        ("B08", "NIR_BROAD"),
        ("B05", "RED_EDGE_1"),
        ("S30:B05", "RED_EDGE_1"),
        ("L30:B05", "NIR_NARROW"),
        ("l30:b5", "NIR_NARROW"),
        ("L30:B06", "SWIR_1"),
        ("red edge 1", "RED_EDGE_1"),
        ("SWIR1", "SWIR_1"),
        ("water vapor", "WATER_VAPOUR"),
        ("vv", "VV"),
    ],
)
def test_aliases(given: str, name: str) -> None:
    assert resolve_bands([given]) == (name,)
    assert resolve_bands(given) == (name,)


def test_a_bare_number_is_sentinel_2_and_the_prefix_changes_it() -> None:
    assert resolve_bands("B05") != resolve_bands("L30:B05")


def test_order_is_kept_and_sensors_resolve_to_known_bands() -> None:
    assert resolve_bands(["B12", "B2", "NIR_NARROW"]) == (
        "SWIR_2", "BLUE", "NIR_NARROW",
    )  # fmt: skip
    assert resolve_bands("hls") == resolve_bands(
        ["B2", "B3", "B4", "B8A", "B11", "B12"]
    )
    sizes = {name: len(bands) for name, bands in SENSORS.items()}
    assert (sizes["hls"], sizes["sentinel2_l2a"], sizes["sentinel2_l1c"]) == (6, 12, 13)
    for bands in SENSORS.values():
        assert resolve_bands(bands) == bands
        assert set(bands) <= set(BANDS)
    assert set(SENSORS["sentinel2_l1c"]) - set(SENSORS["sentinel2_l2a"]) == {"CIRRUS"}


def test_every_spelling_in_the_table_means_its_own_band() -> None:
    for band in BANDS.values():
        for spelling in (band.name, *band.aliases):
            assert resolve_bands(spelling) == (band.name,)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["REDD"], ["REDD", "RED", "SWIR_2", "sentinel2_l2a"]),
        (["NIR"], ["NIR_BROAD", "NIR_NARROW"]),
        (["RED", "B04"], ["RED", "twice"]),
        ([], ["no bands"]),
        (["L30:B12"], ["L30:B12"]),
    ],
)
def test_refusals_name_the_value_and_the_choice(
    given: list[str], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        resolve_bands(given)
    for part in parts:
        assert part in str(error.value)


def test_a_number_is_no_name() -> None:
    with pytest.raises(TypeError, match="4"):
        resolve_bands([4])


def test_positions_and_wavelengths() -> None:
    assert band_indices(["RED", "B2"], SENSORS["hls"]) == [2, 0]
    with pytest.raises(ValueError, match="COASTAL_AEROSOL.*SWIR_2"):
        band_indices(["B1"], SENSORS["hls"])
    visible = wavelengths(["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1"])
    assert visible == sorted(visible)
    assert 0.4 < visible[0] < 0.5
    with pytest.raises(ValueError, match="VV.*radar"):
        wavelengths(["VV"])
