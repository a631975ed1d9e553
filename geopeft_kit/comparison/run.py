"""`compare`: several adaptations on the same data, splits, seeds and head start.

Every candidate gets the same decoder start, the same number of epochs and an equal
budget of learning-rate trials; differences are paired by seed. Taught in notebooks 00
and 02.

Source: equal tuning budget and repeated seeds as in GEO-Bench (Lacoste et al. 2023,
arXiv 2306.03831).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from geopeft_kit.comparison.candidate import Candidate, Trials, check_candidates
from geopeft_kit.comparison.result import Comparison, Trained
from geopeft_kit.data.chips import ChipData
from geopeft_kit.methods import Adapter
from geopeft_kit.progress import progress_bar
from geopeft_kit.training.evaluate import HEADLINE, evaluate
from geopeft_kit.training.fit import Run
from geopeft_kit.training.hardware import choose_device


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
        progress: Show which training of how many, its steps, its loss and the time that
            is left, and print a line for each trained model.

    Returns:
        The `Comparison`.

    Raises:
        ValueError: Labels repeat, or candidates have unequal numbers of trials.
        KeyboardInterrupt: You stopped it; the text says in which training.
    """
    check_candidates(candidates)
    place = choose_device(device)
    runs = sum(len(seeds) + len(one.learning_rates) for one in candidates)
    bar = progress_bar(shown=progress, desc="preparing", unit=" steps", smoothing=0)
    options = backbone_options or {}
    trials = Trials(data, backbone, options, decoder, epochs, place, bar, runs)
    try:
        with bar:
            rows, searches, trained = _train_all(trials, candidates, seeds, train_chips)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped in training {trials.title}. A comparison is kept only when it is "
            "complete; fewer epochs, seeds or candidates make it shorter."
        ) from None
    return Comparison(
        rows=pd.DataFrame(rows),
        searches=pd.DataFrame(searches),
        trained=trained,
        score=HEADLINE[data.task][0],
        splits=[split for split in data.splits if split != "train"],
    )


def _train_all(
    trials: Trials,
    candidates: Sequence[Candidate],
    seeds: Sequence[int],
    train_chips: int | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Trained]]:
    """Rows, searches and trained candidates of a `Comparison`."""
    rows, searches, trained = [], [], {}
    chosen: dict[str, float | None] = {}
    for seed in seeds:
        trials.start_seed(seed, train_chips)
        for candidate in candidates:
            if candidate.label not in chosen:
                rate, tried = trials.search(candidate)
                chosen[candidate.label] = rate
                searches += tried
            run, adapter = trials.train(candidate, chosen[candidate.label])
            row = _row(candidate, seed, run, adapter, trials.all_data, trials.place)
            rows.append(row)
            if not trials.bar.disable:
                trials.bar.write(
                    f"seed {seed}  {candidate.label:<22} val {row['val']:.3f}  "
                    f"test {row['test']:.3f}  {row['step_ms']:.0f} ms a step"
                )
            if seed == seeds[0]:
                trained[candidate.label] = Trained(candidate, run.model, adapter)
            else:
                adapter.detach()
    return rows, searches, trained


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
