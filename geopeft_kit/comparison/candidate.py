"""What a comparison compares: a method, and all that is not common to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One row of a comparison.

    Attributes:
        label: What the table calls it.
        method: A method key; "full", "frozen", "lora", ...
        options: The method's own options, e.g. `{"rank": 8}`.
        backbone: Keyword arguments of `load_backbone` that differ from the common ones,
            e.g. `{"weights": None}` for random weights.
        decoder: Another decoder than the common one, or None.
        decoder_options: Its options, e.g. `{"width": 64}`.
        fresh_decoder: Begin with a random decoder on features as they are: what a
            network trained from scratch gets. Random features are nearly constant, and
            standardising them makes their training unstable.
        learning_rates: Rates to try on validation. The candidate without a trainable
            backbone tries them on its decoder.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Any] = field(default_factory=dict)
    decoder: str | None = None
    decoder_options: Mapping[str, Any] = field(default_factory=dict)
    fresh_decoder: bool = False
    learning_rates: Sequence[float] = ()


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Refuse labels that repeat and unequal numbers of trials (ValueError)."""
    labels = [candidate.label for candidate in candidates]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise ValueError(
            f"labels must differ; {', '.join(sorted(repeated))} is there twice."
        )
    trials = {c.label: len(c.learning_rates) for c in candidates}
    if len(set(trials.values())) > 1:
        raise ValueError(
            "an unequal tuning budget favours some candidates. Give each the same "
            f"number of learning rates; now they have {trials}."
        )
