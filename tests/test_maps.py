"""Maps: at the true place, nodata transparent, names are text, nothing is fetched."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_bounds
from rasterio.warp import transform as to_crs

from geopeft_kit.maps import MapLayer, Raster, chip_layers, overlays, save_map, show_map
from geopeft_kit.maps.overlays import draw, ramp_colours
from geopeft_kit.maps.pixel_values import pixel_html, read_pixel
from geopeft_kit.maps.scene_map import map_html
from geopeft_kit.maps.widget import legend_html, tooltip

EVIL = '<img src=x onerror="window.hacked=1">'
CLASSES = [EVIL, "water </script> & ice"]
COLOURS = ["#c9b37e", "#0072b2"]
SIZE = 40


def chips(places=(("savanna", 500_000, 4_100_000, "EPSG:32630"),), side=2):
    """Chips of 40 x 40 pixels of 10 m, `side` x `side` of them in each place."""
    samples = []
    for region, east, north, crs in places:
        for i in range(side):
            for j in range(side):
                west, south = east + i * SIZE * 10, north - (j + 1) * SIZE * 10
                generator = np.random.default_rng(len(samples))
                mask = np.zeros((SIZE, SIZE), np.int64)
                mask[: SIZE // 2] = 1
                mask[-4:, -4:] = 255
                samples.append({
                    "image": generator.uniform(0, 0.4, (6, SIZE, SIZE)).astype("f4"),
                    "mask": mask,
                    "bounds": [west, south, west + SIZE * 10, south + SIZE * 10],
                    "crs": crs,
                    "region": region,
                })  # fmt: skip
    return samples


FAR = (
    ("savanna", 500_000, 4_100_000, "EPSG:32630"),
    ("delta", 600_000, 2_300_000, "EPSG:32645"),
)


def layers(samples):
    """Image, truth, a perfect prediction and one that is all land."""
    right = [np.where(s["mask"] == 255, 0, s["mask"]) for s in samples]
    land = [np.zeros_like(s["mask"]) for s in samples]
    predictions = {"lora": right, "frozen": land}
    return chip_layers(samples, "hls", CLASSES, COLOURS, predictions)


def pixels(picture) -> np.ndarray:
    raw = base64.b64decode(picture.url.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGBA"))


def at(picture, lon, lat) -> tuple[int, ...]:
    """Colour that a web map shows at a place: linear in EPSG:3857."""
    (south, west), (north, east) = picture.bounds
    xs, ys = to_crs("EPSG:4326", "EPSG:3857", [west, east, lon], [south, north, lat])
    rgba = pixels(picture)
    column = (xs[2] - xs[0]) / (xs[1] - xs[0]) * rgba.shape[1]
    row = (ys[1] - ys[2]) / (ys[1] - ys[0]) * rgba.shape[0]
    return tuple(int(v) for v in rgba[int(row), int(column)])


# --- overlays -------------------------------------------------------------------------


@pytest.mark.parametrize("epsg", [32630, 32733, 4326, 3035])
def test_every_pixel_lies_at_its_true_place(epsg):
    """A lone pixel of another class is found where its coordinates say."""
    pixel = 0.001 if epsg == 4326 else 50.0
    corner = {4326: (-3.0, 40.0), 3035: (4_300_000.0, 3_200_000.0)}
    x, y = corner.get(epsg, (450_000.0, 6_900_000.0))
    transform = Affine(pixel, 0, x, 0, -pixel, y)
    mask = np.zeros((60, 90), np.uint8)
    mask[12:15, 70:73] = 1
    raster = Raster(mask, transform, f"EPSG:{epsg}")
    look = {"classes": ["a", "b"], "colours": ["#000000", "#ff0000"]}
    drawing = draw([MapLayer("m", raster, "classes", **look)])
    picture = drawing.layers[0].pictures[0]
    for row, column, expected in ((13, 71, 255), (13, 60, 0), (30, 71, 0)):
        point = x + (column + 0.5) * pixel, y - (row + 0.5) * pixel
        lon, lat = to_crs(f"EPSG:{epsg}", "EPSG:4326", [point[0]], [point[1]])
        assert at(picture, lon[0], lat[0])[0] == expected


def test_nodata_is_transparent_in_arrays_and_files(tmp_path):
    image = np.random.default_rng(0).uniform(0, 1, (3, 50, 50)).astype("f4")
    image[:, 20:30, 20:30] = np.nan
    transform = from_bounds(0, 0, 1, 1, 50, 50)
    path = tmp_path / "scene.tif"
    stored = np.nan_to_num(image, nan=-9.0)
    with rasterio.open(path, "w", driver="GTiff", width=50, height=50, count=3,
                       dtype="float32", crs="EPSG:4326", transform=transform,
                       nodata=-9.0) as raster:  # fmt: skip
        raster.descriptions = ("RED", "GREEN", "BLUE")
        raster.write(stored)
    for source in (Raster(image, transform, "EPSG:4326"), path):
        layer = MapLayer("image", source, bands=["RED", "GREEN", "BLUE"])
        picture = draw([layer]).layers[0].pictures[0]
        assert at(picture, 0.5, 0.5)[3] == 0
        assert at(picture, 0.2, 0.2)[3] == 255


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_a_file_without_nodata_ends_where_it_ends(tmp_path, dtype, count):
    """Its corners in Web Mercator are empty; a zero within it is a value."""
    path, transform = tmp_path / "scene.tif", Affine(30, 8, 5e5, 8, -30, 4e6)
    with rasterio.open(path, "w", driver="GTiff", width=40, height=40, count=count,
                       dtype=dtype, crs="EPSG:32630", transform=transform,
                       photometric="MINISBLACK") as raster:  # fmt: skip
        raster.write(np.zeros((count, 40, 40), dtype))
    layer = MapLayer("m", path, "classes", classes=["a"], colours=["#ff0000"])
    if count >= 3:
        layer = MapLayer("m", path, bands=["RED", "GREEN", "BLUE", "NIR_NARROW",
                                           "SWIR_1", "SWIR_2"][:count])  # fmt: skip
    alpha = pixels(draw([layer]).layers[0].pictures[0])[..., 3]
    corners = [alpha[i, j] for i in (0, -1) for j in (0, -1)]
    assert corners.count(0) >= 2 and alpha[alpha.shape[0] // 2, 20:30].all()


def test_a_fourth_band_marked_alpha_is_the_mask(tmp_path):
    path = tmp_path / "scene.tif"
    with rasterio.open(path, "w", driver="GTiff", width=40, height=40, count=4,
                       dtype="uint8", crs="EPSG:32630",
                       transform=Affine(9, 0, 5e5, 0, -9, 4e6)) as raster:  # fmt: skip
        kinds = [*raster.colorinterp[:3], ColorInterp.alpha]
        raster.colorinterp = kinds
        bands = np.full((4, 40, 40), 90, "u1")
        bands[3, :, 20:] = 0
        raster.write(bands)
    layer = MapLayer("m", path, bands=["RED", "GREEN", "BLUE", "NIR_NARROW"])
    alpha = pixels(draw([layer]).layers[0].pictures[0])[..., 3]
    assert alpha[20, 10] == 255 and alpha[20, 30] == 0


def test_prediction_files_carry_their_own_names_and_colours(tmp_path):
    path = tmp_path / "prediction.tif"
    with rasterio.open(path, "w", driver="GTiff", width=8, height=8, count=1,
                       dtype="uint8", crs="EPSG:4326", nodata=255,
                       transform=from_bounds(0, 0, 1, 1, 8, 8)) as raster:  # fmt: skip
        raster.write_colormap(1, {0: (1, 2, 3, 255), 1: (250, 0, 0, 255)})
        raster.update_tags(classes=json.dumps(["land", "water"]))
        raster.write(np.eye(8, dtype=np.uint8)[None])
    layer = draw([MapLayer("p", path, "classes")]).layers[0]
    assert layer.legend.entries == (("#010203", "land"), ("#fa0000", "water"))
    assert at(layer.pictures[0], 0.06, 0.94) == (250, 0, 0, 255)


def test_errors_are_where_truth_and_prediction_differ():
    drawn = {one.name: one for one in draw(layers(chips(side=1))).layers}
    perfect, land = drawn["errors of lora"], drawn["errors of frozen"]
    assert (pixels(perfect.pictures[0])[..., 3] == 0).all()
    shown = pixels(land.pictures[0])
    share = (shown[..., 3] > 0).mean()
    assert 0.45 < share < 0.55  # the water half, none of it the unlabelled corner
    assert land.legend.entries[0] == ("#d55e00", f"missed {CLASSES[1]}")
    assert tuple(shown[shown[..., 3] > 0][0][:3]) == (0xD5, 0x5E, 0x00)


def test_neighbours_become_one_mosaic_and_distant_places_stay_apart():
    drawing = draw(layers(chips(FAR)))
    assert [name for name, _ in drawing.places] == ["delta", "savanna"]
    for layer in drawing.layers:
        assert len(layer.pictures) == 2
        high, wide = pixels(layer.pictures[0]).shape[:2]
        assert abs(high - 2 * SIZE) < 8 and abs(wide - 2 * SIZE) < 8


def test_work_grows_with_the_chips_not_with_their_square(monkeypatch):
    """Scattered chips, each a place of its own: twice as many are located as often."""
    located, counts = [], []
    plain = overlays.transform_bounds

    def count(*arguments, **options):
        located.append(1)
        return plain(*arguments, **options)

    monkeypatch.setattr(overlays, "transform_bounds", count)
    for chips_of_a_layer in (6, 12):
        located.clear()
        boxes = [(5 * i, 0, 5 * i + 1, 1) for i in range(chips_of_a_layer)]
        truth = [raster_of(i % 2, box=box) for i, box in enumerate(boxes)]
        guess = [raster_of(0, box=box) for box in boxes]
        names = {"classes": ["a", "b"], "colours": ["#000000", "#ffffff"]}
        errors = MapLayer("errors", guess, "errors", truth=truth, **names)
        drawing = draw([MapLayer("truth", truth, "classes", **names), errors])
        found = np.array([pixels(p)[4, 4] for p in drawing.layers[1].pictures])
        _, shares = np.unique(found, axis=0, return_counts=True)
        assert sorted(shares) == [chips_of_a_layer // 2] * 2  # right and wrong
        counts.append(len(located))
    assert counts[1] == 2 * counts[0]


def test_large_scenes_are_thinned_out_and_it_is_said(capsys):
    big = Raster(np.zeros((40, 3000), np.uint8), from_bounds(0, 0, 30, 0.4, 3000, 40),
                 "EPSG:4326", "plain")  # fmt: skip
    drawing = draw([MapLayer("big", big, "classes", classes=["a"])])
    assert max(pixels(drawing.layers[0].pictures[0]).shape) == 1500
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and "plain is 3000 pixels" in said[0]
    draw(layers(chips(side=1)))
    assert capsys.readouterr().out == ""


def test_values_have_a_ramp_with_ends_and_unit():
    values = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    raster = Raster(values, from_bounds(0, 0, 1, 1, 10, 10), "EPSG:4326")
    layer = MapLayer("density", raster, "values", limits=(0, 2), unit="m")
    legend = draw([layer]).layers[0].legend
    assert legend.limits == (0, 2) and legend.unit == "m"
    ramp = [tuple(colour) for colour in ramp_colours()]
    assert all(step - ramp.index(colour) < 2 for step, colour in enumerate(ramp))
    drawn = pixels(draw([layer]).layers[0].pictures[0])
    assert {tuple(rgba[:3]) for rgba in drawn.reshape(-1, 4) if rgba[3]} <= set(ramp)
    assert legend.entries[0][1] == "0 m" and legend.entries[-1][1] == "2 m"


def raster_of(value, dtype=np.uint8, crs="EPSG:4326", box=(0, 0, 1, 1)):
    return Raster(np.full((8, 8), value, dtype), from_bounds(*box, 8, 8), crs)


@pytest.mark.parametrize(("make", "text"), [
    (lambda: MapLayer("a", raster_of(0), "picture"), "kind='picture'.*image, classes"),
    (lambda: MapLayer("a", raster_of(0), opacity=2), "opacity=2"),
    (lambda: MapLayer("a", raster_of(0), "errors", classes=["x"]), "truth="),
    (lambda: MapLayer("a", raster_of(0), "classes"), "needs classes="),
    (lambda: MapLayer("a", raster_of(7), "classes", classes=["x"]), "holds .7"),
    (lambda: MapLayer("a", raster_of(0, crs=None), "values"), "coordinate system"),
    (lambda: MapLayer("a", raster_of(0, box=(0, 80, 1, 89)), "values"), "85 degrees"),
    (lambda: MapLayer("a", Raster(np.zeros((3, 8, 8)), from_bounds(0, 0, 1, 1, 8, 8),
                                  "EPSG:4326")), "which band is which"),
    (lambda: MapLayer("a", [], "values"), "empty list"),
])  # fmt: skip
def test_bad_layers_say_what_to_do(make, text):
    with pytest.raises(ValueError, match=text):
        draw([make()])


def test_bad_maps_say_what_to_do(tmp_path):
    one = MapLayer("a", raster_of(0), "values")
    with pytest.raises(ValueError, match="a unique name"):
        show_map([one, one])
    with pytest.raises(ValueError, match="one or more layers"):
        show_map([])
    with pytest.raises(ValueError, match="'b'. Known: a"):
        show_map([one], swipe=("a", "b"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_map([one], tmp_path / "nowhere" / "map.html")
    with pytest.raises(ValueError, match="2 predictions for 1 chips"):
        chip_layers(chips(side=1), "hls", CLASSES, COLOURS, {"p": [0, 0]})
    with pytest.raises(ValueError, match=r"no place on a map.*show_chip"):
        chip_layers([{"image": np.zeros((6, 8, 8)), "mask": 0}], "hls", CLASSES)


# --- text forms -----------------------------------------------------------------------


def test_names_are_text_everywhere():
    scene = show_map(layers(chips(side=1)))
    assert EVIL not in scene.page()
    assert EVIL not in unescape(map_html(scene))
    bundle = scene._repr_mimebundle_()
    assert EVIL not in bundle["text/html"]
    legend = legend_html(scene.drawing)
    assert EVIL not in legend and "&lt;img src=x" in legend


def test_notebooks_get_the_widget_and_the_page():
    bundle = show_map(layers(chips(side=1)))._repr_mimebundle_()
    assert "model_id" in bundle["application/vnd.jupyter.widget-view+json"]
    assert bundle["text/html"].startswith("<iframe srcdoc=")


def test_widget_asks_for_no_tiles_and_gives_each_layer_its_own_pane():
    import ipyleaflet

    scene = show_map(layers(chips(FAR)), swipe=("truth", "lora"))
    assert scene.widget is scene.widget
    tiles = [one for one in scene.map.layers if isinstance(one, ipyleaflet.TileLayer)]
    assert tiles == []
    split = [c for c in scene.map.controls if isinstance(c, ipyleaflet.SplitMapControl)]
    assert len(split) == 1
    assert {o.pane for o in split[0].left_layer} == {"layer-1"}
    assert {o.pane for o in split[0].right_layer} == {"layer-2"}
    # A layer on one side of the swipe is not on the map a second time.
    held = on_map(scene)
    assert len(set(held)) == len(held) == 2 * 6


def control(scene, name):
    """A control of the widget, by its CSS class."""
    return next(w for w in inside(scene.widget) if f"gpk-{name}" in w._dom_classes)


def inside(widget):
    """A widget and all widgets in it, from top to bottom."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)


