"""A model and a scene of any size -> a prediction GeoTIFF, in bounded memory.

Taught in notebooks 00 (a held-out region), 09 (unseen regions) and 14 (your own data).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import Affine
from torch import nn

from geopeft_kit.devices import device_of, moved
from geopeft_kit.files import check_not_input, content_key, whole_file
from geopeft_kit.pictures import Colours, class_colours
from geopeft_kit.scenes.blending import blended_rows
from geopeft_kit.scenes.rasters import RowWriter, SceneReader

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

    Super-resolution by r writes a finer grid: r times the rows and columns.

    Args:
        model: Maps (B, C, h, w) reflectance to (B, K, h, w) logits
            (`model.task == "segmentation"`, the default), to (B, 1, h, w) values
            (`"regression"`) or to (B, K, r*h, r*w) bands (`"super_resolution"`, where
            `model.factor` is r). `model.backbone.bands`, where present, says which
            bands it wants.
        source: Any raster that rasterio opens: a GeoTIFF, a VRT, a URL, a name of
            GDAL's as "NETCDF:file.nc:name".
        target: The GeoTIFF to write: uint8 class numbers (nodata 255) or float32
            values (nodata NaN), with one band per predicted band. An existing file,
            but never the source, is replaced once everything is written.
        window: Side of the square that the model sees, in pixels. By default the
            image size of the backbone, else 256.
        overlap: Share of a window that its neighbour sees too, at least 0, below 1.
        batch_size: Windows per forward pass.
        device: Where to run; by default where the model's parameters are.
        progress: Show a progress bar.
        bands: Names of the source's bands, in its order, or a sensor. By default its
            own band descriptions.
        scale: Reflectance = stored value * scale + offset, one number or one for each
            band of the source. By default the raster's own scale; integers without
            one are an error, since 10000, 255 and 1 are all in use.
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
            16 bits: faster where the hardware has them, but close scores may change
            their order. "auto" takes what `fit` would.
        resume: Keep finished rows in a folder `.<target>.rows` until the file is
            complete, and continue from those of an earlier run of the same job, even
            a killed one. The result is the same file. With `probabilities` this needs
            4 bytes of disk space per pixel and class.

    Returns:
        The path of the prediction. It has no data where a band of the source has
        none. CRS and, except for super-resolution, transform are the source's.

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
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 window per batch.")
    window, step = _window_and_step(model, window, overlap)
    finer = int(getattr(model, "factor", 1)) if task == "super_resolution" else 1
    device = torch.device(device) if device is not None else device_of(model)
    wanted = getattr(getattr(model, "backbone", None), "bands", None)
    with ExitStack() as stack:
        stack.enter_context(_predicting(model.to(device)))
        reader = stack.enter_context(
            SceneReader(source, wanted, bands, scale, offset, nodata, window)
        )
        check_not_input([target, _probabilities_of(target)], reader.raster.files)
        predict = _Predictor(model, task, device, meta, precision, finer)
        # One empty window shows the number of channels, and that model and scene fit.
        empty = np.zeros((1, len(reader.indexes), window, window), np.float32)
        channels = predict(empty).shape[1]
        colour_table = _check_classes(channels, task, classes, colours)
        finished, done = None, 0
        if resume:
            how = [window, step, batch_size, probabilities, predict.precision, finer]
            key = _content_key(model, source, reader, [*how, nodata])
            finished = FinishedRows(target.with_name(f".{target.name}.rows"), key)
            done = len(finished)
        rows = blended_rows(
            reader, predict, channels, window, step, batch_size, progress, done, finer
        )
        strips: Any = _as_stored(rows, task, probabilities)
        folder = None if finished is None else finished.folder
        writers = _writers(
            reader, target, channels, task, classes, colour_table, probabilities,
            finer, folder,
        )  # fmt: skip
        _write(strips if finished is None else finished.continued(strips), writers)
        if finished is not None:
            finished.discard()
    return target


def _content_key(
    model: nn.Module,
    source: str | os.PathLike[str],
    reader: SceneReader,
    settings: Sequence[Any],
) -> str:
    """A name for everything that decides about the numbers of a prediction."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        weights.update(flat.view(torch.uint8).numpy())
    files = [Path(name) for name in reader.raster.files]  # a VRT and what is in it
    stats = [(str(path), path.stat()) for path in files if path.exists()]
    facts = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return content_key(
        {
            "source": [str(source), *facts],
            "grid": [reader.width, reader.height, *reader.raster.transform],
            "bands": reader.indexes,
            "scaling": [reader.gain.ravel().tolist(), reader.offset.ravel().tolist()],
            "task": getattr(model, "task", ""),
            "weights": weights.hexdigest(),
            "settings": settings,
        }
    )


