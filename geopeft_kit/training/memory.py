"""Memory of a training run, predicted from shapes before anything is trained.

    gk.estimate_memory(model, batch_size=8)

One training step is rehearsed on tensors without numbers (see `shadow.py`) and counted
as `Tracker` counts, so that prediction and measurement fit in one table. Taught in
notebook 08.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from geopeft_kit.methods import Adapter
from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import parts_to_recompute
from geopeft_kit.training.frozen_precision import (
    check_frozen_precision,
    frozen_weights,
    saved_bytes,
    to_bf16,
)
from geopeft_kit.training.hardware import choose_device, choose_precision
from geopeft_kit.training.optimisers import optimiser_state_bytes
from geopeft_kit.training.shadow import Shadow, Shapes
from geopeft_kit.training.tracker import MIB, weight_bytes

# Nominal size in GB, and GiB that CUDA offers, as error messages of PyTorch report.
CARDS = {
    "T4": (16, 14.56),
    "L4": (24, 22.03),
    "RTX 4090": (24, 23.5),
    "A100 40GB": (40, 39.4),
    "A100 80GB": (80, 79.1),
    "H200": (141, 139.72),
}
# The driver's own share and the allocator's gaps; ours, not measured on a GPU.
CONTEXT_GIB = 0.5
USABLE = 0.9

CAUSES = {
    "weights": "all weights, frozen ones included",
    "originals": "weights kept outside the network: what `detach` brings back",
    "gradients": "one number for each trained one",
    "optimiser": "two running means for each trained number",
    "activations": "kept from the forward for the backward pass",
    "temporary": "comes and goes within the step",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training run will hold in memory, in MiB by cause (see `CAUSES`).

    Attributes:
        method: Key of the active method.
        batch_size: Images in a batch.
        image_size: Height and width, pixels.
        precision, checkpointing, frozen_precision, optimiser: As for `fit`.
        originals_mib: Of `full` and its relatives, which train copies; and adapters
            that are not active.
        per_image_mib: What one more image in the batch adds.
    """

    method: str
    batch_size: int
    image_size: tuple[int, int]
    precision: str
    checkpointing: str | None
    frozen_precision: str | None
    optimiser: str
    weights_mib: float
    originals_mib: float
    gradients_mib: float
    optimiser_mib: float
    activations_mib: float
    temporary_mib: float
    per_image_mib: float

    @property
    def causes(self) -> dict[str, float]:
        """Cause -> MiB, in the order of `CAUSES`."""
        return {cause: getattr(self, f"{cause}_mib") for cause in CAUSES}

    @property
    def total_mib(self) -> float:
        """The sum of all causes."""
        return sum(self.causes.values())

    def fits(self, card: str | float) -> bool:
        """Whether the run fits a card of `CARDS`, or a memory size in GiB."""
        return self.total_mib <= usable_mib(card)

    def largest_batch(self, card: str | float) -> int:
        """The largest batch that fits, see `fits`; 0 where not even one image does."""
        spare = usable_mib(card) - self.total_mib
        more = math.floor(spare / self.per_image_mib)
        return max(0, self.batch_size + more)

    def sentence(self, card: str | float = "T4") -> str:
        """The answer for one card, in words."""
        nominal = f"{CARDS[card][0]} GB {card}" if card in CARDS else f"{card} GiB"
        need, have = self.total_mib / 1024, usable_mib(card) / 1024
        verb = "fits" if self.fits(card) else "does not fit"
        largest = self.largest_batch(card)
        rest = f"largest batch {largest}" if largest else "not even one image fits"
        return (
            f"{verb} a {nominal} at batch {self.batch_size}: {need:.1f} of {have:.1f} "
            f"usable GiB; {rest}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields and the total as a plain dict, e.g. for a row of a table."""
        return asdict(self) | {"total_mib": self.total_mib}

    def __str__(self) -> str:
        return f"{self.method}: {self.sentence()}"

    def _repr_html_(self) -> str:
        rows = []
        for cause, mib in [*self.causes.items(), ("total", self.total_mib)]:
            bar = f"width:{160 * mib / self.total_mib:.0f}px"
            rows.append(
                f"<tr><th style='text-align:left'>{cause}</th>"
                f"<td style='text-align:right'>{mib:,.1f} MiB</td>"
                f"<td><div style='background:#0072b2;height:0.8em;{bar}'></div></td>"
                f"<td style='text-align:left'>{CAUSES.get(cause, '')}</td></tr>"
            )
        return f"<table>{''.join(rows)}</table><p>{self}</p>"


def estimate_memory(
    model: Model,
    batch_size: int = 8,
    image_size: int | tuple[int, int] | None = None,
    precision: str = "auto",
    checkpointing: str | None = None,
    frozen_precision: str | None = None,
    optimiser: str = "adamw",
) -> MemoryEstimate:
    """Predict what training a model will hold in memory, without training it.

    The model is neither changed nor copied. It may be built without numbers, inside
    ``with torch.device("meta"):``, so a laptop can answer for a network of any size.
    Weights, gradients and optimiser state are exact; activations follow the rules of
    PyTorch's CPU kernels. Not measured on a GPU.

    Args:
        model: From `build_model`, its method attached.
        batch_size: Images in a batch.
        image_size: Pixels, one number or (height, width); None is the backbone's.
        precision: As for `fit`.
        checkpointing: As for `fit`.
        frozen_precision: As for `fit`.
        optimiser: As for `fit`.

    Returns:
        The `MemoryEstimate`; notebooks show it as a table.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> gk.estimate_memory(model, batch_size=8).largest_batch("T4")
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    size = image_size or model.backbone.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    if precision == "auto":
        precision = choose_precision(precision, choose_device(), frozen_precision)
    check_frozen_precision(frozen_precision, precision)
    parts_to_recompute(model, checkpointing)
    shadow = Shadow(model)
    # 4-bit matrices are turned into bf16 for each product, so steps look the same
    less = saved_bytes(shadow.model) if frozen_precision == "nf4" else 0
    weights = weight_bytes(shadow.model) - less
    if frozen_precision:
        with shadow.fakes:
            to_bf16(frozen_weights(shadow.model))
    if frozen_precision == "bf16":
        weights = weight_bytes(shadow.model)
    step, larger = (
        shadow.rehearse(_batch(model, n, height, width), precision, checkpointing)
        for n in (batch_size, 2 * batch_size)
    )
    # Early in the backward pass activations are the most, late in it gradients are:
    # the peak is the larger of two straight lines, and the steeper one is safe.
    slope = max(larger.activations - step.activations, larger.peak - step.peak)
    temporary = max(0, step.peak - step.activations - step.gradients)
    adapter: Adapter | None = getattr(model.backbone, "adapter", None)
    return MemoryEstimate(
        method="full" if adapter is None else adapter.name,
        batch_size=batch_size,
        image_size=(height, width),
        precision=precision,
        checkpointing=checkpointing,
        frozen_precision=frozen_precision,
        optimiser=optimiser,
        weights_mib=weights / MIB,
        originals_mib=shadow.beside / MIB,
        gradients_mib=step.gradients / MIB,
        optimiser_mib=optimiser_state_bytes(step.trained, optimiser) / MIB,
        activations_mib=step.activations / MIB,
        temporary_mib=temporary / MIB,
        per_image_mib=slope / batch_size / MIB,
    )


def usable_mib(card: str | float) -> float:
    """MiB of a card in `CARDS`, or of a number of GiB, that one run can use.

    Half a GiB for the driver and a tenth for the allocator's gaps are subtracted from a
    card; a number of GiB is taken as it is. Raises ValueError for an unknown name or no
    positive number.
    """
    if isinstance(card, str):
        if card not in CARDS:
            raise ValueError(
                f"card is {card!r}; known are {', '.join(CARDS)}. Or give GiB, as 8.0."
            )
        return (CARDS[card][1] - CONTEXT_GIB) * USABLE * 1024
    if not 0 < card < math.inf:
        raise ValueError(f"card is {card} GiB; a finite number above 0 is needed.")
    return card * 1024.0


def _batch(model: Model, batch_size: int, height: int, width: int) -> Shapes:
    """Shapes and number types of a training batch, as `ChipData` gives them."""
    bands, pixels = len(model.backbone.bands), (height, width)
    dates = (2,) if model.task == "change" else ()
    shapes: Shapes = {"image": ((batch_size, bands, *dates, *pixels), torch.float32)}
    if model.task == "classification":
        shapes["label"] = ((batch_size,), torch.int64)
    elif model.task == "multilabel":
        shapes["label"] = ((batch_size, model.num_classes), torch.float32)
    else:
        kind = torch.float32 if model.task == "regression" else torch.int64
        shapes["mask"] = ((batch_size, *pixels), kind)
    if model.task == "super_resolution":
        finer = (height * model.factor, width * model.factor)
        shapes["mask"] = ((batch_size, model.num_classes, *finer), torch.float32)
    return shapes
