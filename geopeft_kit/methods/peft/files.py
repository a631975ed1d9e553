"""LoRA and DoRA adapters as Hugging Face `peft` files: written, and read.

Two LoRAs on the q and the v rows of a fused qkv are one LoRA of twice the rank on the
whole matrix: A stacks both As, B is block-diagonal with zero rows for k. That is exact,
and `rank_pattern` tells peft which layers have the other rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.files import save_tensors, whole_file
from geopeft_kit.methods.peft.layers import ADAPTER, FusedProjection, PeftLayer
from geopeft_kit.methods.storage import DESCRIPTION, read_tensors
from geopeft_kit.methods.targets import available_targets

CONFIG, STATE = "adapter_config.json", "adapter_model.safetensors"
UNCHANGED = ("gaussian", "orthogonal", "eva")  # starts that leave W as it is
PREFIX = "base_model.model."  # of every key in a peft file


def write_peft_files(layers: Mapping[str, PeftLayer], folder: Path) -> None:
    """Write the files that `peft.PeftModel.from_pretrained(timm_model, folder)` reads.

    `layers` maps paths inside the timm model to the wrapped layers.
    """
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in layers.items():
        fused = isinstance(layer, FusedProjection)
        parts = list(layer.parts.values()) if fused else [layer]
        tensors = _fused_tensors(layer) if fused else _plain_tensors(layer)
        state |= {f"{PREFIX}{path}.{kind}": value for kind, value in tensors.items()}
        ranks[path] = tensors["lora_A.weight"].shape[0]
        # peft scales by alpha / rank, with the rank that the file gives the layer
        alphas[path] = parts[0].scaling[ADAPTER] * ranks[path]
    config = _config(ranks, alphas, any("magnitude" in key for key in state))
    _write(folder, state, config)


def is_peft_folder(folder: str | Path) -> bool:
    """True for a folder that `peft` wrote, and not the kit as well."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / DESCRIPTION).exists()


