"""What came out of a comparison: rows, their table, and paired differences.

Source: paired Student intervals are ours, because a bootstrap over five seeds is too
narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

from geopeft_kit.comparison.candidate import Candidate
from geopeft_kit.methods import Adapter
from geopeft_kit.model import Model
from geopeft_kit.training.evaluate import HEADLINE


@dataclass
class Trained:
    """A trained candidate, ready to be asked for predictions.

    Candidates that share a backbone are swapped in by `activate()`.
    """

    candidate: Candidate
    model: Model
    adapter: Adapter

    def activate(self) -> Model:
        """Make this candidate's adapter the active one and return its model."""
        self.adapter.activate()
        return self.model.eval()


@dataclass
class Comparison:
    """Raw rows and what can be read from them.

    Attributes:
        rows: One row per candidate and seed: cost, and scores by split and region.
        searches: One row per candidate and learning rate tried.
        trained: The candidates as trained with the first seed, by label.
        score: Name of the metric in the score columns.
        splits: The splits scored, each a column of `rows`.
    """

    rows: pd.DataFrame
    searches: pd.DataFrame
    trained: dict[str, Trained]
    score: str
    splits: list[str]

    def table(self) -> pd.DataFrame:
        """Mean and standard deviation over seeds, one row a candidate, in order."""
        groups = self.rows.groupby("label", sort=False)
        table = groups[list(COSTS)].mean()
        counts = ["backbone_trainable", "decoder_trainable"]
        table[counts] = table[counts].astype("Int64")
        for split in self.splits:
            table[f"{split} {self.score}"] = groups[split].apply(_mean_and_spread)
        return table.rename(columns=COSTS)

    def regions(self) -> pd.DataFrame:
        """Mean and standard deviation for each region of the test split."""
        columns = [c for c in self.rows if c.startswith("region ")]
        groups = self.rows.groupby("label", sort=False)[columns]
        return groups.agg(_mean_and_spread).rename(columns=lambda c: c[7:])

    def differences(self, reference: str, column: str = "test") -> pd.DataFrame:
        """Paired differences to one candidate, with their 95 % interval over seeds.

        Args:
            reference: A label of the table.
            column: A split: "test" (unseen), "val", ...

        Returns:
            One row per other candidate: difference, low, high, and a verdict, which is
            "not resolved" where the interval holds zero.

        Raises:
            ValueError: The reference is not in the table, or there is only one seed.
        """
        scores = self.rows.pivot(index="seed", columns="label", values=column)
        if reference not in scores:
            raise ValueError(
                f"no candidate {reference!r}; the labels are {', '.join(scores)}."
            )
        if len(scores) < 2:
            raise ValueError("one seed has no spread; run compare with more seeds.")
        labels = [label for label in self.rows["label"].unique() if label != reference]
        larger = HEADLINE_BY_METRIC[self.score]
        rows = [
            {"label": label, **_interval(scores[label] - scores[reference], larger)}
            for label in labels
        ]
        return pd.DataFrame(rows).set_index("label")


COSTS = {
    "backbone_trainable": "trained in backbone",
    "decoder_trainable": "trained in decoder",
    "adapter_kib": "adapter KiB",
    "peak_mib": "peak MiB",
    "activations_mib": "activations MiB",
    "step_ms": "ms a step",
}
HEADLINE_BY_METRIC = dict(HEADLINE.values())


def _mean_and_spread(scores: pd.Series) -> str:
    if len(scores) == 1:
        return f"{scores.iloc[0]:.3f}"
    return f"{scores.mean():.3f} ± {scores.std(ddof=1):.3f}"


def half_width(values: pd.Series) -> float:
    """Half of Student's 95 % interval of a mean; two values or more."""
    return stats.t.ppf(0.975, len(values) - 1) * values.sem()


def _interval(differences: pd.Series, larger_is_better: bool) -> dict[str, Any]:
    """The mean of paired differences with its interval, and what it says."""
    mean, half = differences.mean(), half_width(differences)
    low, high = mean - half, mean + half
    if low <= 0 <= high:
        verdict = "not resolved"
    else:
        verdict = "better" if (mean > 0) == larger_is_better else "worse"
    return {"difference": mean, "low": low, "high": high, "verdict": verdict}
