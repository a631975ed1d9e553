"""Progress is a widget, a bar or lines; a stopped training says what it kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from jupyter_client.manager import KernelManager

import geopeft_kit as gk
from geopeft_kit.progress import progress_bar
from tests.test_training import copy_state, make_model


class StopAt(L.Callback):
    """Presses Ctrl-C before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_log_gets_few_lines_and_no_carriage_return(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = progress_bar(total=5000, desc="work", unit=" steps")
    bar.mininterval = 0.01
    for _ in range(5000):
        bar.update()
        time.sleep(0.0001)
    bar.close()
    out = capsys.readouterr().out
    assert "\r" not in out
    assert out.startswith("work:   0% 0/5000 [00:00<?")
    assert "work: 100% 5000/5000" in out.splitlines()[-1]
    assert 4 <= len(out.splitlines()) <= 9  # each gap is twice the one before


def test_every_item_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(50), delay=1, leave=False)) == list(range(50))
    assert list(progress_bar(range(50), shown=False)) == list(range(50))
    assert not capsys.readouterr().out


def test_a_terminal_gets_one_bar_in_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for _ in progress_bar(range(3), desc="work"):
        pass
    assert capsys.readouterr().out.count("\r") >= 1


def test_fit_shows_steps_loss_and_time(
    data: gk.ChipData, capsys: pytest.CaptureFixture[str]
) -> None:
    gk.fit(make_model("frozen"), data, epochs=3, validate_every=1)
    last = capsys.readouterr().out.splitlines()[-1]
    steps = 3 * len(data.dataloader("train"))
    shown = rf"epoch 3/3: 100% {steps}/{steps} \[\d\d:\d\d<\d\d:\d\d,.* steps?/s, loss "
    assert re.match(shown, last)
    assert "miou" in last


@pytest.mark.slow
def test_compare_says_which_training_of_how_many(
    data: gk.ChipData, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = gk.Candidate("probe", "frozen", learning_rates=(1e-3, 1e-2))
    gk.compare([probe], data, epochs=1, seeds=(0, 5))
    out = capsys.readouterr().out
    for start in ("1/4 probe, seed 0", "2/4 probe, seed 0", "4/4 probe, seed 5"):
        assert f"\n{start}" in out
    steps = 4 * len(data.dataloader("train"))
    assert f"100% {steps}/{steps}" in out.splitlines()[-1]


def test_a_stop_says_that_nothing_was_written(data: gk.ChipData) -> None:
    model = make_model("lora")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after 1 of 9 epochs.*nothing was"):
        gk.fit(model, data, 9, head_start="none", progress=False, callbacks=[StopAt(5)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    model(data.dataset("train")[0]["image"][None])


def test_a_stop_before_the_first_epoch_leaves_no_checkpoint(
    data: gk.ChipData, tmp_path: Path
) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"of another run")
    arguments = {"head_start": "none", "progress": False, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt, match="no epoch of this run was complete"):
        gk.fit(make_model("lora"), data, 9, callbacks=[StopAt(1)], **arguments)


def test_other_exits_pass(data: gk.ChipData) -> None:
    class Leave(L.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            sys.exit(3)

    with pytest.raises(SystemExit) as left:
        gk.fit(make_model("bias"), data, 1, progress=False, callbacks=[Leave()])
    assert left.value.code == 3


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(data: gk.ChipData, tmp_path: Path) -> None:
    """With levers on: both are undone by the stop, and the model is used again."""
    levers = {"checkpointing": "blocks", "frozen_precision": "bf16"}

    def fit(model: torch.nn.Module, folder: str, **more) -> gk.training.Run:
        where = tmp_path / folder
        return gk.fit(model, data, 4, folder=where, progress=False, **levers, **more)

    options = {"tokens": 2, "dropout": 0.5}
    whole = fit(make_model("vpt", **options), "whole").model
    model = make_model("vpt", **options)
    before = copy_state(model)
    steps = len(data.dataloader("train"))
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        fit(model, "stopped", callbacks=[StopAt(2 * steps + 1)])
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not any("forward" in module.__dict__ for module in model.modules())
    resumed = fit(model, "stopped", resume=True)
    assert len(resumed.history) == 4
    state = whole.state_dict()
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    again = fit(model, "stopped", resume=True)
    assert again.history.equals(resumed.history)
    assert again.resources.step_ms == resumed.resources.step_ms  # peaks are of now


@pytest.mark.slow
def test_compare_is_stopped_by_one_line(
    data: gk.ChipData, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geopeft_kit.comparison import candidate

    train = candidate.fit
    monkeypatch.setattr(
        candidate, "fit", lambda *a, callbacks, **k: train(
            *a, callbacks=[*callbacks, StopAt(1)], **k
        )
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt, match="1/1 probe, seed 0"):
        gk.compare([gk.Candidate("probe", "frozen")], data, seeds=(0,), progress=False)


SCRIPT = """
    import sys
    from pathlib import Path
    import geopeft_kit as gk
    from tests.test_training import make_model
    from tests.toy import toy_data

    gk.fit(make_model("lora"), toy_data(Path(sys.argv[1])), 1000, head_start="none",
           folder=sys.argv[2])
"""


@pytest.mark.slow
def test_ctrl_c_in_a_script(tmp_path: Path, repo: Path) -> None:
    """A signal from outside: the log shows the run, the process ends as interrupted."""
    arguments = [str(tmp_path / "data"), str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(repo)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if re.match(r"epoch ([3-9]|\d\d)/1000", line):
                break
        assert re.search(r"\d+/4000 \[\d\d:\d\d<.*, loss \d", line)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert error.strip().splitlines()[-1].startswith("KeyboardInterrupt: stopped after")
    assert (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("widgets", [True, False])
def test_the_stop_button_of_a_notebook(
    widgets: bool, tmp_path: Path, repo: Path
) -> None:
    """A real kernel: a bar within two seconds of training, then the interrupt."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | {"PYTHONPATH": str(repo)}, cwd=tmp_path)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    shown: list[dict] = []

    def watch(message: dict) -> None:
        shown.append(message["content"])
        if "0/4000" in str(message["content"]):
            watch.began = time.monotonic()
        # numbers with a loss: the widget's text arrives as a state of its own
        if "loss" in str(message["content"]) and not watch.stopped:
            watch.stopped = time.monotonic()
            manager.interrupt_kernel()

    def run(code: str) -> dict:
        reply = client.execute_interactive(
            textwrap.dedent(code), output_hook=watch, timeout=120
        )
        return reply["content"]

    watch.began = watch.stopped = 0.0
    try:
        if not widgets:
            run("import sys; sys.modules['ipywidgets'] = None")
        setup = """
            from pathlib import Path
            import geopeft_kit as gk
            from tests.test_training import make_model
            from tests.toy import toy_data
            data, model = toy_data(Path("data")), make_model("lora")
            """
        assert run(setup)["status"] == "ok"
        fit = "gk.fit(model, data, 1000, head_start='none', folder='run')"
        reply = run(fit)
        assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
        assert "stopped after" in reply["evalue"]
        after = run("model(data.dataset('train')[0]['image'][None]); model.training")
        assert after["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert 0 < watch.stopped - watch.began < 2
    view = "application/vnd.jupyter.widget-view+json"
    assert any(view in one.get("data", {}) for one in shown) == widgets
