"""Random fields and hashed numbers: the raw material of the simulated world.

Everything is in pixels and knows nothing of land cover. Source: spectral synthesis of
fractal terrain (Voss 1985, in Fundamental Algorithms for Computer Graphics).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import fft

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
    """A random field, (size, size), mean 0, deviation 1, power spectrum f^-beta.

    `beta`: 1-2 grain, 2.5 patches, 3.5-4 hills. Wavelengths below `shortest` are faint.
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
    """Map integers to uniform float32 in [0, 1), the same ones on every machine.

    `salt` is the property asked for. Source: Chris Wellons' `lowbias32` (public
    domain).
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

    Zero lines of noise meander as rivers do. Slopes below `steepness` count as it.
    """
    rows, columns = gradient(field)
    return field / np.maximum(np.sqrt(rows * rows + columns * columns), steepness)