def read_peft_files(
    folder: Path, backbone: Backbone
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read a folder of `peft` as method, config for `attach`, and tensors.

    Ranks and scales may differ: the largest rank counts, and B takes up the scales.
    """
    config = _read_config(folder)
    layers = _by_layer(_read_tensors(folder))
    paths = _in_backbone(list(layers), backbone, folder)
    ranks = {path: state["lora_A"].shape[0] for path, state in layers.items()}
    scales = {path: _scale(config, path, ranks[path]) for path in layers}
    scale, rank = next(iter(scales.values())), max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for path, state in layers.items():
        state["lora_B"] = state["lora_B"] * (scales[path] / scale)
        tensors |= {f"{paths[path]}.{kind}": value for kind, value in state.items()}
    method = "dora" if config.use_dora else "lora"
    placed = [_block_and_name(path, backbone, folder) for path in paths.values()]
    options = {
        "layers": sorted({block for block, _ in placed}),
        "targets": list(dict.fromkeys(name for _, name in placed)),
        "rank": rank,
        "alpha": scale * rank,
        "dropout": config.lora_dropout,
    }
    return method, options, tensors


def padded(
    given: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put tensors of smaller rank into those of an untrained adapter, whose B is 0."""
    tensors = {name: tensor.detach().clone() for name, tensor in start.items()}
    for name, value in given.items():
        if name in tensors and value.ndim == tensors[name].ndim:
            corner = tensors[name][tuple(slice(n) for n in value.shape)]
            if corner.shape == value.shape:
                corner.copy_(value)
                continue
        tensors[name] = value  # refused later, with its name
    return tensors


def _read_config(folder: Path) -> Any:
    """Read peft's configuration, if it is LoRA as the kit can compute it."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(folder))
    kind = getattr(config.peft_type, "value", None)
    if kind != "LORA":
        raise ValueError(
            f"{folder} holds an adapter of peft_type={kind}; of peft's folders only "
            "those of LoRA and DoRA can be read."
        )
    start = config.init_lora_weights
    changes_base = isinstance(start, str) and start.split("_")[0] not in UNCHANGED
    if changes_base or config.bias != "none":
        raise ValueError(
            f"{folder} was trained with init_lora_weights={start!r} and "
            f"bias={config.bias!r}, which changes the frozen weights too. Convert it "
            "to a plain LoRA with peft, and load that."
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / STATE
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())
        raise FileNotFoundError(
            f"{path} does not exist (the folder holds {found}). Pickled files (.bin) "
            "are not read; save the adapter again with safe_serialization=True."
        )
    return read_tensors(path)


def _by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Path in their model -> lora_A, lora_B, lora_magnitude_vector of that layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for key, value in state.items():
        path, _, kind = key.removesuffix(".weight").rpartition(".")
        if "lora_" in key:
            layers.setdefault(path.removeprefix(PREFIX), {})[kind] = value
        else:
            left_out.append(key)
    for path, found in layers.items():
        if set(found) - {"lora_magnitude_vector"} != {"lora_A", "lora_B"}:
            raise ValueError(
                f"{path} has the tensors {sorted(found)}; plain LoRA has lora_A and "
                "lora_B. Variants with others cannot be read."
            )
    if not layers:
        raise ValueError(f"The file holds no LoRA tensors; it has {list(state)}.")
    if left_out:
        warnings.warn(f"Left out, as no part of a LoRA: {left_out}.", stacklevel=4)
    return layers


def _in_backbone(paths: list[str], backbone: Backbone, folder: Path) -> dict[str, str]:
    """Path in their model -> path in `backbone.model`: the same, or the end of it."""
    known = {name for name, _ in backbone.model.named_modules()}
    for cut in range(max(path.count(".") for path in paths) + 1):
        shorter = {path: ".".join(path.split(".")[cut:]) for path in paths}
        if set(shorter.values()) <= known:
            return shorter
    missing = [path for path in paths if path not in known]
    raise ValueError(
        f"{folder} is for another network: {backbone.card.name!r} has no layer "
        f"{missing[0]!r}. Its blocks are called {backbone.block_paths[0]!r} and so on, "
        f"with {', '.join(available_targets(backbone.blocks))}."
    )


def _block_and_name(path: str, backbone: Backbone, folder: Path) -> tuple[int, str]:
    """Number of the block that holds a layer, and the layer's path in it."""
    for number, block in enumerate(backbone.block_paths):
        if path.startswith(f"{block}."):
            return number, path.removeprefix(f"{block}.")
    raise ValueError(
        f"{folder} adapts {path!r}, which is outside the blocks of "
        f"{backbone.card.name!r}. Only adapters of its blocks can be read."
    )


def _scale(config: Any, path: str, rank: int) -> float:
    """The factor on B A of one layer, as peft computes it."""
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(config.alpha_pattern.keys(), path)
    alpha: float = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha / rank ** (0.5 if config.use_rslora else 1)


def _plain_tensors(layer: PeftLayer) -> dict[str, Tensor]:
    tensors = {
        "lora_A.weight": layer.lora_A[ADAPTER].weight,
        "lora_B.weight": layer.lora_B[ADAPTER].weight,
    }
    if ADAPTER in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        tensors["lora_magnitude_vector"] = magnitude
    return tensors


def _fused_tensors(layer: FusedProjection) -> dict[str, Tensor]:
    """Join the LoRAs of q, k, v rows into one of the fused matrix."""
    base = layer.base_layer
    parts: list[PeftLayer] = list(layer.parts.values())
    downs = [part.lora_A[ADAPTER].weight for part in parts]
    rank = downs[0].shape[0]
    up = downs[0].new_zeros(base.out_features, rank * len(downs))
    magnitude = torch.linalg.norm(base.weight.detach(), dim=1)  # (out,), a row's length
    with_magnitude = False
    for number, part in enumerate(parts):
        rows = slice(part.get_base_layer().first, part.get_base_layer().last)
        columns = slice(number * rank, (number + 1) * rank)
        up[rows, columns] = part.lora_B[ADAPTER].weight.detach()
        if ADAPTER in part.lora_magnitude_vector:
            magnitude[rows] = part.lora_magnitude_vector[ADAPTER].weight.detach()
            with_magnitude = True
    tensors = {"lora_A.weight": torch.cat(downs), "lora_B.weight": up}
    if with_magnitude:
        tensors["lora_magnitude_vector"] = magnitude
    return tensors


def _config(
    ranks: dict[str, int], alphas: dict[str, float], dora: bool
) -> dict[str, Any]:
    """The part of peft's LoraConfig that differs from its defaults."""
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": dora,
    }


def _write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(folder / CONFIG) as settings,
        whole_file(folder / STATE) as tensors,
    ):
        save_tensors(
            {key: value.detach().cpu().contiguous() for key, value in state.items()},
            tensors,
            metadata={"format": "pt"},
        )
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
