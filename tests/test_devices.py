"""The rule for devices, on a stand-in GPU; and that the stand-in is like a GPU."""

from __future__ import annotations

from pathlib import Path

import alone
import device_calls
import pytest
import standin_gpu
import torch
from notebook_tools import offline_environment
from torch import nn

import geopeft_kit as gk
from geopeft_kit.devices import device_of, moved, on_own_device

TESTS = Path(__file__).parent
needs_standin = pytest.mark.skipif(
    not standin_gpu.wanted(), reason="the stand-in GPU is off, or PyTorch too old"
)


@pytest.fixture(scope="module", autouse=True)
def _forks(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = offline_environment(tmp_path_factory.mktemp("forks"))
    alone.start_forks(environment | {"MPLBACKEND": "Agg"})


def run(code: str, folder: Path) -> None:
    """Run code on the stand-in, in a process of its own."""
    script = folder / "script.py"
    script.write_text(code)
    ended, said = alone.run_alone(script)
    assert ended == 0, said[-6000:]


def test_every_public_name_is_called_or_says_why_not():
    listed = [*device_calls.CALLS, *device_calls.NOT_CALLED]
    assert sorted(listed) == sorted(device_calls.public_callables())


@pytest.mark.slow
@needs_standin
def test_every_public_name_takes_images_on_the_cpu(tmp_path: Path):
    run("import sys, device_calls; sys.exit(device_calls.main())", tmp_path)


STANDIN = """
import copy, io, numpy as np, pytest, torch
from torch import nn

gpu = torch.device("cuda")
here = torch.arange(6.0).reshape(2, 3)
there = here.to(gpu)
assert torch.cuda.is_available() and there.device == gpu != here.device

# What a GPU refuses.
for mixed in (
    lambda: there + here,
    lambda: torch.cat([there, here]),
    lambda: nn.Linear(3, 2).to(gpu)(here),
    lambda: nn.Linear(3, 2)(there),
    lambda: here[torch.tensor([0], device=gpu)],
    lambda: torch.rand(2, device=gpu, generator=torch.Generator()),
):
    with pytest.raises((RuntimeError, IndexError), match="device"):
        mixed()
for read in (np.asarray, lambda t: t.numpy(), lambda t: np.array([t[0, 0]])):
    with pytest.raises(TypeError, match="Tensor.cpu"):
        read(there)

# What a GPU does.
assert (there + torch.tensor(1.0)).device == gpu
assert torch.equal(there[[1, 0]].cpu(), here[[1, 0]])
assert torch.equal(there[torch.tensor([1])].cpu(), here[1:])
assert f"{there[1, 2]:.1f}" == "5.0" and there.tolist() == here.tolist()
assert torch.tensor([[there[0, 1], there[1, 1]]]).device.type == "cpu"
assert torch.tensor([1, 2], device=there.device).device == gpu
assert there.cpu().numpy().sum() == 15
assert "device='standin:0'" in repr(there)
with torch.device("meta"):
    assert torch.tensor([1.0]).is_meta
with torch.device(gpu):
    assert torch.tensor(1.0).device == nn.Linear(2, 2).weight.device == gpu

layer = nn.Conv2d(1, 2, 3)
weight, before = layer.weight, copy.deepcopy(layer)
layer.to(gpu)
assert layer.weight is weight and weight.device == gpu, "moving replaced a parameter"
image = torch.rand(2, 1, 8, 8)
for model, x in ((before, image), (layer, image.to(gpu))):
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
torch.testing.assert_close(layer.weight.cpu(), before.weight)
twin = copy.deepcopy(layer)
assert twin.weight.device == gpu and isinstance(twin.weight, nn.Parameter)
file = io.BytesIO()
torch.save(layer.state_dict(), file)
file.seek(0)
read = torch.load(file, weights_only=True)
assert read["bias"].device == gpu and torch.equal(read["bias"], layer.bias)
with torch.autocast(gpu.type, torch.bfloat16):
    assert layer(image.to(gpu)).dtype == torch.bfloat16
assert layer.cpu().weight is weight and weight.device.type == "cpu"
"""


@needs_standin
def test_the_standin_is_like_a_gpu(tmp_path: Path):
    run(STANDIN, tmp_path)


class Twice(nn.Module):
    """Weights on the meta device stand for another device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @on_own_device
    def forward(self, image: torch.Tensor, meta: object = None) -> object:
        return [image, meta]


def test_nothing_is_copied_that_is_there_already():
    image = torch.ones(2)
    meta = {"date": torch.ones(1), "name": "kept"}
    same, kept = Twice()(image, meta)
    assert same is image
    assert kept["date"] is meta["date"] and kept["name"] == "kept"
    assert Twice()(image=image)[0] is image


def test_input_and_metadata_meet_the_weights():
    meta = {"date": torch.ones(1, device="meta")}
    model = Twice().to("meta")
    assert device_of(model).type == "meta"
    image, known = model(torch.ones(2, device="meta"), meta=meta)
    assert image.device.type == known["date"].device.type == "meta"
    with pytest.raises(NotImplementedError):  # there, but no way back from meta
        model(torch.ones(2))


@pytest.mark.slow
def test_a_model_still_exports_and_compiles():
    model = gk.build_model(gk.load_backbone("geopeft_tiny"), "linear").eval()
    image = torch.rand(1, 6, 64, 64)
    expected = model(image)
    program = torch.export.export(model, (image,)).module()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(program(image), expected)
    assert torch.equal(compiled(image), expected)


def test_moved_keeps_the_form():
    value = ((32, 32), [torch.ones(1)], {"a": torch.ones(1)}, None)
    size, (one,), named, nothing = moved(value, "meta")
    assert size == (32, 32) and nothing is None
    assert one.device.type == named["a"].device.type == "meta"
    assert device_of(nn.Identity()).type == "cpu"
