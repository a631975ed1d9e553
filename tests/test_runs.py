"""What `fit` does with Lightning's parts, wrapped models, and runs to resume."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from lightning.pytorch import callbacks as brought
from lightning.pytorch.loggers import CSVLogger

import geopeft_kit as gk
from tests.test_training import copy_state, make_model
from tests.toy import toy_data


class Spy(L.Callback):
    """Counts the optimiser's steps and keeps its rates."""

    def on_train_start(self, trainer, module) -> None:
        self.rates = {
            group["initial_lr"] for group in trainer.optimizers[0].param_groups
        }

    def on_train_end(self, trainer, module) -> None:
        self.steps, self.planned = trainer.global_step, module.total_steps


@pytest.mark.parametrize("by", ["argument", "callback"])
def test_accumulation_keeps_loss_and_schedule(by: str, data: gk.ChipData) -> None:
    spy = Spy()
    scheduler = brought.GradientAccumulationScheduler({0: 3})
    more = {"accumulate": 3} if by == "argument" else {}
    own = [spy] if by == "argument" else [spy, scheduler]
    options = {"epochs": 2, "learning_rate": 1e-9, "decoder_learning_rate": 1e-9}
    options |= {"head_start": "none", "progress": False}
    plain = gk.fit(make_model("bias"), data, **options).history
    run = gk.fit(make_model("bias"), data, callbacks=own, **more, **options).history
    batches = len(data.dataloader("train", shuffle=True))
    assert batches % 3  # a rest makes a step of its own
    assert spy.steps == spy.planned == 2 * -(-batches // 3)
    assert run["loss"].tolist() == pytest.approx(plain["loss"].tolist(), rel=1e-4)
    assert run["learning_rate"].iloc[-1] == 0


def test_batches_are_accumulated_in_one_way(data: gk.ChipData) -> None:
    twice = [brought.GradientAccumulationScheduler({0: 2})]
    with pytest.raises(ValueError, match="one of the two"):
        gk.fit(make_model(), data, accumulate=2, callbacks=twice, progress=False)
    with pytest.raises(ValueError, match="whole number of batches"):
        gk.fit(make_model(), data, accumulate=0, progress=False)


def test_a_wrapped_model_is_refused_and_one_compiled_in_place_keeps_its_rates(
    data: gk.ChipData,
) -> None:
    model, spy = make_model("full"), Spy()
    for wrap in (torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        with pytest.raises(TypeError, match="model inside"):
            gk.fit(wrap(model), data, progress=False)
    model.compile(backend="eager")
    gk.fit(model, data, 1, head_start="none", progress=False, callbacks=[spy])
    assert spy.rates == {1e-4, 1e-3}


def test_patience_needs_labels(tmp_path: Path) -> None:
    data = toy_data(tmp_path)
    for row in data.dataset("val").rows:
        path = data.folder / str(data.index["mask"].iloc[row])
        with rasterio.open(path, "r+") as file:
            file.write(np.full_like(file.read(), 255))
    with pytest.raises(ValueError, match="no chip of the validation split"):
        gk.fit(make_model("bias"), data, 1, patience=1, progress=False)


def test_lightnings_callbacks_see_the_columns_of_the_history(
    data: gk.ChipData, tmp_path: Path
) -> None:
    best = brought.ModelCheckpoint(tmp_path / "best", monitor="val_miou", mode="max")
    rates = brought.LearningRateMonitor()
    stop = brought.EarlyStopping("val_miou", mode="min", patience=1, min_delta=2.0)
    run = gk.fit(
        make_model("bias"), data, 9, folder=tmp_path, progress=False,
        head_start="none", callbacks=[best, rates, stop],
    )  # fmt: skip
    assert len(run.history) == stop.stopped_epoch + 1 < 9
    assert float(best.best_model_score) == pytest.approx(run.history["val_miou"].max())
    assert Path(best.best_model_path).is_file()
    assert any(rates.lrs.values())
    logged = pd.read_csv(tmp_path / "logs/version_0/metrics.csv")
    for column in ("loss", "val_miou"):
        found = logged[column].dropna().tolist()
        assert found == pytest.approx(run.history[column].tolist(), abs=1e-6)


def test_a_logger_or_a_bar_of_your_own(
    data: gk.ChipData, tmp_path: Path, capsys
) -> None:
    class Bar(brought.ProgressBar):
        ended = False

        def on_train_end(self, *_) -> None:
            self.ended = True

    bar, mine = Bar(), CSVLogger(tmp_path, "mine")
    options = {"head_start": "none", "learning_rate": 1e-4}
    gk.fit(make_model("bias"), data, 1, callbacks=[bar], logger=mine, **options)
    assert bar.ended and "epoch" not in capsys.readouterr().err
    assert (tmp_path / "mine/version_0/metrics.csv").is_file()
    gk.fit(
        make_model("bias"), data, 1, progress=False, head_start="none",
        callbacks=[brought.LearningRateMonitor(), brought.EarlyStopping("loss")],
    )  # fmt: skip


@pytest.fixture
def half(data: gk.ChipData, tmp_path: Path) -> Path:
    """The folder of a run of one epoch."""
    gk.fit(make_model("lora"), data, 1, folder=tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_only_the_same_run_is_resumed(half: Path, data: gk.ChipData, tmp_path: Path):
    def resume(model=None, chips=data, **more):
        model = model or make_model("lora")
        return gk.fit(model, chips, 2, folder=half, resume=True, progress=False, **more)

    torch.manual_seed(1)
    other = gk.load_backbone("geopeft_tiny", weights=None)
    gk.attach(other, "lora")
    other = gk.build_model(other, decoder="linear")
    with pytest.raises(ValueError, match=r"these differ: frozen weights \("):
        resume(other)
    with pytest.raises(ValueError, match=r"these differ: method \(.*alpha"):
        resume(make_model("lora", alpha=64.0))
    fewer = toy_data(tmp_path / "fewer", chips=18)
    with pytest.raises(ValueError, match=r"these differ: data \("):
        resume(chips=fewer)
    with pytest.raises(ValueError, match=r"differ: seed \(0 there, 7 here\)"):
        resume(seed=7)
    with pytest.raises(ValueError, match=r"differ: batch_size \(4 there, 2 here\)"):
        resume(batch_size=2)
    assert len(resume().history) == 2  # a run may be made longer


def test_other_labels_are_other_data(half: Path, tmp_path: Path) -> None:
    data = toy_data(tmp_path / "same")
    path = data.folder / str(data.index["mask"].iloc[data.dataset("train").rows[0]])
    with rasterio.open(path, "r+") as file:
        file.write(1 - file.read())
    with pytest.raises(ValueError, match=r"these differ: data \("):
        gk.fit(make_model("lora"), data, 2, folder=half, resume=True, progress=False)


def test_parts_of_a_checkpoint_are_named(half: Path, data: gk.ChipData) -> None:
    path = half / "last.ckpt"
    whole = torch.load(path, weights_only=True)
    options = {"folder": half, "resume": True, "progress": False}
    torch.save({k: v for k, v in whole.items() if k != "optimizer_states"}, path)
    with pytest.raises(ValueError, match="lacks optimizer_states"):
        gk.fit(make_model("lora"), data, 2, **options)
    torch.save({"hostile": print}, path)
    with pytest.raises(ValueError, match="no checkpoint of fit") as error:
        gk.fit(make_model("lora"), data, 2, **options)
    assert "weights_only" not in str(error.value)


def test_a_finished_run_says_so(half: Path, data: gk.ChipData, capsys) -> None:
    first = copy_state(gk.fit(
        make_model("lora"), data, 1, folder=half, resume=True, progress=False,
    ).model)  # fmt: skip
    run = gk.fit(make_model("lora"), data, 1, folder=half, resume=True)
    assert "nothing is left to train" in capsys.readouterr().out
    assert len(run.history) == 1 and run.resources.timed_steps > 0
    assert all(torch.equal(first[k], v) for k, v in run.model.state_dict().items())


def test_a_run_that_patience_stopped_stays_stopped(
    data: gk.ChipData, tmp_path: Path
) -> None:
    def fit(**more):
        return gk.fit(
            make_model("full"), data, 9, patience=1, folder=tmp_path, progress=False,
            learning_rate=0.05, **more,
        )  # fmt: skip

    run = fit()
    assert len(run.history) < 9
    again = fit(resume=True)
    assert again.history.equals(run.history)
    state = again.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in run.model.state_dict().items())


def test_checkpoints_are_written_beside_themselves(
    data: gk.ChipData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    made: list[object] = []
    monkeypatch.setattr(tempfile, "mkstemp", lambda *a, **k: made.append(a))
    gk.fit(make_model("bias"), data, 1, folder=tmp_path, progress=False)
    assert (tmp_path / "last.ckpt").is_file() and not made