def rows(scene):
    """Names of the layers in the side panel, the topmost first."""
    found = [w for w in inside(scene.widget) if "gpk-layer" in w._dom_classes]
    return [switch.description for switch in found]


def on_map(scene):
    """The pictures on the map, from bottom to top; those of a swipe come last."""
    import ipyleaflet

    split = [c for c in scene.map.controls if isinstance(c, ipyleaflet.SplitMapControl)]
    groups = [la for la in scene.map.layers if isinstance(la, ipyleaflet.LayerGroup)]
    held = [layer for group in groups for layer in group.layers]
    held += [layer for c in split for layer in (*c.left_layer, *c.right_layer)]
    return [one for one in held if isinstance(one, ipyleaflet.ImageOverlay)]


def test_the_controls_move_the_map_and_end_the_swipe():
    import ipyleaflet

    scene = show_map(layers(chips(FAR)), swipe=("truth", "frozen"))
    here = scene.map.center
    assert control(scene, "places").options == (("delta", 0), ("savanna", 1))
    control(scene, "places").value = 1  # savanna
    ((south, west), (north, east)) = scene.drawing.places[1][1]
    lat, lon = scene.map.center
    assert (lat, lon) != here and south < lat < north and west < lon < east
    control(scene, "swipe").value = False
    assert not [c for c in scene.map.controls
                if isinstance(c, ipyleaflet.SplitMapControl)]  # fmt: skip
    visible = {o.name for o in on_map(scene) if o.visible}
    assert visible == {"image", "truth"}  # "frozen" is off without the swipe


