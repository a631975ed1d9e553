"""The whole model: backbone (with its adapter), decoder and head in one plain module.

`Model` knows nothing about training. Its two halves can be called apart - `features`
and `from_features` - because with a frozen backbone the first half gives the same
answer every epoch and need be computed only once.

Notebooks: 00 (in three lines), 02 (the two halves), 07 (decoders).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle

from geopeft_kit.decoders import (
    DECODERS,
    ClassificationDecoder,
    Decoder,
    build_decoder,
    construct,
)
from geopeft_kit.decoders.neck import Standardise, channel_statistics, pad_to_multiple
from geopeft_kit.devices import on_own_device

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone, Meta

TASKS = (
    "segmentation",
    "regression",
    "classification",
    "multilabel",
    "change",
    "super_resolution",
)
WHOLE_IMAGE_TASKS = ("classification", "multilabel")
FUSIONS = ("difference", "concatenate")
_DETAIL = 0.02  # reflectance that one unit of a decoder's output adds to an image

_Batches = Iterable[Sequence[Tensor]]


def build_model(
    backbone: Backbone,
    decoder: str | None = None,
    task: str = "segmentation",
    num_classes: int = 2,
    fusion: str | None = None,
    factor: int | None = None,
    **options: float,
) -> Model:
    """Put a decoder on a backbone.

    The backbone is used as it is: frozen, with an adapter, or all of it trainable. An
    adapter that changes the maps (ViT-Adapter) has to be attached before.

    Args:
        backbone: from `load_backbone`.
        decoder: "linear", "fcn", "unet" or "upernet"; None means "unet" for maps and
            "linear" for whole images, which have no other.
        task: "segmentation", "regression" (a number per pixel), "classification",
            "multilabel", "change" (two dates through one backbone) or
            "super_resolution" (values on a finer grid; where as many bands go out as
            come in, they are added to the image, enlarged by cubic interpolation).
        num_classes: classes K, the background included (2 for a yes / no map);
            without effect for regression; bands of the finer image for
            super-resolution.
        fusion: only for change: "difference" (default; the absolute difference of the
            two dates' maps, blind to their order) or "concatenate".
        factor: only for super-resolution: fine pixels along one coarse one (default 2).
        **options: of the decoder: `dropout`; `width` (all but linear); `steps` (fcn);
            `all_scales` (linear and fcn: read all four maps, not the last one only;
            True by itself where an active adapter makes the four maps).

    Returns:
        The model. Its decoder has fresh random weights and is not calibrated.

    Raises:
        ValueError: unknown task, decoder or fusion; too few classes; a decoder that
            does not serve the task.
        TypeError: an option that the decoder does not have.

    Example:
        >>> backbone = gk.load_backbone("geopeft_tiny")
        >>> model = gk.build_model(backbone, decoder="unet", num_classes=2)
    """
    _check_choices(task, decoder, num_classes, fusion, factor)
    if task == "change":
        fusion = fusion or "difference"
    dates = 2 if fusion == "concatenate" else 1
    channels = [c * dates for c in backbone.channels]
    strides = list(backbone.strides)
    decoder = decoder or ("linear" if task in WHOLE_IMAGE_TASKS else "unet")
    if decoder in ("linear", "fcn") and _adapter_makes_maps(backbone):
        options.setdefault("all_scales", True)
    if task in WHOLE_IMAGE_TASKS:
        part = construct(
            ClassificationDecoder, "linear", channels, strides, num_classes, **options
        )
    else:
        finer = (factor or 2) if task == "super_resolution" else 1
        outputs = 1 if task == "regression" else num_classes * finer**2
        part = build_decoder(decoder, channels, strides, outputs, **options)
        if task in ("regression", "super_resolution"):
            part.start(reach=0.1)  # values from 0 to 1, most of them near 0
    config = {"decoder": decoder, "task": task, "num_classes": part.outputs, **options}
    if fusion:
        config["fusion"] = fusion
    if task == "super_resolution":
        config |= {"num_classes": num_classes, "factor": finer}
    return Model(backbone, part, config)


def _adapter_makes_maps(backbone: Backbone) -> bool:
    """Whether the four maps are an active adapter's own, at strides of its own."""
    return hasattr(getattr(backbone, "refine", None), "strides")


def _check_choices(
    task: str,
    decoder: str | None,
    num_classes: int,
    fusion: str | None,
    factor: int | None,
) -> None:
    """Errors for what `build_model` cannot build."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}. Choose one of: {', '.join(TASKS)}.")
    if task in WHOLE_IMAGE_TASKS and decoder not in (None, "linear"):
        raise ValueError(
            f"task {task!r} gives one answer per image, so decoder={decoder!r} has no "
            "place in it. Leave decoder out, or choose task='segmentation'."
        )
    if decoder is not None and decoder not in DECODERS:
        raise ValueError(
            f"unknown decoder {decoder!r}. Choose one of: {', '.join(DECODERS)}."
        )
    fewest = {"regression": None, "multilabel": 1, "super_resolution": 1}.get(task, 2)
    if fewest is not None and num_classes < fewest:
        raise ValueError(
            f"num_classes={num_classes} is too few for task {task!r}: at least "
            f"{fewest}. The background counts: a yes / no map has num_classes=2."
        )
    if fusion is not None and (task != "change" or fusion not in FUSIONS):
        raise ValueError(
            f"fusion={fusion!r} does not fit task {task!r}. Only task='change' takes "
            f"it, with one of: {', '.join(FUSIONS)}."
        )
    whole = isinstance(factor, int) and factor >= 2
    if factor is not None and (task != "super_resolution" or not whole):
        raise ValueError(
            f"factor={factor!r} does not fit task {task!r}. Only "
            "task='super_resolution' takes it, a whole number from 2 on."
        )


class Model(nn.Module):
    """Backbone and decoder. Made by `build_model`.

    Attributes:
        backbone: pixels -> maps; holds the active adapter, if any.
        decoder: maps -> answer; holds the standardisation, the neck and the head.
        task: what it answers.
        num_classes: output channels (1 for regression).
        factor: fine pixels along one of the image; 1 but for super-resolution.
        config: what `build_model` was called with, ready for JSON.
        classes: names of the classes, once `fit` has seen them in its data; else None.
        colours: "#rrggbb" of each class, likewise.
        adapter: what `fit` trained in the backbone, or None; to be active when saved.
    """

    backbone: Backbone
    decoder: Decoder

    def __init__(
        self, backbone: Backbone, decoder: Decoder, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.config = config
        self.classes: list[str] | None = None
        self.colours: list[str] | None = None
        self.adapter: Any = None
        self.task: str = config["task"]
        self.num_classes: int = config["num_classes"]
        self.fusion: str | None = config.get("fusion")
        self.factor: int = config.get("factor", 1)
        own = self.num_classes == len(backbone.bands)
        self.adds_detail = self.task == "super_resolution" and own
        self._built_for = backbone.channels, backbone.strides

    @property
    def bands(self) -> list[str]:
        """Bands of the images that it reads, in order."""
        return list(self.backbone.bands)

    @property
    def head(self) -> nn.Module:
        """The last layer, the one that knows the classes."""
        return self.decoder.head

    @property
    def has_linear_head(self) -> bool:
        """Whether the decoder is one linear map, which a probe solves to its best."""
        return self.config["decoder"] == "linear"

    @on_own_device
    def forward(self, image: Tensor, meta: Meta | None = None) -> Tensor:
        """Images -> answer, on the device of the images.

        Args:
            image: (B, C, H, W) reflectance 0-1, any H and W; (B, C, T, H, W) for a
                backbone that reads T dates; (B, C, 2, H, W) for change. torchgeo's
                (B, 2, C, H, W) is turned where it cannot be mistaken.
            meta: optional "date" (B, T, 2) and "lonlat" (B, 2).

        Returns:
            Logits (B, K, H, W); values (B, 1, H, W) for regression and (B, K, r*H, r*W)
            for super-resolution by r; logits (B, K) for classification and multilabel.

        Raises:
            ValueError: an image of another shape.
        """
        size = (image.shape[-2], image.shape[-1])
        return self._answer(self._features(image, meta), size)

    @on_own_device
    def features(self, image: Tensor, meta: Meta | None = None) -> list[Tensor]:
        """The maps that this model's decoder reads, ready to be stored.

        Args:
            image: as for `forward`.
            meta: as for `forward`.

        Returns:
            Maps (B, C_i, h_i, w_i) of the padded image, before standardisation: four
            for UNet, UPerNet and `all_scales`, else the last one; their means
            (B, C_i, 1, 1) for whole-image tasks. For change the two dates are fused
            already. Super-resolution that adds to the image hands it on as the last.

        Raises:
            ValueError: an image of another shape, or a backbone whose maps are no
                longer those that the model was built for.
        """
        return self._features(image, meta)

    def _features(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        _check_image(image)
        if self.task == "change":
            return self._features_of_pair(image, meta)
        if image.ndim == 3 or image.ndim > 5:
            raise ValueError(_shape_error(image, "(B, C, H, W)"))
        dates = getattr(self.backbone, "dates", 1)
        if dates > 1:
            image = dates_after_bands(image, len(self.backbone.bands), dates)
        maps = self._maps(image, meta)
        return [*maps, image] if self.adds_detail else maps

    @on_own_device
    def from_features(
        self, maps: Sequence[Tensor], size: tuple[int, int] | None = None
    ) -> Tensor:
        """The second half of `forward`.

        Args:
            maps: from `features`.
            size: (H, W) of the image, pixels; whole-image tasks do without.

        Returns:
            The same as ``forward(image)``.

        Raises:
            ValueError: the maps are not those of such an image and decoder.
        """
        return self._answer(maps, size)

    def _answer(self, maps: Sequence[Tensor], size: tuple[int, int] | None) -> Tensor:
        if size is None and self.task not in WHOLE_IMAGE_TASKS:
            raise ValueError(
                f"task {self.task!r} needs size=(H, W), the image size in pixels."
            )
        if self.adds_detail:
            *maps, image = maps
            enlarged = interpolate(image, scale_factor=self.factor, mode="bicubic")
            detail = pixel_shuffle(self.decoder(maps, size), self.factor)
            return enlarged + _DETAIL * detail
        output = self.decoder(maps, size)
        # r * r values of every coarse pixel become r x r fine pixels
        return pixel_shuffle(output, self.factor) if self.factor > 1 else output

    def _maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        self._check_maps()
        multiple = math.lcm(*self.backbone.strides)
        maps = self.backbone(pad_to_multiple(image, multiple), meta)
        maps = [maps[i] for i in self.decoder.reads]
        if self.task in WHOLE_IMAGE_TASKS:
            maps = [m.mean(dim=(2, 3), keepdim=True) for m in maps]  # (B, C, 1, 1)
        return maps

    def _check_maps(self) -> None:
        """An error where an adapter that makes its own maps came or went."""
        now = self.backbone.channels, self.backbone.strides
        if now != self._built_for:
            raise ValueError(
                f"this model was built for maps with channels {self._built_for[0]} at "
                f"strides {self._built_for[1]}, and its backbone now gives channels "
                f"{now[0]} at strides {now[1]}: an adapter that makes its own maps "
                "(ViT-Adapter) was attached, activated, deactivated or detached since. "
                "Bring back the adapter of then, or call build_model again."
            )

    def _features_of_pair(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Both dates as one batch through the backbone, then fused."""
        image = dates_after_bands(image, len(self.backbone.bands))
        batch = image.shape[0]
        both = image.transpose(1, 2).flatten(0, 1)  # (2B, C, H, W)
        fused = []
        for features in self._maps(both, _meta_of_each_date(meta)):
            pair = features.unflatten(0, (batch, 2))  # (B, 2, C_i, h, w)
            if self.fusion == "concatenate":
                fused.append(pair.flatten(1, 2))  # (B, 2*C_i, h, w)
            else:
                fused.append((pair[:, 1] - pair[:, 0]).abs())  # (B, C_i, h, w)
        return fused

    def calibrate(self, batches: _Batches | Sequence[Tensor]) -> None:
        """Measure mean and spread of the features in front of the decoder.

        Call it once, before training, with features of training images. Use the same
        call for every method that is compared, so that all start alike.

        Args:
            batches: results of `features`, for example
                ``(model.features(batch["image"]) for batch in loader)``; or one such
                result, a list of maps.

        Raises:
            ValueError: no batch, maps of another model, or values that are not finite.
        """
        if isinstance(batches, Sequence) and batches and torch.is_tensor(batches[0]):
            batches = [cast("Sequence[Tensor]", batches)]
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():  # a generator computes its features in here
                statistics = channel_statistics(cast("_Batches", batches))
        finally:
            self.train(was_training)
        if self.adds_detail:
            statistics = statistics[:-1]  # the last is the image
        given = [len(mean) for mean, _ in statistics]
        if given != self.decoder.channels:
            raise ValueError(
                f"the decoder reads maps with {self.decoder.channels} channels, but "
                f"the batches hold maps with {given}. Calibrate with the features of "
                "this model."
            )
        for layer, pair in zip(self.decoder.standardise, statistics, strict=True):
            cast("Standardise", layer).set_statistics(*pair)

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` has been called (also remembered by a checkpoint)."""
        return all(bool(layer.calibrated) for layer in self.decoder.standardise)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters: "backbone" (adapter or weights) and "decoder"."""
        return {
            "backbone": [p for p in self.backbone.parameters() if p.requires_grad],
            "decoder": [p for p in self.decoder.parameters() if p.requires_grad],
        }

    def decoder_parameters(self) -> list[nn.Parameter]:
        """All parameters of the decoder, neck and head included."""
        return list(self.decoder.parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters that training changes, the backbone's first."""
        groups = self.parameter_groups()
        return groups["backbone"] + groups["decoder"]

    def count(self) -> dict[str, int]:
        """Numbers of parameters, backbone and decoder apart.

        Returns:
            `backbone_total` (an active adapter included), `backbone_trainable` and
            `decoder_trainable` (the neck and the head included).
        """
        groups = self.parameter_groups()
        return {
            "backbone_total": sum(p.numel() for p in self.backbone.parameters()),
            "backbone_trainable": sum(p.numel() for p in groups["backbone"]),
            "decoder_trainable": sum(p.numel() for p in groups["decoder"]),
        }


def dates_after_bands(image: Tensor, bands: int, dates: int = 2) -> Tensor:
    """Turn images of several dates into the kit's order (B, C, T, H, W).

    Args:
        image: (B, C, T, H, W), or torchgeo's (B, T, C, H, W).
        bands: C. With as many bands as dates both orders look alike; the kit's own is
            assumed.
        dates: T.

    Returns:
        (B, C, T, H, W).

    Raises:
        ValueError: neither of the two.
    """
    if image.ndim == 5 and tuple(image.shape[1:3]) == (bands, dates):
        return image
    if image.ndim == 5 and tuple(image.shape[1:3]) == (dates, bands):
        return image.transpose(1, 2)
    words = "two dates" if dates == 2 else f"{dates} dates"
    raise ValueError(_shape_error(image, f"(B, {bands}, {dates}, H, W) for {words}"))


def _meta_of_each_date(meta: Meta | None) -> Meta | None:
    """Metadata of B pairs -> metadata of 2B single images."""
    if meta is None:
        return None
    single: dict[str, Tensor] = {}
    if "date" in meta:
        single["date"] = meta["date"].flatten(0, 1).unsqueeze(1)  # (2B, 1, 2)
    if "lonlat" in meta:
        single["lonlat"] = meta["lonlat"].repeat_interleave(2, dim=0)  # (2B, 2)
    return single


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(
            f"image is a {type(image).__name__}; a torch tensor (B, C, H, W) is needed."
        )
    if image.ndim < 4 or min(image.shape) < 1:
        raise ValueError(_shape_error(image, "(B, C, H, W), each at least 1"))


def _shape_error(image: Tensor, wanted: str) -> str:
    hint = " For a single image use image[None]." if image.ndim == 3 else ""
    return f"image has shape {tuple(image.shape)}; {wanted} is needed.{hint}"
