"""What a checkpoint must share with the run that continues from it."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pandas.util import hash_pandas_object

from geopeft_kit.data.batch import Batch
from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.split_data import SplitData
from geopeft_kit.model import Model
from geopeft_kit.training.plan import Plan
from geopeft_kit.training.task import trained_names

SAMPLE = 1000  # numbers of each frozen tensor that are compared
CHIPS = 8  # training chips whose pixels are compared
SETTINGS = (
    "seed",
    "loss",
    "class_weights",
    "batch_size",
    "accumulate",
    "learning_rate",
    "decoder_learning_rate",
    "weight_decay",
    "optimiser",
    "frozen_precision",
)
KEYS = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "run"}


def description_of(model: Model, data: SplitData, plan: Plan) -> dict[str, str]:
    """What decides about the weights of a run, each as a text; called before training.

    Epochs and patience may change: a run can be made longer.
    """
    adapter: Any = model.backbone.adapter
    trained = trained_names(model)
    state = model.state_dict()
    frozen = {name: state[name] for name in state if name not in trained}
    settings = plan.settings()
    return {
        "backbone": f"{model.backbone.card.name} {model.bands}",
        "frozen weights": _hash_of(frozen),
        "method": "none" if adapter is None else f"{adapter.name} {adapter.config}",
        "decoder": str(model.config),
        "trained tensors": f"{len(trained)}, {_hash_of(dict.fromkeys(trained))}",
        "data": _hash_of_data(data),
        **{name: str(settings[name]) for name in SETTINGS},
    }


def check_same_run(checkpoint: Path, description: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another run, or a file that is none.

    Raises ValueError that names each difference.
    """
    try:
        content = torch.load(checkpoint, "cpu", weights_only=True, mmap=True)
        missing = sorted(KEYS - set(content))
    except (pickle.UnpicklingError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is no checkpoint of fit. Restore it from a copy, or start "
            "with resume=False."
        ) from error
    if missing:
        raise ValueError(
            f"{checkpoint} is no whole checkpoint of fit: it lacks "
            f"{', '.join(missing)}. Restore it from a copy, or start with resume=False."
        )
    there = content["run"]
    different = [name for name in description if there.get(name) != description[name]]
    if different:
        parts = [
            f"{n} ({there.get(n)} there, {description[n]} here)" for n in different
        ]
        raise ValueError(
            f"{checkpoint} was written by another set-up; these differ: "
            f"{'; '.join(parts)}. Resume with what it was made with, or pass another "
            "folder."
        )


def _hash_of_data(data: SplitData) -> str:
    """Of names, splits and labels of all chips, and of some training chips."""
    train = data.dataset("train")
    parts: dict[str, Any] = {f"{data.task}, {data.num_classes}, {len(train)}": None}
    if isinstance(data, ChipData):  # others may draw transforms
        columns = [c for c in ("chip", "split", "region", "label") if c in data.index]
        rows = hash_pandas_object(data.index[columns].astype(str), index=False)
        parts["index"] = torch.from_numpy(rows.to_numpy().astype("int64"))
        for number in range(0, len(train), -(-len(train) // CHIPS)):
            chip = Batch.of(train[number])
            parts[f"image {number}"], parts[f"target {number}"] = (
                chip.image,
                chip.target,
            )
    return _hash_of(parts)


def _hash_of(tensors: Mapping[str, Any]) -> str:
    """Over sorted names, and evenly spaced numbers of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        value = tensors[name]
        if value is not None:
            flat = torch.as_tensor(value).detach().reshape(-1)
            flat = flat[:: max(1, flat.numel() // SAMPLE)].cpu().contiguous()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]
