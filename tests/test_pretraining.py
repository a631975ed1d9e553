"""Pretraining: masked patches are hidden, losses fall, a resume is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import geopeft_kit as gk
from geopeft_kit.pretraining import Objective, PretextTask, known_error, save_weights
from geopeft_kit.pretraining.distillation import Teacher
from geopeft_kit.pretraining.samples import Draws, Samples
from tests.toy import toy_data


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


RGB = ("RED", "GREEN", "BLUE")


@pytest.mark.parametrize(
    ("name", "bands", "new_bands"),
    [
        ("geopeft_tiny", RGB, "error"),  # half of its bands
        ("geopeft_tiny_rgb", RGB, "error"),  # its bands in another order
        ("timm:vit_tiny_patch16_224", (*RGB, "SWIR_1"), "random"),
        ("prithvi_eo_v2_tiny_tl", None, "error"),  # two numbers beside the network
        ("terramind_v1_tiny", None, "error"),  # other names than its upstream's
    ],
)
def test_weights_load_again_with_the_same_call(
    tmp_path: Path, name: str, bands: tuple[str, ...] | None, new_bands: str
) -> None:
    call = {"bands": bands, "new_bands": new_bands}
    path = tmp_path / "weights.safetensors"
    model = gk.load_backbone(name, weights=None, **call)
    save_weights(model, path, half=False)
    torch.manual_seed(1)
    again = gk.load_backbone(name, weights=path, **call)
    assert torch.initial_seed() == 1 and torch.rand(()) == _first_draw(1)
    loaded = again.weights()
    for key, value in model.weights().items():
        assert torch.equal(loaded[key], value), key
    assert again.bands == model.bands


def _first_draw(seed: int) -> Tensor:
    return torch.rand((), generator=torch.Generator().manual_seed(seed))


def test_weights_for_other_bands_are_refused(tmp_path: Path) -> None:
    """Kernels have no names: in the wrong order they would load and mean nothing."""
    path = tmp_path / "weights.safetensors"
    turned = gk.load_backbone("geopeft_tiny_rgb", RGB, weights=None)
    save_weights(turned, path)
    with pytest.raises(ValueError, match="saved for the bands RED, GREEN, BLUE"):
        gk.load_backbone("geopeft_tiny_rgb", weights=path)
    six = backbone()
    save_weights(six, path, half=False)  # all bands of the card serve any subset
    three = gk.load_backbone("geopeft_tiny", RGB, weights=path)
    kernels = six.model.patch_embed.proj.weight
    kept = [six.bands.index(band) for band in RGB]
    assert torch.equal(three.model.patch_embed.proj.weight, kernels[:, kept])


def test_the_same_number_of_steps_on_every_device() -> None:
    for size, batch, ranks in ((10, 8, 2), (3, 64, 1), (64, 8, 2), (1, 4, 3)):
        draws = Draws(size, batch, ranks, None, 0)
        assert len(draws) <= draws.steps * batch
        assert -(-len(draws) // batch) == draws.steps
        assert set(draws) <= set(range(size))


def test_positions_and_vectors_do_not_decay() -> None:
    vit = gk.load_backbone("timm:vit_tiny_patch16_224", weights=None)
    task = PretextTask(vit, Objective())
    (optimiser,), _ = task.configure_optimizers()
    still = {id(p) for p in optimiser.param_groups[1]["params"]}
    assert optimiser.param_groups[1]["weight_decay"] == 0
    assert id(vit.model.pos_embed) in still and id(vit.model.norm.weight) in still
    assert id(vit.model.blocks[0].mlp.fc1.weight) not in still


@pytest.mark.slow  # a large network, even without numbers
def test_a_neck_may_teach_and_not_be_taught() -> None:
    with torch.device("meta"):
        vit = gk.load_backbone("phileo_vit_100m", weights=None, patch=16)
        with pytest.raises(ValueError, match="no neck"):
            PretextTask(vit, Objective())
        teacher = Teacher(vit, vit.bands, 3)
        assert teacher(torch.rand(2, 10, 128, 128)).shape == (2, teacher.width)


def _samples(**second: Tensor | None) -> list[dict[str, Tensor]]:
    """Two samples; the second differs, and has no value for a key that is None."""
    first = {"image": torch.rand(6, 32, 32), "scene": torch.rand(2)}
    other = {k: v for k, v in (first | second).items() if v is not None}
    return [first, other]


def test_data_that_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    def read(data: object) -> None:
        samples = Samples(data)
        for index in range(len(samples)):
            samples[index]

    cases = {
        "holds no sample": [],
        "is a NoneType": None,
        'no dict with "image"': torch.rand(2, 6, 32, 32),
        "sample 1 has no 'scene'": _samples(scene=None),
        "image 1 holds NaN": _samples(image=torch.full((6, 32, 32), float("nan"))),
    }
    for text, data in cases.items():
        with pytest.raises((ValueError, TypeError), match=text):
            read(data)
    labelled = toy_data(tmp_path)
    labelled.index.loc[labelled.index["split"] == "train", "split"] = "unused"
    with pytest.raises(ValueError, match="split 'train'"):  # never its val or test
        read(labelled)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps_per_epoch": 1.5}, "steps_per_epoch is 1.5"),
        ({"devices": 0}, "devices is 0"),
        ({"crop": 0}, "crop is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"masked": 0, "physical": 0, "scene": 0}, "nothing to learn"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(backbone(), **options)


@pytest.mark.slow
def test_a_run_goes_on_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    settings = {"epochs": 1, "steps_per_epoch": 2, "folder": tmp_path}
    model = backbone()
    first = run(model, **settings)
    assert first.weights is not None
    first.weights.unlink()  # as if it were killed before the last file
    with pytest.raises(ValueError, match=r"learning_rate=0.001 \(now 0.01\)"):
        run(backbone(), resume=True, learning_rate=0.01, **settings)
    with pytest.raises(ValueError, match="teacher=None .now 'geopeft_tiny'"):
        gk.pretrain(backbone(), Ramps(), backbone(), resume=True, folder=tmp_path)
    with pytest.raises(ValueError, match="bands="):
        other = gk.load_backbone("geopeft_tiny", RGB, weights=None)
        gk.pretrain(other, Ramps(), resume=True, folder=tmp_path)
    assert not first.weights.exists()
    again = backbone()
    rest = run(again, resume=True, **settings)  # no step is left
    assert rest.resources is None and "peak MiB" not in rest.cost()
    assert rest.history.equals(first.history) and rest.weights == first.weights
    assert again.weights_hash() == model.weights_hash()
    more = run(again, resume=True, **settings | {"epochs": 2})
    assert more.history["samples"].to_list() == [16, 32]


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