def test_layers_are_taken_away_and_put_in_order():
    scene = show_map(layers(chips(FAR)), swipe=("truth", "lora"))
    names = rows(scene)[::-1]
    control(scene, "chosen").value = "frozen"
    control(scene, "up").click()
    moved = [n for n in names if n != "frozen"]
    moved.insert(names.index("frozen") + 1, "frozen")
    assert rows(scene)[::-1] == [la.name for la in scene.layers] == moved
    panes = {o.name: int(o.pane.split("-")[1]) for o in on_map(scene)}
    assert sorted(panes, key=panes.get) == moved, "the pictures lie in another order"
    assert scene.swipe == (moved.index("truth"), moved.index("lora"))
    control(scene, "chosen").value = "lora"
    control(scene, "remove").click()
    left = [n for n in moved if n != "lora"]
    assert rows(scene)[::-1] == left == [la.name for la in scene.drawing.layers]
    assert {o.name for o in on_map(scene)} == set(left)
    assert scene.swipe is None and "lora" in scene.page()  # "errors of lora"
    with pytest.raises(ValueError, match="no layer 'lora'"):
        scene.remove("lora")
    for name in left[1:]:
        scene.remove(name)
    with pytest.raises(ValueError, match="only layer"):
        scene.remove(left[0])


def test_errors_are_drawn_over_a_swipe_and_what_covers_it_is_switched_off():
    scene = show_map(layers(chips(side=1)), swipe=("image", "lora"))
    switches = {w.description: w for w in inside(scene.widget)
                if "gpk-layer" in w._dom_classes}  # fmt: skip
    switches["errors of lora"].value = True
    visible = {o.name for o in on_map(scene) if o.visible}
    assert visible == {"image", "lora", "errors of lora"}
    off = {name for name, switch in switches.items() if switch.disabled}
    assert off == {"image", "truth", "lora", "frozen"}


