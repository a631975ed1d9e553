"""The comparison of the quickstart, on real pixels and real weights.

    python benchmarks/real.py --data DIR --out build/real

DIR holds `eurosat_rgb`, `amazon_forest`, `terramesh` and `galileo_nano`. Three parts:

- EuroSAT: Galileo nano, classification, the longitude split; 5 seeds, 3 learning
  rates for each method, chosen on the validation block.
- Amazon forest: segmentation, trained in the west, scored in the east, and drawn on a
  map at its true place.
- TerraMesh: twelve bands and land cover on a map. Windows inside each chip are split
  with a buffer; five chips cannot support a claim about regions, and none is made.

Writes the raw rows as CSV, the tables as Markdown, and the maps as HTML.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from shared import convert, pixel_rows, search_table, table, write_page

import geopeft_kit as gk
from geopeft_kit.comparison import Comparison

RATES = {
    "frozen": (5e-4, 1e-3, 3e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "bias": (1e-3, 3e-3, 1e-2),
    "full": (1e-4, 3e-4, 1e-3),
}


def main() -> None:
    """Run the parts that were asked for and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/real"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--chips", type=int, default=1000, help="EuroSAT training images"
    )
    parser.add_argument("--tested", type=int, help="chips of other splits; else all")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--trials", type=int, default=3, help="learning rates tried")
    parser.add_argument(
        "--parts", nargs="+", default=["eurosat", "amazon", "terramesh"]
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = {"eurosat": eurosat, "amazon": amazon, "terramesh": terramesh}
    for name in arguments.parts:
        began = time.monotonic()
        text = parts[name](arguments, range(arguments.seeds))
        write_page(arguments.out / f"{name}.md", began, text)
    print(f"wrote {', '.join(arguments.parts)} to {arguments.out}")


def eurosat(arguments: argparse.Namespace, seeds: Sequence[int]) -> str:
    """Classification across longitudes with Galileo nano."""
    folder = convert("eurosat_rgb", arguments, "--in-region", "0.2")
    data = fewer(gk.ChipData(folder, split="index", batch_size=32), arguments.tested)
    random = {"weights": None}
    rates = {method: all_[: arguments.trials] for method, all_ in RATES.items()}
    candidates = [
        gk.Candidate("probe", "frozen", learning_rates=rates["frozen"]),
        gk.Candidate(
            "LoRA q, v", "lora", {"rank": 8, "targets": ("q", "v")},
            learning_rates=rates["lora"],
        ),
        gk.Candidate("bias", "bias", learning_rates=rates["bias"]),
        gk.Candidate("full", "full", learning_rates=rates["full"]),
        gk.Candidate(
            "random, probe", "frozen", backbone=random, learning_rates=rates["frozen"]
        ),
        gk.Candidate(
            "random, full",
            "full",
            backbone=random,
            fresh_decoder=True,
            learning_rates=rates["full"],
        ),
    ]  # fmt: skip
    result = compare_on_galileo(candidates, data, arguments, seeds)
    statistics = pixel_rows(data, seeds, arguments.chips)
    result.rows = pd.concat([result.rows, statistics], ignore_index=True)
    result.rows.to_csv(arguments.out / "eurosat.csv", index=False)
    result.searches.to_csv(arguments.out / "eurosat_search.csv", index=False)
    parts = [
        "### EuroSAT RGB, Galileo nano",
        table(result.table()),
        "Learning rates tried (validation accuracy, first seed):",
        table(search_table(result.searches)),
    ]
    if len(seeds) > 1:
        for split in ("in_region", "test"):
            parts += [
                f"Paired difference to full, {split}, 95 % interval over seeds:",
                table(result.differences("full", split)),
            ]
    return "\n\n".join(parts)


def amazon(arguments: argparse.Namespace, seeds: Sequence[int]) -> str:
    """Forest segmentation: west for training, east unseen."""
    folder = convert("amazon_forest", arguments)
    data = gk.ChipData(folder, test_regions=["east"], batch_size=16)
    data = fewer(data, arguments.tested)
    scratch = {"name": "timm:resnet18", "weights": None}
    candidates = [
        gk.Candidate("probe", "frozen"),
        gk.Candidate("LoRA", "lora", {"rank": 8, "targets": ("q", "v")}),
        gk.Candidate("full", "full"),
        gk.Candidate("UNet from scratch", "full", {}, scratch, "unet", {"width": 64}),
    ]
    result = compare_on_galileo(candidates, data, arguments, seeds[:3])
    pixels = gk.baselines.PixelStatistics(data)
    scores = {
        split: gk.evaluate(pixels, data, split)["overall"]["miou"]
        for split in ("val", "test")
    }
    result.rows.to_csv(arguments.out / "amazon.csv", index=False)
    draw_map(data, result.trained, arguments.out / "amazon.html")
    parts = [
        "### Amazon forest, west to east",
        table(result.table()),
        f"Pixel statistics (no network): val miou {scores['val']:.3f}, test miou "
        f"{scores['test']:.3f}.",
    ]
    if len(seeds) > 1:
        difference = result.differences("full", "test")
        parts += ["Paired difference to full, unseen east:", table(difference)]
    return "\n\n".join(parts)


def terramesh(arguments: argparse.Namespace, seeds: Sequence[int]) -> str:
    """Twelve bands and land cover, read by the same reader and drawn on a map."""
    folder = convert("terramesh", arguments, "--chip", "32")
    data = gk.ChipData(folder, split="index", batch_size=8)
    torch.manual_seed(0)
    bands = [band for band in data.bands if band in GALILEO_BANDS]
    weights = arguments.data / "galileo_nano" / "encoder.pt"
    backbone = gk.load_backbone("galileo_nano", data.bands, weights, new_bands="ignore")
    gk.attach(backbone, "lora", rank=8)
    model = gk.build_model(backbone, "linear", data.task, data.num_classes)
    gk.fit(model, data, epochs=arguments.epochs * 2, progress=False)
    scores = gk.evaluate(model, data, "test")["overall"]
    samples = [data.dataset("test")[i] for i in range(len(data.dataset("test")))]
    guesses = {"LoRA": predict(model, samples)}
    layers = gk.chip_layers(samples, data.bands, data.classes, data.colours, guesses)
    gk.save_map(layers, arguments.out / "terramesh.html")
    return (
        "### TerraMesh, twelve bands\n\n"
        f"{data!r}. Galileo nano reads {len(bands)} of the {len(data.bands)} bands; "
        "LoRA, linear decoder. Windows of the same five chips, held out with a buffer: "
        f"mIoU {scores['miou']:.3f}, accuracy {scores['accuracy']:.3f}. This says "
        "nothing about other places."
    )


GALILEO_BANDS = (
    "BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3", "NIR_BROAD",
    "NIR_NARROW", "SWIR_1", "SWIR_2",
)  # fmt: skip


def fewer(data: gk.ChipData, tested: int | None) -> gk.ChipData:
    """At most so many chips of each split that is not trained on; None takes all."""
    for split in data.splits:
        if tested is not None and split != "train":
            data = data.subset(min(tested, len(data.dataset(split))), split=split)
    return data


def compare_on_galileo(
    candidates: Sequence[gk.Candidate],
    data: gk.ChipData,
    arguments: argparse.Namespace,
    seeds: Sequence[int],
) -> Comparison:
    """The candidates on Galileo nano's real weights."""
    weights = arguments.data / "galileo_nano" / "encoder.pt"
    return gk.compare(
        candidates,
        data,
        backbone="galileo_nano",
        backbone_options={"bands": data.bands, "weights": weights},
        epochs=arguments.epochs,
        seeds=seeds,
        train_chips=min(arguments.chips, len(data.dataset("train"))),
    )


def predict(model: torch.nn.Module, samples: Sequence[dict]) -> list[torch.Tensor]:
    """Class maps (H, W) of samples, one by one."""
    model.eval()
    with torch.inference_mode():
        return [model(sample["image"][None]).argmax(1)[0] for sample in samples]


def draw_map(data: gk.ChipData, trained: dict, path: Path, chips: int = 128) -> None:
    """The held-out chips with truth, predictions and errors, at their place."""
    unseen = data.dataset("test")
    samples = [unseen[i] for i in range(min(chips, len(unseen)))]
    guesses = {
        label: predict(candidate.activate(), samples)
        for label, candidate in trained.items()
    }
    layers = gk.chip_layers(samples, data.bands, data.classes, data.colours, guesses)
    gk.show_map(layers, swipe=("image", "LoRA"), title=data.name).save(path)


if __name__ == "__main__":
    main()
