"""TerraTorch's side of `scene.py`: a raster, its tiled inference, a raster."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import rasterio
import torch
from step_terratorch import Peer
from terratorch.tasks.tiled_inference import tiled_inference
from workers import serve

from geopeft_kit.training.hardware import PeakMemory
from geopeft_kit.training.tracker import MIB


class Scenes(Peer):
    """TerraTorch's model, and whole scenes through it."""

    def scene(
        self, source: str, target: str, window: int, step: int, batch: int, setting: str
    ) -> dict[str, Any]:
        """Predict a scene; CPU seconds and MiB of memory on top.

        Reading and writing are the least that has to be done: the whole raster as one
        array, as TerraTorch's data modules read it, and class numbers in one band.
        """
        self.model.eval()
        memory = PeakMemory(torch.device("cpu"))
        memory.start()
        began = time.process_time()
        with rasterio.open(source) as raster:
            image = torch.from_numpy(raster.read().astype(np.float32) * 1e-4)[None]
            profile = raster.profile | {"count": 1, "dtype": "uint8", "nodata": 255}
        output = tiled_inference(
            lambda x: self.model(x).output, image, crop=window, stride=step,
            batch_size=batch,
        )  # fmt: skip
        with rasterio.open(target, "w", **profile) as raster:
            raster.write(output.argmax(1).to(torch.uint8).numpy())
        seconds = time.process_time() - began
        return {"seconds": seconds, "mib": (memory.peak() - memory.floor) / MIB}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    scenes = Scenes()
    serve({"build": scenes.build, "scene": scenes.scene})