def test_a_box_leaves_the_divider_alone_and_places_have_names_of_their_own():
    def paint(box):
        return [MapLayer("box", raster_of(1, box=box), "classes", classes=["a", "b"])]

    scene = show_map(layers(chips(FAR)), swipe=("truth", "lora"), on_box=paint)
    assert rows(scene)
    pencil = next(c for c in scene.map.controls if type(c).__name__ == "DrawControl")
    for number in range(12):
        draw_box(pencil, (1.0 + number, 2.0, 1.5 + number, 2.5))
    panes = {o.pane for o in on_map(scene)}
    assert len(panes) == len(scene.layers) == 18 and panes <= set(scene.map.panes)
    names = [name for name, _ in scene.drawing.places]
    assert len(set(names)) == len(names) == 14
    assert sum(type(c).__name__ == "SplitMapControl" for c in scene.map.controls) == 1


def test_the_first_view_and_home_show_the_whole_place():
    scene = show_map(layers(chips(FAR)))
    assert scene.widget is not None
    (south, west), (north, east) = scene.drawing.places[0][1]
    for wide in (300, 1200):  # pixels
        scene.map.zoom = 3
        scene.map.set_trait("pixel_bounds", ((0.0, 0.0), (float(wide), 520.0)))
        assert scene.map.zoom != 3 or wide == 1200, "the first view was not fitted"
        control(scene, "home").click()
        pixels = (east - west) / 360 * 256 * 2**scene.map.zoom
        assert 0.3 * min(wide, 520) < pixels <= wide
    assert scene.map.center == pytest.approx(
        ((south + north) / 2, (west + east) / 2), abs=1e-3
    )


