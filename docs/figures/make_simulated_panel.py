"""Draw `simulated_panel.png`: what the simulated world looks like.

    python docs/figures/make_simulated_panel.py

Six regions in true colour, then land cover, a flood and a fire with their labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from geopeft_kit.world import LAND_COVER_CLASSES, REGIONS, Scene, simulate_scene

TARGET = Path(__file__).with_name("simulated_panel.png")
SIDE, BORDER, CAPTION = 160, 3, 13
PLACES = {
    "temperate": 52,
    "mediterranean": 55,
    "arid": 50,
    "boreal": 57,
    "delta": 58,
    "savanna": 55,
}


def composite(
    scene: Scene, bands: tuple[str, str, str], image: np.ndarray | None = None
) -> np.ndarray:
    """Three bands as uint8 RGB; bright clouds do not count for the stretch."""
    image = scene.image if image is None else image
    ground = image[scene.bands.index("BLUE")] < 0.3
    layers = []
    for name in bands:
        layer = image[scene.bands.index(name)]
        low, high = np.percentile(layer[ground], [0.5, 99.2])
        layers.append(np.clip((layer - low) / (high - low), 0, 1) ** 0.8)
    return (255 * np.stack(layers, -1)).astype(np.uint8)


def true_colour(scene: Scene, image: np.ndarray | None = None) -> np.ndarray:
    """Red, green and blue with one common stretch, as the eye would see it."""
    image = scene.image if image is None else image
    rgb = np.stack([image[scene.bands.index(b)] for b in ("RED", "GREEN", "BLUE")], -1)
    ground = rgb[..., 2] < 0.3
    low = np.percentile(rgb[ground], 1, axis=0) * 0.8  # the haze of this day
    high = np.percentile(rgb[ground], 99.3)
    return (255 * np.clip((rgb - low) / (high - low), 0, 1) ** 0.75).astype(np.uint8)


def coloured(label: np.ndarray, colours: list[str]) -> np.ndarray:
    """Class numbers as uint8 RGB."""
    table = [[int(text[k : k + 2], 16) for k in (1, 3, 5)] for text in colours]
    return np.array(table, np.uint8)[label]


def tiles() -> list[tuple[str, np.ndarray]]:
    """Captions and pictures, in reading order."""
    shown = [
        (region, true_colour(simulate_scene(region, seed, pair=False)))
        for region, seed in PLACES.items()
    ]
    cover = simulate_scene("temperate", PLACES["temperate"], pair=False)
    colours = list(LAND_COVER_CLASSES.values())
    shown.append(
        ("temperate: NIR-R-G", composite(cover, ("NIR_NARROW", "RED", "GREEN")))
    )
    shown.append(("land cover", coloured(cover.labels["land_cover"], colours)))
    wet = simulate_scene("temperate", 20, event="flood", pair=False)
    water = wet.labels["flood"] + wet.labels["permanent_water"]
    shown.append(
        ("flood: SWIR1-NIR-R", composite(wet, ("SWIR_1", "NIR_NARROW", "RED")))
    )
    shown.append(
        ("flood, permanent water", coloured(water, ["#e0dfd8", "#5aa9ef", "#153f9e"]))
    )
    fire = simulate_scene("boreal", 31, event="burn", pair=False)
    shown.append(
        ("fire: SWIR2-NIR-R", composite(fire, ("SWIR_2", "NIR_NARROW", "RED")))
    )
    shown.append(("fresh scar", coloured(fire.labels["burn"], ["#e0dfd8", "#d1495b"])))
    return shown


def main() -> None:
    """Put the tiles together and write a small PNG."""
    shown = tiles()
    assert len(PLACES) == len(REGIONS)
    columns = 4
    rows = -(-len(shown) // columns)
    step = SIDE + BORDER
    size = (columns * step - BORDER, rows * (step + CAPTION) - BORDER)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for number, (caption, picture) in enumerate(shown):
        x, y = number % columns * step, number // columns * (step + CAPTION)
        draw.text((x + 1, y), caption, fill="black", font_size=11)
        corner = (picture.shape[0] - SIDE) // 2
        picture = picture[corner : corner + SIDE, corner : corner + SIDE]
        page.paste(Image.fromarray(picture), (x, y + CAPTION))
    # A palette keeps the file small.
    page = page.quantize(112, kmeans=2, dither=Image.Dither.NONE)
    page.save(TARGET, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
