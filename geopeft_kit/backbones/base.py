"""The backbone contract: pixels in, four feature maps out.

Every geospatial foundation model of the kit is a `Backbone`: a thin wrapper around a
plain network (`model`), which keeps the names of its upstream, so that checkpoints
load by key and PEFT methods find the layers they know. The wrapper checks and
normalises the image.

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.devices import on_own_device

Meta = Mapping[str, Tensor]
SAMPLE = 1024  # numbers of each tensor that show whether it was trained
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
# What a block is called, per layout.
_BLOCKS = {
    "vit": re.compile(r"(vit\.)?blocks\.\d+"),
    "convnext": re.compile(r"stages\.\d+\.blocks\.\d+"),
    "resnet": re.compile(r"layer\d+\.\d+"),
    "swin": re.compile(r"layers\.\d+\.blocks\.\d+"),
    "mambaout": re.compile(r"stages\.\d+\.blocks\.\d+"),
    "efficientvim": re.compile(r"stages\.\d+\.blocks\.\d+"),
}


class SelectBands(nn.Module):
    """Only the channels (`positions`) that the patch embedding reads.

    Used with ``new_bands="ignore"``; a method that reads the other bands replaces it.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        super().__init__()
        self.positions = tuple(positions)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, len(positions), H, W)."""
        return image[:, list(self.positions)]

    def extra_repr(self) -> str:
        """The channels, as `print` shows them."""
        return f"positions={self.positions}"


@dataclass
class TokenGrid:
    """The grid of the patch tokens in the last forward pass, for methods that need it.

    The patch tokens are the last `height * width * groups` of the sequence, ordered by
    row, column, group; `groups` is the number of tokens per patch.
    """

    height: int = 0
    width: int = 0
    groups: int = 1

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, P + h*w*N, D) -> the first P of them, and maps (B*N, D, h, w)."""
        count = self.height * self.width * self.groups
        patches = tokens[:, -count:]  # (B, h*w*N, D)
        maps = patches.unflatten(1, (self.height, self.width, self.groups))
        return tokens[:, :-count], maps.permute(0, 3, 4, 1, 2).flatten(0, 1)

    def join(self, first: Tensor, maps: Tensor) -> Tensor:
        """The opposite of `split`: (B, P, D), (B*N, D, h, w) -> (B, P + h*w*N, D)."""
        maps = maps.unflatten(0, (-1, self.groups))  # (B, N, D, h, w)
        return torch.cat([first, maps.permute(0, 3, 4, 1, 2).flatten(1, 3)], dim=1)


@dataclass(frozen=True)
class Origin:
    """How `load_backbone` made a backbone, so that a saved model can make it again.

    Attributes:
        arguments: of `load_backbone`, ready for JSON.
        generator: state of torch's generator before weights were drawn, or None.
        sample: `weights_hash(SAMPLE)` at that time; a different one now shows that the
            weights were changed.
    """

    arguments: dict[str, Any]
    generator: Tensor | None
    sample: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self  # never changed, so copies of a backbone share it


