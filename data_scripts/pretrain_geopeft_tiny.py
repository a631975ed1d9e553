"""Make the weights of `geopeft_tiny` or its RGB twin, pretrained on simulated scenes.

The corpus is five simulated regions without any event (no flood, no burn scar, no
building site) plus, where a folder of them is given, unlabelled real Sentinel-2 chips.
The region `savanna` is in no part of it. Targets: masked patches, physical maps (cover
fractions, height above the river, slope), facts about the scene. No target is one of
the lessons'.

    python data_scripts/pretrain_geopeft_tiny.py --real-chips DIR

Writes geopeft_kit/weights/geopeft_tiny.safetensors and its log beside it;
`--backbone geopeft_tiny_rgb` makes the twin that sees blue, green and red alone, of the
same crops with the same targets. A run that was cut, or that --minutes ended, goes on
with --resume; a new run from weights that are there already begins with --start FILE.
The corpus takes about 1 GiB of memory and is made anew from its seeds each time.
Lessons draw other places, so no scene is in both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch import Tensor
from torch.utils.data import Dataset

import geopeft_kit as gk
from geopeft_kit.data.simulated import LESSON_PLACES
from geopeft_kit.pretraining import save_weights
from geopeft_kit.world import REGIONS, Scene, simulate_scene

HELD_OUT = "savanna"
CROP = 64
CELL = 4  # physical maps are kept at a quarter of the image's resolution
PHYSICAL = ("green", "dry", "canopy", "soil", "impervious", "shade", "hand", "slope")
# "water" is left out: it is what the flood lesson asks for
WEIGHTS = Path(__file__).parents[1] / "geopeft_kit" / "weights"


def physical_maps(scene: Scene) -> np.ndarray:
    """(P, size/4, size/4) float16, scaled to about unit range."""
    scaled = []
    for name in PHYSICAL:
        field = scene.physical[name]
        if name == "hand":
            field = np.log1p(np.clip(field, 0, None)) / 4  # 0-50 m -> 0-1
        if name == "slope":
            field = np.clip(field * 3, 0, 2)
        size = field.shape[0] // CELL
        cells = field.reshape(size, CELL, size, CELL).mean((1, 3))
        scaled.append(cells)
    return np.stack(scaled).astype(np.float16)


def scene_facts(scene: Scene, regions: Sequence[str]) -> np.ndarray:
    """Climate as one-hot, then season, haze, dryness, sun, place as sin and cos."""
    facts = scene.scalars
    place = np.radians([facts["lon"], facts["lat"]])
    numbers = [
        facts["season"],
        facts["haze"],
        facts["dryness"],
        facts["sun_elevation"] / 45 - 1,
        *np.sin(place),
        *np.cos(place),
    ]
    one_hot = [float(scene.region == region) for region in regions]
    return np.array([*one_hot, *numbers], dtype=np.float32)


def make_sample(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene of the corpus: image, physical maps, facts."""
    region, seed = job
    scene = simulate_scene(region, seed, size=256, bands="hls", pair=False)
    regions = [name for name in REGIONS if name != HELD_OUT]
    image = scene.image.astype(np.float16)
    return image, physical_maps(scene), scene_facts(scene, regions)


def real_chip(path: Path) -> np.ndarray:
    """The six HLS bands of a twelve-band Sentinel-2 L2A chip, (6,H,W) reflectance."""
    with rasterio.open(path) as file:
        # B2, B3, B4, B8A, B11, B12 of B1, B2, ..., B8, B8A, B9, B11, B12
        digital = file.read([2, 3, 4, 9, 11, 12])
    return (digital / 10_000).astype(np.float16)


class Corpus(Dataset):
    """Random crops of scenes, flipped and turned.

    Args:
        scenes: Simulated scenes per region.
        real: Paths of real chips; `real_share` of the samples come from them.
        workers: Processes that generate.
        channels: How many of the six bands a sample keeps, from blue on.
    """

    def __init__(
        self,
        scenes: int,
        real: Sequence[Path],
        real_share: float = 0.1,
        workers: int = 2,
        channels: int = 6,
    ) -> None:
        names = [name for name in REGIONS if name != HELD_OUT]
        if scenes > LESSON_PLACES:
            raise ValueError(f"places from {LESSON_PLACES} on belong to the lessons.")
        jobs = [(name, place) for place in range(scenes) for name in names]
        with ProcessPoolExecutor(workers) as pool:
            samples = list(pool.map(make_sample, jobs, chunksize=16))
        images, self.physical, self.facts = map(list, zip(*samples, strict=True))
        self.images = [image[:channels] for image in images]
        self.real = [real_chip(path)[:channels] for path in real]
        self.real_share = real_share if self.real else 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if torch.rand(()) < self.real_share:
            image = self.real[int(torch.randint(len(self.real), ()))]
            shape = (len(PHYSICAL), image.shape[1] // CELL, image.shape[2] // CELL)
            physical = np.full(shape, np.nan, dtype=np.float16)
            facts = np.full_like(self.facts[0], np.nan)
        else:
            image, physical = self.images[index], self.physical[index]
            facts = self.facts[index]
        cells = CROP // CELL
        limit = physical.shape[-1] - cells + 1
        row, column = (int(torch.randint(limit, ())) for _ in range(2))
        physical = physical[:, row : row + cells, column : column + cells]
        row, column = row * CELL, column * CELL
        image = image[:, row : row + CROP, column : column + CROP]
        turn, flip = int(torch.randint(4, ())), bool(torch.rand(()) < 0.5)
        maps = [torch.from_numpy(m.astype(np.float32)) for m in (image, physical)]
        maps = [torch.rot90(m, turn, (1, 2)) for m in maps]
        maps = [m.flip(2) if flip else m for m in maps]
        return {
            "image": maps[0].contiguous(),
            "physical": maps[1].contiguous(),
            "scene": torch.from_numpy(facts),
        }


def main() -> None:
    """Make the corpus, pretrain, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--backbone",
        choices=("geopeft_tiny", "geopeft_tiny_rgb"),
        default="geopeft_tiny",
    )
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--steps", type=int, default=60, help="steps an epoch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=240, help="scenes per region")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--mask", type=float, default=0.4)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real-chips", type=Path, default=None)
    parser.add_argument("--start", default=None, help="weights to begin with, a file")
    parser.add_argument("--out", type=Path, default=None, help="a .safetensors file")
    parser.add_argument("--folder", type=Path, default=Path("build/pretrain"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--minutes", type=float, default=None, help="of a stretch")
    arguments = parser.parse_args()

    began = time.perf_counter()
    real = sorted(arguments.real_chips.glob("*.tif")) if arguments.real_chips else []
    torch.manual_seed(arguments.seed)
    backbone = gk.load_backbone(arguments.backbone, weights=arguments.start)
    corpus = Corpus(arguments.scenes, real, channels=len(backbone.bands))
    print(
        f"{len(corpus)} scenes, {len(real)} real chips, "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    run = gk.pretrain(
        backbone,
        corpus,
        mask_ratio=arguments.mask,
        steps_per_epoch=arguments.steps,
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        learning_rate=arguments.rate,
        precision=arguments.precision,
        seed=arguments.seed,
        folder=arguments.folder / arguments.backbone,
        resume=arguments.resume,
        minutes=arguments.minutes,
    )
    if len(run.history) < arguments.epochs:
        raise SystemExit("the stretch is over; go on with --resume")
    out = arguments.out or WEIGHTS / f"{arguments.backbone}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(backbone, out)
    run.history.to_csv(out.with_suffix(".log.csv"), index=False, float_format="%.6g")
    print(f"wrote {out} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
