"""Overlapping windows of a scene -> seamless rows of predictions, in bounded memory.

Each prediction is weighted by a smooth bump that is high in the middle of its window
and low at its rim, where a network sees least context. The weighted sum divided by the
sum of the weights has no seam. Only a strip of rows as high as a window is in memory.

Source:
    Overlapping tiles for U-Net: Ronneberger et al. 2015, arXiv:1505.04597, figure 2.
    Blending by a Hann window: Pielawski and Wählby 2020, doi:10.1371/
    journal.pone.0229839.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from geopeft_kit.progress import progress_bar
from geopeft_kit.scenes.rasters import SceneReader

# (N, C, window, window) -> (N, K, r*window, r*window)
Predict = Callable[[np.ndarray], np.ndarray]


def window_starts(length: int, window: int, step: int) -> list[int]:
    """First pixels of windows that cover `length`; the last one ends at its end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, step), length - window]


def blend_weight(window: int) -> np.ndarray:
    """A Hann window (window, window) float32, sampled at pixel centres, so never zero.

    At the edge of the scene, where only one window reads, it cancels out.
    """
    bump = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    return np.outer(bump, bump).astype(np.float32)


def blended_rows(
    reader: SceneReader,
    predict: Predict,
    channels: int,
    window: int,
    step: int,
    batch_size: int,
    progress: bool = False,
    done: int = 0,
    finer: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the blended rows of a scene from top to bottom.

    Args:
        reader: The scene, H x W pixels.
        predict: (N, C, window, window) -> (N, K, r*window, r*window).
        channels: K.
        window: Side of a window in pixels.
        step: Distance between windows in pixels.
        batch_size: Windows per call of `predict`.
        progress: Show a progress bar, one step per row of windows.
        done: Strips of rows that are known already and are not yielded. Windows that
            reach below them are computed again, and in the same order, so that the
            sums come out the same to the last bit.
        finer: r, pixels of the prediction along one of the scene.

    Yields:
        (K, r*n, r*W) float32 blended predictions of the next n rows of the scene and
        (r*n, r*W) bool, True where the scene has data.
    """
    tops = window_starts(reader.height, window, step)
    lefts = window_starts(reader.width, window, step)
    weight = blend_weight(window * finer)
    size = (window * finer, max(reader.width, window) * finer)
    sums = np.zeros((channels, *size), np.float32)
    weights = np.zeros(size, np.float32)
    valid = np.zeros(size, bool)
    ends = [*tops[1:], reader.height]
    # The first row of windows that reaches below the strips that are done.
    edge = [0, *ends][done]
    first = sum(top + window <= edge for top in tops) if done < len(tops) else done
    bar = progress_bar(
        range(first, len(tops)), progress, desc="predict", unit=" rows of windows",
        initial=first, total=len(tops),
    )  # fmt: skip
    for number in bar:
        top = tops[number]
        for left, prediction, data in _row_of_windows(
            reader, predict, top, lefts, window, batch_size
        ):
            columns = slice(left * finer, (left + window) * finer)
            sums[:, :, columns] += prediction * weight
            weights[:, columns] += weight
            valid[:, columns] |= data.repeat(finer, axis=0).repeat(finer, axis=1)
        count = (ends[number] - top) * finer
        ready = np.s_[..., :count, : reader.width * finer]
        if number >= done:
            # Where the weight is zero, no window had any data.
            yield sums[ready] / np.maximum(weights[ready], 1e-30), valid[ready].copy()
        for strip in (sums, weights, valid):
            _scroll(strip, count)


def _row_of_windows(
    reader: SceneReader,
    predict: Predict,
    top: int,
    lefts: Sequence[int],
    window: int,
    batch_size: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(left, prediction, valid) per window of a row; empty windows are left out."""
    for first in range(0, len(lefts), batch_size):
        some = lefts[first : first + batch_size]
        read = [(left, *reader.read(top, left, window)) for left in some]
        valid = [(left, image, data) for left, image, data in read if data.any()]
        if valid:
            predictions = predict(np.stack([image for _, image, _ in valid]))
            for (left, _, data), prediction in zip(valid, predictions, strict=True):
                yield left, prediction, data


def _scroll(strip: np.ndarray, rows: int) -> None:
    """Move a strip (..., window, W) up by some rows, in place, and clear the rest."""
    kept = strip.shape[-2] - rows
    if kept > 0:
        strip[..., :kept, :] = strip[..., rows:, :].copy()
    strip[..., max(kept, 0) :, :] = 0