class Backbone(nn.Module):
    """A geospatial foundation model as a source of four feature maps.

    Args:
        card: what the model is.
        model: the plain network; ``state_dict`` keys are the upstream's.
        plan: which kernel each band meets, see `plan_bands`.

    Attributes:
        normalise: apply the card's normalisation; False passes values through.
        channels: channels C_i of the four maps, or of those of an active adapter.
        strides: pixels per cell of the four maps, likewise.
        select: first module, on the normalised image; a method may replace it.
        refine: last module, on the four maps; what replaces it may have `channels` and
            `strides` of its own.
        layout: ``"vit"``, ``"convnext"``, ``"resnet"``, ``"swin"``, ``"mambaout"``,
            ``"efficientvim"`` or ``"unet"`` (PhilEO's).
        width: token width of a ViT, else None.
        num_prefix_tokens: tokens before the patch tokens (class, registers).
        image_size: height and width in pixels that it was loaded for.
        adapter: the active PEFT adapter, or None.
        grid: of a ViT, the grid of the last forward pass.
        dates: dates T that an image has; 1 for most backbones.
        beside: further submodules that hold weights.
        origin: how `load_backbone` made it; None where it was built by hand.
    """

    layout: str
    dates: int = 1
    beside: tuple[str, ...] = ()
    width: int | None = None
    num_prefix_tokens: int = 0
    origin: Origin | None = None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        card: BackboneCard,
        model: nn.Module,
        plan: BandPlan,
    ) -> None:
        super().__init__()
        self.card = card
        self.bands = plan.bands
        self.normalise = True
        self.image_size = card.image_size
        self.model = model
        self.grid = TokenGrid()
        everything = plan.read == tuple(range(len(plan.bands)))
        self.select: nn.Module = nn.Identity() if everything else SelectBands(plan.read)
        self.refine: nn.Module = nn.Identity()
        # Not persistent: the card holds the numbers, the state dict the weights.
        mean = torch.tensor(plan.mean).view(-1, 1, 1)  # (C, 1, 1)
        std = torch.tensor(plan.std).view(-1, 1, 1)  # (C, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        object.__setattr__(self, "adapter", None)

    @on_own_device
    def forward(self, image: Tensor, meta: Meta | None = None) -> list[Tensor]:
        """Compute the four feature maps, on the device of the image.

        Args:
            image: (B, C, H, W) or (B, C, 1, H, W) for one date, (B, C, T, H, W) for
                T = `dates`; reflectance 0-1, channels in the order of `bands`, H and
                W multiples of the largest stride.
            meta: ``date`` (B, T, 2: year, day of year from 0) and ``lonlat``
                (B, 2, degrees), both optional; a backbone that has no use for
                metadata does not look at it.

        Returns:
            Four maps (B, C_i, H / stride_i, W / stride_i), shallow to deep. Of several
            dates the channels of the first come first.

        Raises:
            TypeError: if the image is not floating point.
            ValueError: if its shape does not fit.
        """
        image = self.normalised(self._check(image))
        return self.refine(self.forward_maps(self.select(image), meta))

    @property
    def channels(self) -> list[int]:
        """Channels C_i of the four maps, as they leave the backbone now."""
        return list(getattr(self.refine, "channels", self._channels))

    @channels.setter
    def channels(self, channels: Sequence[int]) -> None:
        self._channels = list(channels)

    @property
    def strides(self) -> list[int]:
        """Pixels per cell of the four maps, as they leave the backbone now."""
        return list(getattr(self.refine, "strides", self._strides))

    @strides.setter
    def strides(self, strides: Sequence[int]) -> None:
        self._strides = list(strides)

    @on_own_device
    def normalised(self, image: Tensor) -> Tensor:
        """Reflectance 0-1 as the network wants it, (B, C, H, W) both."""
        if not self.normalise:
            return image
        return (image * self.card.normalisation.scale - self.mean) / self.std

    @on_own_device
    def reflectance(self, image: Tensor) -> Tensor:
        """The opposite of `normalised`, (B, C, H, W) both."""
        if not self.normalise:
            return image
        return (image * self.std + self.mean) / self.card.normalisation.scale

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Feature maps of a normalised image (B * T, C, H, W); each family's own."""
        raise NotImplementedError

    def _check(self, image: Tensor) -> Tensor:
        if not image.is_floating_point():
            raise TypeError(
                f"image is {image.dtype}: reflectance 0-1 in floating point is needed; "
                "divide integer values by the data set's scale first"
            )
        shape = tuple(image.shape)
        if image.ndim == 4:
            image = image.unsqueeze(2)  # (B, C, 1, H, W)
        if image.ndim != 5 or image.shape[2] != self.dates:
            wanted = f"{self.dates} dates, (B, C, {self.dates}, H, W)"
            if self.dates == 1:
                wanted = "one date, (B, C, H, W) or (B, C, 1, H, W)"
            raise ValueError(
                f"image has shape {shape}: {self.card.name} takes {wanted}. Prithvi "
                "reads several dates: load_backbone(..., dates=T)"
            )
        if image.shape[1] != len(self.bands):
            raise ValueError(
                f"image has {image.shape[1]} channels, {self.card.name} was loaded for "
                f"{len(self.bands)}: {', '.join(self.bands)}. Load it with "
                "bands=[...] in the order of your channels"
            )
        height, width = image.shape[-2:]
        step = max(self.strides)
        if height % step or width % step or not height or not width:
            raise ValueError(
                f"image is {height} x {width} px: {self.card.name} needs multiples of "
                f"{step}. Pad it, or use build_model, which pads and crops back"
            )
        return image.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)

    @property
    def block_paths(self) -> list[str]:
        """Dotted paths of the blocks inside `model`, in order."""
        return block_names(self.model, self.layout)

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """(path, module) of every block, in order, wrapped ones included."""
        return [(path, self.module(path)) for path in self.block_paths]

    def module(self, path: str) -> nn.Module:
        """The module at a dotted path inside `model`; ValueError if there is none."""
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"{self.card.name} has no module {path!r}: {error}. Paths are those of "
                "backbone.model.named_modules()"
            ) from error

    def weights(self) -> dict[str, Tensor]:
        """The state dict of `model`, and of the modules `beside` it."""
        state = dict(self.model.state_dict())
        for path in self.beside:
            state |= self.get_submodule(path).state_dict(prefix=f"{path}.")
        return state

    def weights_hash(self, sample: int | None = None) -> str:
        """SHA-256 over names, shapes, types and bytes of `weights`.

        With `sample`, about this many evenly spaced numbers of each tensor are hashed.
        """
        digest = hashlib.sha256()
        for name, tensor in self.weights().items():
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            flat = tensor.detach().reshape(-1)
            step = 1 if sample is None else max(1, flat.numel() // sample)
            flat = flat[::step].cpu().contiguous()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def train(self, mode: bool = True) -> Backbone:
        """Switch mode; frozen batch norms stay in eval mode.

        Otherwise their running statistics, and so a "frozen" backbone, would change
        with every batch.
        """
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BATCH_NORMS) and not any(
                parameter.requires_grad for parameter in layer.parameters()
            ):
                layer.eval()
        return self

    def extra_repr(self) -> str:
        """Name and bands, as `print(backbone)` shows them."""
        return f"name={self.card.name!r}, bands={list(self.bands)}"


