"""Training: the step and its loss, `fit`, the tracker, the feature cache, scores."""

from geopeft_kit.training.evaluate import evaluate
from geopeft_kit.training.fit import Run, fit
from geopeft_kit.training.intervals import region_gap, score_regions
from geopeft_kit.training.tracker import Resources, Tracker, count_saved_bytes

__all__ = [
    "Resources",
    "Run",
    "Tracker",
    "count_saved_bytes",
    "evaluate",
    "fit",
    "region_gap",
    "score_regions",
]