def test_the_map_says_where_the_mouse_is():
    scene = show_map(layers(chips(side=1)))
    assert scene.widget is not None
    for handler in scene.map._interaction_callbacks.callbacks:
        handler(type="mousemove", coordinates=(-1.5, 2.25))
    texts = [c.widget.value for c in scene.map.controls if hasattr(c, "widget")]
    assert "1.50000° S, 2.25000° E" in texts


def test_an_unknown_basemap_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match=r"Esri\.WorldImagery"):
        show_map(layers(chips(side=1)), basemap="Esri.WorldImagry")
    base = show_map(layers(chips(side=1)), basemap="Esri.WorldImagery").map.layers[0]
    assert base.max_zoom == 24 and base.max_native_zoom <= 24


@pytest.mark.slow
def test_tools_are_leafmaps_and_keep_what_is_drawn():
    import ipyleaflet

    scene = show_map(layers(chips(side=1)), swipe=("truth", "lora"), tools=True)
    assert scene.map in inside(scene.widget)
    kinds = {type(control).__name__ for control in scene.map.controls}
    assert {"DrawControl", "MeasureControl", "SplitMapControl"} <= kinds
    tiles = [one for one in scene.map.layers if isinstance(one, ipyleaflet.TileLayer)]
    assert [tile.url for tile in tiles] == [""]
    pencil = next(c for c in scene.map.controls if type(c).__name__ == "DrawControl")
    draw_box(pencil, (1.0, 2.0, 1.5, 2.5))
    (feature,) = scene.map.user_rois["features"]
    assert feature["geometry"]["coordinates"][0][2] == [1.5, 2.5]


