"""Weights: find the file, read it without trusting it, load it strictly.

A checkpoint from the internet is untrusted: nothing here runs code from a file.
Loading is strict, since a model with half of its weights still gives numbers.

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from geopeft_kit.backbones.card import BackboneCard, WeightFile
from geopeft_kit.download import cache_folder, fetch, hub_url
from geopeft_kit.files import save_tensors, whole_file

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone

State = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)
_SHOWN = 5
_PACKAGED = Path(__file__).resolve().parents[1] / "weights"
# Where training scripts put the network inside a checkpoint.
_NESTS = ("state_dict", "model", "model_state_dict", "teacher", "encoder")


class _Namespace:
    """Empty stand-in for `argparse.Namespace`."""


class _ConfigNode:
    """Stand-in for `yacs.config.CfgNode`: becomes a plain ordered dictionary."""

    def __new__(cls, *_: object) -> OrderedDict[str, Any]:  # type: ignore[misc]
        """PyTorch's reader fills no other mapping type."""
        return OrderedDict()


_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Namespace, "argparse.Namespace"),
    (_ConfigNode, "yacs.config.CfgNode"),
]


def find_weights(card: BackboneCard, weights: str | Path | None) -> Path | None:
    """The local file of a card's weights, downloaded if needed; None for random.

    `weights` is a tag of ``card.weights``, a checkpoint file, or a folder in the
    upstream's layout. Raises ValueError, FileNotFoundError (packaged weights missing)
    or RuntimeError (a download failed).
    """
    # A card from scratch has random weights by definition, and says so.
    from_scratch = weights == "default" and card.architecture.get("from_scratch")
    if weights is None or from_scratch:
        return None
    if isinstance(weights, str) and weights in card.weights:
        return _find_tagged(card, weights)
    path = Path(weights).expanduser().absolute()
    if card.obtain and weights == "default" and not path.exists():
        raise ValueError(
            f"the weights of {card.name} cannot be downloaded from here. {card.obtain}."
            f" Then load_backbone({card.name!r}, weights=<path of the file>); "
            "weights=None gives random ones"
        )
    if path.is_dir():
        names = [published(file).file for file in card.weights.values()]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(
                f"folder {path} holds none of the files of {card.name}: "
                f"{', '.join(names) or 'none is published'}. Give the checkpoint file"
            )
        return found[0]
    if not path.is_file():
        tags = ", ".join(repr(tag) for tag in card.weights) or "none"
        raise ValueError(
            f"weights={str(weights)!r} is neither an existing file or folder nor a tag "
            f"of {card.name} (tags: {tags}). Use a tag, a local path, or None for "
            "random weights"
        )
    return path


def is_tag(card: BackboneCard, weights: str | Path | None) -> bool:
    """Whether this is a tag (or None, random weights) and not a path."""
    return weights is None or weights in ("default", *card.weights)


def _find_tagged(card: BackboneCard, tag: str) -> Path:
    file = published(card.weights[tag])
    if file.repo is None and file.url is None:
        path = _PACKAGED / file.file
        if not path.is_file():
            raise FileNotFoundError(
                f"the weights of {card.name} are missing from this installation "
                f"({path}). Reinstall the kit, give weights=<local path>, or take "
                "weights=None for random weights"
            )
        return path
    folder = re.sub(r"[^\w.-]+", "_", card.name)
    path = cache_folder() / "weights" / folder / tag / file.file
    return fetch(weight_url(file), path, sha256=file.sha256)


def published(file: WeightFile) -> WeightFile:
    """The file with its name and address, looked up in torchgeo where that has them.

    Its address there is ``https://hf.co/OWNER/NAME/resolve/REVISION/FILE``.
    """
    if file.torchgeo is None:
        return file
    from torchgeo import models

    enum, _, member = file.torchgeo.partition(".")
    path = urlsplit(getattr(models, enum)[member].value.url).path
    repo, _, rest = path.removeprefix("/").partition("/resolve/")
    revision, _, name = rest.partition("/")
    return WeightFile(name, repo=repo, revision=revision)


def weight_url(file: WeightFile) -> str:
    """Address of a published weight file; HF_ENDPOINT names a mirror of the hub."""
    if file.url is not None:
        return file.url
    if file.repo is None:
        raise ValueError(f"{file.file} is packaged with the kit and has no address")
    return hub_url(file.repo, file.file, file.revision)