def block_names(model: nn.Module, layout: str) -> list[str]:
    """Dotted paths of a network's blocks, in order."""
    names = (name for name, _ in model.named_modules())
    return [name for name in names if _BLOCKS[layout].fullmatch(name)]


def tap_points(depth: int) -> tuple[int, ...]:
    """Blocks after which the four maps of a plain ViT are taken.

    12 blocks give 2, 5, 8, 11; 24 give 5, 11, 17, 23; 32 give 7, 15, 23, 31.
    """
    return tuple(math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4))


def tapped_tokens(model: Any, tokens: Tensor, taps: Sequence[int]) -> Iterator[Tensor]:
    """Run the blocks of a ViT; yield the tokens (B, N, D) after the tapped ones.

    The last are normed. Fewer than four blocks yield the same tokens more than once.
    """
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        for tap in taps:
            if tap == index:
                yield model.norm(tokens) if index == taps[-1] else tokens


def adapt_kernels(layer: nn.Module, plan: BandPlan) -> None:
    """Rearrange the input kernels (D, C, kh, kw) of a convolution in place.

    `plan.kernels` has one entry per new channel: the index of the old kernel, or None
    for a random one with the spread of the old ones. Raises TypeError for a layer that
    is not an ungrouped `nn.Conv2d`.
    """
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        raise TypeError(f"bands can be changed on a plain Conv2d, not on {layer!r}")
    if plan.kernels == tuple(range(layer.in_channels)):
        return
    old: Tensor = layer.weight.detach()
    new: list[Any] = []
    for index in plan.kernels:
        if index is None:
            new.append(torch.randn_like(old[:, 0]) * old.std())
        else:
            new.append(old[:, index] * plan.share(index))
    layer.weight = nn.Parameter(torch.stack(new, dim=1))  # (D, C of the plan, kh, kw)
    layer.in_channels = len(new)
