"""`compare`: several adaptations on the same data, splits, seeds and head start.

Every candidate gets the same decoder start, the same number of epochs and an equal
budget of learning-rate trials; differences are paired by seed. Taught in notebooks 00
and 02.

Sources: equal tuning budget and repeated seeds as in GEO-Bench (Lacoste et al. 2023,
arXiv 2306.03831); paired Student intervals are ours, because a bootstrap over five
seeds is too narrow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from geopeft_kit.backbones import load_backbone
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.data.chips import ChipData
from geopeft_kit.methods import Adapter, attach
from geopeft_kit.model import Model, build_model
from geopeft_kit.training.evaluate import HEADLINE, evaluate
from geopeft_kit.training.fit import DECODER_LEARNING_RATE, Run, fit
from geopeft_kit.training.hardware import choose_device
from geopeft_kit.training.head_start import start_decoder


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


def compare(
    candidates: Sequence[Candidate],
    data: ChipData,
    backbone: str = "geopeft_tiny",
    backbone_options: Mapping[str, Any] | None = None,
    decoder: str = "linear",
    epochs: int = 20,
    seeds: Sequence[int] = (0, 1, 2),
    train_chips: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Comparison:
    """Train every candidate with every seed and score it on seen and unseen regions.

    For each seed the decoder is started once (see `head_start`), and every candidate on
    the same weights begins with that decoder. A method that is no identity at the start
    hands other features to it, and gets a start by the same recipe on those. Learning
    rates are searched with the first seed, on the validation split. The test split is
    read once per trained model.

    Args:
        candidates: The rows of the table; labels must differ.
        data: Chips with train, val and test splits.
        backbone: Name of the common backbone.
        backbone_options: Keyword arguments of `load_backbone` common to all.
        decoder: Name of the common decoder; ignored for classification.
        epochs: For every candidate.
        seeds: Start of decoder and adapters, order of samples, and draw of the subset.
        train_chips: Train on that many chips, drawn anew for each seed; None for all.
        device: As in `fit`.
        progress: Print a line for each trained model.

    Returns:
        The `Comparison`.

    Raises:
        ValueError: Labels repeat, or candidates have unequal numbers of trials.
    """
    _check(candidates)
    place = choose_device(device)
    lab = _Lab(data, backbone, backbone_options or {}, decoder, epochs, place)
    rows, searches, trained = [], [], {}
    chosen: dict[str, float | None] = {}
    for seed in seeds:
        lab.start_seed(seed, train_chips)
        for candidate in candidates:
            if candidate.label not in chosen:
                rate, trials = lab.search(candidate)
                chosen[candidate.label] = rate
                searches += trials
            run, adapter = lab.train(candidate, chosen[candidate.label])
            row = _row(candidate, seed, run, adapter, data, place)
            rows.append(row)
            if progress:
                print(
                    f"seed {seed}  {candidate.label:<22} val {row['val']:.3f}  "
                    f"test {row['test']:.3f}  {row['step_ms']:.0f} ms a step",
                    flush=True,
                )
            if seed == seeds[0]:
                trained[candidate.label] = Trained(candidate, run.model, adapter)
            else:
                adapter.detach()
    return Comparison(
        rows=pd.DataFrame(rows),
        searches=pd.DataFrame(searches),
        trained=trained,
        score=HEADLINE[data.task][0],
        splits=[split for split in data.splits if split != "train"],
    )


class _Lab:
    """What the candidates of a comparison share: data, backbones and decoder starts."""

    def __init__(
        self,
        data: ChipData,
        backbone: str,
        options: Mapping[str, Any],
        decoder: str,
        epochs: int,
        place: torch.device,
    ) -> None:
        self.all_data = data
        self.name, self.options, self.decoder = backbone, dict(options), decoder
        self.epochs, self.place = epochs, place
        self.pretrained: dict[str, Backbone] = {}

    def start_seed(self, seed: int, train_chips: int | None) -> None:
        self.seed = seed
        self.data = self.all_data
        if train_chips is not None:
            self.data = self.all_data.subset(train_chips, seed)
        self.random: dict[str, Backbone] = {}
        self.starts: dict[tuple[str, str], dict[str, Tensor]] = {}

    def train(self, candidate: Candidate, rate: float | None) -> tuple[Run, Adapter]:
        key, backbone = self._backbone(candidate)
        start = {}
        if not candidate.fresh_decoder:
            start = self._decoder_start(key, backbone, candidate)
        torch.manual_seed(self.seed)
        adapter = attach(backbone, candidate.method, **candidate.options)
        model = self._model(backbone, candidate)
        if adapter.identity_at_start or candidate.fresh_decoder:
            model.load_state_dict(start, strict=False)
        else:  # other features, or even other maps: the same recipe, on those
            start_decoder(model, self.data, self.place, seed=self.seed)
        frozen = adapter.num_parameters == 0
        run = fit(
            model,
            self.data,
            epochs=self.epochs,
            learning_rate=None if frozen else rate,
            decoder_learning_rate=rate if frozen else DECODER_LEARNING_RATE,
            head_start="none",
            device=self.place.type,
            seed=self.seed,
            progress=False,
        )
        return run, adapter

    def search(self, candidate: Candidate) -> tuple[float | None, list[dict[str, Any]]]:
        """The best of the candidate's rates on validation, with every trial's score."""
        if not candidate.learning_rates:
            return None, []
        name, larger = HEADLINE[self.data.task]
        trials = []
        for rate in candidate.learning_rates:
            run, adapter = self.train(candidate, rate)
            score = run.metrics["overall"][name]
            trials.append(
                {"label": candidate.label, "learning_rate": rate, "val": score}
            )
            adapter.detach()
        pick = max if larger else min
        best = pick(trials, key=lambda trial: trial["val"])["learning_rate"]
        edge = best in (min(candidate.learning_rates), max(candidate.learning_rates))
        for trial in trials:
            trial["chosen"] = trial["learning_rate"] == best
            trial["at_edge"] = edge
        return best, trials

    def _backbone(self, candidate: Candidate) -> tuple[str, Backbone]:
        """The candidate's backbone and its key: random ones are new for each seed."""
        options = {**self.options, **candidate.backbone}
        name = options.pop("name", self.name)
        key = repr((name, sorted(options.items(), key=str)))
        is_random = options.get("weights", "default") is None
        store = self.random if is_random else self.pretrained
        if key not in store:
            torch.manual_seed(self.seed)
            store[key] = load_backbone(name, **options).to(self.place)
        return key, store[key]

    def _decoder_start(
        self, backbone_key: str, backbone: Backbone, candidate: Candidate
    ) -> dict[str, Tensor]:
        """The decoder's weights that every candidate on this backbone begins with."""
        key = (backbone_key, repr((candidate.decoder, candidate.decoder_options)))
        if key not in self.starts:
            frozen = attach(backbone, "frozen")
            torch.manual_seed(self.seed)
            model = self._model(backbone, candidate)
            start_decoder(model, self.data, self.place, seed=self.seed)
            state = model.state_dict()
            self.starts[key] = {
                name: value.clone()
                for name, value in state.items()
                if not name.startswith("backbone.")
            }
            frozen.detach()
        return self.starts[key]

    def _model(self, backbone: Backbone, candidate: Candidate) -> Model:
        return build_model(
            backbone,
            candidate.decoder or self.decoder,
            self.all_data.task,
            self.all_data.num_classes,
            **candidate.decoder_options,
        ).to(self.place)


