"""What a pretraining run leaves: history, cost, a look at paintings, and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.devices import device_of, moved
from geopeft_kit.files import whole_file
from geopeft_kit.pretraining.masking import draw_cells, enlarged
from geopeft_kit.pretraining.task import PretextTask
from geopeft_kit.training.tracker import Resources


@dataclass
class Pretraining:
    """What a pretraining run leaves behind.

    Attributes:
        task: Backbone and heads as they ended.
        history: One row an epoch: samples seen, and the mean of each loss.
        resources: Time and memory, see `Resources`; None where a resumed run had no
            step left.
        seconds: Of this call; a resumed run counts from its resume.
        watt_hours: Of the GPUs in this call; None is "not measured".
        weights: The file that `load_backbone` reads; None without a folder, or where an
            adapter trained: that is saved by `adapter.save`.
    """

    task: PretextTask
    history: pd.DataFrame
    resources: Resources | None
    seconds: float
    watt_hours: float | None
    weights: Path | None = None

    def cost(self) -> dict[str, Any]:
        """Minutes, memory and energy, as one row of a table."""
        cost: dict[str, Any] = {"minutes": self.seconds / 60}
        if self.resources is not None:
            cost |= {
                "ms a step": self.resources.step_ms,
                "peak MiB": self.resources.peak_mib,
                "activations MiB": self.resources.activations_mib,
            }
        energy = self.watt_hours
        return cost | {"energy Wh": "not measured" if energy is None else energy}

    @torch.no_grad()
    def reconstruct(
        self, image: Tensor, mask_ratio: float | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Hide a part of images and let the network paint it.

        Args:
            image: (B, C, H, W) reflectance.
            mask_ratio: Share to hide; None is that of training.
            seed: Of the cells that are hidden.

        Returns:
            What is hidden, (B, H, W) bool, and the painted images, (B, C, H, W)
            reflectance: all of them painted, the visible cells too. Both are on the
            CPU.

        Raises:
            ValueError: `mask_ratio` is no share.
        """
        task = self.task
        ratio = task.objective.mask_ratio if mask_ratio is None else mask_ratio
        if not 0 <= ratio <= 1:
            raise ValueError(f"mask_ratio is {ratio}; it is a share from 0 to 1.")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            cells = draw_cells(image.cpu(), task.unit, ratio)
        tokens, _ = task.encode(*moved((image, cells), device_of(task)))
        painted = task.paint(tokens)
        return enlarged(cells, task.unit), task.backbone.reflectance(painted).cpu()


def save_weights(backbone: Backbone, path: str | Path, half: bool = True) -> Path:
    """Write the backbone's plain weights as safetensors that `load_backbone` reads.

    The file knows its bands: load it with the same `bands` and options. One for all
    bands of the card serves any subset where the network keeps its upstream's names
    (Prithvi, Swin, timm's), else it is refused.

    Args:
        backbone: Any backbone; no adapter may be active.
        path: The file; written whole or not at all.
        half: Store as float16, half the size.

    Returns:
        The path written.

    Raises:
        ValueError: An adapter is active.
    """
    adapter: Any = getattr(backbone, "adapter", None)
    if adapter is not None:
        raise ValueError(
            f"the adapter {adapter.name!r} is active, so these are not plain "
            "weights. Save it with adapter.save(folder), or fold it in with "
            "adapter.merge() first."
        )
    path = Path(path)
    dtype = torch.float16 if half else torch.float32
    state = {}
    for name, tensor in backbone.weights().items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.to(kind).contiguous()
    with whole_file(path) as part:
        save_file(state, part, {"bands": ",".join(backbone.bands)})
    return path
