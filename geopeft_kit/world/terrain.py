"""Relief and water of a simulated scene.

A river is the zero line of a tilted random field; the valley grows from it, so the
height above the river is known exactly, and streams find their own way into it.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from geopeft_kit.world.noise import (
    curve_distance,
    fractal_noise,
    gradient,
    hash_unit,
    quantile,
    smoothstep,
)
from geopeft_kit.world.regions import Region


def drainage(height: np.ndarray, outlet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the water of each cell goes, and how much passes it: priority-flood.

    From the outlets and the border, the lowest cell seen so far is taken next, and its
    unseen neighbours drain into it. `height` (h, w) in metres and `outlet` (h, w) bool
    -> index of the cell drained into (h*w,), -1 at outlets and borders, and the number
    of cells upstream (h*w,) float32. Source: Barnes et al. 2014,
    doi:10.1016/j.cageo.2013.04.024.
    """
    rows, columns = height.shape
    wide = columns + 2
    # A frame of seen cells saves the bounds check.
    level = np.pad(height, 1, constant_values=0).ravel().tolist()
    frame = np.pad(np.zeros(height.shape, bool), 1, constant_values=True)
    seen = frame.ravel().tolist()
    border = outlet.copy()
    border[[0, -1]] = border[:, [0, -1]] = True
    start = np.flatnonzero(np.pad(border, 1)).tolist()
    receiver = [-1] * len(level)
    queue = [(level[cell], cell) for cell in start]
    for cell in start:
        seen[cell] = True
    heapq.heapify(queue)
    steps = (-1, 1, -wide, wide, -wide - 1, -wide + 1, wide - 1, wide + 1)
    order = []
    while queue:
        floor, cell = heapq.heappop(queue)
        order.append(cell)
        for step in steps:
            other = cell + step
            if not seen[other]:
                seen[other] = True
                receiver[other] = cell
                filled = level[other]
                heapq.heappush(queue, (filled if filled > floor else floor, other))
    flow = [1.0] * len(level)
    for cell in reversed(order):
        if receiver[cell] >= 0:
            flow[receiver[cell]] += flow[cell]
    inner = np.arange(len(level)).reshape(rows + 2, wide)[1:-1, 1:-1]
    to = np.asarray(receiver)[inner].ravel()
    to = np.where(to < 0, -1, (to // wide - 1) * columns + to % wide - 1)
    return to, np.asarray(flow, np.float32)[inner].ravel()


def stream_distance(
    receiver: np.ndarray,
    flow: np.ndarray,
    shape: tuple[int, int],
    size: int,
    least: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest stream (pixels) and its flow (cells), (size, size).

    The coarse cells of `drainage` with a flow of at least `least` are joined to lines,
    which are smoothed along their course before they are drawn on the fine grid.
    """
    cells = np.flatnonzero((flow > least) & (receiver >= 0))
    if cells.size == 0:
        nowhere = np.full((size, size), 1e3, np.float32)
        return nowhere, np.zeros_like(nowhere)
    scale = size / shape[0]
    every = np.arange(receiver.size)
    place = np.stack([every // shape[1], every % shape[1]], 1).astype(np.float32)
    place += np.stack([hash_unit(every, 3), hash_unit(every, 4)], 1) * 0.7 - 0.35
    donor = np.arange(receiver.size)
    ascending = cells[np.argsort(flow[cells], kind="stable")]
    donor[receiver[ascending]] = ascending  # the largest one is written last
    below = np.where(receiver >= 0, receiver, every)
    for _ in range(4):
        place[cells] = (
            0.4 * place[cells] + 0.3 * place[below[cells]] + 0.3 * place[donor[cells]]
        )
    steps = int(np.ceil(scale * 2.2))
    along = np.linspace(0, 1, steps, dtype=np.float32)[:, None, None]  # (steps, 1, 1)
    points = place[cells] * (1 - along) + place[below[cells]] * along  # (steps, n, 2)
    points = ((points + 0.5) * scale - 0.5).reshape(-1, 2)
    carried = np.tile(flow[cells], along.shape[0])
    pixel = np.rint(points).astype(int)
    inside = ((pixel >= 0) & (pixel < size)).all(1)
    points, pixel, carried = points[inside], pixel[inside], carried[inside]
    exact = np.zeros((3, size, size), np.float32)
    exact[:, pixel[:, 0], pixel[:, 1]] = points[:, 0], points[:, 1], carried
    dry = np.ones((size, size), bool)
    dry[pixel[:, 0], pixel[:, 1]] = False
    nearest = ndimage.distance_transform_edt(
        dry, return_distances=False, return_indices=True
    )
    row, column, carried = exact[:, nearest[0], nearest[1]]
    grid = np.arange(size, dtype=np.float32)
    return np.hypot(row - grid[:, None], column - grid[None, :]), carried


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
