"""Pictures in folders: one folder a class, or images and masks of the same name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pixels import chip_name, cut, first_of_each, read_mask, read_raster

from geopeft_kit.data import Chip

PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
# 8-bit pictures of unknown processing: brightness from 0 to 1, no reflectance.
BRIGHTNESS = {"bands": "rgb", "scale": 1 / 255}
BRIGHTNESS_NOTE = "8-bit values became brightness 0-1 by / 255; it is no reflectance. "


def pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name.

    Args:
        folder: It is not searched further down.

    Returns:
        Their paths.

    Raises:
        FileNotFoundError: There are none, or no folder.
    """
    found = [p for p in folder.glob("*") if p.suffix.lower() in PICTURES]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no pictures ({', '.join(PICTURES)}). Unpack it again."
        )
    return sorted(found)


def class_chips(
    folder: Path,
    classes: Sequence[str],
    train_share: float,
    small: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Iterator[Chip]:
    """Labelled pictures; a share of each class trains, the rest tests.

    Args:
        folder: Holds one folder a class.
        classes: Their names.
        train_share: Part of each class that trains. Nested: with one seed, the
            training pictures of 0.2 are among those of 0.5.
        small: Pictures of each class and split to keep; None keeps all.
        size: Pictures that are not of this height and width are resampled to it.
        seed: Of the draw.

    Yields:
        RGB chips, without a place.
    """
    paths = [p for name in classes for p in pictures(folder / name)]
    train = set(first_of_each(paths, _parent, lambda n: round(train_share * n), seed))
    if small is not None:
        parts = (
            [p for p in paths if (p in train) == chosen] for chosen in (True, False)
        )
        kept = {p for part in parts for p in first_of_each(part, _parent, small, seed)}
        paths = [p for p in paths if p in kept]
    for path in paths:
        pixels = read_raster(path)[0]
        if size is not None and pixels.shape[1:] != (size, size):
            pixels = read_raster(path, (size, size), "bilinear")[0]
        yield Chip(
            chip_name(path.stem),
            pixels[:3],
            label=path.parent.name,
            split="train" if path in train else "test",
        )


def _parent(path: Path) -> str:
    return path.parent.name


def mask_chips(
    folder: Path,
    folders: Sequence[str],
    values: Mapping[int, int],
    split: str,
    region: str = "everywhere",
    small: int | None = None,
    size: int | None = None,
) -> Iterator[Chip]:
    """Images, or pairs of two dates, with masks that are named like them.

    Args:
        folder: Holds the folders.
        folders: Of the images, of the second date (with three names), of the masks.
        values: Mask value -> class number, 255 for no label.
        split: Of all these chips.
        region: Of all these chips.
        small: How many pictures to keep, in a seeded order; None keeps all.
        size: Side of the windows to cut; None keeps pictures whole.

    Yields:
        RGB chips, without a place.
    """
    paths = pictures(folder / folders[0])
    if small is not None:
        paths = first_of_each(paths, None, small)
    masks = {p.stem: p for p in pictures(folder / folders[-1])}
    for path in paths:
        if path.stem not in masks:
            raise FileNotFoundError(
                f"{path} has no mask in {folder / folders[-1]}. Unpack it again."
            )
        after = None
        if len(folders) == 3:
            after = read_raster(folder / folders[1] / path.name)[0][:3]
        chip = Chip(
            chip_name(f"{split}_{region}_{path.stem}".replace("_everywhere", "")),
            read_raster(path)[0][:3],
            read_mask(masks[path.stem], dict(values)),
            region=region,
            split=split,
            image_after=after,
        )
        yield from cut(chip, size)
