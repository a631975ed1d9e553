"""A LoRA or DoRA adapter as Hugging Face `peft` files, for the plain timm model.

Two LoRAs on the q and the v rows of a fused qkv are one LoRA of twice the rank on the
whole matrix: A stacks both As, B is block-diagonal with zero rows for k. That is exact,
and `rank_pattern` tells peft which layers have the other rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.files import save_tensors, whole_file
from geopeft_kit.methods.peft.layers import ADAPTER, FusedProjection, PeftLayer

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
        whole_file(folder / "adapter_config.json") as settings,
        whole_file(folder / "adapter_model.safetensors") as tensors,
    ):
        save_tensors(
            {key: value.detach().cpu().contiguous() for key, value in state.items()},
            tensors,
            metadata={"format": "pt"},
        )
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