def test_tools_without_leafmap_say_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install leafmap"):
        show_map(layers(chips(side=1)), tools=True)


@pytest.mark.parametrize("name", ["tooltip", "description_tooltip"])
def test_a_tooltip_is_named_as_the_version_of_ipywidgets_names_it(name):
    class Widget:
        @classmethod
        def class_trait_names(cls):
            return ["value", name]

    assert tooltip(Widget, "a layer") == {name: "a layer"}


# --- the numbers behind a click -------------------------------------------------------


def with_probabilities(samples):
    """A method that is sure of water in the north, and layers of everything."""
    chances = []
    for number, sample in enumerate(samples):
        water = np.where(sample["mask"] == 1, 0.9, 0.25 + number / 100)
        chances.append(np.stack([1 - water, water]).astype("f4"))
    distances = [np.full((SIZE, SIZE), 0.2 + 0.3 * n) for n in range(len(samples))]
    return chip_layers(
        samples, "hls", CLASSES, COLOURS, {"lora": chances}, false_colour=True,
        distances=distances, threshold=0.6,
    )  # fmt: skip


def where(sample, row, column):
    """Degrees of the middle of a pixel."""
    west, _, _, north = sample["bounds"]
    x, y = west + 10 * (column + 0.5), north - 10 * (row + 0.5)
    (lon,), (lat,) = to_crs(sample["crs"], "EPSG:4326", [x], [y])
    return lon, lat


@pytest.mark.parametrize(("chip", "row", "column"), [
    (0, 0, 0), (1, 19, 39), (3, 20, 17), (2, 35, 35),
])  # fmt: skip
def test_a_pixel_holds_the_numbers_of_its_sources(chip, row, column):
    samples = chips(FAR)
    scene = show_map(with_probabilities(samples))
    sample = samples[chip]
    found = {r.layer: r for r in scene.pixel(*where(sample, row, column))}
    image = sample["image"][:, row, column]
    assert found["image"].values == pytest.approx(image.tolist())
    assert found["image, false colour"].values == found["image"].values
    assert found["truth"].text == CLASSES[sample["mask"][row, column]]
    water = 0.9 if row < SIZE // 2 else 0.25 + chip / 100
    assert found["lora"].values == pytest.approx([1 - water, water])
    assert found["lora"].text == CLASSES[int(water > 0.5)]
    sure = found["confidence of lora"].values[0]
    assert sure == pytest.approx(max(water, 1 - water))
    far = 0.2 + 0.3 * chip
    assert found["distance to training"].values[0] == pytest.approx(far)
    assert ("outside the area of applicability" in found) == (far > 0.6)


def test_where_nothing_is_known_a_pixel_says_so():
    samples = chips(side=1)
    scene = show_map(with_probabilities(samples))
    assert scene.pixel(0.0, 0.0) == []
    found = {r.layer for r in scene.pixel(*where(samples[0], SIZE - 1, SIZE - 1))}
    assert "truth" not in found and "lora" in found  # not labelled there


