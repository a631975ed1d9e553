"""The data room: a chip folder on disk becomes batches; splits are by region.

Taught in `notebooks/09_unseen_regions.ipynb` and `notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopeft_kit.data.check import check_data
    from geopeft_kit.data.chip import Chip
    from geopeft_kit.data.chips import ChipData
    from geopeft_kit.data.folder import read_chip_folder, write_chip_folder
    from geopeft_kit.data.leakage import touching_chips
    from geopeft_kit.data.sample import sample_scene
    from geopeft_kit.data.simulated import simulated_data
    from geopeft_kit.data.torchgeo_data import TorchgeoData

__all__ = [
    "Chip",
    "ChipData",
    "TorchgeoData",
    "check_data",
    "read_chip_folder",
    "sample_scene",
    "simulated_data",
    "touching_chips",
    "write_chip_folder",
]

# Resolved when first used: writing a chip folder needs no torch, reading one does.
_ROOMS = {
    "Chip": "chip",
    "ChipData": "chips",
    "TorchgeoData": "torchgeo_data",
    "check_data": "check",
    "read_chip_folder": "folder",
    "sample_scene": "sample",
    "simulated_data": "simulated",
    "touching_chips": "leakage",
    "write_chip_folder": "folder",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
