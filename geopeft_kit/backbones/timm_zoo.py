"""Networks of timm, by the name ``timm:<name>``, and a ResNet-50 from scratch.

Any ViT, DINOv3, ConvNeXt, ResNet, Swin, MambaOut or EfficientViM (the state-space
model). The card is made from what timm knows: statistics, licence, address. The
networks were trained on RGB photographs; `new_bands` says what other bands do.

Source: timm.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.mambaout import MambaOut
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone, adapt_kernels, block_names
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.hierarchical import (
    EfficientViMBackbone,
    HierarchicalBackbone,
    resnet50,
)
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import RotaryViTBackbone, ViTBackbone
from geopeft_kit.backbones.weights import State, load_strictly, strip_prefixes

PREFIX = "timm:"
_LAYOUTS: dict[type[nn.Module], str] = {
    VisionTransformer: "vit",
    Eva: "vit",
    ConvNeXt: "convnext",
    ResNet: "resnet",
    SwinTransformer: "swin",
    SwinTransformerV2: "swin",
    MambaOut: "mambaout",
}
# Modules whose models take images of any size on request.
_PLAIN_VITS = (
    "timm.models.vision_transformer",
    "timm.models.deit",
    "timm.models.eva",
)
# DINOv3's weights with this word in their tag saw 493 million satellite images.
_SATELLITE = "sat493m"
# Parts that only serve the classifier.
_CLASSIFIER = ("head", "fc", "fc_norm", "attn_pool", "head_dist")
# EfficientViM classifies from its hidden states, with norms and weights of their own.
_STATE_CLASSIFIER = ("norm", "weights", "heads", "weights_dist", "heads_dist")


@lru_cache(maxsize=32)
def make_card(name: str) -> BackboneCard:
    """Make a card from timm's own data, for ``timm:`` and a name with or without a tag.

    Raises ValueError for an unknown name or a kind of network that is not supported.
    """
    config = _config(name.removeprefix(PREFIX))
    with torch.device("meta"):
        model = _network(name, config.input_size[1])
    layout = _layout(name, model)
    licence = config.license or "not stated by timm: see the source"
    weights = {}
    if config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        weights["default"] = WeightFile(file, repo=config.hf_hub_id)
    elif config.url:
        file = config.url.rsplit("/", 1)[-1]
        weights["default"] = WeightFile(file, url=config.url)
    page = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else ""
    notes = (
        "Trained on photographs, not on satellite images; timm's statistics are those "
        "of photographs in display brightness."
    )
    if _SATELLITE in name:
        notes = (
            "DINOv3, self-distillation on 493 million satellite images (8-bit RGB); "
            "statistics are those of display brightness; reflectance is darker."
        )
    return BackboneCard(
        name=name,
        family="timm",
        bands=("RED", "GREEN", "BLUE"),
        patch=_patch(model, layout),
        width=model.feature_info[-1]["num_chs"],
        depth=len(block_names(model, layout)),
        parameters=sum(p.numel() for p in model.parameters()),
        image_size=config.input_size[1],
        normalisation=Normalisation(1.0, tuple(config.mean), tuple(config.std)),
        licence_weights=licence,
        licence_code="Apache-2.0",
        source=page or config.origin_url or config.url or "random weights only",
        weights=weights,
        architecture={"layout": layout},
        paper=str(config.paper_ids or ""),
        notes=notes,
        cannot="Reads red, green and blue only.",
    )


@register("timm")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    image_size: int | None = None,
) -> Backbone:
    """Build a timm network without its classifier, from timm's or the authors' keys.

    `image_size` sets the windows of a Swin; a ViT takes any size.
    """
    layout = str(card.architecture["layout"])
    # A ViT's position table keeps its published size and is resized per image.
    size = image_size if image_size and layout == "swin" else card.image_size
    # DINOv3 computes its rotations into buffers that no checkpoint would fill.
    if state is not None and layout == "vit" and "dinov3" not in card.name:
        with torch.device("meta"):  # no memory and no time for random numbers
            model = _network(card.name, size)
    else:
        model = _network(card.name, size)
    if state is not None:
        load_strictly(model, _timm_state(model, state), card.name)
    first = str(_config(card.name.removeprefix(PREFIX)).first_conv)
    adapt_kernels(model.get_submodule(first), plan)
    if isinstance(model, Eva):
        return RotaryViTBackbone(card, model, plan)
    if layout == "vit":
        return ViTBackbone(card, model, plan)
    if layout == "efficientvim":
        return EfficientViMBackbone(card, model, plan, layout)
    return HierarchicalBackbone(card, model, plan, layout)


@register("from_scratch")
def build_from_scratch(
    card: BackboneCard, plan: BandPlan, state: State | None
) -> HierarchicalBackbone:
    """Build a ResNet-50 with random weights: the encoder of the from-scratch UNet.

    `state` is weights that you trained yourself, in timm's keys.
    """
    model = resnet50(len(card.bands))
    if state is not None:
        load_strictly(model, _timm_state(model, state), card.name)
    adapt_kernels(model.conv1, plan)
    return HierarchicalBackbone(card, model, plan, "resnet")


def _config(name: str) -> Any:
    """What timm knows about a model and its weight tag."""
    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        close = ", ".join(difflib.get_close_matches(plain, timm.list_models(), n=5))
        raise ValueError(
            f"timm {timm.__version__} has no model {plain!r}. Close names: "
            f"{close or 'none'}; timm.list_models('vit*') lists more"
        )
    tagged = timm.list_models(f"{plain}.*", pretrained=True)
    if tag and name not in tagged:
        raise ValueError(
            f"timm has no weights {tag!r} for {plain}. There are: "
            f"{', '.join(tagged) or 'none'}"
        )
    return timm.get_pretrained_cfg(name)


def _network(name: str, size: int) -> Any:
    """The network of timm with random weights and without what only classifies."""
    plain = name.removeprefix(PREFIX)
    options: dict[str, Any] = {}
    if _config(plain).fixed_input_size:
        options["img_size"] = size
    entry = timm.model_entrypoint(plain.split(".")[0])
    if entry.__module__ in _PLAIN_VITS:
        options["dynamic_img_size"] = True
    elif "swin" in entry.__module__:
        options["strict_img_size"] = False
    model = timm.create_model(plain, pretrained=False, num_classes=0, **options)
    for part in _classifier(model):
        module = getattr(model, part, None)
        if isinstance(module, nn.Parameter):
            delattr(model, part)
        elif isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            setattr(model, part, nn.Identity())
    return model


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Names of the parts that only serve the classifier."""
    return _STATE_CLASSIFIER if _is_efficientvim(model) else _CLASSIFIER


