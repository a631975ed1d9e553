"""Pretraining: masked patches are hidden, losses fall, a resume is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import geopeft_kit as gk
from geopeft_kit.pretraining import Objective, PretextTask, known_error, save_weights


class Ramps(Dataset):
    """Smooth images whose dense map and scene fact can be read off them."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        level = (index + 1) / 16
        ramp = torch.linspace(0, level, 32).expand(32, 32)
        image = (ramp * 0.4).expand(6, 32, 32).contiguous()
        physical = ramp[None].clone()
        if index % 4 == 0:
            physical[:] = float("nan")  # a real chip: nothing is known
        return {
            "image": image,
            "physical": physical,
            "scene": torch.tensor([level, float("nan")]),
        }


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return gk.load_backbone("geopeft_tiny", weights=None)


def run(model: torch.nn.Module, **options: object):
    settings = {"steps_per_epoch": 8, "epochs": 3, "batch_size": 8} | options
    return gk.pretrain(model, Ramps(), **settings)


@pytest.mark.slow
def test_every_loss_falls() -> None:
    log = run(backbone(), steps_per_epoch=12, learning_rate=3e-3).history
    for part in ("masked", "physical", "scene"):
        assert log[part].iloc[-1] < 0.9 * log[part].iloc[0], part
    assert list(log["samples"]) == [96, 192, 288]


def test_masked_patches_are_hidden_from_the_backbone() -> None:
    """What lies under the mask changes nothing in the features."""
    task = PretextTask(backbone(), Objective(mask_unit=16))
    image = torch.rand(1, 6, 32, 32)
    cells = torch.zeros(1, 2, 2, dtype=torch.bool)
    cells[0, 0, 0] = True
    other = image.clone()
    other[:, :, :16, :16] = 0.9  # the four patches in the hidden cell
    with torch.no_grad():
        assert torch.equal(task.encode(image, cells)[0], task.encode(other, cells)[0])
        assert not torch.equal(task.encode(image, None)[0], task.encode(other, None)[0])


def test_unknown_targets_do_not_count() -> None:
    output = torch.zeros(2, 3, requires_grad=True)
    target = torch.tensor([[1.0, float("nan"), 1.0], [float("nan")] * 3])
    loss = known_error(output, target)
    loss.backward()
    assert loss == 1.0
    assert torch.isfinite(output.grad).all()
    assert known_error(output, torch.full((2, 3), float("nan"))) == 0


@pytest.mark.slow
def test_resume_is_exact(tmp_path: Path) -> None:
    whole = backbone()
    run(whole, epochs=2, folder=tmp_path / "a")

    class Cut(BaseException):
        pass

    first = backbone()
    from geopeft_kit.training.callbacks import Checkpoint

    write = Checkpoint.on_train_epoch_end

    def write_and_cut(self, trainer, task) -> None:
        write(self, trainer, task)
        if trainer.current_epoch == 0:
            raise Cut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Checkpoint, "on_train_epoch_end", write_and_cut)
        run(first, epochs=2, folder=tmp_path / "b")
    second = backbone()
    log = run(second, epochs=2, folder=tmp_path / "b", resume=True).history
    assert len(log) == 2
    states = whole.state_dict(), second.state_dict()
    different = [n for n, v in states[0].items() if not torch.equal(v, states[1][n])]
    assert not different


def test_saved_weights_load_again(tmp_path: Path) -> None:
    model = backbone()
    path = save_weights(model, tmp_path / "weights.safetensors")
    again = gk.load_backbone("geopeft_tiny", weights=path)
    for name, value in model.model.state_dict().items():
        loaded = again.model.state_dict()[name]
        torch.testing.assert_close(loaded, value, atol=1e-3, rtol=1e-3)


def test_refusals(tmp_path: Path) -> None:
    resnet = gk.load_backbone("timm:resnet18", weights=None)
    with pytest.raises(ValueError, match="layout is 'vit' or 'swin'"):
        run(resnet)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(backbone(), folder=tmp_path, resume=True)


@pytest.mark.slow
def test_the_embedded_model_earns_its_file(repo: Path) -> None:
    """The packaged weights are small, and not random: land cover shows in them."""
    path = repo / "geopeft_kit" / "weights" / "geopeft_tiny.safetensors"
    assert path.stat().st_size <= 12e6
    assert path.with_suffix(".log.csv").exists()
    data = gk.simulated_data(
        "land_cover", chips_per_region=12, train_regions=["temperate"], val_fraction=0.3
    )
    scores = {}
    for weights in ("default", None):
        torch.manual_seed(0)
        model = gk.load_backbone("geopeft_tiny", weights=weights)
        gk.attach(model, "frozen")
        model = gk.build_model(model, "linear", num_classes=data.num_classes)
        gk.fit(model, data, epochs=3, progress=False)
        scores[weights] = gk.evaluate(model, data, "test")["overall"]["accuracy"]
    assert scores["default"] > scores[None] + 0.02
