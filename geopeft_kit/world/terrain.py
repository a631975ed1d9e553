"""Relief and water of a simulated scene.

A river is the zero line of a tilted random field; the valley grows from it, so the
height above the river is known exactly, and streams find their own way into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from geopeft_kit.world.drainage import drainage, stream_distance
from geopeft_kit.world.noise import (
    curve_distance,
    fractal_noise,
    gradient,
    quantile,
    smoothstep,
)
from geopeft_kit.world.regions import Region

PIXEL = 10.0
"""Pixel size in metres."""


@dataclass
class Terrain:
    """Relief and water; every field is (size, size) float32."""

    height: np.ndarray  # metres
    hand: np.ndarray  # height above the nearest river or lake, metres
    slope: np.ndarray  # metres per metre
    wet: np.ndarray  # soil moisture from position, 0-1
    water: np.ndarray  # share of the pixel under permanent water
    river: np.ndarray  # signed distance to the bank, pixels, below 0 inside
    side: np.ndarray  # which bank: signed distance to the middle of the river
    stream: np.ndarray  # distance to the nearest stream, pixels
    flow: np.ndarray  # upstream area of that stream, coarse cells
    lake: np.ndarray  # share of the pixel under a lake


def build_terrain(region: Region, rng: np.random.Generator, size: int) -> Terrain:
    """Shape the relief around a meandering river and let streams run into it."""
    grid = np.arange(size, dtype=np.float32) - size / 2
    rough = fractal_noise(rng, size, 4.2, 14)
    hills = 0.7 * rough + 0.04 * fractal_noise(rng, size, 3.0, 8)
    if region.relief > 100:  # ridges; on a plain they would look like worms
        hills += 0.5 - 0.7 * np.abs(fractal_noise(rng, size, 4.4, 20))
    side, river, distance = _rivers(region, rng, size, grid)
    valley = rng.uniform(30, 75)
    hand = region.relief * np.maximum(0.5 + 0.3 * hills, 0.04)
    hand *= np.clip(distance / valley, 0, 1) ** 1.3 * 0.8
    hand = (hand + 0.02 * distance) * smoothstep(river, 0, 5)
    lake, basin = _lakes(region, rng, size, rough)
    hand *= 1 - smoothstep(basin, -1.6, 0)
    angle = rng.uniform(0, 2 * np.pi)
    tilt = 0.02 * (grid[:, None] * math.sin(angle) + grid * math.cos(angle))
    height = hand + tilt
    water = np.maximum(np.clip(0.5 - river, 0, 1), np.clip(lake + 0.5, 0, 1))
    stream, flow = _streams(height, water, size)
    carve = np.log1p(flow) / 7 * np.exp(-((stream / 4.0) ** 2))
    hand = hand * (1 - 0.5 * np.clip(carve, 0, 1))
    if region.dryness < 0.7:  # elsewhere the small streams are dry
        brook = np.clip(flow / 700, 0.05, 0.9)
        water = np.maximum(water, np.clip(brook + 0.5 - stream, 0, 1) * brook)
    rows, columns = gradient(height)
    slope = np.sqrt(rows**2 + columns**2) / PIXEL
    wet = 0.9 * np.exp(-hand / (1.0 + 0.04 * region.relief)) + 0.5 * carve
    return Terrain(
        height=height,
        hand=hand,
        slope=slope,
        wet=np.clip(wet, 0, 1),
        water=water,
        river=river,
        side=side,
        stream=stream,
        flow=flow,
        lake=np.clip(lake + 0.5, 0, 1),
    )


def _rivers(
    region: Region, rng: np.random.Generator, size: int, grid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zero lines of tilted noise: distances in pixels, (H, W) each.

    To the middle of the river (signed), to its bank, and one that stays smooth far
    away, for the shape of the valley.
    """
    angle = rng.uniform(0, np.pi)
    low, high = (math.log(width) for width in region.river_width)
    width_noise = np.exp(0.25 * fractal_noise(rng, size, 3.0, 12))
    far = np.full((size, size), 1e3, np.float32)
    middle, bank, away = far, far, far
    for number in range(region.rivers):
        turn = angle + rng.normal(0, 0.35) * (number > 0)
        shift = rng.uniform(-0.33, 0.33) * 256
        across = grid[:, None] * math.cos(turn) + grid * math.sin(turn) - shift
        bends = rng.uniform(16, 36)
        field = across + bends * fractal_noise(rng, size, 4.2, 20)
        signed = curve_distance(field)
        half = math.exp(rng.uniform(low, high)) * (0.55 if number else 1.0)
        to_bank = _without_rings(np.abs(signed) - half * width_noise)
        middle = np.where(to_bank < bank, signed, middle)
        bank = np.minimum(bank, to_bank)
        away = np.minimum(away, np.abs(field))
    return middle, bank, away


def _without_rings(to_bank: np.ndarray) -> np.ndarray:
    """Take out courses that close on themselves inside the scene, banks and all."""
    for reach, far in ((0.5, 8.0), (6.0, 60.0)):
        number, count = ndimage.label(to_bank < reach)
        edges = (number[0], number[-1], number[:, 0], number[:, -1])
        runs = np.zeros(count + 1, bool)
        runs[np.concatenate(edges)] = True
        runs[0] = True
        to_bank = np.where(runs[number], to_bank, np.float32(far))
    return to_bank


def _lakes(
    region: Region, rng: np.random.Generator, size: int, rough: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lakes fill the lowest basins: distance to the shore, positive inside.

    With the field whose zero line is the shore, which stays smooth far away.
    """
    share = region.lakes * rng.uniform(0.2, 1.8)
    if share < 0.002:
        none = np.full((size, size), -1e3, np.float32)
        return none, none
    basin = fractal_noise(rng, size, 3.7, 12) - 0.4 * rough
    basin -= quantile(basin, 1 - share)
    return curve_distance(basin, 0.004), basin


def _streams(
    height: np.ndarray, water: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Streams of the terrain, traced on a grid four times coarser."""
    coarse = size // 4
    step = coarse * 4
    blocks = height[:step, :step].reshape(coarse, 4, coarse, 4)  # (h, 4, w, 4)
    outlet = water[2:step:4, 2:step:4] > 0.5
    receiver, flow = drainage(blocks.mean((1, 3)), outlet)
    return stream_distance(receiver, flow, (coarse, coarse), size, least=60)


def sand_bars(
    region: Region, rng: np.random.Generator, size: int, terrain: Terrain
) -> np.ndarray:
    """Bars on one side of turbid rivers at a time, none on creeks."""
    noise = fractal_noise(rng, size, 3.4, 12)
    swing = noise * np.sign(terrain.side)
    half = np.abs(terrain.side) - terrain.river  # half width of the river here
    wide = smoothstep(half, 1.2, 3.0)
    reach = 0.5 + 3.5 * smoothstep(swing, 0.5, 2.0)
    bar = np.clip(reach - np.abs(terrain.river + 0.5 * reach), 0, 1)
    bar *= smoothstep(swing, 0.5, 1.0) * wide * min(1.0, 1.4 * region.turbidity)
    if region.dryness > 0.6:  # a dry river bed is wider than its water
        bed = np.clip((0.6 + 1.8 * noise - terrain.river) / 1.5, 0, 1)
        bed *= 0.35 + 0.45 * smoothstep(noise, 0.0, 1.5)
        bar = np.maximum(bar, bed * smoothstep(terrain.river, -0.5, 0.8))
    return bar
