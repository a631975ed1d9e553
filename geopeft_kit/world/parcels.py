"""Land cut into rectangles again and again, as farmland is inherited.

A cell's number is a hash, so that what belongs to it (a field, a house) does not depend
on the order of drawing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from geopeft_kit.world.noise import hash_integer, hash_unit


@dataclass(frozen=True)
class Parcels:
    """The rectangle that each pixel lies in, in the (u, v) frame of its district."""

    number: np.ndarray  # of the cell, uint32
    left: np.ndarray  # this and the next three: sides in pixels
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
    """How farmland is cut up, all (H, W)."""

    u: np.ndarray  # pixel coordinate along the fields of the district
    v: np.ndarray  # and across them
    turn: np.ndarray  # angle of the district in radians
    block: Parcels  # squares with a road around
    parcels: Parcels  # the fields
    edge: np.ndarray  # distance to the field's border, pixels


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
    """Cut each rectangle in two, `levels` times, as farmland is inherited.

    `u`, `v` are pixel coordinates along the sides. A side below about twice `smallest`
    is not cut any more; `spread` 0 cuts in the middle, 1 anywhere; `elongation` above 1
    leaves strips.
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
