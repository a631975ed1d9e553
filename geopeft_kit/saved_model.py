"""A trained model on disk, whole: everything but the frozen backbone.

A folder holds `model.json`, `model.safetensors` (the decoder with its head and its
standardisation), the adapter as `Adapter.save` writes it, and `backbone.safetensors`
only where the backbone's own weights are no longer those that `load_backbone` gives.
Taught in notebooks 00 and 14.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.backbones import find_card, load_backbone
from geopeft_kit.backbones.base import SAMPLE, Backbone, Origin
from geopeft_kit.backbones.weights import is_tag, read_checkpoint, save_weights
from geopeft_kit.devices import device_of
from geopeft_kit.files import hash_of, save_tensors, whole_file, whole_folder
from geopeft_kit.methods import load_adapter
from geopeft_kit.methods.adapter import original_backbone, original_hash
from geopeft_kit.model import Model, build_model

FORMAT = 1
DESCRIPTION = "model.json"
TENSORS = "model.safetensors"
BACKBONE = "backbone.safetensors"
ADAPTER = ("adapter.json", "adapter.safetensors")  # written by Adapter.save
_GENERATOR = "backbone.generator"


def save_model(model: Model, folder: str | Path) -> Path:
    """Write a model to a folder, whole or not at all; `load_model` reads it.

    It holds the active adapter, the decoder with the standardisation of its features,
    the names and colours of the classes, the bands, and how the backbone was loaded.
    The backbone's weights are in it only where they were trained or merged into.

    Args:
        model: From `build_model`, trained or not, on any device.
        folder: Made if needed; a saved model that is there is replaced.

    Returns:
        The folder.

    Raises:
        TypeError: It is no model of `build_model`.
        ValueError: The adapter that it was trained with is not active, or parts of the
            model differ in their number type.
        FileExistsError: The folder holds something else.
        OSError: The disk is full, or the place cannot be written.
    """
    if not isinstance(model, Model):
        raise TypeError(f"no model of gk.build_model, but a {type(model).__name__}.")
    folder = Path(folder).expanduser().absolute()
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if strange := sorted(held - {DESCRIPTION, TENSORS, BACKBONE, *ADAPTER}):
        raise FileExistsError(
            f"{folder} holds {strange[0]!r}, which would be lost. Choose another."
        )
    with whole_folder(folder) as part:
        _write(model, part)
    return folder


def load_model(folder: str | Path, backbone: Backbone | None = None) -> Model:
    """Bring back a model that `save_model` wrote, ready to predict.

    Args:
        folder: Written by `save_model`.
        backbone: One that is in memory already, with the weights of then; large frozen
            weights are not loaded a second time. None loads it as it was loaded then.

    Returns:
        The model on the CPU (or where `backbone` is), in eval mode, its adapter active.
        `classes`, `colours` and `bands` are its attributes.

    Raises:
        FileNotFoundError: A file of the folder is missing, or the file that the
            backbone's weights came from.
        ValueError: A file is damaged or of a newer format, or the backbone is another.
    """
    folder = Path(folder).expanduser()
    saved = _read(folder)
    tensors = read_checkpoint(folder / TENSORS)
    generator = tensors.pop(_GENERATOR, None)
    if backbone is None:
        backbone = _loaded(saved, generator, folder)
    else:
        _check_backbone(backbone, saved, folder)
    active: Any = backbone.adapter
    if saved["adapter"]:
        load_adapter(backbone, folder)
    elif original_hash(backbone) != saved["backbone"]["weights_hash"]:
        raise ValueError(
            f"{folder} was saved with other weights of {backbone.card.name!r}. Leave "
            "backbone out, or load it with the same weights, bands and image_size."
        )
    elif active is not None:
        active.deactivate()
    with torch.random.fork_rng(devices=[]):  # a file needs no random numbers
        model = build_model(backbone, **saved["model"])
    model.to(device_of(backbone), getattr(torch, saved["dtype"]))
    model.decoder.load_state_dict(tensors)
    model.classes, model.colours = saved["classes"], saved["colours"]
    model.adapter = backbone.adapter
    return model.eval()


def _write(model: Model, folder: Path) -> None:
    """Fill an empty folder."""
    from geopeft_kit import __version__

    backbone, origin = model.backbone, model.backbone.origin
    adapter: Any = backbone.adapter
    state = model.decoder.state_dict()
    tensors = {name: value.cpu().contiguous() for name, value in state.items()}
    if origin is not None and origin.generator is not None:
        tensors[_GENERATOR] = origin.generator
    with whole_file(folder / TENSORS) as path:  # with the rights of ordinary files
        save_tensors(tensors, path)
    if adapter is not None:
        adapter.save(folder)
    with original_backbone(backbone):
        weights_hash = backbone.weights_hash()
        changed = origin is None or origin.sample != backbone.weights_hash(SAMPLE)
        _check_adapter(model, adapter, changed)
        if origin is not None and changed:
            save_weights(backbone, folder / BACKBONE, half=False)
    if adapter is not None:
        adapter.activate()
    content = {
        "format": FORMAT,
        "geopeft_kit": __version__,
        "model": model.config,
        "classes": model.classes,
        "colours": model.colours,
        "bands": model.bands,
        "adapter": None if adapter is None else adapter.name,
        "dtype": _dtype(model),
        "backbone": {
            "name": backbone.card.name,
            "weights_hash": weights_hash,
            "arguments": None if origin is None else origin.arguments,
        },
        "sha256": {path.name: hash_of(path) for path in sorted(folder.iterdir())},
    }
    text = json.dumps(content, indent=1)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _dtype(model: Model) -> str:
    """The one floating point type of a model, as "float32"."""
    names = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    if len(names) > 1:
        raise ValueError(f"the model holds {names}; call model.float() and save again.")
    return names[0]


def _check_adapter(model: Model, active: Any, changed: bool) -> None:
    """An error where what `fit` trained is no longer in the backbone."""
    trained = model.adapter
    merged = trained is not None and not trained.attached and changed
    if trained not in (None, active) and not merged:
        raise ValueError(
            f"this model was trained with a {trained.name!r} adapter, which is not "
            "active now, so a part of it would be lost. Call adapter.activate() first, "
            "or save before adapter.detach()."
        )


def _read(folder: Path) -> dict[str, Any]:
    """The content of model.json, once all files are there and unchanged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. gk.save_model(model, folder) writes one."
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        version, maker, files = saved["format"], saved["geopeft_kit"], saved["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is truncated or no saved model: {error!r}. Copy the folder again."
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, of geopeft_kit {maker}; this version "
            f"reads format {FORMAT}. Update geopeft_kit, or save the model again."
        )
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing. Copy the folder again."
            )
        if hash_of(folder / name) != digest:
            raise ValueError(
                f"{folder / name} is damaged: its checksum is another than in "
                f"{DESCRIPTION}. Copy the folder again."
            )
    return saved


