"""GFM's objective: both losses, their switches, and what a run leaves behind."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geopeft_kit as gk
from geopeft_kit import backbones
from geopeft_kit.backbones import find_card
from geopeft_kit.pretraining import Objective, PretextTask, save_weights
from geopeft_kit.pretraining.distillation import Teacher, stage_features
from geopeft_kit.pretraining.masking import draw_cells
from geopeft_kit.pretraining.result import EnergyMeter
from tests.toy import toy_data

GFM = "gfm_swin_base"
SIZES = {"embed_dim": 16, "depths": (1, 2, 1, 1), "heads": (1, 2, 4, 8)}


@pytest.fixture(autouse=True)
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    card = replace(find_card(GFM), architecture=SIZES, depth=5)
    monkeypatch.setitem(backbones.CARDS, GFM, card)
    yield


def swin(size: int = 64, seed: int = 0) -> backbones.Backbone:
    torch.manual_seed(seed)
    return gk.load_backbone(GFM, weights=None, image_size=size)


def vit(seed: int = 0, name: str = "geopeft_tiny_rgb") -> backbones.Backbone:
    torch.manual_seed(seed)
    return gk.load_backbone(name, weights=None, image_size=32)


class Noise:
    """Images without anything to learn, RGB."""

    def __init__(self, bands: int = 3, size: int = 64, count: int = 8) -> None:
        random = torch.Generator().manual_seed(7)
        self.images = 0.4 * torch.rand(count, bands, size, size, generator=random)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index]}


def quick(backbone: nn.Module, data: object, teacher: object = None, **options: object):
    settings = {"epochs": 1, "batch_size": 4, "progress": False} | options
    return gk.pretrain(backbone, data, teacher, **settings)


@pytest.mark.parametrize(
    ("side", "unit", "ratio", "count"),
    [(192, 32, 0.6, 22), (64, 8, 0.4, 26), (64, 16, 0.5, 8), (64, 32, 0.25, 1)],
)
def test_as_many_cells_are_hidden_in_every_image(side, unit, ratio, count) -> None:
    cells = draw_cells(torch.zeros(5, 3, side, side), unit, ratio)
    assert cells.shape == (5, side // unit, side // unit)
    assert cells.flatten(1).sum(1).tolist() == [count] * 5
    assert count == math.ceil(ratio * (side // unit) ** 2)
    assert not torch.equal(cells[0], cells[1])


def test_losses_of_a_swin_are_those_of_the_formulas() -> None:
    """Both losses again, from timm's own parts and the paper's equations."""
    student, teacher = swin(), swin(96, seed=1)
    task = PretextTask(student, Objective(), Teacher(teacher, student.bands, 3)).eval()
    image = 0.4 * torch.rand(2, 3, 64, 64)
    torch.manual_seed(5)
    losses = task.compute_losses({"image": image})
    torch.manual_seed(5)
    cells = draw_cells(image, 32, 0.6)  # (2, 2, 2), three of four hidden
    assert cells.sum() == 6

    net, pixels = student.model, cells.repeat_interleave(32, 1).repeat_interleave(32, 2)
    tokens = net.patch_embed(student.normalised(image))  # (2, 16, 16, 16)
    hidden = pixels[:, ::4, ::4, None].float()
    x = tokens * (1 - hidden) + task.mask_token * hidden
    for layer in net.layers[:3]:
        x = layer(x)
    merged = net.layers[3].downsample(x)  # (2, 2, 2, 128): stage 3 with its merging
    x = net.norm(net.layers[3].blocks(merged)).permute(0, 3, 1, 2)
    weight = task.pixels.weight[:, :, None, None]  # a 1 x 1 convolution
    painted = F.pixel_shuffle(F.conv2d(x, weight, task.pixels.bias), 32)
    mask = pixels[:, None].float()
    error = (painted - student.normalised(image)).abs() * mask
    expected = error.sum() / (mask.sum() + 1e-5) / 3
    torch.testing.assert_close(losses["masked"], expected)

    big = F.interpolate(image, (96, 96), mode="bilinear", align_corners=True)
    t = teacher.model.patch_embed(teacher.normalised(big))
    for layer in teacher.model.layers[:3]:
        t = layer(t)
    t = teacher.model.layers[3].downsample(t).mean((1, 2))
    s = task.projector(merged.mean((1, 2)))
    cosine = (F.normalize(s, dim=1) * F.normalize(t, dim=1)).sum(1)
    torch.testing.assert_close(losses["teacher"], -cosine.mean())
    assert task.projector.weight.shape == (128, 128)
    assert not losses["teacher"].isnan() and losses["teacher"].requires_grad


def test_sizes_are_those_of_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder 3.149 M and projector 1.050 M beside an encoder of 86.725 M."""
    monkeypatch.undo()  # the card as it is
    with torch.device("meta"):
        student, teacher = (
            gk.load_backbone(GFM, weights=None, image_size=size) for size in (192, 224)
        )
        task = PretextTask(student, Objective(), Teacher(teacher, student.bands, 3))
    assert sum(p.numel() for p in student.parameters()) == 86_725_176
    assert sum(p.numel() for p in task.pixels.parameters()) == 3_148_800
    assert sum(p.numel() for p in task.projector.parameters()) == 1_049_600
    assert task.mask_token.shape == (128,) and task.unit == 32


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stages_of_a_vit_are_quarters_of_its_depth(stage: int) -> None:
    backbone = vit()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), stage_features(backbone, stage) as found:
        maps = backbone(image)
    if stage < 4:  # the last map is normed, features are not
        torch.testing.assert_close(found[0], maps[stage - 1].mean((2, 3)))
    with torch.no_grad(), stage_features(backbone, stage, stop=True) as again:
        backbone(image)
    assert torch.equal(found[0], again[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_every_stage_can_teach(stage: int) -> None:
    for student, teacher, size in ((swin(), vit(), 64), (vit(), swin(), 32)):
        run = quick(student, Noise(size=size), teacher, stage=stage)
        assert -1 <= run.history["teacher"].iloc[0] <= 1


def test_a_vit_ignores_tokens_that_are_no_patches() -> None:
    backbone = vit()
    gk.attach(backbone, "vpt", tokens=3)
    with torch.no_grad(), stage_features(backbone, 2) as found:
        maps = backbone(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(found[0], maps[1].mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "teacher", "parts"),
    [
        ({}, False, ["masked"]),
        ({}, True, ["masked", "teacher"]),
        ({"masked": 0}, True, ["teacher"]),
        ({"alpha": 0.0}, True, ["masked", "teacher"]),
    ],
)
def test_rows_of_the_ablation(options: dict, teacher: bool, parts: list[str]) -> None:
    run = quick(vit(), Noise(size=32), vit(1) if teacher else None, **options)
    assert list(run.history.columns) == ["epoch", "samples", *parts]


def test_alpha_and_masked_weigh_the_parts() -> None:
    student, batch = vit(), {"image": Noise(size=32).images[:2]}
    teacher = Teacher(vit(1), student.bands, 3)
    task = PretextTask(student, Objective(masked=2.0, alpha=0.5), teacher)
    total = task.training_step(batch, 0)
    expected = 2.0 * task.losses["masked"] + 0.5 * task.losses["teacher"]
    torch.testing.assert_close(total.detach(), expected)


def test_without_masked_modelling_nothing_is_hidden() -> None:
    student, image = vit(), Noise(size=32).images[:2]
    task = PretextTask(student, Objective(masked=0), Teacher(vit(1), student.bands, 3))
    with torch.no_grad():
        first = task.compute_losses({"image": image})
        assert first == task.compute_losses({"image": image})  # no draw


@pytest.mark.slow
def test_the_teacher_stays_as_it_is_and_is_saved_nowhere(tmp_path: Path) -> None:
    teacher, student = vit(1), vit()
    before = teacher.weights_hash()
    quick(student, Noise(size=32), teacher, folder=tmp_path, learning_rate=1e-2)
    assert teacher.weights_hash() == before
    assert all(p.grad is None for p in teacher.parameters())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [key for key in content["state_dict"] if "teacher" in key]
    size = sum(v.numel() for v in student.model.state_dict().values())
    assert size < sum(v.numel() for v in content["state_dict"].values()) < 1.1 * size


def test_a_teacher_picks_its_bands_by_name() -> None:
    image = torch.rand(1, 6, 64, 64)
    teacher = swin()  # RED, GREEN, BLUE
    student = gk.load_backbone("geopeft_tiny", weights=None)
    position = [student.bands.index(band) for band in teacher.bands]
    asked = Teacher(teacher, student.bands, 3)(image)
    assert torch.equal(asked, Teacher(teacher, teacher.bands, 3)(image[:, position]))
    with pytest.raises(ValueError, match="the teacher 'geopeft_tiny' needs NIR_NARROW"):
        Teacher(student, teacher.bands, 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "slr"])
def test_an_adapter_can_be_all_that_trains(tmp_path: Path, method: str) -> None:
    backbone = vit()
    plain = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    adapter = gk.attach(backbone, method, rank=2)
    before = {k: v.detach().clone() for k, v in adapter.named_parameters()}
    run = quick(
        backbone, Noise(size=32), vit(1), folder=tmp_path, learning_rate=1e-2, epochs=2
    )
    moved = [k for k, v in adapter.named_parameters() if not torch.equal(v, before[k])]
    assert moved
    assert run.weights is None
    with pytest.raises(ValueError, match="is active"):
        save_weights(backbone, tmp_path / "w.safetensors")
    adapter.detach()
    after = backbone.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("make", [swin, vit], ids=["swin", "vit"])
def test_a_run_with_a_teacher_resumes_bit_for_bit(tmp_path: Path, make) -> None:
    """Stopped after one of two epochs, in the middle of its schedule."""
    data, size = Noise(), 64 if make is swin else 32

    def run(folder: str, backbone: nn.Module, **options: object):
        return quick(
            backbone, data, make(seed=1), epochs=2, steps_per_epoch=2, crop=size,
            folder=tmp_path / folder, **options,
        )  # fmt: skip

    whole, cut, resumed = make(), make(), make()
    run("whole", whole)
    stretch = run("cut", cut, minutes=0)  # over when the first epoch is
    assert stretch.history["epoch"].to_list() == [1]
    found = run("cut", resumed, resume=True)
    assert found.history["epoch"].to_list() == [1, 2]
    states = whole.state_dict(), resumed.state_dict()
    assert not [k for k, v in states[0].items() if not torch.equal(v, states[1][k])]
    assert [k for k, v in cut.state_dict().items() if not torch.equal(v, states[0][k])]


@pytest.mark.slow
@pytest.mark.parametrize("make", [swin, vit], ids=["swin", "vit"])
def test_the_weights_written_are_those_loaded(tmp_path: Path, make) -> None:
    backbone = make()
    run = quick(backbone, Noise(size=backbone.image_size), folder=tmp_path)
    again = gk.load_backbone(
        backbone.card.name, weights=run.weights, image_size=backbone.image_size
    )
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = zip(backbone.eval()(image), again(image), strict=True)
        assert all(torch.equal(a, b) for a, b in maps)
    assert not list(tmp_path.glob("*.part"))


def test_the_rate_warms_up_and_falls_as_published() -> None:
    """From 1e-6 over a tenth to the peak of 2e-4, then a cosine to 1e-5."""
    task = PretextTask(vit(), Objective(), learning_rate=2e-4, total_steps=1000)
    (optimiser,), (entry,) = task.configure_optimizers()
    rates = []
    for step in range(1001):
        entry["scheduler"].step_update(step)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert max(range(1001), key=rates.__getitem__) in (99, 100)
    assert max(rates) == pytest.approx(2e-4, rel=0.03)
    assert rates[999] == pytest.approx(1e-5, rel=0.01)
    decayed = {id(p) for p in optimiser.param_groups[0]["params"]}
    assert optimiser.param_groups[0]["weight_decay"] == 0.05
    assert id(task.mask_token) not in decayed and id(task.pixels.weight) in decayed


@pytest.mark.slow
def test_chips_are_read_without_their_labels(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "toy")
    run = quick(vit(name="geopeft_tiny"), data)
    assert run.history["samples"].to_list() == [len(data.dataset("train"))]


@pytest.mark.slow
def test_a_reconstruction_is_reflectance() -> None:
    run = quick(vit(), Noise(size=32), epochs=1)
    image = Noise(size=32).images[:2]
    hidden, painted = run.reconstruct(image, 0.5, seed=1)
    assert hidden.shape == (2, 32, 32) and hidden.float().mean() == 0.5
    assert painted.shape == image.shape
    task = run.task
    normal = task.backbone.normalised(painted)  # back to what the head puts out
    with torch.random.fork_rng():
        torch.manual_seed(1)
        cells = draw_cells(image, task.unit, 0.5)
        with torch.no_grad():
            head = task.paint(task.encode(image, cells)[0])
    torch.testing.assert_close(normal, head)
    assert torch.equal(hidden, run.reconstruct(image, 0.5, seed=1)[0])
    assert not torch.equal(hidden, run.reconstruct(image, 0.5, seed=2)[0])


@pytest.mark.slow
def test_energy_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = quick(vit(), Noise(size=32)).cost()
    assert cost["energy Wh"] == "not measured"
    assert cost["minutes"] > 0 and cost["peak MiB"] > 0
    counter = iter([1.0e6, 1.0e6, 2.8e6, 2.8e6])  # two GPUs, 1.8 kJ each
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1")
    )
    meter = EnergyMeter([0, 1])
    meter.start()
    assert meter.watt_hours() == pytest.approx(1.0)
    assert EnergyMeter([]).watt_hours() is None


