"""Every PEFT method under distributed data parallel, with two CPU processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from method_table import ROWS, Row, image, make
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone

TRAINED = [row for row in ROWS if row.name != "frozen"]
STEPS = 2  # DDP sorts its buckets anew after the first


class Loss(nn.Module):
    """A backbone and a number to minimise, as DDP wants them: one forward."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return sum(m.square().mean() for m in self.backbone(batch))


def train(backbone: Backbone, ranks: list[int], wrap: bool) -> list[torch.Tensor]:
    """A few steps on the batches of these ranks; returns what was trained."""
    loss: nn.Module = Loss(backbone)
    if wrap:
        loss = DistributedDataParallel(loss)
    trained = list(backbone.adapter.parameters())
    for step in range(STEPS):
        batch = torch.cat([image(backbone, seed=10 * step + rank) for rank in ranks])
        loss(batch).backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.005 * parameter.grad
                parameter.grad = None
    return [parameter.detach().clone() for parameter in trained]


def attached(kind: str, row: Row) -> Backbone:
    """The same adapter in every process; batch norms keep their statistics."""
    backbone = make(kind, row.load)
    torch.manual_seed(3)
    gk.attach(backbone, row.name, **row.options)
    return backbone.eval()


def work(rank: int, folder: str) -> None:
    """What one of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {}
    for row in TRAINED:
        for kind in row.serves:
            results[f"{kind}-{row}"] = train(attached(kind, row), [rank], wrap=True)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two processes ended with."""
    folder: Path = tmp_path_factory.mktemp("ddp")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "row"),
    [pytest.param(k, row, id=f"{k}-{row}") for row in TRAINED for k in row.serves],
)
def test_two_processes_train_as_one(trained: list[dict], kind: str, row: Row) -> None:
    """Equal weights in both, and those of one process that sees both batches."""
    first, second = (results[f"{kind}-{row}"] for results in trained)
    backbone = attached(kind, row)
    start = [parameter.detach().clone() for parameter in backbone.adapter.parameters()]
    alone = train(backbone, [0, 1], wrap=False)
    assert any(not torch.equal(a, b) for a, b in zip(first, start, strict=True))
    for ours, theirs, single in zip(first, second, alone, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, single, atol=1e-4, rtol=1e-3)
