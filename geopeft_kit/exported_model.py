"""A trained model as one file that runs without geopeft_kit: ONNX or `torch.export`.

    gk.export_model(model, "floods.onnx")

The graph takes reflectance and normalises it itself. A JSON file with the same name
says what goes in and what comes out. `pip install "geopeft-kit[export]"` brings what
ONNX needs.

Source:
    ONNX, https://onnx.ai; `torch.export` and `torch.onnx.export(dynamo=True)`,
    https://docs.pytorch.org/docs/stable/export.html.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from geopeft_kit.files import whole_file
from geopeft_kit.methods import list_methods
from geopeft_kit.model import Model

SUFFIXES = (".onnx", ".pt2")
LARGEST_BATCH = 4096
MOST_BYTES = 2**31 - 1  # of one ONNX file
TOLERANCE = 1e-5  # of the largest logit
# Runs a graph in a process that never imports torch.
_RUN = """
import sys, numpy as np, onnxruntime
graph, given, answered = sys.argv[1:]
session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
images = np.load(given)
answers = {name: session.run(["logits"], {"image": images[name]})[0] for name in images}
assert "torch" not in sys.modules
np.savez(answered, **answers)
"""


class _ImageOnly(nn.Module):
    """A model whose one input is the image: date and place are unknown."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)


def export_model(
    model: Model, path: str | Path, batch: int | Literal["dynamic"] = "dynamic"
) -> Path:
    """Write a model as one file: `.onnx` for ONNX Runtime, `.pt2` for PyTorch alone.

    Input `image`: (B, C, H, W) float32 reflectance at the backbone's image size, with
    an axis of dates after the bands where the model reads several. Output `logits`:
    what the model returns. An adapter is merged where its method can be; the other
    methods stay in the graph as layers, and a line says so. The file is run on random
    images before it takes its place, ONNX in a process without torch.

    Args:
        model: From `build_model`, trained or not; it stays as it is.
        path: Where to write; the facts go to the same name with the suffix `.json`.
        batch: "dynamic", or the one number of images that the graph takes.

    Returns:
        The path.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: Another suffix, or a wrong batch.
        RuntimeError: The file answers otherwise than the model, or is too large for
            ONNX. Nothing is written then.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path ends in {path.suffix!r}; allowed are .onnx and .pt2.")
    if batch != "dynamic" and not (isinstance(batch, int) and batch > 0):
        raise ValueError(f"batch is {batch!r}; pass 'dynamic' or a number from 1 on.")
    if path.suffix == ".onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    # Tracing may leave its own tensors in a network's memory: another copy is compared.
    known = _ImageOnly(_merged(model)).eval().requires_grad_(False)
    plain = copy.deepcopy(known)
    first = 2 if batch == "dynamic" else int(batch)
    image = torch.rand(first, *_image_shape(model)) * 0.5
    sizes = None
    if batch == "dynamic":
        sizes = ({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(plain, (image,), dynamic_shapes=sizes)
    counts = (1, 3) if batch == "dynamic" else (first,)
    images = {f"{n}": torch.rand(n, *_image_shape(model)) * 0.5 for n in counts}
    with whole_file(path) as part:
        if path.suffix == ".onnx":
            _write_onnx(program, part)
            answers = _run_onnx(part, images)
        else:
            torch.export.save(program, part)
            loaded = torch.export.load(part).module()
            answers = {name: loaded(image) for name, image in images.items()}
        apart = _compare(known, images, answers)
    facts = {**_facts(model), "batch": batch, "largest_difference": apart}
    with whole_file(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    size = path.stat().st_size / 2**20
    print(
        f"{path.name}: {size:.1f} MiB; on random images of batch "
        f"{' and '.join(images)} its logits differ by at most {apart:.1e}."
    )
    return path


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX needs {', '.join(missing)}: pip install 'geopeft-kit[export]', or "
            "export to .pt2, which PyTorch alone reads."
        )


def _merged(model: Model) -> Model:
    """A copy on the CPU, its adapter folded into the weights if the method can be."""
    plain = copy.deepcopy(model).cpu().float().eval()
    adapter: Any = plain.backbone.adapter
    if adapter is None:
        return plain
    if adapter.mergeable:
        adapter.merge()
    else:
        able = [card.name for card in list_methods() if card.mergeable]
        print(
            f"{adapter.name!r} cannot be merged, so its layers are part of the graph. "
            f"Methods that merge: {', '.join(able)}."
        )
    return plain


def _image_shape(model: Model) -> tuple[int, ...]:
    """(C, H, W), or (C, T, H, W) for several dates, of one image."""
    backbone = model.backbone
    dates = 2 if model.task == "change" else backbone.dates
    middle = (dates,) if dates > 1 else ()
    return (len(backbone.bands), *middle, backbone.image_size, backbone.image_size)


def _write_onnx(program: Any, path: Path) -> None:
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > MOST_BYTES:
        raise RuntimeError(
            f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds 2 GiB. "
            "Export to .pt2."
        )
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program,
            f=str(path),
            input_names=["image"],
            output_names=["logits"],
            external_data=False,
            dynamo=True,
        )


def _run_onnx(graph: Path, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of ONNX Runtime, by name."""
    with tempfile.TemporaryDirectory() as folder:
        given, answered = Path(folder) / "given.npz", Path(folder) / "answered.npz"
        arrays: Any = {name: image.numpy() for name, image in images.items()}
        np.savez(given, **arrays)
        run = subprocess.run(
            [sys.executable, "-c", _RUN, graph, given, answered],
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(f"ONNX Runtime refused the graph: {run.stderr[-800:]}")
        with np.load(answered) as answers:
            return {name: torch.from_numpy(answers[name]) for name in answers}


def _compare(
    plain: nn.Module, images: dict[str, Tensor], answers: dict[str, Tensor]
) -> float:
    """The largest difference between model and file; an error if it is too large."""
    largest = 0.0
    for name, image in images.items():
        with torch.no_grad():
            known = plain(image)
        apart = float((answers[name] - known).abs().max())
        if not apart <= TOLERANCE * max(1.0, float(known.abs().max())):
            raise RuntimeError(
                f"the exported file differs from the model by {apart:.1e} on a random "
                "image, more than rounding explains. Nothing was written; please "
                "report the backbone and the method."
            )
        largest = max(largest, apart)
    return largest


def _facts(model: Model) -> dict[str, Any]:
    """What a user of the file has to know, as JSON."""
    from geopeft_kit import __version__

    card = model.backbone.card
    adapter: Any = model.backbone.adapter
    return {
        "input": {
            "name": "image",
            "type": "float32",
            "shape": ["batch", *_image_shape(model)],
            "values": "reflectance 0-1, normalised inside",
            "bands": list(model.backbone.bands),
        },
        "output": {"name": "logits", "task": model.task},
        "classes": model.classes,
        "colours": model.colours,
        "backbone": card.name,
        "licence": f"weights: {card.licence_weights}",
        "method": None if adapter is None else adapter.name,
        "geopeft_kit": __version__,
    }
