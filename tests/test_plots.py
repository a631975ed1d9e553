"""Figures: colours that can be told apart, labelled axes, meaningful pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

import geopeft_kit as gk
from geopeft_kit import plots
from geopeft_kit.data.sample import _COLOURS
from geopeft_kit.data.simulated import _LESSONS
from geopeft_kit.maps.layers import OUTSIDE
from geopeft_kit.maps.overlays import FALSE_ALARM, MISSED
from geopeft_kit.maps.page import GROUND
from geopeft_kit.methods.base import FAMILIES
from geopeft_kit.pictures import (
    class_colours,
    picture_bands,
    stretch,
    stretch_limits,
    token_picture,
)
from geopeft_kit.plots import colours
from geopeft_kit.plots.colours import FAMILY_SHADES
from geopeft_kit.plots.drawing import figure_png

# Machado et al. 2009, doi:10.1109/TVCG.2009.113: full deuteranopia, protanopia
# and tritanopia.
DEUTAN = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
PROTAN = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
TRITAN = [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
QUICKSTART = ("frozen", "lora", "full", "from_scratch", "bias", "vpt")


def lab(colour: str, vision=None) -> np.ndarray:
    rgb = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if vision is not None:
        linear = np.clip(np.array(vision) @ linear, 0, 1)
    x, y, z = np.array(TO_XYZ) @ linear / np.array([0.9505, 1, 1.089])
    f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def spare(family):
    """The shades of a family that no method has yet."""
    taken = set(plots.METHOD_COLOURS.values())
    return [shade for shade in FAMILY_SHADES[family] if shade not in taken]


def test_every_method_has_a_colour_of_its_own():
    """Those of today, and those that wait for methods to come."""
    assert {card.name for card in gk.list_methods()} <= set(plots.METHOD_COLOURS)
    shades = dict(plots.METHOD_COLOURS)
    for family in FAMILY_SHADES:
        shades |= {f"{family} {n}": shade for n, shade in enumerate(spare(family))}
    for a, b in itertools.combinations(shades, 2):
        far = np.linalg.norm(lab(shades[a]) - lab(shades[b]))
        assert far > 8, f"{a} and {b} look alike"


def test_a_new_method_takes_the_next_shade_of_its_family(monkeypatch):
    monkeypatch.setattr(colours, "METHOD_COLOURS", dict(plots.METHOD_COLOURS))
    assert set(FAMILY_SHADES) == set(FAMILIES)
    shades = spare("low rank")
    for number in range(len(shades) + 1):
        colours.add_method_colour(f"new {number}", "low rank")
    given = [plots.method_colour(f"new {n}") for n in range(len(shades) + 1)]
    assert given == [*shades, shades[-1]]
    colours.add_method_colour("lora", "low rank")
    assert plots.method_colour("lora") == "#0072b2"  # those that have one keep it


@pytest.mark.parametrize("vision", [None, DEUTAN, PROTAN])
def test_the_methods_of_the_quickstart_differ_for_every_eye(vision):
    for a, b in itertools.combinations(QUICKSTART, 2):
        pair = [lab(plots.method_colour(m), vision) for m in (a, b)]
        assert np.linalg.norm(pair[0] - pair[1]) > 11, f"{a} and {b}"


LEGENDS = {
    **{name: one.classes for name, one in _LESSONS.items() if one.classes},
    "sample scene": _COLOURS,
    "errors": {"missed": MISSED, "false alarm": FALSE_ALARM},
    "no data beyond training": {"outside": OUTSIDE},
    "default": dict(enumerate(class_colours("1234567"))),
}


def luminance(colour: str) -> float:
    rgb = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ TO_XYZ[1])


@pytest.mark.parametrize("legend", LEGENDS)
def test_classes_differ_for_every_eye_and_from_the_empty_ground(legend):
    shades = LEGENDS[legend]
    for name, shade in shades.items():
        contrast = (luminance(shade) + 0.05) / (luminance(GROUND) + 0.05)
        assert contrast >= 3, f"{name} is hardly seen on the ground"
    for vision in (None, DEUTAN, PROTAN, TRITAN):
        for (a, one), (b, other) in itertools.combinations(shades.items(), 2):
            far = np.linalg.norm(lab(one, vision) - lab(other, vision))
            assert far >= 10, f"{a} and {b} look alike"


def test_colours_of_classes():
    found = class_colours(["a", "b"], {"a": "#010203", 1: (4, 5, 6)})
    assert found == ["#010203", "#040506"]
    assert len(set(class_colours([str(i) for i in range(8)]))) == 8
    with pytest.raises(ValueError, match="only 8"):
        class_colours([str(i) for i in range(9)])
    with pytest.raises(ValueError, match="Class 'b'"):
        class_colours(["a", "b"], ["#010203"])
    with pytest.raises(ValueError, match="'blue' is not a colour"):
        class_colours(["a"], ["blue"])
    with pytest.raises(ValueError, match="'magic'.*Known: full"):
        plots.method_colour("magic")


def test_picture_bands_by_name():
    assert picture_bands("hls") == [2, 1, 0]
    assert picture_bands("hls", "false") == [3, 2, 1]
    assert picture_bands(["B8A", "B04", "B03"], ["B04", "B03", "B8A"]) == [1, 2, 0]
    with pytest.raises(ValueError, match="cannot be made of the bands VV, VH"):
        picture_bands(["VV", "VH"])
    with pytest.raises(ValueError, match="show='pretty'.*true, false, swir"):
        picture_bands("hls", "pretty")


def test_stretch_shares_its_limits_and_survives_nan():
    dark, bright = np.full((3, 9, 9), 0.1), np.full((3, 9, 9), 0.5)
    dark[:, 0, 0] = np.nan
    limits = stretch_limits([dark, bright], (0, 100))
    assert np.allclose(stretch(dark, limits)[1, 1], 0)
    assert np.allclose(stretch(bright, limits), 1)
    assert np.isfinite(stretch(np.full((3, 4, 4), np.nan))).all()


def test_token_picture_gives_like_features_like_colours():
    features = torch.randn(16, 6, 6)
    features[:, :3] = features[:, :1, :1]
    picture = token_picture(features)
    assert picture.shape == (6, 6, 3)
    assert np.allclose(picture[:3], picture[0, 0], atol=1e-6)
    assert picture.std() > 0.1
    assert token_picture(torch.randn(2, 2, 3, 4)).shape == (2, 3, 4, 3)


def sample(**more):
    image = np.random.default_rng(0).uniform(0, 0.4, (6, 32, 32)).astype("f4")
    mask = np.zeros((32, 32), np.int64)
    mask[:10], mask[-4:] = 1, 255
    place = {"bounds": [5e5, 4e6, 5e5 + 320, 4e6 + 320], "crs": "EPSG:32630"}
    return {"image": image, "mask": mask, "region": "a $ region_1", **place, **more}


def texts(figure) -> str:
    figure_png(figure)  # drawing fails on bad labels
    return "\n".join(
        part for axis in figure.axes
        for part in (axis.get_xlabel(), axis.get_ylabel(), axis.get_title())
    )  # fmt: skip


CLASSES = ["land", "water $x$"]


def test_chips_are_drawn_north_up_with_units():
    figure = plots.show_chip(sample(), "hls", classes=CLASSES)
    assert "easting (km)" in texts(figure) and "northing (km)" in texts(figure)
    west, east, south, north = figure.axes[0].images[0].get_extent()
    assert (east - west, north - south) == pytest.approx((0.32, 0.32))
    assert figure.axes[0].images[0].origin == "upper"
    assert [t.get_text() for t in figure.legends[0].get_texts()][0] == "land"
    figure = plots.show_chip(sample(crs="EPSG:4326", bounds=[0, 1, 2, 3]), "hls")
    assert "longitude (degrees)" in texts(figure)
    figure = plots.show_chip({"image": sample()["image"]}, "hls")
    assert "column (pixels)" in texts(figure)


def test_grid_of_chips_and_tokens():
    figure = plots.show_chips([sample(), sample(), sample()], "hls", columns=2)
    assert len([axis for axis in figure.axes if axis.images]) == 3
    with pytest.raises(ValueError, match="empty"):
        plots.show_chips([], "hls")
    figure = plots.plot_tokens([torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 2)])
    assert "8 features, 4 x 4" in texts(figure)


def test_errors_leave_out_what_is_not_labelled():
    chip = sample()
    prediction = np.where(chip["mask"] == 255, 1, chip["mask"])
    assert "0.0%" in texts(plots.plot_errors(chip, prediction, "hls", CLASSES))
    prediction[12:19] = 1  # 7 of the 28 labelled rows
    assert "25.0%" in texts(plots.plot_errors(chip, prediction, "hls", CLASSES))
    with pytest.raises(ValueError, match="both|Both"):
        plots.plot_errors(chip, prediction[:5], "hls", CLASSES)


def test_history_resources_and_scores():
    history = pd.DataFrame({"epoch": [0, 1], "loss": [1, 0.5], "val_miou": [0, 1]})
    figure = plots.plot_history({"lora": history, "full": history}, "val_miou")
    assert figure.axes[0].lines[0].get_color() == plots.METHOD_COLOURS["lora"]
    assert "epoch" in texts(figure)
    with pytest.raises(ValueError, match="'val_f1'.*epoch, loss"):
        plots.plot_history({"lora": history}, "val_f1")

    parts = {"lora": {"weights": 2**20, "activations": 3 * 2**20}, "full": {}}
    figure = plots.plot_resources(parts)
    assert "MiB" in texts(figure)
    right = max(bar.get_x() + bar.get_width() for bar in figure.axes[0].patches)
    assert right == pytest.approx(4)

    cards = {"T4": 6 * 2**20, "H200": 2**30}
    figure = plots.plot_resources({"lora": parts["lora"]}, cards)
    assert figure.axes[0].lines[0].get_xdata()[0] == pytest.approx(6)
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "T4" in words and "H200 1,024 MiB" in texts(figure)
    colours = [bar[0].get_facecolor() for bar in figure.axes[0].containers]
    expected = [plots.CAUSE_COLOURS[cause] for cause in parts["lora"]]
    assert [to_hex(colour) for colour in colours] == expected
    with pytest.raises(ValueError, match="No colour.*wieghts"):
        plots.plot_resources({"lora": {"wieghts": 1.0}})

    rows = [
        {"method": m, "region": r, "seed": s, "miou": 0.5 + 0.1 * s}
        for m in ("lora", "full") for r in ("seen", "unseen") for s in range(3)
    ]  # fmt: skip
    figure = plots.plot_scores(pd.DataFrame(rows))
    dots = figure.axes[0].containers[0][0]
    assert np.allclose(dots.get_xdata(), 0.6)
    assert "mean over seeds" in texts(figure)
    with pytest.raises(ValueError, match="no column region"):
        plots.plot_scores(pd.DataFrame({"method": [], "miou": []}))
