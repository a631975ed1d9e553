"""The comparison on real pixels and real weights, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, real_data: Path, repo: Path
) -> Path:
    """One seed, one learning rate, 200 chips to train and as many to score."""
    out = tmp_path_factory.mktemp("real")
    command = [sys.executable, str(repo / "benchmarks" / "real.py")]
    command += ["--data", str(real_data), "--out", str(out)]
    command += ["--seeds", "1", "--trials", "1", "--chips", "200", "--epochs", "2"]
    command += ["--tested", "200"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_pretraining_shows_on_the_unseen_block(outcome: Path) -> None:
    """Probe of real weights > pixel statistics > probe of random weights."""
    rows = pd.read_csv(outcome / "eurosat.csv").set_index("label")
    for split in ("in_region", "val", "test"):
        score = rows[split]
        assert score["probe"] > score["pixel statistics"] + 0.05
        assert score["pixel statistics"] > score["random, probe"] + 0.05


def test_adapters_train_a_fraction_and_keep_up(outcome: Path) -> None:
    rows = pd.read_csv(outcome / "eurosat.csv").set_index("label")
    assert rows.loc["LoRA q, v", "backbone_trainable"] == 16_384
    assert rows.loc["LoRA q, v", "adapter_kib"] < 0.05 * rows.loc["full", "adapter_kib"]
    assert rows.loc["LoRA q, v", "in_region"] > rows.loc["probe", "in_region"] - 0.03


def test_forest_is_found_in_the_unseen_east(outcome: Path) -> None:
    rows = pd.read_csv(outcome / "amazon.csv").set_index("label")
    assert (rows.loc[["probe", "LoRA", "full"], "test"] > 0.7).all()


@pytest.mark.browser
@pytest.mark.parametrize("name", ["amazon", "terramesh"])
def test_maps_stand_alone(outcome: Path, name: str, visit) -> None:
    visit.page.goto((outcome / f"{name}.html").as_uri())
    visit.page.locator(".leaflet-image-layer").first.wait_for(state="attached")
    assert visit.page.locator("#legend, .legend").count() > 0
    visit.clean()