def test_the_binding_has_what_the_meter_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = pytest.importorskip("pynvml", reason="pip install nvidia-ml-py")
    assert callable(nvml.nvmlDeviceGetHandleByUUID)
    assert callable(nvml.nvmlDeviceGetTotalEnergyConsumption)

    def no_driver() -> None:
        raise nvml.NVMLError(nvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(nvml, "nvmlInit", no_driver)
    meter = EnergyMeter([0])
    meter.start()
    assert meter.watt_hours() is None  # no library of the driver: not measured


def test_refusals(tmp_path: Path) -> None:
    backbone, data = vit(), Noise(size=32)
    with pytest.raises(ValueError, match="nothing to learn"):
        quick(backbone, data, masked=0)
    with pytest.raises(ValueError, match="backbone itself"):
        quick(backbone, data, backbone)
    with pytest.raises(ValueError, match="stage is 5"):
        quick(backbone, data, vit(1), stage=5)
    with pytest.raises(ValueError, match="mask_ratio is 1"):
        quick(backbone, data, mask_ratio=1)
    with pytest.raises(ValueError, match="mask_unit is 12 px"):
        quick(backbone, data, mask_unit=12)
    with pytest.raises(ValueError, match="cells of 24 px"):
        quick(backbone, data, mask_unit=24)
    with pytest.raises(ValueError, match="needs the folder"):
        quick(backbone, data, resume=True)
    with pytest.raises(ValueError, match="resnet"):
        quick(backbone, data, gk.load_backbone("timm:resnet18", weights=None))
    adapter = gk.attach(backbone, "lora", rank=2)
    adapter.deactivate()
    with pytest.raises(ValueError, match="nothing trains in the backbone"):
        quick(backbone, data)
    adapter.detach()
    gk.attach(backbone, "adalora")
    with pytest.raises(ValueError, match="'lora' or 'slr'"):
        quick(backbone, data)


SCRIPT = """
import sys, torch
import geopeft_kit as gk

class Noise:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    def __len__(self): return 16
    def __getitem__(self, index): return {"image": self.images[index]}

def make(seed):
    torch.manual_seed(seed)
    return gk.load_backbone("geopeft_tiny_rgb", weights=None, image_size=32)

if __name__ == "__main__":
    student = make(0)
    run = gk.pretrain(student, Noise(), make(1), epochs=1, batch_size=4, device="cpu",
                      devices=2, folder=sys.argv[1])
    rank = torch.distributed.get_rank()
    torch.save(student.model.state_dict(), f"{sys.argv[1]}/{rank}.pt")
    assert run.history["samples"].to_list() == [16]
"""


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path: Path, repo: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    subprocess.run(command, check=True, cwd=repo, timeout=200)
    first, second = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert (tmp_path / "weights.safetensors").exists()
    assert (tmp_path / "last.ckpt").exists()
