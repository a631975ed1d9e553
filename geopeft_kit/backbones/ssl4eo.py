"""SSL4EO-S12's plain networks: ViTs and ResNet-50 by DINO, MoCo, MAE, DeCUR, SoftCon.

One data set and several pretext tasks: one card has several tags where network and
pixel values agree. SoftCon's ViTs have patches of 14 px and layer scale. The networks
are timm's, as in torchgeo.

Sources: SSL4EO-S12, arXiv 2211.07044; FG-MAE, arXiv 2310.18653; DeCUR, arXiv
2309.05300; SoftCon, arXiv 2405.20462; torchgeo (MIT).
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import torch

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.hierarchical import HierarchicalBackbone, resnet50
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import ViTBackbone, vit_network
from geopeft_kit.backbones.weights import State, filled, strip_prefixes

# The trained network in training checkpoints: MoCo v3, MoCo v2, DINO.
_NETWORKS = ("base_encoder.", "encoder_q.", "backbone.")
# Other parts of such a checkpoint: momentum encoder, predictors, queues.
_BESIDES = ("momentum_encoder.", "encoder_k.", "predictor.", "queue")


@register("ssl4eo_vit")
def build_vit(card: BackboneCard, plan: BandPlan, state: State | None) -> ViTBackbone:
    """Build a ViT from torchgeo's file, or from MoCo's or DINO's training.

    A file without the last norm, which torchgeo accepts, gets gain 1 and shift 0.
    """
    kept = None
    if state is not None:
        kept = encoder_state(state, "head.")
        kept.setdefault("norm.weight", torch.ones(card.width))
        kept.setdefault("norm.bias", torch.zeros(card.width))
    scale = 1e-5 if card.architecture["layer_scale"] else None
    model = filled(lambda: vit_network(card, init_values=scale), kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    return ViTBackbone(card, model, plan)


@register("ssl4eo_resnet")
def build_resnet(
    card: BackboneCard, plan: BandPlan, state: State | None
) -> HierarchicalBackbone:
    """Build a ResNet-50 from the same kinds of file."""
    kept = None if state is None else encoder_state(state, "fc.")
    model = filled(lambda: resnet50(len(card.bands)), kept, card.name)
    adapt_kernels(model.conv1, plan)
    return HierarchicalBackbone(card, model, plan, "resnet")


def encoder_state(state: State, classifier: str) -> State:
    """The network alone in timm's names, from torchgeo's file or a training checkpoint.

    Keys that start with `classifier` are dropped.
    """
    kept = {
        key: tensor
        for key, tensor in strip_prefixes(state, ("module.",)).items()
        if not key.startswith(_BESIDES)
    }
    inner = next((p for p in _NETWORKS if any(k.startswith(p) for k in kept)), "")
    return {
        key.removeprefix(inner): tensor
        for key, tensor in kept.items()
        if not key.removeprefix(inner).startswith(classifier)
        and not (inner and key.startswith(classifier))
    }
