"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from geopeft_kit.training.metrics import RegionalMetrics


def logits(classes, num_classes=3):
    """Logits whose argmax are the given class numbers, (B, H, W) -> (B, K, H, W)."""
    return (
        torch.nn.functional.one_hot(torch.as_tensor(classes), num_classes)
        .movedim(-1, 1)
        .float()
    )


def score(truth, prediction, num_classes=3, ignore_index=255):
    metrics = RegionalMetrics("segmentation", num_classes, ignore_index)
    truth = torch.tensor(truth).view(1, 1, -1)
    prediction = torch.tensor(prediction).view(1, 1, -1)
    metrics.update(logits(prediction, num_classes), truth, ["here"])
    return metrics.compute()["overall"]


@pytest.mark.parametrize(
    ("truth", "prediction", "ious", "f1s"),
    [
        # class 0: 2 hits, 1 false, 1 missed; class 1: 1, 1, 1; class 2: 1 hit
        ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 2], [1 / 2, 1 / 3, 1], [2 / 3, 1 / 2, 1]),
        ([0, 0, 0, 1], [0, 0, 1, 1], [2 / 3, 1 / 2], [4 / 5, 2 / 3]),  # 2 is absent
        ([0, 0, 0, 1], [0, 0, 2, 1], [2 / 3, 1, 0], [4 / 5, 1, 0]),  # 2 is never true
    ],
)
def test_scores_by_hand(truth, prediction, ious, f1s):
    scores = score(truth, prediction)
    right = sum(t == p for t, p in zip(truth, prediction, strict=True))
    assert scores["miou"] == pytest.approx(sum(ious) / len(ious))
    assert scores["f1"] == pytest.approx(sum(f1s) / len(f1s))
    assert scores["accuracy"] == pytest.approx(right / len(truth))


@pytest.mark.parametrize("ignore_index", [255, -1])
def test_ignored_pixels_change_nothing(ignore_index):
    plain = score([0, 1, 2, 1], [0, 1, 1, 1], ignore_index=ignore_index)
    truth = [0, 1, 2, 1, ignore_index, ignore_index]
    assert score(truth, [0, 1, 1, 1, 2, 0], ignore_index=ignore_index) == plain


def test_scores_are_pooled_and_not_a_mean_of_batches():
    batches = [([0, 0, 0, 0], [0, 0, 0, 0]), ([1, 1, 0, 0], [1, 0, 0, 1])]
    metrics = RegionalMetrics("segmentation", 2)
    for truth, prediction in batches:
        output = logits(torch.tensor(prediction).view(1, 2, 2), 2)
        metrics.update(output, torch.tensor(truth).view(1, 2, 2), ["here"])
    pooled = metrics.compute()["overall"]["miou"]
    assert pooled == pytest.approx((5 / 7 + 1 / 3) / 2)
    mean = sum(score(t, p, 2)["miou"] for t, p in batches) / 2
    assert abs(pooled - mean) > 0.1  # the two differ, so the test can tell


def test_the_cut_into_batches_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(8, 3, 4, 4, generator=generator)
    truth = torch.randint(0, 3, (8, 4, 4), generator=generator)
    regions = ["a", "b", "a", "c", "b", "a", "c", "c"]
    whole, cut = (RegionalMetrics("segmentation", 3) for _ in range(2))
    whole.update(output, truth, regions)
    for i, j in ((0, 1), (1, 5), (5, 8)):
        cut.update(output[i:j], truth[i:j], regions[i:j])
    assert whole.compute() == cut.compute()


def test_regions_are_scored_apart():
    metrics = RegionalMetrics("classification", 3)
    truth = torch.tensor([0, 1, 2, 0])
    metrics.update(logits([0, 1, 0, 1]), truth, ["north", "north", "south", "south"])
    scores = metrics.compute()
    assert list(scores["regions"]) == ["north", "south"]
    assert scores["regions"]["north"]["accuracy"] == 1.0
    assert scores["regions"]["south"]["accuracy"] == 0.0
    assert scores["overall"]["accuracy"] == 0.5


def test_a_region_without_labels_is_nan_and_does_not_harm_the_rest():
    metrics = RegionalMetrics("segmentation", 2)
    truth = torch.tensor([[[0, 1]], [[255, 255]]])
    metrics.update(logits([[[0, 1]], [[0, 1]]], 2), truth, ["seen", "cloudy"])
    scores = metrics.compute()
    assert all(math.isnan(v) for v in scores["regions"]["cloudy"].values())
    assert scores["overall"] == {"miou": 1.0, "f1": 1.0, "accuracy": 1.0}


def test_regression_is_pooled_and_skips_unknown_pixels():
    metrics = RegionalMetrics("regression", 1)
    truth = torch.tensor([[[1.0, math.nan]], [[2.0, 255.0]]])
    output = torch.tensor([[[[4.0, 9.0]]], [[[2.0, 9.0]]]])
    metrics.update(output, truth, ["a", "b"])
    metrics.update(output[:1, ..., :1], truth[:1, ..., :1], ["a"])
    scores = metrics.compute()
    # errors 3, 0, 3
    assert scores["overall"]["rmse"] == pytest.approx(math.sqrt(18 / 3))
    assert scores["overall"]["mae"] == pytest.approx(2.0)
    assert scores["regions"]["a"]["rmse"] == pytest.approx(3.0)
    assert scores["regions"]["b"]["rmse"] == 0.0


def test_multilabel_by_hand_and_without_absent_labels():
    metrics = RegionalMetrics("multilabel", 3)
    truth = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    output = torch.tensor([[2.0, 1.0, -1.0], [-1.0, 1.0, -2.0]])
    metrics.update(output, truth, ["a", "a"])
    scores = metrics.compute()["overall"]
    # label 0: 1 hit, 1 missed; label 1: 1 hit, 1 false; label 2: occurs nowhere
    assert scores["miou"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert scores["f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["accuracy"] == pytest.approx(4 / 6)


def test_logits_between_zero_and_one_are_not_taken_for_probabilities():
    """A logit of 0.2 is a chance of 0.55: the label is predicted."""
    metrics = RegionalMetrics("multilabel", 2)
    metrics.update(torch.tensor([[0.2, 0.3]]), torch.tensor([[1, 1]]), ["a"])
    assert metrics.compute()["overall"]["accuracy"] == 1.0


def test_wrong_input_is_explained():
    with pytest.raises(ValueError, match=r"'detection'.*segmentation"):
        RegionalMetrics("detection", 2, 255)
    metrics = RegionalMetrics("segmentation", 2)
    output = logits([[[0, 1]]], 2)
    with pytest.raises(ValueError, match=r"holds \[7\].*0 to 1.*255"):
        metrics.update(output, torch.tensor([[[0, 7]]]), ["a"])
    with pytest.raises(ValueError, match="do not belong together"):
        metrics.update(output, torch.tensor([[0, 1]]), ["a"])
    with pytest.raises(ValueError, match="2 region names"):
        metrics.update(output, torch.tensor([[[0, 1]]]), ["a", "b"])
