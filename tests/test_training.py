"""Training: what moves, what does not, what is written, and that a resume is exact."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import geopeft_kit as gk
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.hardware import choose_device, choose_precision
from geopeft_kit.training.step import compute_loss
from geopeft_kit.training.task import trained_names
from tests.toy import BANDS, toy_data

TASKS = ("segmentation", "regression", "classification")


def make_model(
    method: str | None = "lora",
    decoder: str = "linear",
    task: str = "segmentation",
    **options,
) -> nn.Module:
    torch.manual_seed(0)
    backbone = gk.load_backbone("geopeft_tiny", weights=None)
    if method is not None:
        gk.attach(backbone, method, **options)
    return gk.build_model(backbone, decoder=decoder, task=task, num_classes=2)


def random_resnet() -> nn.Module:
    torch.manual_seed(0)
    return gk.load_backbone("timm:resnet18", BANDS, weights=None, new_bands="random")


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "task",
    [TASKS[0], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])],
)
def test_fit_learns(task: str, tmp_path: Path) -> None:
    data = toy_data(tmp_path, task)
    model = make_model("lora", task=task)
    before = gk.evaluate(model, data, "test")["overall"]
    run = gk.fit(model, data, epochs=3, progress=False)
    after = gk.evaluate(model, data, "test")["overall"]
    name = {"segmentation": "miou", "classification": "accuracy", "regression": "rmse"}
    if task == "regression":
        assert after["rmse"] < 0.5 * before["rmse"]
    else:
        assert after[name[task]] > before[name[task]]
        assert after[name[task]] > 0.85
    assert set(gk.evaluate(model, data, "test")["regions"]) == {"far"}
    assert list(run.history["epoch"]) == [1, 2, 3]


@pytest.mark.parametrize("method", ["frozen", "lora", "bias", "full"])
def test_only_what_is_trainable_moves(method: str, data: gk.ChipData) -> None:
    model = make_model(method)
    before, trained = copy_state(model), trained_names(model)
    gk.fit(model, data, epochs=1, head_start="none", progress=False)
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert not moved or name in trained, name
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_frozen_batch_norm_stays_frozen(data: gk.ChipData) -> None:
    backbone = random_resnet()
    gk.attach(backbone, "frozen")
    model = gk.build_model(backbone, decoder="linear", num_classes=2)
    before = copy_state(backbone)
    # the cache would run the backbone in eval mode only, which proves nothing
    gk.fit(model, data, epochs=1, cache_features=False, progress=False)
    after = backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
def test_full_batch_norm_moves(data: gk.ChipData) -> None:
    backbone = random_resnet()
    model = gk.build_model(backbone, decoder="linear", num_classes=2)
    before = copy_state(backbone)
    gk.fit(model, data, epochs=1, head_start="none", learning_rate=1e-4, progress=False)
    moved = [
        k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])
    ]
    assert any(name.endswith("running_mean") for name in moved)


@pytest.mark.slow
def test_cached_features_train_like_the_images(data: gk.ChipData) -> None:
    ends = []
    for cached in (True, False):
        model = make_model("frozen")
        gk.fit(model, data, epochs=2, cache_features=cached, progress=False)
        ends.append(copy_state(model))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=2e-5, rtol=1e-4)


def test_cache_holds_what_the_decoder_reads(data: gk.ChipData) -> None:
    model = make_model("frozen")
    cache = FeatureCache(model, data.dataloader("train"))
    batch = cache.collate([cache[0], cache[1]])
    images = torch.stack([data.dataset("train")[i]["image"] for i in (0, 1)])
    cached = model.from_features(batch["features"], batch["size"])
    torch.testing.assert_close(cached, model(images), atol=1e-5, rtol=1e-5)


def test_checkpoint_holds_only_what_was_trained(
    data: gk.ChipData, tmp_path: Path
) -> None:
    model = make_model("lora", rank=2)
    run = gk.fit(model, data, epochs=1, folder=tmp_path, progress=False)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {f"model.{name}" for name in trained_names(model)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        sum(v.numel() for k, v in stored.items() if "standardise" not in k) == trained
    )
    assert run.folder == tmp_path


KILLED = """
    import sys, os
    from pathlib import Path
    import lightning as L
    import geopeft_kit as gk
    from geopeft_kit.training import callbacks
    from tests.test_training import make_model
    from tests.toy import toy_data

    if sys.argv[3] == "kill":
        write = callbacks.Checkpoint.on_train_epoch_end
        def write_and_die(self, trainer, task):
            write(self, trainer, task)
            if trainer.current_epoch == 1:
                os.kill(os.getpid(), 9)
        callbacks.Checkpoint.on_train_epoch_end = write_and_die
    data = toy_data(Path(sys.argv[1]))
    run = gk.fit(make_model("vpt", tokens=2, dropout=0.5), data, epochs=4,
                 folder=sys.argv[2], resume=sys.argv[3] == "resume", progress=False)
    print(len(run.history))
    from safetensors.torch import save_file
    save_file({k: v.clone() for k, v in run.model.state_dict().items()}, sys.argv[4])
