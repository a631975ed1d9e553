"""The explorer without its page: backbones in memory, previews, finished runs.

One backbone carries the adapters of all runs; showing a run activates its adapter. A
preview attaches a method, counts, and detaches it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import default_collate

from geopeft_kit.backbones import load_backbone
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.data.batch import Batch
from geopeft_kit.data.chips import ChipData
from geopeft_kit.explorer.choice import AS_GIVEN, Choice, code_of, find_method
from geopeft_kit.explorer.threads import Reporter, TrainingLock
from geopeft_kit.methods import Adapter, attach
from geopeft_kit.model import Model, build_model
from geopeft_kit.training.evaluate import HEADLINE, evaluate
from geopeft_kit.training.fit import fit
from geopeft_kit.training.hardware import (
    choose_device,
    choose_precision,
    free_gib,
)
from geopeft_kit.training.memory import estimate_memory
from geopeft_kit.training.tracker import MIB

Report = Callable[[dict[str, Any]], None]
PARTS = ("weights", "gradients", "optimiser", "activations")
LARGEST_OPTION = 4096  # beyond the width of every backbone


@dataclass(frozen=True)
class Preview:
    """What is known about a choice before it is trained.

    Attributes:
        reason: Why it cannot be trained, or None.
        backbone, adapter, decoder: Numbers of parameters; adapter and decoder train.
        memory: Predicted MiB of weights, gradients, optimiser and activations.
    """

    reason: str | None = None
    backbone: int = 0
    adapter: int = 0
    decoder: int = 0
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass
class KeptRun:
    """A trained choice.

    Attributes:
        adapter: Attached to the shared backbone, active when it is shown.
        model: That backbone with the decoder of this run.
        rows: The history, one dict an epoch.
        losses: Training loss of each step.
        resources: Measured time and memory, see `gk.training.Resources`.
        scores: "val" and "test" -> what `gk.evaluate` gives.
        counts: Parameters of backbone, adapter and decoder.
        predictions: For chips of the test split, by position; made when needed.
        saved: Folder that it was last saved in, or empty.
    """

    number: int
    choice: Choice
    adapter: Adapter = field(repr=False)
    model: Model = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    losses: list[float] = field(repr=False)
    resources: dict[str, Any] = field(repr=False)
    scores: dict[str, Any] = field(repr=False)
    counts: dict[str, int]
    predictions: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    saved: str = ""

    @property
    def free_folder(self) -> str:
        """The default folder to save to, which does not exist yet."""
        name = f"runs/{self.choice.method}_{self.choice.decoder}"
        names = (name, *(f"{name}_{number}" for number in range(2, 10_000)))
        return next(name for name in names if not Path(name).exists())

    @property
    def name(self) -> str:
        """What tables and maps call it."""
        return f"{self.number} {self.choice.title}"

    @property
    def memory(self) -> float:
        """Measured MiB of weights, gradients, optimiser and activations together."""
        return sum(self.resources[f"{part}_mib"] for part in PARTS)

    def score(self, split: str = "test") -> float:
        """The headline score of a split; NaN where it has none."""
        name = HEADLINE[self.model.task][0]
        return self.scores.get(split, {}).get("overall", {}).get(name, float("nan"))


class Session:
    """Data sets, backbones and runs.

    Args:
        data: Label -> data.
        backbones: Label -> arguments of `load_backbone`, `name` among them.

    Attributes:
        runs: Key of the choice -> run, in the order of training.
        lock: Decides who computes: the page, or the training.
        device: Where everything is computed.
    """

    def __init__(
        self, data: Mapping[str, ChipData], backbones: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.data, self.backbones = dict(data), dict(backbones)
        self.runs: dict[str, KeptRun] = {}
        self.lock = TrainingLock()
        self.device = choose_device()
        self._held_out: dict[tuple[str, str], ChipData] = {}
        self._loaded: dict[tuple[str, tuple[str, ...]], Backbone] = {}
        self._sizes: dict[int, int] = {}  # of the plain backbones, by id
        self._previews: dict[str, Preview] = {}

    def regions(self, label: str) -> list[str]:
        """Regions of a data set that can be held out one at a time."""
        data = self.data[label]
        if data.hparams["split"] != "region" or data.subsets:
            return []
        return data.regions if len(data.regions) > 1 else []

    def data_of(self, choice: Choice) -> ChipData:
        """The data with the choice's region held out."""
        data, key = self.data[choice.data], (choice.data, choice.held_out)
        if choice.held_out == AS_GIVEN:
            return data
        if key not in self._held_out:
            other = ChipData(**{**data.hparams, "test_regions": [choice.held_out]})
            if data.factor > 1:
                other = other.for_super_resolution(data.factor)
            self._held_out[key] = other
        return self._held_out[key]

    def backbone_of(self, choice: Choice) -> Backbone:
        """The backbone, loaded once for each set of bands."""
        bands = tuple(self.data[choice.data].bands)
        key = (choice.backbone, bands)
        if key not in self._loaded:
            # All threads share torch's random numbers, which random weights draw.
            with self.lock.exclusive():
                if key not in self._loaded:  # another thread may have been faster
                    self._loaded[key] = self._load(choice, bands)
        return self._loaded[key]

    def _load(self, choice: Choice, bands: tuple[str, ...]) -> Backbone:
        """A backbone with the weights that `code` gives as well."""
        torch.manual_seed(0)
        arguments = {"bands": bands, **self.backbones[choice.backbone]}
        backbone = load_backbone(**arguments).to(self.device)
        self._sizes[id(backbone)] = sum(p.numel() for p in backbone.parameters())
        return backbone

    def code(self, choice: Choice) -> str:
        """The cell that repeats a run, trained or not."""
        arguments, run = self.backbones[choice.backbone], self.runs.get(choice.key)
        saved = "" if run is None else run.saved
        return code_of(choice, self.data_of(choice), arguments, self.device, saved)

    def preview(self, choice: Choice) -> Preview:
        """Sizes and memory of a choice, or why it cannot be trained."""
        if choice.key not in self._previews:
            try:
                self._previews[choice.key] = self._preview(choice)
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                return Preview(reason=str(error))
        return self._previews[choice.key]

    def _preview(self, choice: Choice) -> Preview:
        for name, value in choice.options.items():
            # The preview builds the adapter; a typing error must not fill the memory.
            if isinstance(value, int) and value > LARGEST_OPTION:
                raise ValueError(
                    f"{name} is {value:,}; the largest that is tried is "
                    f"{LARGEST_OPTION:,}."
                )
        backbone = self.backbone_of(choice)
        with self.lock.borrow(backbone):
            active: Any = backbone.adapter
            if active is not None:  # `why_not` is about the plain network
                active.deactivate()
            reason = find_method(choice.method).why_not(backbone)
            if reason is not None:
                return Preview(reason=f"{choice.method} does not fit: {reason}")
            torch.manual_seed(choice.seed)
            adapter, model = self._build(choice)
            try:
                counts = self._count(model, adapter)
                memory = self._predict_memory(model, self.data_of(choice))
            finally:
                adapter.detach()
        return Preview(None, counts["backbone"], counts["adapter"], counts["decoder"],
                       memory)  # fmt: skip

    def _predict_memory(self, model: Model, data: ChipData) -> dict[str, float]:
        """MiB of a training step by part, as `KeptRun.memory` counts them."""
        size = min(data.batch_size, len(data.dataset("train")))
        precision = choose_precision("auto", self.device)
        estimate = estimate_memory(model, size, data.image_size, precision)
        return {part: estimate.causes[part] for part in PARTS}

    def _build(self, choice: Choice) -> tuple[Adapter, Model]:
        """The adapter, active, and the model; an error leaves nothing attached."""
        backbone, data = self.backbone_of(choice), self.data_of(choice)
        adapter = attach(backbone, choice.method, **choice.options)
        try:
            model = build_model(
                backbone,
                choice.decoder,
                data.task,
                data.num_classes,
                factor=data.factor if data.factor > 1 else None,
            )
        except BaseException:
            adapter.detach()
            raise
        return adapter, model.to(self.device)

    def _count(self, model: Model, adapter: Adapter) -> dict[str, int]:
        """Parameters of the plain backbone, of the adapter, and of the decoder."""
        return {
            "backbone": self._sizes[id(model.backbone)],
            "adapter": adapter.num_parameters,
            "decoder": sum(p.numel() for p in model.decoder_parameters()),
        }

    def train(self, choice: Choice, report: Report) -> KeptRun:
        """Train a choice; meant for a separate thread. `report`: see `Reporter`.

        The adapter of the run is attached but not active. Raises Cancelled when
        `lock.stop` was set; after any error the backbone is bit for bit what it was.
        """
        data, backbone = self.data_of(choice), self.backbone_of(choice)
        reporter = Reporter(self.lock, report)
        with self.lock.training():
            torch.manual_seed(choice.seed)
            adapter, model = self._build(choice)
            try:
                with self.lock.handing_over(model):
                    run = fit(
                        model,
                        data,
                        epochs=choice.epochs,
                        learning_rate=choice.learning_rate,
                        validate_every=1 if "val" in data.splits else None,
                        seed=choice.seed,
                        device=self.device,
                        progress=False,
                        callbacks=[reporter],
                    )
                    held_out = evaluate(model, data, "test", self.device)
                kept = KeptRun(
                    number=1 + max((r.number for r in self.runs.values()), default=0),
                    choice=choice,
                    adapter=adapter,
                    model=model,
                    rows=run.history.to_dict("records"),
                    losses=reporter.losses,
                    resources=run.resources.to_dict(),
                    scores={"val": run.metrics, "test": held_out},
                    counts=self._count(model, adapter),
                )
            except BaseException:
                adapter.detach()
                backbone.eval()
                raise
            adapter.deactivate()
        return kept

    def activate(self, run: KeptRun) -> Model:
        """Activate a run's adapter; `lock.borrow` restores a training's own."""
        run.adapter.activate()
        return run.model.eval()

    def predict(self, run: KeptRun, position: int) -> np.ndarray:
        """The prediction for the chip at a position of the test split.

        (H, W) class numbers or values, (C, r*H, r*W) finer bands, or () / (K,) for
        whole images.
        """
        if position not in run.predictions:
            sample = self.data_of(run.choice).dataset("test")[position]
            batch = Batch.of(default_collate([sample]))
            with self.lock.borrow(run.model.backbone), torch.inference_mode():
                output = self.activate(run)(batch.image, batch.meta)[0]
            run.predictions[position] = _decide(output, run.model.task).numpy()
        return run.predictions[position]


def _decide(output: torch.Tensor, task: str) -> torch.Tensor:
    """Logits of one chip -> class numbers, zeros and ones, or values."""
    if task == "super_resolution":
        return output  # (C, r*H, r*W)
    if task == "regression":
        return output[0]  # (H, W)
    if task == "multilabel":
        return output > 0  # (K,)
    return output.argmax(dim=0)  # (H, W), or () for one class per image


def machine_memory(device: torch.device) -> tuple[float, float]:
    """MiB of memory (free, total) where the model trains."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    else:
        total = psutil.virtual_memory().total
    return free_gib(device) * 1024, total / MIB


def pareto_front(runs: list[KeptRun]) -> list[KeptRun]:
    """The runs that no other beats in both the held-out score and memory."""
    if not runs:
        return []
    sign = 1 if HEADLINE[runs[0].model.task][1] else -1
    best, front = -float("inf"), []
    for run in sorted(runs, key=lambda r: (r.memory, -sign * r.score())):
        if sign * run.score() > best:
            best = sign * run.score()
            front.append(run)
    return front