def _check_classes(
    channels: int, task: str, classes: Sequence[str] | None, colours: Colours | None
) -> list[str] | None:
    """Names and colours are one per class, before hours are spent on predicting."""
    if classes is None and colours is None:
        return None
    if task != "segmentation":
        raise ValueError(f"classes and colours do not apply to the task {task!r}.")
    names = [str(i) for i in range(channels)] if classes is None else list(classes)
    if len(names) != channels:
        raise ValueError(
            f"classes has {len(names)} names ({', '.join(names)}), but the model has "
            f"{channels} classes. Pass one name per class, or leave classes out."
        )
    return None if colours is None else class_colours(names, colours)


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


class _Predictor:
    """Calls the model on windows: (N, C, h, w) -> (N, K, r*h, r*w) float32."""

    def __init__(
        self,
        model: nn.Module,
        task: str,
        device: torch.device,
        meta: Mapping[str, torch.Tensor] | None,
        precision: str,
        finer: int,
    ) -> None:
        if precision != "32-true":
            from geopeft_kit.training.hardware import choose_precision

            precision = choose_precision(precision, device)
        self.model, self.task, self.device = model, task, device
        self.meta, self.precision, self.finer = meta, precision, finer

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
                "are two channels). Set model.task accordingly."
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


def _as_stored(
    rows: Iterator[tuple[np.ndarray, np.ndarray]], task: str, probabilities: bool
) -> Iterator[list[np.ndarray]]:
    """Blended rows as the files hold them: class numbers or values, (K or 1, n, W)."""
    for blended, valid in rows:
        strip = []
        if task == "segmentation":
            best = blended.argmax(axis=0).astype(np.uint8)
            strip.append(np.where(valid, best, np.uint8(CLASS_NODATA))[None])
        if task != "segmentation" or probabilities:
            strip.append(np.where(valid, blended, np.nan))
        yield strip


def _writers(
    reader: SceneReader,
    target: Path,
    channels: int,
    task: str,
    classes: Sequence[str] | None,
    colours: Sequence[str] | None,
    probabilities: bool,
    finer: int,
    folder: Path | None,
) -> Iterator[RowWriter]:
    """The file of the prediction, then that of its probabilities."""
    size = {"width": reader.width * finer, "height": reader.height * finer}
    grid = size | _place(reader.raster, finer)
    values = {**grid, "count": channels, "dtype": "float32", "nodata": float("nan")}
    if task != "segmentation":
        names = _value_names(reader, channels, task)
        yield RowWriter(target, values, names, folder=folder)
        return
    numbers = {**grid, "count": 1, "dtype": "uint8", "nodata": CLASS_NODATA}
    yield RowWriter(target, numbers, ["class"], classes, colours, folder)
    if probabilities:
        names = list(map(str, classes or range(channels)))
        yield RowWriter(_probabilities_of(target), values, names, folder=folder)


def _write(strips: Iterator[list[np.ndarray]], writers: Iterator[RowWriter]) -> None:
    """Turn strips of rows into files; all of them appear, or none."""
    with ExitStack() as stack:
        opened = [stack.enter_context(writer) for writer in writers]
        for strip in strips:
            for writer, rows in zip(opened, strip, strict=True):
                writer.write(rows)
        for writer in opened:
            writer.check()
        for writer in opened:
            writer.publish()


def _probabilities_of(target: Path) -> Path:
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


class FinishedRows:
    """The strips of rows of one prediction, in order, each written whole or not at all.

    Args:
        folder: Of the rows; those of another key are deleted, and a line is printed.
        key: Changes with whatever the rows are computed from, see `content_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        note = folder / "key.txt"
        known = note.exists() and note.read_bytes() == key.encode()
        if folder.exists() and not known:
            print(f"predict: {folder.name} holds rows of another job; it starts anew.")
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob("*.part*"):  # left by a run that was killed
            unfinished.unlink()
        with whole_file(note) as part:
            part.write_text(key)

    def __len__(self) -> int:
        """Strips that are finished, counted from the first without a gap."""
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def _path(self, number: int) -> Path:
        return self.folder / f"rows_{number:06d}.npz"

    def continued(self, strips: Iterable[list[np.ndarray]]) -> Iterator[list]:
        """Yield the finished strips, then the new ones, which are kept as they pass."""
        count = len(self)
        for number in range(count):
            try:
                with np.load(self._path(number)) as kept:
                    finished = [kept[name] for name in kept.files]
            except (OSError, ValueError, BadZipFile, EOFError) as error:
                raise ValueError(
                    f"{self._path(number)} is damaged: {error}. Delete {self.folder}, "
                    "then run again."
                ) from error
            yield finished
        for number, strip in enumerate(strips, start=count):
            with whole_file(self._path(number)) as part:
                np.savez_compressed(part, *strip)
            yield strip

    def discard(self) -> None:
        """Remove the folder: the prediction is complete."""
        shutil.rmtree(self.folder)
