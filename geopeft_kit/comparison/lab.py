"""Where candidates are trained alike: same chips, same start of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.backbones import load_backbone
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.comparison.candidate import Candidate
from geopeft_kit.data.chips import ChipData
from geopeft_kit.methods import Adapter, attach
from geopeft_kit.model import Model, build_model
from geopeft_kit.training.callbacks import Progress
from geopeft_kit.training.evaluate import HEADLINE
from geopeft_kit.training.fit import Run, fit
from geopeft_kit.training.head_start import start_decoder
from geopeft_kit.training.plan import DECODER_LEARNING_RATE


class Lab:
    """What the candidates of a comparison share: data, backbones and decoder starts."""

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
