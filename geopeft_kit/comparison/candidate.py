"""Candidates of a comparison, and the conditions that all of them are trained under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.backbones import load_backbone
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.data.chips import ChipData
from geopeft_kit.methods import Adapter, attach
from geopeft_kit.model import Model, build_model
from geopeft_kit.training.callbacks import Progress
from geopeft_kit.training.evaluate import HEADLINE
from geopeft_kit.training.fit import Run, fit
from geopeft_kit.training.head_start import start_decoder
from geopeft_kit.training.plan import DECODER_LEARNING_RATE


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
        fresh_decoder: Begin with a random decoder on raw features, for a network
            trained from scratch: standardising its nearly constant features would make
            training unstable.
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


class Trials:
    """Trains candidates alike: the same chips, backbones and start of the decoder."""

    def __init__(
        self,
        data: ChipData,
        backbone: str,
        options: Mapping[str, Any],
        decoder: str,
        epochs: int,
        place: torch.device,
        bar: Any,
        runs: int,
    ) -> None:
        self.all_data = data
        self.name, self.options, self.decoder = backbone, dict(options), decoder
        self.epochs, self.place = epochs, place
        self.bar, self.runs, self.run = bar, runs, 0
        self.title = "0"
        self.pretrained: dict[str, Backbone] = {}

    def start_seed(self, seed: int, train_chips: int | None) -> None:
        """Draw the seed's chips; forget the decoder starts of the one before."""
        self.seed = seed
        self.data = self.all_data
        if train_chips is not None:
            self.data = self.all_data.subset(train_chips, seed)
        self.random: dict[str, Backbone] = {}
        self.starts: dict[tuple[str, str], dict[str, Tensor]] = {}

    def train(self, candidate: Candidate, rate: float | None) -> tuple[Run, Adapter]:
        """Train a candidate with this seed; its adapter stays on the backbone."""
        self.run += 1
        self.title = f"{self.run}/{self.runs} {candidate.label}, seed {self.seed}"
        self.bar.set_postfix_str("", refresh=False)
        self.bar.set_description_str(self.title)
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
            device=self.place,
            seed=self.seed,
            progress=False,
            callbacks=[Progress(self.bar, title=f"{self.title}, ", runs=self.runs)],
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