def _loaded(
    saved: Mapping[str, Any], generator: Tensor | None, folder: Path
) -> Backbone:
    """The backbone, loaded as it was loaded then."""
    facts = saved["backbone"]
    if facts["arguments"] is None:
        raise ValueError(
            f"the backbone of {folder} was not made by load_backbone. Make it again "
            "and pass it: gk.load_model(folder, backbone=backbone)."
        )
    arguments = dict(facts["arguments"])
    weights = arguments["weights"]
    if BACKBONE in saved["sha256"]:
        arguments["weights"] = folder / BACKBONE
    elif not is_tag(find_card(facts["name"]), weights) and not Path(weights).exists():
        raise FileNotFoundError(
            f"the backbone's weights were loaded from {weights}, which is gone. Load "
            f"{facts['name']!r} from where they are now, with bands={saved['bands']}, "
            "and pass it: gk.load_model(folder, backbone=backbone)."
        )
    with torch.random.fork_rng(devices=[]):
        if generator is not None:
            torch.set_rng_state(generator)
        backbone = load_backbone(**arguments)
    if BACKBONE in saved["sha256"]:  # and nowhere else: saving again writes them again
        backbone.origin = Origin(facts["arguments"], None, sample="")
    return backbone.to(getattr(torch, saved["dtype"]))


def _check_backbone(backbone: Backbone, saved: Mapping[str, Any], folder: Path) -> None:
    """An error for a backbone of another kind; its weights are compared by hash."""
    made = {} if backbone.origin is None else backbone.origin.arguments
    now = {**made, "name": backbone.card.name, "bands": list(backbone.bands)}
    facts = saved["backbone"]
    then = {
        **(facts["arguments"] or {}),
        "name": facts["name"],
        "bands": saved["bands"],
    }
    for name in ("name", "bands", *sorted(then.keys() | now.keys())):
        wanted, found = then.get(name), now.get(name)
        if wanted != found and name not in ("weights", "image_size", "new_bands"):
            raise ValueError(
                f"{folder} was saved with a backbone of {name}={wanted!r}; this has "
                f"{name}={found!r}. Load it with {name}={wanted!r}, or leave it out."
            )
