"""Many short runs that may be cut: every run is a row of a CSV as soon as it ends.

The rules are those of `gk.compare`: one decoder start for all candidates on the same
weights, the same chips, epochs and number of learning-rate trials for each, differences
paired by seed. Two things differ. Rates are searched with a seed of their own, that no
reported row uses. And a rerun goes on where the last one stopped, also with other
candidates, trials or seeds, and in several processes.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import geopeft_kit as gk
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.comparison import Comparison, adapter_kib
from geopeft_kit.methods import Adapter
from geopeft_kit.model import Model
from geopeft_kit.training.evaluate import HEADLINE
from geopeft_kit.training.head_start import start_decoder

SEARCH_SEED = 100  # of the learning-rate trials; reported seeds count from 0
COLUMNS = (
    "label", "method", "kind", "seed", "learning_rate", "backbone_trainable",
    "decoder_trainable", "adapter_kib", "steps", "step_ms", "peak_mib",
    "activations_mib", "loss", "val", "in_region", "test", "seconds", "problem",
)  # fmt: skip
CPU = torch.device("cpu")


@dataclass
class Journal:
    """The rows of a study, in one CSV for each process that writes.

    Attributes:
        folder: Where the files are.
        study: What their names begin with.
        writer: Number of this process.
    """

    folder: Path
    study: str
    writer: int = 0

    def rows(self) -> pd.DataFrame:
        """All rows of all processes, a rerun's own included."""
        files = sorted(self.folder.glob(f"{self.study}-*.csv"))
        frames = [pd.read_csv(file) for file in files]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def has(self, label: str, seed: int, rate: float) -> bool:
        """Whether that run is there, trained or failed."""
        rows = self.rows()
        if rows.empty:
            return False
        same = (rows["label"] == label) & (rows["seed"] == seed)
        return bool((same & (rows["learning_rate"].sub(rate).abs() < 1e-12)).any())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row to this process' file."""
        path = self.folder / f"{self.study}-{self.writer}.csv"
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerow(row)


@dataclass
class Study:
    """What the candidates have in common.

    Attributes:
        data: Chips with train, val and test; "in_region" is scored where there is one.
        backbone: Name of the backbone.
        options: Arguments of `load_backbone` common to all.
        epochs: For every run.
        chips: Training chips, drawn anew for each seed.
        journal: Where rows go.
        decoder: Name of the decoder; ignored for classification.
    """

    data: gk.ChipData
    backbone: str
    options: Mapping[str, Any]
    epochs: int
    chips: int
    journal: Journal
    decoder: str = "linear"
    _backbones: dict[str, Backbone] = field(default_factory=dict)
    _starts: dict[tuple[str, int], dict[str, torch.Tensor]] = field(
        default_factory=dict
    )

    def run(self, candidates: Sequence[gk.Candidate], seeds: Sequence[int]) -> None:
        """Search the rate of every candidate, then train it with every seed."""
        for candidate in candidates:
            for rate in candidate.learning_rates:
                self._row(candidate, SEARCH_SEED, rate)
        for seed in seeds:
            rates = chosen_rates(self.journal.rows())
            for candidate in candidates:
                if candidate.label in rates:
                    self._row(candidate, seed, rates[candidate.label])

    def _row(self, candidate: gk.Candidate, seed: int, rate: float) -> None:
        if self.journal.has(candidate.label, seed, rate):
            return
        row: dict[str, Any] = {
            "label": candidate.label,
            "method": candidate.method,
            "kind": "search" if seed == SEARCH_SEED else "score",
            "seed": seed,
            "learning_rate": rate,
        }
        began = time.perf_counter()
        try:
            row |= self._train(candidate, seed, rate)
        except Exception as fault:  # a failure is a result, and the others go on
            row["problem"] = f"{type(fault).__name__}: {fault}"[:300]
        row["seconds"] = round(time.perf_counter() - began, 2)
        self.journal.add(row)
        score = row.get("test", row.get("val", float("nan")))
        print(
            f"{row['kind']} {seed}  {candidate.label:<28} {rate:<8.2g} {score:.3f}  "
            f"{row['seconds']:.0f} s  {row.get('problem', '')}",
            flush=True,
        )

    def _train(self, candidate: gk.Candidate, seed: int, rate: float) -> dict[str, Any]:
        name = HEADLINE[self.data.task][0]
        chips = min(self.chips, len(self.data.dataset("train")))
        data = self.data.subset(chips, seed)
        key, backbone = self._load(candidate)
        start = self._start(key, backbone, data, seed)
        with attached(backbone, candidate, seed) as adapter:
            model = self._model(backbone)
            if adapter.identity_at_start:
                model.load_state_dict(start, strict=False)
            else:  # the frozen features' start would not fit what the decoder sees
                start_decoder(model, data, CPU, seed=seed)
            frozen = adapter.num_parameters == 0
            run = gk.fit(
                model,
                data,
                epochs=self.epochs,
                learning_rate=None if frozen else rate,
                decoder_learning_rate=rate if frozen else None,
                head_start="none",
                device="cpu",
                seed=seed,
                progress=False,
            )
            counts, loss = model.count(), float(run.history["loss"].iloc[-1])
            row = {
                "backbone_trainable": counts["backbone_trainable"],
                "decoder_trainable": counts["decoder_trainable"],
                "adapter_kib": round(adapter_kib(adapter), 1),
                "steps": len(data.dataloader("train", shuffle=True)) * self.epochs,
                "loss": loss,
                "val": run.metrics["overall"][name],
            }
            for cost in ("step_ms", "peak_mib", "activations_mib"):
                row[cost] = round(getattr(run.resources, cost), 2)
            if not math.isfinite(loss):
                row["problem"] = "diverged: the loss is not finite"
            if seed != SEARCH_SEED:  # the search sees the validation split only
                for split in set(data.splits) & {"test", "in_region"}:
                    scores = gk.evaluate(model, data, split, CPU)
                    row[split] = scores["overall"][name]
        return row

    def _load(self, candidate: gk.Candidate) -> tuple[str, Backbone]:
        """The backbone of a candidate; the same weights are loaded once."""
        options = {"name": self.backbone, **self.options, **candidate.backbone}
        key = repr(sorted(options.items(), key=str))
        if key not in self._backbones:
            torch.manual_seed(SEARCH_SEED)
            self._backbones[key] = gk.load_backbone(**options)
        return key, self._backbones[key]

    def _start(
        self, key: str, backbone: Backbone, data: gk.ChipData, seed: int
    ) -> dict[str, torch.Tensor]:
        """The decoder that all candidates on this backbone begin with."""
        if (key, seed) not in self._starts:
            with attached(backbone, gk.Candidate("", "frozen"), seed):
                model = self._model(backbone)
                start_decoder(model, data, CPU, seed=seed)
                self._starts[key, seed] = {
                    name: value.clone()
                    for name, value in model.state_dict().items()
                    if not name.startswith("backbone.")
                }
        return self._starts[key, seed]

    def _model(self, backbone: Backbone) -> Model:
        data = self.data
        return gk.build_model(backbone, self.decoder, data.task, data.num_classes)


