"""Every saved adapter gives the same maps in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from method_table import ROWS, make, output, stir

import geopeft_kit as gk

CASES = {f"{kind}-{row}": (kind, row) for row in ROWS for kind in row.serves}
LOAD = """
import sys
import torch
import geopeft_kit as gk
from method_table import make, output
from test_methods_elsewhere import CASES
torch.set_num_threads(1)
folder = sys.argv[1]
maps = {}
for name, (kind, row) in CASES.items():
    backbone = make(kind, row.load)
    gk.load_adapter(backbone, f"{folder}/{name}")
    maps[name] = output(backbone)
torch.save(maps, f"{folder}/maps.pt")
"""


@pytest.mark.slow
def test_saved_adapters_load_in_another_process(tmp_path: Path) -> None:
    expected = {}
    for name, (kind, row) in CASES.items():
        backbone = make(kind, row.load)
        adapter = gk.attach(backbone, row.name, **row.options)
        stir(adapter)
        adapter.save(tmp_path / name)
        expected[name] = output(backbone)
    subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=Path(__file__).parent,
        check=True,
    )
    found = torch.load(tmp_path / "maps.pt", weights_only=True)
    for name, maps in expected.items():
        # Another process may take another number of threads, hence not bit for bit.
        torch.testing.assert_close(found[name], maps, atol=1e-5, rtol=1e-5, msg=name)
