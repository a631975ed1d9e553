"""Random fields, parcels and drainage: the raw material of the simulated world.

Everything here works in pixels and knows nothing of land cover. Random fields are
drawn in the frequency domain (one inverse FFT each); everything that belongs to a
cell (a field, a house) is a hash of the cell's number, so that it does not depend on
the order of drawing.

Source: spectral synthesis of fractal terrain (Voss 1985, in Fundamental Algorithms
for Computer Graphics); priority-flood drainage (Barnes et al. 2014,
doi:10.1016/j.cageo.2013.04.024).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

OUTER_SCALE = 320.0
"""Wavelength in pixels above which a random field gains no further power."""


@lru_cache(maxsize=128)
def _amplitude(size: int, beta: float, shortest: float) -> np.ndarray:
    """Amplitude of a power law, flat above `OUTER_SCALE`: (size, size//2+1)."""
    rows = np.fft.fftfreq(size)[:, None]
    columns = np.fft.rfftfreq(size)[None, :]
    frequency = np.sqrt(rows**2 + columns**2 + OUTER_SCALE**-2)
    amplitude = frequency ** (-beta / 2)
    if shortest:
        amplitude *= np.exp(-0.5 * (frequency * shortest) ** 2)
    amplitude[0, 0] = 0.0  # no mean
    return amplitude.astype(np.float32)


def fractal_noise(
    rng: np.random.Generator, size: int, beta: float, shortest: float = 0.0
) -> np.ndarray:
    """Draw a random field with a power-law spectrum.

    Args:
        rng: Random generator.
        size: Side in pixels.
        beta: Exponent of the power spectrum: 1-2 grain, 2.5 patches, 3.5-4 hills.
        shortest: Wavelengths well below this (pixels) are smoothed away.

    Returns:
        (size, size) float32, mean 0 and standard deviation 1.
    """
    shape = (size, size // 2 + 1)
    spectrum = np.empty(shape, np.complex64)
    spectrum.real = rng.standard_normal(shape, np.float32)
    spectrum.imag = rng.standard_normal(shape, np.float32)
    spectrum *= _amplitude(size, beta, shortest)
    field = fft.irfft2(spectrum, s=(size, size), overwrite_x=True)
    field /= max(float(field.std()), 1e-12)
    return field


def hash_unit(number: np.ndarray | int, salt: int) -> np.ndarray:
    """Map integers to uniform numbers in [0, 1), the same ones on every machine.

    Args:
        number: Cell numbers, any shape, any integer type.
        salt: Which property of the cell is asked for.

    Returns:
        float32 array of the same shape.

    Source: the `lowbias32` integer hash of Chris Wellons (public domain).
    """
    return (hash_integer(number, salt) >> 8).astype(np.float32) * np.float32(2**-24)


def hash_integer(number: np.ndarray | int, salt: int) -> np.ndarray:
    """Hash integers to uint32; see `hash_unit`."""
    x = np.asarray(number).astype(np.uint32) ^ np.uint32(salt * 0x9E3779B1 & 0xFFFFFFFF)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def smoothstep(x: np.ndarray | float, low: float, high: float) -> np.ndarray:
    """Rise smoothly from 0 at `low` to 1 at `high`."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def quantile(field: np.ndarray, share: float) -> float:
    """Value below which `share` of the field lies, from every fifth pixel."""
    return float(np.quantile(field.ravel()[::5], min(max(share, 0.0), 1.0)))


def gradient(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences (row, column), one-sided at the edges, per pixel."""
    rows, columns = np.empty_like(field), np.empty_like(field)
    rows[1:-1] = (field[2:] - field[:-2]) * 0.5
    rows[0], rows[-1] = field[1] - field[0], field[-1] - field[-2]
    columns[:, 1:-1] = (field[:, 2:] - field[:, :-2]) * 0.5
    columns[:, 0] = field[:, 1] - field[:, 0]
    columns[:, -1] = field[:, -1] - field[:, -2]
    return rows, columns


def curve_distance(field: np.ndarray, steepness: float = 0.35) -> np.ndarray:
    """Signed distance in pixels to the zero line of a field, close to the line.

    A zero line of a smooth random field meanders, forks around islands and leaves
    cut-off loops, as rivers do; drawn lines do not.

    Args:
        field: (H, W).
        steepness: Slopes below this count as this much, so that the distance stays
            finite on plateaus.

    Returns:
        (H, W), positive where the field is.
    """
    rows, columns = gradient(field)
    return field / np.maximum(np.sqrt(rows * rows + columns * columns), steepness)


@dataclass(frozen=True)
class Parcels:
    """The rectangle that each pixel lies in, in the (u, v) frame of its district.

    Attributes:
        number: Cell number, uint32.
        left, right, bottom, top: The rectangle's sides, in pixels.
    """

    number: np.ndarray
    left: np.ndarray
    right: np.ndarray
    bottom: np.ndarray
    top: np.ndarray

    def edge(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Distance of each pixel to the nearest side of its rectangle."""
        across = np.minimum(u - self.left, self.right - u)
        return np.minimum(across, np.minimum(v - self.bottom, self.top - v))

    def at(self, where: np.ndarray) -> Parcels:
        """The parcels of some pixels, given by their flat index."""
        sides = (self.left, self.right, self.bottom, self.top)
        return Parcels(
            self.number.ravel()[where], *(side.ravel()[where] for side in sides)
        )

    def unit(self, salt: int) -> np.ndarray:
        """One uniform number per parcel."""
        return hash_unit(self.number, salt)


@dataclass(frozen=True)
class Layout:
    """How farmland is cut up, all (H, W).

    Attributes:
        u: Pixel coordinate along the fields of the district.
        v: Pixel coordinate across them.
        turn: Angle of the district in radians.
        block: Squares with a road around.
        parcels: The fields.
        edge: Distance to the field's border, pixels.
    """

    u: np.ndarray
    v: np.ndarray
    turn: np.ndarray
    block: Parcels
    parcels: Parcels
    edge: np.ndarray


def square_cells(u: np.ndarray, v: np.ndarray, side: float, salt: int) -> Parcels:
    """Cut the plane into squares of `side` pixels."""
    column, row = np.floor(u / side), np.floor(v / side)
    number = hash_integer(column.astype(np.int64), salt)
    number = hash_integer(number ^ row.astype(np.int64).astype(np.uint32), salt + 1)
    left, bottom = column * side, row * side
    return Parcels(number, left, left + side, bottom, bottom + side)


def split_cells(
    parcels: Parcels,
    u: np.ndarray,
    v: np.ndarray,
    smallest: float,
    levels: int,
    spread: float = 0.5,
    elongation: float = 1.5,
) -> Parcels:
    """Cut each rectangle in two, again and again, as farmland is inherited.

    Args:
        parcels: Rectangles to start from.
        u: Pixel coordinate along the rectangles' one side.
        v: Pixel coordinate along the other.
        smallest: A side below about twice this is not cut any more (pixels).
        levels: Number of rounds.
        spread: 0 cuts in the middle, 1 anywhere.
        elongation: Above 1 leaves strips, 1 leaves squares.

    Returns:
        Parcels with the same shape as `u`.
    """
    number = parcels.number
    left, right, bottom, top = (
        side.copy()
        for side in (parcels.left, parcels.right, parcels.bottom, parcels.top)
    )
    lengthwise = np.where(parcels.unit(7) < 0.5, elongation, 1 / elongation)
    for level in range(levels):
        chance = hash_unit(number, 11 + level)
        width, height = right - left, top - bottom
        across = width > height * lengthwise
        side = np.where(across, width, height)
        cutting = side > smallest * (1.6 + 0.9 * hash_unit(number, 31 + level))
        share = 0.5 + spread * (chance - 0.5)
        place = np.where(across, left, bottom) + share * side
        beyond = np.where(across, u, v) > place
        np.copyto(left, place, where=cutting & across & beyond)
        np.copyto(right, place, where=cutting & across & ~beyond)
        np.copyto(bottom, place, where=cutting & ~across & beyond)
        np.copyto(top, place, where=cutting & ~across & ~beyond)
        child = hash_integer(number + beyond.astype(np.uint32), 53 + level)
        number = np.where(cutting, child, number)
    return replace(
        parcels, number=number, left=left, right=right, bottom=bottom, top=top
    )


def drainage(height: np.ndarray, outlet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the water of each cell goes, and how much passes it.

    Priority-flood: starting from the outlets and the border, the lowest cell seen so
    far is taken next, and its unseen neighbours drain into it.

    Args:
        height: (h, w) terrain in metres; 64 x 64 is enough for a 256-pixel scene.
        outlet: (h, w) bool, cells that are open water.

    Returns:
        receiver: (h*w,) index of the cell drained into, -1 at outlets and borders.
        flow: (h*w,) float32, number of cells upstream, itself included.
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
    """Distance to the nearest stream and that stream's flow, without stair steps.

    The cells of the coarse drainage grid are joined to lines; the lines are smoothed
    along their course before they are drawn on the fine grid.

    Args:
        receiver: From `drainage`.
        flow: From `drainage`.
        shape: Of the coarse grid.
        size: Side of the fine grid in pixels.
        least: Cells with less flow than this carry no stream.

    Returns:
        distance (pixels) and flow (coarse cells), both (size, size) float32.
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
