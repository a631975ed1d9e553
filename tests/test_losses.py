"""Losses by name, of one's own, and weights of classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geopeft_kit as gk
from geopeft_kit.training.step import make_loss
from tests.test_training import make_model

NAMES = ("focal", "dice", "ce+dice", "tversky")


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_change_nothing_and_the_truth_is_best(name: str) -> None:
    loss, (logits, target) = make_loss("segmentation", 255, name), maps()
    target[:, :2] = 255
    other = logits.clone()
    other[:, :, :2] = 50.0
    torch.testing.assert_close(loss(logits, target), loss(other, target))
    truth = torch.where(target == 255, 0, target)
    right = 20.0 * nn.functional.one_hot(truth, 3).permute(0, 3, 1, 2) - 10.0
    assert loss(right, target) < 0.01 < loss(logits, target)
    nothing = torch.full_like(target, 255)
    logits.requires_grad_()
    empty = loss(logits, nothing)
    empty.backward()
    assert float(empty) == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["multilabel", "classification"])
def test_whole_images(name: str, task: str) -> None:
    target = torch.tensor([[1, 0, 0], [0, 0, 1]])
    truth = target if task == "multilabel" else target.argmax(1)
    loss = make_loss(task, 255, name)
    right = loss(20.0 * target - 10.0, truth)
    assert right < 0.01 < loss(torch.zeros(2, 3), truth)


def test_weights_are_those_of_torch() -> None:
    logits, target = maps()
    target[:, :2] = 255
    weights = [1.0, 4.0, 0.5]
    found = make_loss("segmentation", 255, "auto", weights)(logits, target)
    torch.testing.assert_close(
        found,
        nn.CrossEntropyLoss(torch.tensor(weights), ignore_index=255)(logits, target),
    )


def test_huber_leaves_unknown_values_out() -> None:
    output = torch.tensor([0.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
    target = torch.tensor([0.05, 2.0, float("nan")]).reshape(1, 1, 3)
    found = make_loss("regression", loss="huber")(output, target)
    expected = nn.HuberLoss(delta=0.1)(torch.zeros(2), torch.tensor([0.05, 2.0]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "focla"}, "takes auto, focal"),
        ({"loss": "huber"}, "takes auto, focal"),
        ({"class_weights": [1.0]}, "takes 2 numbers"),
        ({"class_weights": {"lo": 1.0}}, "the classes are low, high"),
        ({"class_weights": "even"}, "'balanced'"),
        ({"loss": nn.CrossEntropyLoss(), "class_weights": [1, 1]}, "a loss by name"),
        ({"loss": lambda x, y: x}, "tensor of one number"),
        ({"loss": lambda x, y: x.mean() * float("nan")}, "the loss returned nan"),
    ],
)
def test_bad_losses_and_weights(
    data: gk.ChipData, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gk.fit(make_model("bias"), data, head_start="none", progress=False, **arguments)


def test_balanced_weights_are_counted_printed_and_used(data, capsys) -> None:
    model = make_model("bias")
    run = gk.fit(model, data, 1, class_weights="balanced", loss="ce+dice")
    masks = torch.cat([b["mask"].flatten() for b in data.dataloader("train")])
    expected = (len(masks) / (2 * torch.bincount(masks.long(), minlength=2))).clamp(
        max=10
    )
    assert run.settings["class_weights"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert "class_weights low" in capsys.readouterr().out
    assert run.settings["loss"] == "ce+dice" and run.history["loss"].notna().all()
