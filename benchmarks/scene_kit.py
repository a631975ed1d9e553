"""The kit's side of `scene.py`: `gk.predict_scene` on the peer's weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from step_kit import same_model
from workers import serve

import geopeft_kit as gk
from geopeft_kit.training.hardware import PeakMemory
from geopeft_kit.training.tracker import MIB


class Scenes:
    """The peer's model in the kit, and whole scenes through it."""

    def build(self, backbone: str, size: int, folder: str) -> dict[str, Any]:
        """Build the model from the peer's start."""
        start = Path(folder) / "frozen.st"
        self.model = same_model("frozen", backbone, size, start)
        return {}

    def scene(
        self, source: str, target: str, window: int, step: int, batch: int, setting: str
    ) -> dict[str, Any]:
        """Predict a scene; CPU seconds and MiB of memory on top."""
        memory = PeakMemory(torch.device("cpu"))
        memory.start()
        began = time.process_time()
        overlap = 1 - (step + 0.5) / window  # half a pixel against rounding
        gk.predict_scene(
            self.model, source, target, window, overlap, batch, progress=False,
            precision=setting,
        )  # fmt: skip
        seconds = time.process_time() - began
        return {"seconds": seconds, "mib": (memory.peak() - memory.floor) / MIB}


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenes = Scenes()
    serve({"build": scenes.build, "scene": scenes.scene})
