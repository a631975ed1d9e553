"""Outputs of TerraTorch's networks, kept as fixtures for the kit's tests.

Run by the interpreter that `terratorch_environment.py` prints:

    build/terratorch/bin/python benchmarks/make_parity_fixtures.py

TerraTorch's own classes with its own settings, but thin and with two blocks, and with
all weights filled by a formula (`tests/formula_weights.py`). For each network one
safetensors file goes to `tests/fixtures/`: the tokens after each block in a few cases,
the buffers of the checkpoint, and as text the keys and shapes of its weights in the
upstream's layout. The tests write that checkpoint anew, load it, and compare.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from formula_weights import draw, weight  # noqa: E402

PATCHES = 4  # along each side of the images that the networks are built for
DATES = torch.tensor(  # year, and day of the year counted from 0
    [[[2020.0, 0.0], [2021.0, 150.0], [2024.0, 365.0]],
     [[2018.0, 33.0], [2019.0, 200.0], [2019.0, 364.0]]]
)  # fmt: skip
LONLAT = torch.tensor([[151.2, -33.9], [-21.9, 64.1]])  # Sydney, Reykjavik


@dataclass
class Filled:
    """A network with weights by formula.

    Attributes:
        network: In evaluation mode.
        shapes: Shapes of its parameters, by key of the checkpoint.
        buffers: The rest of its state, likewise.
    """

    network: Any
    shapes: dict[str, list[int]]
    buffers: dict[str, Tensor]


def fill(network: nn.Module, rename: Callable[[str], str] = str) -> Filled:
    """Fill the parameters by their keys in the checkpoint."""
    parameters = dict(network.eval().named_parameters())
    for key, parameter in parameters.items():
        parameter.data.copy_(weight(rename(key), parameter.shape))
    shapes = {rename(key): list(p.shape) for key, p in parameters.items()}
    state = network.state_dict()
    buffers = {rename(key): state[key] for key in state if key not in parameters}
    return Filled(network, shapes, buffers)


def keep(name: str, filled: Filled, outputs: dict[str, list[Tensor]]) -> None:
    """Write one fixture."""
    tensors = {f"buffer|{key}": tensor for key, tensor in filled.buffers.items()}
    for case, levels in outputs.items():
        tensors |= {f"{case}|{level}": tokens for level, tokens in enumerate(levels)}
    text = {"shapes": json.dumps(filled.shapes), "terratorch": version("terratorch")}
    path = TESTS / "fixtures" / f"{name}.safetensors"
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, path, text)
    print(f"{path.name}: {path.stat().st_size:,} bytes, {', '.join(outputs)}")


def prithvi(variant: str, dates: int) -> None:
    """The checkpoint of the whole autoencoder, and the encoder's tokens."""
    from terratorch.models.backbones.prithvi_mae import PrithviMAE
    from terratorch.models.backbones.prithvi_vit import prithvi_cfgs

    settings = prithvi_cfgs[variant]
    patch = settings["patch_size"][1]
    size = PATCHES * patch
    thin = {"img_size": size, "num_frames": dates, "embed_dim": 48, "depth": 2,
            "num_heads": 3, "decoder_embed_dim": 32, "decoder_depth": 1,
            "decoder_num_heads": 2}  # fmt: skip
    first = variant.startswith("prithvi_eo_v1")

    def rename(key: str) -> str:  # the file of 1.0 is flat
        return key.partition(".")[2] if first else key

    filled = fill(PrithviMAE(**{**settings, **thin}), rename)
    tokens = filled.network.encoder.forward_features
    image = draw("image", (2, 6, dates, size, size))
    wide = draw("wide", (2, 6, dates, 3 * patch, 6 * patch))
    outputs = {"plain": tokens(image), "wide": tokens(wide)}
    if settings["coords_encoding"]:
        date, latlon = DATES[:, :dates], LONLAT.flip(1)
        outputs["metadata"] = tokens(image, date, latlon)
        outputs["date"] = tokens(image, date)
        outputs["place"] = tokens(image, None, latlon)
    keep(f"{variant}_{dates}", filled, outputs)