def adapter_kib(adapter: Adapter) -> float:
    """Size of the adapter's saved folder in KiB, read off the disk."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter")
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files) / 1024


def _row(
    candidate: Candidate,
    seed: int,
    run: Run,
    adapter: Adapter,
    data: ChipData,
    place: torch.device,
) -> dict[str, Any]:
    name = HEADLINE[data.task][0]
    counts = run.model.count()
    scores = {
        split: evaluate(run.model, data, split, place)
        for split in data.splits
        if split not in ("train", "val")
    }
    row = {
        "label": candidate.label,
        "method": candidate.method,
        "seed": seed,
        "learning_rate": run.settings["learning_rate"],
        "backbone_trainable": counts["backbone_trainable"],
        "decoder_trainable": counts["decoder_trainable"],
        "adapter_kib": adapter_kib(adapter),
        **run.resources.to_dict(),
        "val": run.metrics["overall"][name],
    }
    row |= {split: score["overall"][name] for split, score in scores.items()}
    unseen = scores["test"]["regions"]
    return row | {f"region {region}": score[name] for region, score in unseen.items()}


def _check(candidates: Sequence[Candidate]) -> None:
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


def _mean_and_spread(scores: pd.Series) -> str:
    if len(scores) == 1:
        return f"{scores.iloc[0]:.3f}"
    return f"{scores.mean():.3f} ± {scores.std(ddof=1):.3f}"


def _interval(differences: pd.Series, larger_is_better: bool) -> dict[str, Any]:
    """Student's 95 % interval of a mean of paired differences."""
    mean, count = differences.mean(), len(differences)
    half = stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5
    low, high = mean - half, mean + half
    if low <= 0 <= high:
        verdict = "not resolved"
    else:
        verdict = "better" if (mean > 0) == larger_is_better else "worse"
    return {"difference": mean, "low": low, "high": high, "verdict": verdict}
