"""A model as one file: equal answers, any batch, and nothing half-written."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import backbone_table
import numpy as np
import pytest
import torch
from backbone_table import ROWS, Row

import geopeft_kit as gk
from geopeft_kit import exported_model
from geopeft_kit.model import Model

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(method: str | None = "lora", task: str = "segmentation") -> Model:
    """A model of 32 x 32 pixels whose decoder has left its start."""
    torch.manual_seed(0)
    backbone = gk.load_backbone("geopeft_tiny", weights=None, image_size=32)
    if method is not None:
        gk.attach(backbone, method)
    model = gk.build_model(backbone, "linear", task, num_classes=3)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_backbone_keeps_its_batch_open(row: Row, monkeypatch):
    backbone = backbone_table.twin(monkeypatch, row)
    model = gk.build_model(backbone, "linear", num_classes=2).eval()
    spare = copy.deepcopy(model)  # tracing may leave its own tensors in a network
    image = backbone_table.image(backbone, row)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        graph = torch.export.export(model, (image,), dynamic_shapes=sizes).module()
    fresh = torch.rand(3, *image.shape[1:]) * 0.4
    with torch.no_grad():
        known = spare(fresh)
        torch.testing.assert_close(graph(fresh), known, rtol=1e-4, atol=1e-5)
        one = torch.cat([graph(part) for part in fresh.split(1)])
    torch.testing.assert_close(one, known, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "lora", "vpt"])
def test_onnx_answers_as_the_model_does(method: str | None, tmp_path: Path, capsys):
    model = tiny(method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training, adapter = model.training, model.backbone.adapter
    model.classes = ["land", "water", "ice"]
    path = gk.export_model(model, tmp_path / "model.onnx")
    assert "differ by at most" in capsys.readouterr().out
    image = torch.rand(5, 6, 32, 32)
    np.save(tmp_path / "image.npy", image.numpy())
    code = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "session = ort.InferenceSession(sys.argv[1])\n"
        "image = np.load(sys.argv[2] + '/image.npy')\n"
        "assert [i.name for i in session.get_inputs()] == ['image']\n"
        "logits, = session.run(['logits'], {'image': image})\n"
        "np.save(sys.argv[2] + '/logits.npy', logits)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, path, tmp_path], check=True)
    with torch.no_grad():
        known = model.eval()(image)
    answered = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(answered, known, rtol=1e-4, atol=1e-5)
    model.train(training)
    assert model.backbone.adapter is adapter
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["input"]["bands"] == list(model.backbone.bands)
    assert facts["input"]["shape"] == ["batch", 6, 32, 32]
    assert facts["classes"] == ["land", "water", "ice"]
    assert facts["largest_difference"] < 1e-4


@pytest.mark.slow
def test_pytorch_reads_its_own_file(tmp_path: Path):
    model = tiny("ia3", "regression")
    path = gk.export_model(model, tmp_path / "model.pt2", batch=2)
    image = torch.rand(2, 6, 32, 32)
    with torch.no_grad():
        known = model.eval()(image)
        answered = torch.export.load(path).module()(image)
    torch.testing.assert_close(answered, known, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch):
    def other(graph, images):
        return {name: torch.ones(len(x), 3, 32, 32) for name, x in images.items()}

    monkeypatch.setattr(exported_model, "_run_onnx", other)
    with pytest.raises(RuntimeError, match="differs from the model"):
        gk.export_model(tiny(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch):
    model = tiny(None)
    with pytest.raises(ValueError, match=r"\.onnx and \.pt2"):
        gk.export_model(model, tmp_path / "model.pth")
    for batch in (0, "many"):
        with pytest.raises(ValueError, match="'dynamic' or a number"):
            gk.export_model(model, tmp_path / "model.onnx", batch=batch)
    monkeypatch.setattr(exported_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"geopeft-kit\[export\]"):
        gk.export_model(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
