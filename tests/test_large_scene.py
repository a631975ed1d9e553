"""Large scenes: bounded memory, and a run that was killed goes on to the same file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from large_scene import write_vrt
from test_inference import BANDS, Net, pixelwise, read, reflectance, write_scene

from geopeft_kit.scenes.inference import predict_scene

HERE = Path(__file__).parent

# Dies like a machine that loses its power: no handler, no clean-up.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from test_inference import Net
from geopeft_kit.scenes.inference import predict_scene

class Dying(Net):
    calls = 0
    def forward(self, image):
        Dying.calls += 1
        if Dying.calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(image)

torch.set_num_threads(1)
torch.manual_seed(1)
model = Dying(torch.nn.Conv2d(3, 3, 5, padding=2))
predict_scene(model, {source!r}, {target!r}, window=32, overlap={overlap}, batch_size=4,
              progress=False, probabilities=True, resume=True)
"""


def convolution() -> Net:
    torch.manual_seed(1)
    return Net(torch.nn.Conv2d(3, 3, 5, padding=2))


@pytest.mark.parametrize(
    ("overlap", "call"),
    [
        (0.75, 40),
        pytest.param(0.0, 5, marks=pytest.mark.slow),
        pytest.param(0.5, 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_file(tmp_path, overlap, call):
    source = write_scene(tmp_path / "scene.tif", reflectance(150, 110))
    options = {"window": 32, "overlap": overlap, "batch_size": 4, "progress": False}
    options["probabilities"] = True
    (tmp_path / "whole").mkdir()
    predict_scene(convolution(), source, tmp_path / "whole" / "out.tif", **options)
    target = tmp_path / "out.tif"
    script = KILLED.format(
        tests=str(HERE), call=call, source=str(source), target=str(target),
        overlap=overlap,
    )  # fmt: skip
    run = subprocess.run([sys.executable, "-c", script])
    assert run.returncode == -signal.SIGKILL
    assert not target.exists(), "a file that is not whole appeared"
    kept = len(list((tmp_path / ".out.tif.rows").glob("rows_*.npz")))
    model, calls = convolution(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    predict_scene(model, source, target, resume=True, **options)
    for name in ("out.tif", "out_probabilities.tif"):
        assert (tmp_path / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()
    assert not (tmp_path / ".out.tif.rows").exists()
    model, full = convolution(), []
    model.register_forward_hook(lambda *_: full.append(1))
    predict_scene(model, source, target, **options)
    assert (len(calls) < len(full)) == (kept > 0), "kept rows were computed again"


def test_an_interrupted_run_of_another_job_starts_afresh(tmp_path, capsys):
    source = write_scene(tmp_path / "scene.tif", reflectance(96, 64))
    target = tmp_path / "out.tif"
    options = {"window": 32, "progress": False}

    class Stopped(Net):
        calls = 0

        def forward(self, image):
            Stopped.calls += 1
            if Stopped.calls == 4:
                raise KeyboardInterrupt
            return super().forward(image)

    torch.manual_seed(5)
    stopped = Stopped(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(KeyboardInterrupt):
        predict_scene(stopped, source, target, resume=True, **options)
    assert list((tmp_path / ".out.tif.rows").glob("rows_*.npz"))
    predict_scene(pixelwise(), source, target, resume=True, **options)
    assert "another job" in capsys.readouterr().out
    predict_scene(pixelwise(), source, tmp_path / "plain.tif", **options)
    assert (read(target) == read(tmp_path / "plain.tif")).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.tif", "plain.tif", "scene.tif",
    ]  # fmt: skip


def test_the_vrt_is_what_it_says(tmp_path):
    with rasterio.open(write_vrt(tmp_path, 1100, 1500)) as scene:
        assert (scene.width, scene.height, scene.count) == (1100, 1500, 6)
        assert set(scene.descriptions) > set(BANDS)
        with rasterio.open(tmp_path / "delta.tif") as tile:
            assert (scene.read(3)[:1024, 1024:] == tile.read(3)[:, :76]).all()
        assert np.ptp(scene.read(4)) > 1000


@pytest.mark.slow
def test_memory_of_a_scene_20000_pixels_wide(tmp_path):
    """A strip is what is in memory, so a wide scene shows what a whole one takes.

    The whole 20,000 x 20,000 with `geopeft_tiny` is the same command with other
    numbers, see `large_scene.py`.
    """
    command = [sys.executable, str(HERE / "large_scene.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "20000", "2560", "cheap"], capture_output=True, text=True,
        env=environment, check=True,
    )  # fmt: skip
    extra = int(re.search(r"(\d+) MiB extra", run.stdout)[1])
    assert extra < 2048, run.stdout
    assert read(tmp_path / "out.tif").shape == (1, 2560, 20000)