def test_a_pixel_of_files_is_scaled_and_named(tmp_path):
    path = tmp_path / "scene.tif"
    profile = {"width": 4, "height": 4, "count": 2, "dtype": "uint16", "nodata": 0}
    transform = from_bounds(10, 50, 10.4, 50.4, 4, 4)
    with rasterio.open(
        path, "w", driver="GTiff", crs="EPSG:4326", transform=transform, **profile
    ) as raster:
        raster.write(np.arange(32, dtype=np.uint16).reshape(2, 4, 4))
        raster.scales, raster.descriptions = (0.1, 0.1), ("RED", EVIL)
    layer = MapLayer("f", path, "image", show=("RED", "RED", "RED"))
    (reading,) = read_pixel([layer], 10.25, 50.35)
    assert reading.names == ("RED", EVIL)
    assert reading.values == pytest.approx((0.2, 1.8))
    assert read_pixel([layer], 10.05, 50.35) == []  # nodata
    assert EVIL not in pixel_html([reading], 10.25, 50.35)


def test_a_click_shows_them_and_names_stay_text():
    samples = chips(side=1)
    scene = show_map(with_probabilities(samples))
    panel = control(scene, "pixel")
    lon, lat = where(samples[0], 3, 5)
    for handler in scene.map._interaction_callbacks.callbacks:
        handler(type="mousemove", coordinates=(lat, lon))
    assert panel.value == ""
    for handler in scene.map._interaction_callbacks.callbacks:
        handler(type="click", coordinates=(lat, lon))
    assert EVIL not in panel.value and "&lt;img src=x" in panel.value
    assert "90%" in panel.value and "data:image/png" in panel.value


def test_a_box_becomes_a_layer_and_an_error_becomes_a_sentence():
    samples = chips(FAR)
    boxes = []

    def predict(box):
        boxes.append(box)
        if box[0] < 0:
            raise ValueError(f"nothing known at {EVIL}")
        return [MapLayer("truth", raster_of(1, box=box), "classes", classes=["a", "b"])]

    scene = show_map(layers(samples), on_box=predict)
    before = rows(scene)
    pencil = next(c for c in scene.map.controls if type(c).__name__ == "DrawControl")
    draw_box(pencil, (1.0, 2.0, 1.5, 2.5))
    assert boxes == [(1.0, 2.0, 1.5, 2.5)]
    assert [la.name for la in scene.drawing.layers][-1] == "truth 2"
    assert rows(scene) == ["truth 2", *before]
    assert "truth 2" in scene.page()
    draw_box(pencil, (-1.0, 2.0, 1.5, 2.5))
    assert len(scene.layers) == 7
    text = control(scene, "pixel").value
    assert "no layer" in text and EVIL not in text