def _is_efficientvim(model: nn.Module) -> bool:
    """By name: timm 1.0.27, which Colab ships, has no such class to import."""
    return type(model).__name__ == "EfficientViM"


def _patch(model: Any, layout: str) -> int:
    """Pixels per cell of the finest of the four maps."""
    if layout == "efficientvim":
        return model.feature_info[0]["reduction"] // 2  # see EfficientViMBackbone
    return model.feature_info[-4]["reduction"]


def _layout(name: str, model: nn.Module) -> str:
    if _is_efficientvim(model):
        return "efficientvim"
    for kind, layout in _LAYOUTS.items():
        # Eva's other children (EVA-02, PE, ...) have blocks that methods do not know.
        if isinstance(model, kind) and (kind is not Eva or "dinov3" in name):
            return layout
    raise ValueError(
        f"{name} is a {type(model).__name__}: timm's VisionTransformer, DINOv3, "
        "SwinTransformer (v1, v2), ConvNeXt, ResNet, MambaOut and EfficientViM are "
        "supported"
    )


def _timm_state(model: nn.Module, state: State) -> State:
    """Authors' keys to timm's, with timm's own converter; classifier dropped."""
    module = sys.modules[type(model).__module__]
    convert: Callable[..., State] | None = getattr(module, "checkpoint_filter_fn", None)
    clean: Mapping[str, Tensor] = strip_prefixes(state, ("module.",))
    if convert is not None:
        clean = convert(dict(clean), model)
    parts = _classifier(model)
    return {k: v for k, v in clean.items() if k.split(".")[0] not in parts}