@contextmanager
def attached(
    backbone: Backbone, candidate: gk.Candidate, seed: int
) -> Iterator[Adapter]:
    """Attach a candidate's method, and detach it whatever happens."""
    torch.manual_seed(seed)
    adapter = gk.attach(backbone, candidate.method, **candidate.options)
    try:
        yield adapter
    finally:
        adapter.detach()


def chosen_rates(rows: pd.DataFrame) -> dict[str, float]:
    """Label -> the rate with the best validation score among the trials that ended."""
    marked = mark_searches(rows)
    best = marked[marked["chosen"]]
    return dict(zip(best["label"], best["learning_rate"], strict=True))


def mark_searches(rows: pd.DataFrame) -> pd.DataFrame:
    """The trials with the columns `chosen` and `at_edge`, as `gk.compare` has them.

    More is better in all scores here. Failed trials are shown and never chosen.
    """
    trials = rows[rows["kind"] == "search"].sort_values(["label", "learning_rate"])
    trials = trials.reset_index(drop=True)
    ended = trials[trials["problem"].isna() & trials["val"].notna()]
    best = trials.index.isin(ended.groupby("label")["val"].idxmax())
    rates = trials.groupby("label")["learning_rate"]
    ends = (rates.transform("min"), rates.transform("max"))
    edge = best & (
        trials["learning_rate"].eq(ends[0]) | trials["learning_rate"].eq(ends[1])
    )
    return trials.assign(
        chosen=best, at_edge=edge.groupby(trials["label"]).transform("any")
    )


def final_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The scored rows at the chosen rates: what the tables are made of."""
    rates = chosen_rates(rows)
    scored = rows[rows["kind"] == "score"]
    wanted = scored["label"].map(rates).astype(float)
    chosen = scored[(scored["learning_rate"] - wanted).abs() < 1e-12]
    return chosen.drop_duplicates(["label", "seed"])  # two processes met


def difference(rows: pd.DataFrame, label: str, reference: str, column: str) -> str:
    """Paired difference with its 95 % interval over the seeds that both have."""
    both = rows[rows["label"].isin([label, reference])].dropna(subset=[column])
    seeds = both.groupby("seed")["label"].nunique()
    both = both[both["seed"].isin(seeds[seeds == 2].index)]
    if label == reference or both["seed"].nunique() < 2:
        return "-"
    score = "accuracy"  # larger is better, as for mIoU
    result = Comparison(both, pd.DataFrame(), {}, score, [column])
    row = result.differences(reference, column).loc[label]
    return (
        f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, "
        f"{100 * row['high']:+.1f}] {row['verdict']}"
    )
