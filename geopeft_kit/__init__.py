"""Parameter-efficient fine-tuning of geospatial foundation models, to read and copy.

`import geopeft_kit as gk` loads nothing heavy: each public name is imported from
its room when it is first used (PEP 562), so that torch, peft or leafmap cost time
only in the cell that needs them. `notebooks/00_quickstart.ipynb` shows the names.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopeft_kit import bands, baselines, plots
    from geopeft_kit.applicability import area_of_applicability
    from geopeft_kit.backbones import list_backbones, load_backbone
    from geopeft_kit.backbones.selective_scan import SelectiveScanBlock, selective_scan
    from geopeft_kit.comparison import Candidate, compare
    from geopeft_kit.data import (
        ChipData,
        TorchgeoData,
        check_data,
        sample_scene,
        simulated_data,
        touching_chips,
    )
    from geopeft_kit.explorer import Explorer
    from geopeft_kit.exported_model import export_model
    from geopeft_kit.geo_aware import pretrain_geo_aware
    from geopeft_kit.maps import MapLayer, Raster, chip_layers, save_map, show_map
    from geopeft_kit.maps.places import predict_place
    from geopeft_kit.methods import attach, combine, list_methods, load_adapter
    from geopeft_kit.model import build_model
    from geopeft_kit.pretraining import pretrain
    from geopeft_kit.saved_model import load_model, save_model
    from geopeft_kit.scenes.exports import export_prediction
    from geopeft_kit.scenes.fetch import fetch_scene
    from geopeft_kit.scenes.inference import predict_scene
    from geopeft_kit.training import (  # type: ignore[no-redef]
        MemoryEstimate,
        estimate_memory,
        evaluate,
        fit,
        mixed_precision,
        region_gap,
        score_regions,
        usable_mib,
    )

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "ChipData",
    "Explorer",
    "MapLayer",
    "MemoryEstimate",
    "Raster",
    "SelectiveScanBlock",
    "TorchgeoData",
    "area_of_applicability",
    "attach",
    "baselines",
    "bands",
    "build_model",
    "check_data",
    "chip_layers",
    "combine",
    "compare",
    "estimate_memory",
    "evaluate",
    "export_model",
    "export_prediction",
    "fetch_scene",
    "fit",
    "list_backbones",
    "list_methods",
    "load_adapter",
    "load_backbone",
    "load_model",
    "mixed_precision",
    "plots",
    "predict_place",
    "predict_scene",
    "pretrain",
    "pretrain_geo_aware",
    "region_gap",
    "sample_scene",
    "save_map",
    "save_model",
    "score_regions",
    "selective_scan",
    "show_map",
    "simulated_data",
    "touching_chips",
    "usable_mib",
]

# Room -> the public names it holds. `_MODULES` are public as modules.
_ROOMS = {
    "applicability": ("area_of_applicability",),
    "backbones": ("list_backbones", "load_backbone"),
    "backbones.selective_scan": ("SelectiveScanBlock", "selective_scan"),
    "comparison": ("Candidate", "compare"),
    "data": (
        "ChipData",
        "TorchgeoData",
        "check_data",
        "sample_scene",
        "simulated_data",
        "touching_chips",
    ),
    "explorer": ("Explorer",),
    "exported_model": ("export_model",),
    "geo_aware": ("pretrain_geo_aware",),
    "maps": ("MapLayer", "Raster", "chip_layers", "save_map", "show_map"),
    "maps.places": ("predict_place",),
    "methods": ("attach", "combine", "list_methods", "load_adapter"),
    "model": ("build_model",),
    "pretraining": ("pretrain",),
    "saved_model": ("load_model", "save_model"),
    "scenes.exports": ("export_prediction",),
    "scenes.fetch": ("fetch_scene",),
    "scenes.inference": ("predict_scene",),
    "training": (
        "MemoryEstimate",
        "estimate_memory",
        "evaluate",
        "fit",
        "mixed_precision",
        "region_gap",
        "score_regions",
        "usable_mib",
    ),
}
_MODULES = ("baselines", "bands", "plots")
_HOME = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        near = difflib.get_close_matches(name, __all__, n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else f"It has: {__all__}."
        raise AttributeError(f"geopeft_kit has no public name {name!r}. {hint}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted([*__all__, "__version__"])