"""


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, repo: Path) -> None:
    """A kill -9 after epoch 2 of 4, with dropout, then a resume in a new process."""
    from safetensors.torch import load_file

    data = tmp_path / "data"
    toy_data(data)

    def python(mode: str, run: str) -> subprocess.CompletedProcess:
        out = tmp_path / f"{mode}.safetensors"
        command = [sys.executable, "-c", textwrap.dedent(KILLED)]
        command += [str(data), str(tmp_path / run), mode, str(out)]
        environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    whole = python("whole", "a")
    assert whole.returncode == 0, whole.stderr
    killed = python("kill", "b")
    assert killed.returncode == -9, killed.stderr
    resumed = python("resume", "b")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == "4"  # the history of both parts
    one = load_file(tmp_path / "whole.safetensors")
    two = load_file(tmp_path / "resume.safetensors")
    different = [
        name for name, value in one.items() if not torch.equal(two[name], value)
    ]
    assert not different


@pytest.mark.slow
def test_resume_with_another_method_is_refused(
    data: gk.ChipData, tmp_path: Path
) -> None:
    gk.fit(make_model("bias"), data, epochs=1, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another set-up"):
        gk.fit(
            make_model("norm"), data, 2, folder=tmp_path, resume=True, progress=False
        )


def test_a_damaged_checkpoint_is_refused(data: gk.ChipData, tmp_path: Path) -> None:
    gk.fit(make_model("bias"), data, epochs=1, folder=tmp_path, progress=False)
    path = tmp_path / "last.ckpt"
    content = bytearray(path.read_bytes())
    for damaged in (content[:-30], content[:2000] + b"other" + content[2005:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.ckpt was damaged"):
            gk.fit(make_model("bias"), data, 2, folder=tmp_path, resume=True)


@pytest.mark.slow
def test_full_disk_keeps_the_old_checkpoint(
    data: gk.ChipData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning as L

    gk.fit(make_model("bias"), data, epochs=1, folder=tmp_path, progress=False)
    before = (tmp_path / "last.ckpt").read_bytes()

    def full(self: L.Trainer, path: Path, *args: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        gk.fit(make_model("bias"), data, epochs=1, folder=tmp_path, progress=False)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "logs"}


@pytest.mark.slow
def test_early_stopping_returns_to_the_best(data: gk.ChipData) -> None:
    model = make_model("full")
    run = gk.fit(
        model, data, epochs=12, learning_rate=0.05, patience=2, progress=False
    )  # a rate that wrecks the weights: the start of the run is its best
    scores = run.history["val_miou"]
    assert len(scores) < 12
    assert run.metrics["overall"]["miou"] == pytest.approx(scores.max(), abs=1e-6)


@pytest.mark.slow
def test_same_seed_same_weights(data: gk.ChipData) -> None:
    ends = []
    for seed in (0, 0, 1):
        model = make_model("lora")
        gk.fit(model, data, epochs=1, seed=seed, progress=False)
        ends.append(copy_state(model))
    name = "decoder.head.weight"
    assert torch.equal(ends[0][name], ends[1][name])
    assert not torch.equal(ends[0][name], ends[2][name])


@pytest.mark.slow
def test_head_start_beats_a_fresh_head(data: gk.ChipData) -> None:
    losses = {}
    for start in ("probe", "none"):
        run = gk.fit(make_model("lora"), data, 1, head_start=start, progress=False)
        losses[start] = run.history["loss"].iloc[0]
    assert losses["probe"] < losses["none"]


def test_default_learning_rate_is_the_cards_and_is_printed(
    data: gk.ChipData, capsys: pytest.CaptureFixture[str]
) -> None:
    run = gk.fit(make_model("lora"), data, epochs=1)
    card = next(card for card in gk.list_methods() if card.name == "lora")
    assert run.settings["learning_rate"] == card.learning_rate
    assert f"{card.learning_rate:g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "1 or more"),
        ({"head_start": "maybe"}, "allowed are auto"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"precision": "8-bit"}, "allowed are auto"),
        ({"precision": "16-mixed", "device": "cpu"}, "needs a GPU"),
        ({"device": "tpu"}, "allowed are"),
        ({"resume": True}, "needs the folder"),
        ({"cache_features": True}, "needs a frozen backbone"),
    ],
)
def test_bad_arguments(data: gk.ChipData, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.fit(make_model("lora"), data, progress=False, **arguments)


def test_task_of_model_and_data_must_agree(data: gk.ChipData) -> None:
    with pytest.raises(ValueError, match="task='segmentation'"):
        gk.fit(make_model(task="classification"), data, progress=False)


def test_nothing_to_resume(data: gk.ChipData, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no last\.ckpt"):
        gk.fit(make_model(), data, folder=tmp_path, resume=True, progress=False)


def test_loss_ignores_what_has_no_label() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.randint(0, 3, (2, 4, 4))
    hidden = target.clone()
    hidden[:, 2:] = 255
    expected = compute_loss(logits[:, :, :2], target[:, :2], "segmentation")
    torch.testing.assert_close(compute_loss(logits, hidden, "segmentation"), expected)
    nothing = compute_loss(logits, torch.full_like(target, 255), "segmentation")
    nothing.backward()
    assert nothing == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_regression_loss_ignores_nan() -> None:
    output = torch.randn(2, 1, 4, 4, requires_grad=True)
    target = torch.randn(2, 4, 4)
    target[0] = float("nan")
    loss = compute_loss(output, target, "regression")
    torch.testing.assert_close(loss, (output[1, 0] - target[1]).square().mean())
    loss.backward()
    assert torch.isfinite(output.grad).all()


def test_precision_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == "32-true"
    assert choose_precision("bf16-mixed", cpu) == "bf16-mixed"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            choose_device("cuda")