def draw_box(pencil, box):
    west, south, east, north = box
    ring = [[west, south], [west, north], [east, north], [east, south], [west, south]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    for handler in pencil._draw_callbacks.callbacks:
        drawn = {"type": "Feature", "properties": {"style": {}}, "geometry": shape}
        handler(pencil, action="created", geo_json=drawn)


def test_plain_import_loads_no_map_library():
    code = (
        "import sys, geopeft_kit.maps as m; "
        "print([n for n in ('leafmap', 'ipyleaflet', 'torch') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- in a real browser ----------------------------------------------------------------


def pane(page, name: str, what: str) -> str:
    script = "([name, what]) => [...document.querySelectorAll('.leaflet-pane')]" \
        ".find(p => p.dataset.layer === name).style[what]"  # fmt: skip
    return page.evaluate(script, [name, what])


def row(page, name: str):
    return page.locator(".layer").filter(has=page.get_by_text(name, exact=True))


@pytest.mark.browser
def test_page_in_a_browser(visit, tmp_path):
    scene = show_map(layers(chips(FAR)), swipe=("truth", "frozen"))
    visit.page.goto(scene.save(tmp_path / "map.html").as_uri())
    page = visit.page
    page.wait_for_selector(".leaflet-image-layer")

    # all pictures really arrived
    widths = page.eval_on_selector_all(
        ".leaflet-image-layer", "all => all.map(i => i.complete && i.naturalWidth)"
    )
    assert len(widths) == 12 and all(widths)

    # the legend shows the evil name as text
    assert EVIL in page.locator(".legend").first.inner_text().replace("\n", " ")
    assert page.evaluate("window.hacked") is None

    # swipe: dragging the divider moves both cuts
    before = pane(page, "truth", "clipPath"), pane(page, "frozen", "clipPath")
    picture = page.screenshot()
    box = page.locator("#divider").bounding_box()
    x, y = box["x"] + box["width"] / 2, 350
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 150, y, steps=4)
    page.mouse.up()
    after = pane(page, "truth", "clipPath"), pane(page, "frozen", "clipPath")
    assert before[0] != after[0] and before[1] != after[1]
    assert page.locator("#divider").bounding_box()["x"] == pytest.approx(box["x"] + 150)
    assert page.screenshot() != picture
    page.locator("#divider").press("ArrowLeft")
    assert pane(page, "truth", "clipPath") != after[0]

    # without swipe nothing is cut and what is off is hidden
    page.locator("#swipe").uncheck()
    assert pane(page, "frozen", "clipPath") == ""
    assert pane(page, "frozen", "display") == "none"
    row(page, "frozen").locator("input[type=checkbox]").check()
    assert pane(page, "frozen", "display") == ""

    # opacity
    picture = page.screenshot()
    row(page, "frozen").locator("input[type=range]").fill("0.3")
    assert pane(page, "frozen", "opacity") == "0.3"
    assert page.screenshot() != picture

    # go to
    first = page.locator(".leaflet-image-layer").first
    here = first.bounding_box()
    page.select_option("#places", label="savanna")
    page.wait_for_timeout(500)
    assert first.bounding_box() != here
    visit.clean()


def click(page, lon: float, lat: float) -> dict[str, str]:
    """Click a place of the stand-alone page: layer -> what the popup says."""
    point = page.evaluate(
        "([lat, lon]) => map.latLngToContainerPoint([lat, lon])", [lat, lon]
    )
    box = page.locator("#map").bounding_box()
    page.mouse.click(box["x"] + point["x"], box["y"] + point["y"])
    page.locator(".leaflet-popup-content .pixel").wait_for()
    page.wait_for_timeout(400)  # the map moves where the popup would not be seen whole
    lines = page.locator(".leaflet-popup-content .pixel span").all_inner_texts()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.browser
def test_a_click_on_the_page_says_what_the_sources_hold(visit, tmp_path):
    samples = chips(FAR)
    scene = show_map(with_probabilities(samples))
    page = visit.page
    page.goto(scene.save(tmp_path / "map.html").as_uri())
    page.wait_for_selector(".leaflet-image-layer")
    limits = {la.name: la.legend.limits for la in scene.drawing.layers if la.legend}
    for chip, row_, column in ((0, 3, 5), (1, 30, 20), (3, 12, 30), (7, 25, 8)):
        page.select_option("#places", label=samples[chip]["region"])
        page.wait_for_timeout(400)
        place = where(samples[chip], row_, column)
        said = click(page, *place)
        known = [r for r in scene.pixel(*place) if r.kind != "image"]
        assert {r.layer for r in known} <= set(said)
        for reading in known:
            if reading.kind == "classes":
                assert said[reading.layer] == reading.text
                continue
            low, high = limits[reading.layer]
            number = float(said[reading.layer].lstrip("\u2264\u2265 "))
            wanted = min(max(reading.values[0], low), high)
            assert number == pytest.approx(wanted, abs=(high - low) / 128 + 1e-3)
        truth, guess = said["truth"], said["lora"]
        assert ("errors of lora" in said) == (truth != guess)
        assert "image" not in said  # colours are no reflectance
    page.screenshot(path=tmp_path / "click.png")
    assert page.evaluate("window.hacked") is None
    assert click(page, *where(samples[4], 12, -4)) == {}  # west of the chips
    assert "no data here" in page.locator(".pixel").inner_text()
    visit.clean()


@pytest.mark.browser
def test_frame_in_another_page(visit, tmp_path):
    """As an exported notebook carries it: inside an iframe that shares nothing."""
    path = tmp_path / "notebook.html"
    path.write_text(f"<h1>A notebook</h1>{map_html(layers(chips(side=1)), 400)}")
    visit.page.goto(path.as_uri())
    frame = visit.page.frame_locator("iframe")
    frame.locator(".leaflet-image-layer").first.wait_for()
    assert frame.locator(".layer").count() == 6
    assert visit.page.locator("iframe").bounding_box()["height"] >= 400
    frame.locator("#map").click()
    assert "truth: " in frame.locator(".leaflet-popup-content").inner_text()
    visit.clean()
