"""Training: the step and its loss, `fit`, the tracker, memory, scores."""

from geopeft_kit.training.evaluate import evaluate, region_gap, score_regions
from geopeft_kit.training.fit import Run, fit
from geopeft_kit.training.hardware import mixed_precision
from geopeft_kit.training.memory import MemoryEstimate, estimate_memory, usable_mib
from geopeft_kit.training.tracker import Resources, Tracker, count_saved_bytes

__all__ = [
    "MemoryEstimate",
    "Resources",
    "Run",
    "Tracker",
    "count_saved_bytes",
    "estimate_memory",
    "evaluate",
    "fit",
    "mixed_precision",
    "region_gap",
    "score_regions",
    "usable_mib",
]
