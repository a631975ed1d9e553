"""Transforms of kornia and torchgeo on chips: the same geometry for image and mask.

Geometry (flips, turns, crops, scales) meets all bands and the mask, which is taken to
the nearest pixel so that no class is made up. Colour meets only the bands that are
named: a jitter made for photographs would turn water in the short-wave infrared into
something that no sensor ever saw. Draws depend on the seed, the epoch and the chip
alone, so a run that was killed and resumed sees the same images. Taught in
`notebooks/14_your_own_data.ipynb`.

Source:
    Riba et al. 2020, "Kornia", arXiv 1910.02190 (kornia.augmentation).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from geopeft_kit.bands import BANDS, band_indices, resolve_bands

RGB = ("RED", "GREEN", "BLUE")
# These mix the channels of a photograph: they mean nothing on other bands.
PHOTOGRAPHIC = (
    "ColorJiggle", "ColorJitter", "RandomGrayscale", "RandomHue",
    "RandomPlanckianJitter", "RandomRGBShift", "RandomSaturation",
)  # fmt: skip


class Augmentation:
    """kornia's 2-D transforms, or torchgeo's that derive from them, for training chips.

    Geometry comes first, in the order given, then colour on `colour_bands` (see
    `ChipData`) of images with the channels `bands`.

    Raises:
        TypeError: Something that is not such a transform.
        ValueError: Colour on bands that are not there, or that are not optical.
    """

    def __init__(
        self,
        transforms: Sequence[nn.Module],
        bands: Sequence[str],
        colour_bands: str | Sequence[str] | None = None,
    ) -> None:
        from kornia.augmentation import (
            AugmentationSequential,
            GeometricAugmentationBase2D,
            IntensityAugmentationBase2D,
        )

        geometry, self.colour = [], []
        for transform in transforms:
            if isinstance(transform, GeometricAugmentationBase2D):
                geometry.append(transform)
            elif isinstance(transform, IntensityAugmentationBase2D):
                self.colour.append(transform)
            else:
                raise TypeError(
                    f"{type(transform).__name__} is neither a geometric nor an "
                    "intensity transform of kornia. Give transforms of "
                    "kornia.augmentation (or torchgeo's that derive from them), as "
                    "augment=[K.RandomHorizontalFlip(), K.RandomRotation(15.0)]."
                )
        self.move = None
        if geometry:  # masks go to the nearest pixel
            self.move = AugmentationSequential(*geometry, data_keys=["input", "mask"])
        names = RGB if colour_bands is None else resolve_bands(colour_bands)
        self.rows: list[list[int]] = [
            _rows(RGB if type(each).__name__ in PHOTOGRAPHIC else names, bands, each)
            for each in self.colour
        ]

    def __call__(
        self, image: Tensor, mask: Tensor | None, seed: Sequence[int], ignore: float
    ) -> tuple[Tensor, Tensor | None]:
        """Transform (C, H, W) or (C, 2, H, W) reflectance and its mask (H, W), if any.

        `seed` is what the draw depends on, `ignore` the mask value of pixels that come
        from outside of the chip, where the image is 0.
        """
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)  # of the CPU alone
            if self.move is not None:
                image, mask = self._moved(image, mask, ignore)
            return self._recoloured(image), mask

    def _moved(
        self, image: Tensor, mask: Tensor | None, ignore: float
    ) -> tuple[Tensor, Tensor | None]:
        assert self.move is not None
        shape = image.shape
        flat = image.reshape(1, -1, *shape[-2:])  # (1, C or 2C, H, W)
        # A channel of ones goes along and says what lay wholly inside of the chip.
        flat = torch.cat([flat, torch.ones(1, 1, *shape[-2:])], dim=1)
        target = torch.zeros(shape[-2:]) if mask is None else mask.float()
        flat, target = self.move(flat, target[None, None])
        if flat.shape[-2:] != shape[-2:]:
            raise ValueError(
                f"the transforms make {tuple(flat.shape[-2:])} of {tuple(shape[-2:])} "
                "pixels; the size of a chip has to stay. Give crops the chip's size."
            )
        inside = flat[0, -1] > 0.999
        image = torch.where(inside, flat[0, :-1].reshape(shape), 0.0)
        if mask is None:
            return image, None
        return image, torch.where(inside, target[0, 0], float(ignore)).to(mask.dtype)

    def _recoloured(self, image: Tensor) -> Tensor:
        if not self.colour:
            return image
        image = image.clone()
        dates = list(image.unbind(1)) if image.ndim == 4 else [image]
        for transform, rows in zip(self.colour, self.rows, strict=True):
            params = None
            for picture in dates:  # both dates of a pair get one and the same colour
                picture[rows] = transform(picture[rows][None], params=params)[0]
                params = transform._params
        return image


def _rows(
    names: Sequence[str], bands: Sequence[str], transform: nn.Module
) -> list[int]:
    """Channels that a colour transform meets, in the order of `names`."""
    odd = [name for name in names if BANDS[name].kind != "optical"]
    if odd:
        raise ValueError(
            f"colour_bands names {odd[0]}, which is a {BANDS[odd[0]].kind} layer: "
            "brightness and contrast mean nothing there. Leave it out."
        )
    missing = [name for name in names if name not in bands]
    if missing:
        raise ValueError(
            f"{type(transform).__name__} wants {', '.join(names)}, but the images have "
            f"{', '.join(bands)}. Leave it out, or name other bands for brightness and "
            "contrast: colour_bands=[...]."
        )
    return band_indices(list(names), list(bands))
