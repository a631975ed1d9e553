"""A model and a scene of any size -> a prediction GeoTIFF, in bounded memory.

The scene is read window by window. Neighbouring windows overlap, and every
prediction is weighted by a smooth bump that is high in the middle of its window and
low at its rim, where a network sees least context; the weighted sum is divided by the
sum of the weights, so no seam is left. Only one strip of rows, as high as a window,
is in memory: a row is written as soon as no later window can reach it. A long run can
be stopped and taken up again.

Taught in notebooks 00 (a held-out region), 09 (unseen regions) and 14 (your own data).

Source:
    Overlapping tiles for U-Net: Ronneberger et al. 2015, arXiv:1505.04597, figure 2.
    Blending by a Hann window: Pielawski and Wählby 2020, doi:10.1371/
    journal.pone.0229839.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import Affine
from torch import nn

from .devices import device_of, moved
from .files import check_not_input
from .kept_rows import KeptRows
from .pictures import Colours, class_colours
from .progress import progress_bar
from .rasters import RowWriter, SceneReader

CLASS_NODATA = 255
TASKS = ("segmentation", "regression", "super_resolution")
LOW_PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def predict_scene(
    model: nn.Module,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    window: int | None = None,
    overlap: float = 0.5,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: bool = True,
    *,
    bands: str | Sequence[str] | None = None,
    scale: float | Sequence[float] | None = None,
    offset: float | Sequence[float] = 0.0,
    nodata: float | None = None,
    classes: Sequence[str] | None = None,
    colours: Colours | None = None,
    probabilities: bool = False,
    meta: Mapping[str, torch.Tensor] | None = None,
    precision: str = "32-true",
    resume: bool = False,
) -> Path:
    """Predict a whole scene and write it as a GeoTIFF on the same grid.

    Super-resolution by r writes a finer one: r times the rows and columns of the scene
    in pixels of 1/r of its size.

    Args:
        model: Maps (B, C, h, w) reflectance to (B, K, h, w) logits
            (`model.task == "segmentation"`, the default), to (B, 1, h, w) values
            (`"regression"`) or to (B, K, r*h, r*w) bands (`"super_resolution"`, where
            `model.factor` is r). `model.backbone.bands`, where present, says which
            bands it wants.
        source: Any raster that rasterio opens: a GeoTIFF, a VRT, a URL, a name of
            GDAL's as "NETCDF:file.nc:name".
        target: The GeoTIFF to write: uint8 class numbers (nodata 255) or float32
            values (nodata NaN), of super-resolution one band per predicted band, under
            the names of the bands that went in where as many come out. An existing
            file, but never the source, is replaced once all is written.
        window: Side of the square that the model sees, in pixels. By default the
            image size of the backbone, else 256.
        overlap: Share of a window that its neighbour sees too, at least 0, below 1.
        batch_size: Windows per forward pass.
        device: Where to run; by default where the model's parameters are.
        progress: Show a progress bar.
        bands: Names of the source's bands, in its order, or a sensor. By default its
            own band descriptions.
        scale: Reflectance = stored value * scale + offset, one number or one for each
            band of the source. By default the scale that
            the raster itself states; integers that state none are an error, since
            10000, 255 and 1 are all in use.
        offset: See `scale`; used only together with it.
        nodata: A stored value that means no data where the source does not say so.
        classes: Class names, kept as a tag of the file. By default `model.classes`.
        colours: One "#rrggbb" per class (a list, or a dict by class), kept as the
            colour table of the file. By default `model.colours`.
        probabilities: Also write `<target>_probabilities.tif`, float32, one band per
            class (segmentation only).
        meta: `date` (1, 1, 2: year, day of year from 0) and `lonlat` (1, 2, degrees)
            of the scene, for a model that was trained with them; every window gets
            the same.
        precision: "bf16-mixed" (or "16-mixed" on a GPU) computes matrix products in
            16 bits: faster where the hardware has them, and close scores may change
            their order. "auto" takes what `fit` would.
        resume: Keep finished rows in a folder `.<target>.rows` until all is done, and
            go on from those of a run of the same job that was stopped, even killed.
            The result is the same file. Costs some disk space, 4 bytes per pixel and
            class with `probabilities`.

    Returns:
        The path of the prediction. Where a band of the source has no data, so has the
        prediction; CRS and, but for super-resolution, transform are the source's.

    Raises:
        FileNotFoundError: `source` or the folder of `target` does not exist.
        ValueError: Bands, scale, overlap, window or task do not fit; or the target is
            the source.
        RuntimeError: The prediction could not be written whole (a full disk); no
            file is left behind.
    """
    task = getattr(model, "task", "segmentation")
    if task not in TASKS:
        raise ValueError(
            f"predict_scene cannot draw the task {task!r} pixel by pixel. Allowed: "
            f"{', '.join(TASKS)}. For one label per chip use gk.evaluate."
        )
    if probabilities and task != "segmentation":
        raise ValueError(
            f"probabilities=True needs task 'segmentation'; this model does {task!r}."
        )
    if task == "segmentation":
        classes = getattr(model, "classes", None) if classes is None else classes
        colours = getattr(model, "colours", None) if colours is None else colours
    target = Path(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {str(target.parent)!r} does not exist. Create it first."
        )
    window, step = _window_and_step(model, window, overlap)
    finer = int(getattr(model, "factor", 1)) if task == "super_resolution" else 1
    device = torch.device(device) if device is not None else device_of(model)
    wanted = getattr(getattr(model, "backbone", None), "bands", None)
    with ExitStack() as stack:
        stack.enter_context(_predicting(model.to(device)))
        reader = stack.enter_context(
            SceneReader(source, wanted, bands, scale, offset, nodata, window)
        )
        check_not_input([target, _beside(target)], reader.raster.files)
        predict = _Predictor(model, task, device, batch_size, meta, precision, finer)
        # One empty window shows the number of channels, and that model and scene fit.
        empty = np.zeros((1, len(reader.indexes), window, window), np.float32)
        channels = predict(empty).shape[1]
        colour_table = _check_classes(channels, task, classes, colours)
        kept = None
        if resume:
            how = [window, step, batch_size, probabilities, predict.precision, finer]
            job = _job(model, source, reader, *how, nodata)
            kept = KeptRows(target.with_name(f".{target.name}.rows"), job)
        done = 0 if kept is None else len(kept)
        rows = blended_rows(
            reader, predict, channels, window, step, progress, done, finer
        )
        strips = _finished(rows, task, probabilities)
        return _write_scene(
            strips, reader, target, channels, task, classes, colour_table,
            probabilities, kept, finer,
        )  # fmt: skip


def _job(
    model: nn.Module, source: str | os.PathLike[str], reader: SceneReader,
    *settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Everything that decides about the numbers of a prediction, for `KeptRows`."""
    weights = hashlib.sha256(f"{getattr(model, 'task', '')}".encode())
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        weights.update(flat.view(torch.uint8).numpy())
    files = [Path(name) for name in reader.raster.files]  # a VRT and what is in it
    stats = [(str(path), path.stat()) for path in files if path.exists()]
    facts = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return {
        "source": [str(source), *facts],
        "grid": [reader.width, reader.height, *reader.raster.transform],
        "bands": reader.indexes,
        "scaling": [reader.gain.ravel().tolist(), reader.offset.ravel().tolist()],
        "weights": weights.hexdigest(),
        "settings": list(settings),
    }


