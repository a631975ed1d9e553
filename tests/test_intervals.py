"""Bootstrap intervals: they agree with `evaluate` and draw chips, not pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MultilabelF1Score,
    MultilabelJaccardIndex,
)
from toy import toy_data

import geopeft_kit as gk
from geopeft_kit.training.evaluate import count_chips, resampled_scores
from geopeft_kit.training.metrics import scores_of


class Small(torch.nn.Module):
    """One convolution; all that scores ask of a model."""

    def __init__(self, task: str, num_classes: int) -> None:
        super().__init__()
        self.task, self.num_classes = task, num_classes
        outputs = 1 if task == "regression" else num_classes
        self.layer = torch.nn.Conv2d(6, outputs, 3, padding=1)

    def forward(self, image, meta=None):
        maps = self.layer(image * 5)
        return maps.mean(dim=(2, 3)) if self.task == "classification" else maps


def toy_model(data) -> Small:
    torch.manual_seed(0)
    return Small(data.task, data.num_classes)


@pytest.mark.parametrize("task", ["segmentation", "regression", "classification"])
def test_points_are_those_of_evaluate(tmp_path, task):
    data = toy_data(tmp_path / "toy", task)
    model = toy_model(data)
    table = gk.score_regions(model, data, "train", resamples=50)
    scores = gk.evaluate(model, data, "train")
    expected = {"all regions": scores["overall"], **scores["regions"]}
    assert list(table["region"]) == list(expected)
    for row in table.to_dict("records"):
        for metric, value in expected[row["region"]].items():
            assert row[metric] == pytest.approx(value, rel=1e-5)
            assert row[f"{metric}_low"] <= row[f"{metric}_high"]


def reference_scores(output, target, task):
    """torchmetrics' scores; of labels, the mean over those that occur somewhere."""
    if task == "segmentation":
        options = {"num_classes": 4, "ignore_index": 255}
        return {
            "miou": MulticlassJaccardIndex(average="macro", **options)(output, target),
            "f1": MulticlassF1Score(average="macro", **options)(output, target),
            "accuracy": MulticlassAccuracy(average="micro", **options)(output, target),
        }
    predicted = (output > 0).long()
    occur = (predicted + target).sum(dim=0) > 0
    iou = MultilabelJaccardIndex(4, average=None)(predicted, target)
    f1 = MultilabelF1Score(4, average=None)(predicted, target)
    right = (predicted == target).float().mean()
    return {"miou": iou[occur].mean(), "f1": f1[occur].mean(), "accuracy": right}


@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
def test_scores_from_counts_are_torchmetrics_own(task):
    """Four classes of which one never occurs and one is only ever predicted."""
    generator = torch.Generator().manual_seed(3)
    shape = (6, 4) if task == "multilabel" else (6, 4, 9, 9)
    output = torch.randn(shape, generator=generator)
    output[:, 3] = -9
    if task == "multilabel":
        target = (torch.rand(6, 4, generator=generator) > 0.5).long()
        target[:, 2:] = 0
    else:
        target = torch.randint(0, 2, (6, 9, 9), generator=generator)
        target[0, :4] = 255
    reference = reference_scores(output, target, task)
    expected = {name: float(value) for name, value in reference.items()}

    class Data:
        ignore_index = 255

        def dataloader(self, split):
            key = "label" if task == "multilabel" else "mask"
            yield {"image": output, key: target, "region": ["a"] * 6}

    class Echo(torch.nn.Module):
        num_classes = 4

        def forward(self, image, meta=None):
            return image

    Echo.task = task
    counts, regions = count_chips(Echo(), Data(), "test", torch.device("cpu"))
    assert len(counts) == len(regions) == 6
    ours = scores_of(counts.sum(axis=0), task)
    assert {k: float(v) for k, v in ours.items()} == pytest.approx(expected, abs=1e-6)


def test_draws_agree_with_a_loop_and_with_theory():
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, 40)
    counts = np.zeros((40, 2, 2))
    counts[np.arange(40), 0, 1 - hits] = 1  # 40 images, one decision each
    draws = resampled_scores(counts, "classification", 4000, seed=1)["accuracy"]
    share = hits.mean()
    assert draws.mean() == pytest.approx(share, abs=0.01)
    assert draws.std() == pytest.approx(np.sqrt(share * (1 - share) / 40), rel=0.06)
    again = resampled_scores(counts, "classification", 4000, seed=1)["accuracy"]
    assert (draws == again).all()
    other = resampled_scores(counts, "classification", 4000, seed=2)["accuracy"]
    assert (draws != other).any()


def test_many_pixels_of_few_chips_do_not_feign_certainty():
    """The interval does not shrink with the size of a chip."""
    rng = np.random.default_rng(0)
    quality = rng.uniform(0.2, 0.9, 12)
    widths = []
    for pixels in (100, 10_000):
        counts = np.zeros((12, 2, 2))
        counts[:, 0, 0] = quality * pixels
        counts[:, 0, 1] = (1 - quality) * pixels
        draws = resampled_scores(counts, "segmentation", 500)["accuracy"]
        widths.append(np.ptp(np.percentile(draws, [2.5, 97.5])))
    assert widths[0] == pytest.approx(widths[1], rel=1e-6)
    assert widths[0] > 0.1


def test_the_gap_is_positive_where_unseen_is_worse(tmp_path):
    for task, sign in (("segmentation", 1), ("regression", -1)):
        data = toy_data(tmp_path / task, task)
        model = toy_model(data)
        table = gk.region_gap({"one": model, "two": model}, data, resamples=20)
        seen = gk.evaluate(model, data, "val")["overall"]
        unseen = gk.evaluate(model, data, "test")["overall"]
        metric = table["metric"].iloc[0]
        assert metric == ("miou" if task == "segmentation" else "rmse")
        gap = sign * (seen[metric] - unseen[metric])
        assert table["gap"].to_numpy() == pytest.approx([gap, gap], rel=1e-4)
        assert (table["gap_low"] <= table["gap_high"]).all()
        assert gk.plots.plot_gap(table).axes[0].get_xlabel().startswith(metric)


def test_one_chip_gives_no_interval_and_bad_values_are_refused(tmp_path):
    data = toy_data(tmp_path / "toy").subset(1, split="test")
    model = toy_model(data)
    table = gk.score_regions(model, data)
    assert table["miou"].notna().all() and table["miou_low"].isna().all()
    with pytest.raises(ValueError, match="resamples is 1"):
        gk.score_regions(model, data, resamples=1)
    with pytest.raises(ValueError, match="level is 95"):
        gk.score_regions(model, data, level=95)
    with pytest.raises(ValueError, match="'iou'; task 'segmentation' has miou"):
        gk.region_gap({"one": model}, data, metric="iou")
    with pytest.raises(ValueError, match="models is empty"):
        gk.region_gap({}, data)