def read_checkpoint(path: str | Path) -> State:
    """Read the tensors of a ``.safetensors`` file or a file of `torch.save`.

    Nothing in it is executed; tensors are mapped from the file where its format allows.
    Raises ValueError for a truncated file, one without tensors, or an unknown class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _flatten(_read_torch(path), path)


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(_unreadable(path, error)) from error


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_INERT):
            return torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),
            )
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise ValueError(_unreadable(path, error)) from error
        raise ValueError(
            f"{path} is refused: it holds {refused[1]}, and building that could run "
            "code. Take a file with weights only (safetensors, or the state dict saved "
            "alone) from its authors"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{path} ({path.stat().st_size:,} bytes) is truncated or not a checkpoint: "
        f"{reason}. Delete it and download it again"
    )


def _flatten(content: object, path: Path) -> State:
    """Open the nest that holds the network and keep its tensors."""
    while isinstance(content, Mapping):
        nest = next((n for n in _NESTS if isinstance(content.get(n), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    if isinstance(content, Mapping):
        state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if state := state or _parts(content):
            return state
    raise ValueError(f"{path} holds no tensors by name: not a checkpoint of a network")


def _parts(content: Mapping[Any, object]) -> State:
    """The tensors of several networks side by side, as CROMA's: ``part.key``."""
    return {
        f"{part}.{key}": tensor
        for part, network in content.items()
        if isinstance(network, Mapping)
        for key, tensor in network.items()
        if isinstance(tensor, Tensor)
    }


def saved_bands(path: str | Path) -> tuple[str, ...] | None:
    """The bands of a file that `save_weights` wrote; None for any other file."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        bands = (file.metadata() or {}).get("bands")
    return None if bands is None else tuple(bands.split(","))


def save_weights(backbone: Backbone, path: str | Path, half: bool = True) -> Path:
    """Write the backbone's plain weights as safetensors that `load_backbone` reads.

    The file records its bands: load it with the same `bands` and options. One for all
    bands of the card serves any subset where the network keeps its upstream's names
    (Prithvi, Swin, timm's), else it is refused.

    Args:
        backbone: any backbone; an active adapter raises ValueError.
        path: the file; written whole or not at all.
        half: store as float16, half the size; else each in its own type.

    Returns:
        The path written.
    """
    adapter: Any = getattr(backbone, "adapter", None)
    if adapter is not None:
        raise ValueError(
            f"the adapter {adapter.name!r} is active, so these are not plain "
            "weights. Save it with adapter.save(folder), or fold it in with "
            "adapter.merge() first."
        )
    path = Path(path)
    state = {}
    for name, tensor in backbone.weights().items():
        kind = torch.float16 if half and tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.to("cpu", kind).contiguous()
    with whole_file(path) as part:
        save_tensors(state, part, {"bands": ",".join(backbone.bands)})
    return path


def strip_prefixes(state: Mapping[str, Tensor], prefixes: Sequence[str]) -> State:
    """Remove wrappers' prefixes (``"module."``), as often as they occur, from keys.

    Raises ValueError if two keys would become one.
    """
    clean: State = {}
    for key, tensor in state.items():
        name = key
        while prefix := next((p for p in prefixes if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if name in clean:
            raise ValueError(
                f"the checkpoint holds {name!r} twice, once as {key!r}: it has two "
                "networks inside; save the wanted one alone"
            )
        clean[name] = tensor
    return clean


def filled(make: Callable[[], Network], state: State | None, name: str) -> Network:
    """The network that `make` makes, with the tensors of `state`, or random if None.

    With a state it is made on the meta device, which needs no memory or random numbers.
    """
    if state is None:
        return make()
    with torch.device("meta"):
        model = make()
    load_strictly(model, state, name)
    return model


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load every tensor of a model, and nothing else, widened to the model's own type.

    The tensors become the model's own without a copy. Raises ValueError that names
    missing and unexpected keys and wrong shapes.
    """
    own = model.state_dict()
    check_fit(own, state, name)
    cast = {key: state[key].to(own[key].dtype) for key in own}
    model.load_state_dict(cast, strict=True, assign=True)


def check_patch(name: str, kernel: Tensor | None, patch: int) -> None:
    """An error where the kernels (D, C, p, p) of a file have another patch size."""
    if kernel is not None and kernel.shape[-1] != patch:
        raise ValueError(
            f"this checkpoint of {name} has patches of {kernel.shape[-1]} px and "
            f"patch={patch}. Load it with patch={kernel.shape[-1]}"
        )


def check_fit(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str
) -> None:
    """An error that names keys and shapes of a checkpoint that do not fit."""
    problems = misfits(own, state)
    if problems:
        raise ValueError(
            f"the checkpoint does not fit {name}: {'; '.join(problems)}. "
            "Take the file that the card names, or the backbone it was saved from"
        )


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unexpected, or of another shape; arguments of `check_fit`."""
    problems = [
        _listed("missing", [key for key in own if key not in state]),
        _listed("unexpected", [key for key in state if key not in own]),
        _listed(
            "of another shape",
            [
                f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ],
        ),
    ]
    return [problem for problem in problems if problem]


def _listed(what: str, keys: Iterable[str]) -> str:
    """``3 missing (a, b, c)``; long lists are cut and counted."""
    keys = list(keys)
    if not keys:
        return ""
    shown = ", ".join(keys[:_SHOWN])
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{len(keys)} {what} ({shown}{more})"