def _check_classes(
    channels: int, task: str, classes: Sequence[str] | None, colours: Colours | None
) -> list[str] | None:
    """Names and colours are one per class, before hours are spent on predicting."""
    if classes is None and colours is None:
        return None
    if task != "segmentation":
        raise ValueError(f"classes and colours have no place in the task {task!r}.")
    names = [str(i) for i in range(channels)] if classes is None else list(classes)
    if len(names) != channels:
        raise ValueError(
            f"classes has {len(names)} names ({', '.join(names)}), but the model tells "
            f"{channels} classes apart. Pass one name per class, or leave it out."
        )
    return None if colours is None else class_colours(names, colours)


# --- where the windows lie, and how much each pixel of one counts ---------------------


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


def _window_and_step(
    model: nn.Module, window: int | None, overlap: float
) -> tuple[int, int]:
    """Side of a window and distance between windows, both multiples of the patch."""
    if not 0 <= overlap < 1:
        raise ValueError(
            f"overlap={overlap} is not a share of a window. Allowed: 0 (side by side) "
            "up to, not including, 1; 0.5 is a good start."
        )
    backbone = getattr(model, "backbone", None)
    if window is None:
        window = getattr(backbone, "image_size", None) or getattr(
            getattr(backbone, "card", None), "image_size", None
        )
        window = 256 if window is None else int(window)
    grid = max(getattr(backbone, "strides", None) or [1])
    if window < 1 or window % grid:
        near = max(grid, round(window / grid) * grid)
        raise ValueError(
            f"window={window} is not a positive multiple of {grid}, the coarsest "
            f"stride of this backbone. Take window={near}."
        )
    # Steps on the stride's own grid show a network each pixel in the same phase.
    step = max(grid, int(window * (1 - overlap)) // grid * grid)
    return window, step


# --- predicting -----------------------------------------------------------------------


class _Predictor:
    """Calls the model on windows: (N, C, h, w) -> (N, K, r*h, r*w) float32."""

    def __init__(
        self,
        model: nn.Module,
        task: str,
        device: torch.device,
        batch_size: int,
        meta: Mapping[str, torch.Tensor] | None = None,
        precision: str = "32-true",
        finer: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1 window per batch.")
        if precision != "32-true":
            from geopeft_kit.training.hardware import choose_precision

            precision = choose_precision(precision, device)
        self.precision = precision
        self.model, self.task, self.finer = model, task, finer
        self.device, self.batch_size, self.meta = device, batch_size, meta

    def __call__(self, images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).to(self.device)
        known: list[dict[str, torch.Tensor]] = []  # a second argument, or none
        if self.meta is not None:
            meta = moved(self.meta, self.device)
            known = [{k: v.expand(len(batch), *v.shape[1:]) for k, v in meta.items()}]
        low = LOW_PRECISIONS.get(self.precision)
        with torch.autocast(self.device.type, low, enabled=low is not None):
            logits = self.model(batch, *known).float()
        size = tuple(side * self.finer for side in images.shape[-2:])
        if logits.ndim != 4 or tuple(logits.shape[-2:]) != size:
            raise ValueError(
                f"The model returned {tuple(logits.shape)} for images of "
                f"{tuple(images.shape[-2:])} pixels; expected (B, K, {size[0]}, "
                f"{size[1]})."
            )
        count = logits.shape[1]
        fewest, most = {"regression": (1, 1), "super_resolution": (1, 65_535)}.get(
            self.task, (2, 255)
        )
        if not fewest <= count <= most:
            raise ValueError(
                f"The model returned {count} channels for the task {self.task!r}. "
                "Allowed: 1 for regression, 2 to 255 for segmentation (two classes "
                "are two channels). Set model.task to say which it is."
            )
        if self.task == "segmentation":
            logits = logits.softmax(dim=1)
        return logits.cpu().numpy()


@contextmanager
def _predicting(model: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode; afterwards every module is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def blended_rows(
    reader: SceneReader,
    predict: Callable[[np.ndarray], np.ndarray],
    channels: int,
    window: int,
    step: int,
    progress: bool = False,
    done: int = 0,
    finer: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of the scene, top to bottom, blended and finished.

    Args:
        reader: The scene.
        predict: (N, C, window, window) -> (N, K, r*window, r*window); its attribute
            `batch_size` says how many windows at once.
        channels: K.
        window: Side of a window in pixels.
        step: Distance between windows in pixels.
        progress: Show a progress bar, one step per row of windows.
        done: Strips of rows that are known already and are not yielded. Windows that
            reach below them are computed again, and in the same order, so that the
            sums come out the same to the last bit.
        finer: r, fine pixels of the prediction along one of the scene.

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
    following_tops = [*tops[1:], reader.height]
    edge = tops[done] if done < len(tops) else reader.height
    first = sum(top + window <= edge for top in tops) if done < len(tops) else done
    bar = progress_bar(
        range(first, len(tops)), progress, desc="predict", unit=" rows of windows",
        initial=first, total=len(tops),
    )  # fmt: skip
    for number in bar:
        top, following = tops[number], following_tops[number]
        for left, prediction, data in _predicted(reader, top, lefts, window, predict):
            columns = slice(left * finer, (left + window) * finer)
            sums[:, :, columns] += prediction * weight
            weights[:, columns] += weight
            valid[:, columns] |= data.repeat(finer, axis=0).repeat(finer, axis=1)
        count = (min(following, reader.height) - top) * finer
        ready = np.s_[..., :count, : reader.width * finer]
        if number >= done:
            # A weight of zero means that no window here held any data.
            yield sums[ready] / np.maximum(weights[ready], 1e-30), valid[ready].copy()
        for strip in (sums, weights, valid):
            _roll(strip, count)


def _predicted(
    reader: SceneReader,
    top: int,
    lefts: Sequence[int],
    window: int,
    predict: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(left, prediction, valid) per window of a row; empty windows are left out."""
    size = getattr(predict, "batch_size", 1)
    for first in range(0, len(lefts), size):
        read = [
            (left, *reader.read(top, left, window)) for left in lefts[first:][:size]
        ]
        held = [(left, image, data) for left, image, data in read if data.any()]
        if held:
            predictions = predict(np.stack([image for _, image, _ in held]))
            for (left, _, data), prediction in zip(held, predictions, strict=True):
                yield left, prediction, data


def _roll(strip: np.ndarray, rows: int) -> None:
    """Move a strip (..., window, W) up by some rows, in place, and clear the rest."""
    kept = strip.shape[-2] - rows
    if kept > 0:
        strip[..., :kept, :] = strip[..., rows:, :].copy()
    strip[..., max(kept, 0) :, :] = 0


# --- writing --------------------------------------------------------------------------


def _finished(
    rows: Iterator[tuple[np.ndarray, np.ndarray]], task: str, probabilities: bool
) -> Iterator[list[np.ndarray]]:
    """Blended rows as the files hold them: class numbers or values, (K or 1, n, W)."""
    for blended, valid in rows:
        if task == "segmentation":
            best = blended.argmax(axis=0).astype(np.uint8)
            strip = [np.where(valid, best, np.uint8(CLASS_NODATA))[None]]
        else:
            strip = [np.where(valid, blended, np.nan)]
        if probabilities:
            strip.append(np.where(valid, blended, np.nan))
        yield strip


def _write_scene(
    strips: Iterator[list[np.ndarray]],
    reader: SceneReader,
    target: Path,
    channels: int,
    task: str,
    classes: Sequence[str] | None,
    colours: Sequence[str] | None,
    probabilities: bool,
    kept: KeptRows | None = None,
    finer: int = 1,
) -> Path:
    """Turn strips of rows into files; all of them appear, or none."""
    size = {"width": reader.width * finer, "height": reader.height * finer}
    grid = size | _place(reader.raster, finer)
    numbers = {**grid, "count": 1, "dtype": "uint8", "nodata": CLASS_NODATA}
    floats = {**grid, "count": channels, "dtype": "float32", "nodata": float("nan")}
    tags = {"classes": json.dumps(list(classes))} if classes is not None else {}
    names = list(classes) if classes is not None else [str(i) for i in range(channels)]
    place = None if kept is None else kept.folder
    look: tuple = (_value_names(reader, channels, task), None, {}, place)
    if task == "segmentation":
        look = (["class"], colours, tags, place)
    profile = numbers if task == "segmentation" else floats
    writers = [RowWriter(target, profile, *look)]
    try:
        if probabilities:
            writers.append(RowWriter(_beside(target), floats, names, folder=place))
        for strip in strips if kept is None else kept.go_on(strips):
            for writer, rows in zip(writers, strip, strict=True):
                writer.write(rows)
        for writer in writers:
            writer.check()
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.discard()
    if kept is not None:
        kept.discard()
    return target


def _beside(target: Path) -> Path:
    """Where the probabilities of a prediction are written."""
    return target.with_name(f"{target.stem}_probabilities.tif")


def _place(raster: rasterio.DatasetReader, finer: int) -> dict[str, Any]:
    """The place of a scene with `finer` times as many rows and columns.

    A scene that was never warped has control points or RPCs instead of a transform.
    """
    points, crs = raster.gcps
    if points:
        moved = [GroundControlPoint(p.row * finer, p.col * finer, p.x, p.y, p.z)
                 for p in points]  # fmt: skip
        return {"gcps": moved, "crs": crs}
    if raster.rpcs is not None:
        rpcs = raster.rpcs.to_dict()
        for name in ("line_off", "line_scale", "samp_off", "samp_scale"):
            rpcs[name] *= finer
        return {"rpcs": RPC(**rpcs)}
    a, b, x, d, e, y = raster.transform[:6]
    transform = Affine(a / finer, b / finer, x, d / finer, e / finer, y)
    return {"transform": transform, "crs": raster.crs}


def _value_names(reader: SceneReader, channels: int, task: str) -> list[str]:
    """Descriptions of predicted values; finer bands keep the names that came in."""
    if task != "super_resolution":
        return ["prediction"]
    names = reader.names if channels == len(reader.names) else [None] * channels
    return [name or f"band {number}" for number, name in enumerate(names, start=1)]
