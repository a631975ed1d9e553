"""Comparing adaptations fairly: candidates, their training, the result."""

from geopeft_kit.comparison.candidate import Candidate
from geopeft_kit.comparison.result import Comparison, Trained, half_width
from geopeft_kit.comparison.run import adapter_kib, compare

__all__ = ["Candidate", "Comparison", "Trained", "adapter_kib", "compare", "half_width"]