def terramind(size: str) -> None:
    """Three sensors in one checkpoint, the tokens of one at a time."""
    from terratorch.models.backbones.terramind.model import terramind_register

    whole = terramind_register.TerraMindViT

    def thin(**settings: Any) -> nn.Module:
        return whole(**{**settings, "dim": 48, "encoder_depth": 2, "num_heads": 3})

    with mock.patch.object(terramind_register, "TerraMindViT", thin):
        build = getattr(terramind_register, f"terramind_v1_{size}")
        network = build(modalities=["S2L2A", "S1GRD", "S1RTC"], img_size=16 * PATCHES)
    filled = fill(network)
    sides = (16 * PATCHES,) * 2
    outputs = {
        "plain": network({"S2L2A": draw("image", (2, 12, *sides))}),
        "wide": network({"S2L2A": draw("wide", (2, 12, 48, 96))}),
        "grd": network({"S1GRD": draw("radar", (2, 2, *sides))}),
        "rtc": network({"S1RTC": draw("radar", (2, 2, *sides))}),
    }
    keep(f"terramind_v1_{size}", filled, outputs)


def circle(share: float) -> list[float]:
    """Sine and cosine of a share of a full turn."""
    return [math.sin(2 * math.pi * share), math.cos(2 * math.pi * share)]


def clay_metadata() -> dict[str, Tensor]:
    """Week, hour and place of the first dates as Clay's own scripts code them."""
    times, places = [], []
    pairs = zip(DATES[:, 0].tolist(), LONLAT.tolist(), strict=True)
    for (year, day), (lon, lat) in pairs:
        date = datetime.date(int(year), 1, 1) + datetime.timedelta(int(day))
        times.append(circle(date.isocalendar().week / 52) + circle(10 / 24))
        places.append(circle(lat / 360) + circle(lon / 360))
    return {"time": torch.tensor(times), "latlon": torch.tensor(places)}


def clay(name: str) -> None:
    """The encoder under the keys of the training checkpoint."""
    thin = {"dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "mlp_ratio": 4.0,
            "patch_size": 8}  # fmt: skip
    if name == "clay_v1":
        from terratorch.models.backbones.clay_v1.modules import EmbeddingEncoder

        network: Any = EmbeddingEncoder(img_size=8 * PATCHES, **thin)
    else:
        from terratorch.models.backbones.clay_v15.model import Encoder

        network = Encoder(mask_ratio=0.0, shuffle=False, **thin)
    filled = fill(network, "model.encoder.{}".format)
    nowhere = {"time": torch.zeros(2, 4), "latlon": torch.zeros(2, 4)}

    def tokens(key: str, waves: list[float], gsd: float, **known: Tensor) -> list:
        pixels = draw(key, (2, len(waves), 8 * PATCHES, 8 * PATCHES))
        numbers = {"gsd": torch.tensor(gsd), "waves": torch.tensor(waves)}
        levels = network({"pixels": pixels, **numbers, **nowhere, **known})
        return levels if isinstance(levels, list) else [levels[0]]  # 1.5: last only

    hls = [0.493, 0.56, 0.665, 0.865, 1.61, 2.19]
    outputs = {
        "plain": tokens("image", hls, 10.0),
        "coarse": tokens("three", [0.665, 0.4427, 2.19], 30.0),
        "metadata": tokens("image", hls, 10.0, **clay_metadata()),
    }
    keep(name, filled, outputs)


def main() -> None:
    """Make all fixtures."""
    with torch.no_grad():
        prithvi("prithvi_eo_v1_100", 1)
        prithvi("prithvi_eo_v1_100", 3)
        prithvi("prithvi_eo_v2_300", 1)
        prithvi("prithvi_eo_v2_100_tl", 3)
        prithvi("prithvi_eo_v2_600_tl", 1)
        terramind("tiny")
        terramind("base")
        clay("clay_v1")
        clay("clay_v1_5")


if __name__ == "__main__":
    main()
