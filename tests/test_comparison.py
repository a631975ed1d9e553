"""A comparison is fair: same start, same budget, honest intervals."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import geopeft_kit as gk
from geopeft_kit.comparison import Comparison
from tests.toy import toy_data

NO_WEIGHTS = {"weights": None}


@pytest.fixture(scope="module")
def result(data: gk.ChipData) -> Comparison:
    candidates = [
        gk.Candidate("probe", "frozen", learning_rates=(1e-4, 1e-3)),
        gk.Candidate("LoRA", "lora", {"rank": 2}, learning_rates=(1e-4, 1e-3)),
    ]
    return gk.compare(
        candidates,
        data,
        backbone_options=NO_WEIGHTS,
        epochs=1,
        seeds=(0, 1),
        train_chips=8,
        progress=False,
    )


@pytest.mark.slow
def test_one_row_a_candidate_and_seed(result: Comparison) -> None:
    assert len(result.rows) == 4
    assert list(result.table().index) == ["probe", "LoRA"]
    assert (
        result.rows.loc[result.rows.label == "probe", "backbone_trainable"] == 0
    ).all()
    assert list(result.regions().columns) == ["far"]


@pytest.mark.slow
def test_the_budget_is_equal_and_the_best_rate_is_taken(result: Comparison) -> None:
    assert set(result.searches.groupby("label").size()) == {2}
    for label, trials in result.searches.groupby("label"):
        best = trials.loc[trials["val"].idxmax(), "learning_rate"]
        assert trials.loc[trials["chosen"], "learning_rate"].iloc[0] == best, label


@pytest.mark.slow
def test_trained_candidates_swap_in_and_differ(
    result: Comparison, data: gk.ChipData
) -> None:
    image = data.dataset("test")[0]["image"][None]
    with torch.inference_mode():
        first = [result.trained[label].activate()(image) for label in result.trained]
        again = [result.trained[label].activate()(image) for label in result.trained]
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.slow
def test_adapter_size_is_read_off_the_disk(result: Comparison) -> None:
    lora = result.rows[result.rows.label == "LoRA"].iloc[0]
    exact = lora["backbone_trainable"] * 4 / 1024
    assert exact < lora["adapter_kib"] < exact + 20


def frame(differences: list[float]) -> Comparison:
    rows = [
        {"label": label, "seed": seed, "test": 0.5 + (label == "b") * change}
        for seed, change in enumerate(differences)
        for label in ("a", "b")
    ]
    return Comparison(pd.DataFrame(rows), pd.DataFrame(), {}, "miou", ["test"])


def test_interval_by_hand() -> None:
    """Mean .02, standard deviation .01, n = 3: half width 4.303 * .01 / sqrt(3)."""
    row = frame([0.01, 0.02, 0.03]).differences("a").loc["b"]
    assert row["difference"] == pytest.approx(0.02)
    assert row["high"] - row["difference"] == pytest.approx(0.02484, abs=1e-4)
    assert row["verdict"] == "not resolved"


@pytest.mark.parametrize(
    ("change", "verdict"), [(0.1, "better"), (-0.1, "worse")]
)  # fmt: skip
def test_resolved_differences(change: float, verdict: str) -> None:
    result = frame([change, change + 0.001, change - 0.001])
    assert result.differences("a").loc["b", "verdict"] == verdict


def test_a_smaller_error_is_better() -> None:
    result = frame([-0.1, -0.101, -0.099])
    result.score = "rmse"
    assert result.differences("a").loc["b", "verdict"] == "better"


def test_bad_comparisons(data: gk.ChipData) -> None:
    twice = [gk.Candidate("a", "frozen"), gk.Candidate("a", "lora")]
    with pytest.raises(ValueError, match="a is there twice"):
        gk.compare(twice, data)
    unequal = [
        gk.Candidate("a", "frozen", learning_rates=(1e-3,)),
        gk.Candidate("b", "lora"),
    ]
    with pytest.raises(ValueError, match="unequal tuning budget"):
        gk.compare(unequal, data)
    with pytest.raises(ValueError, match="labels are a, b"):
        frame([0.1, 0.2]).differences("c")
    with pytest.raises(ValueError, match="one seed has no spread"):
        frame([0.1]).differences("a")


def test_index_threshold_is_the_best_one(data: gk.ChipData) -> None:
    """Against a search over every threshold that occurs."""
    rival = gk.baselines.IndexThreshold(data, "NDVI")
    batch = next(iter(data.dataloader("train")))
    assert rival(batch["image"]).argmax(1).float().mean() > 0
    best = gk.evaluate(rival, data, "train")["overall"]["miou"]
    for shift in (-0.05, 0.05):
        other = gk.baselines.IndexThreshold(data, "NDVI")
        other.threshold += shift
        assert gk.evaluate(other, data, "train")["overall"]["miou"] <= best + 1e-6


@pytest.mark.parametrize("task", ["regression", "segmentation", "classification"])
def test_a_constant_is_the_best_constant(task: str, tmp_path: Path) -> None:
    data = toy_data(tmp_path, task)
    rival = gk.baselines.Constant(data)
    scores = gk.evaluate(rival, data, "train")["overall"]
    batches = list(data.dataloader("train"))
    truth = torch.cat([batch[data.info.target].flatten() for batch in batches])
    if task == "regression":
        spread = (truth.double() - truth.double().mean()).square().mean().sqrt()
        assert scores["rmse"] == pytest.approx(float(spread), rel=1e-5)
    else:
        share = truth.bincount().max() / len(truth)
        assert scores["accuracy"] == pytest.approx(float(share))


def test_pixel_statistics_learn_the_toy(data: gk.ChipData) -> None:
    rival = gk.baselines.PixelStatistics(data)
    assert gk.evaluate(rival, data, "test")["overall"]["miou"] > 0.95


def test_pixel_statistics_of_whole_images(tmp_path: Path) -> None:
    data = toy_data(tmp_path, "classification")
    rival = gk.baselines.PixelStatistics(data)
    assert gk.evaluate(rival, data, "train")["overall"]["accuracy"] == 1.0


def test_baselines_refuse_what_they_cannot_do(
    data: gk.ChipData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="allowed are MNDWI, NBR, NDVI"):
        gk.baselines.IndexThreshold(data, "EVI")
    with pytest.raises(ValueError, match="window is 4"):
        gk.baselines.PixelStatistics(data, window=4)
    regression = toy_data(tmp_path, "regression")
    with pytest.raises(ValueError, match="task is 'regression'"):
        gk.baselines.PixelStatistics(regression)
    with pytest.raises(ValueError, match="2 classes"):
        gk.baselines.IndexThreshold(regression, "NDVI")
