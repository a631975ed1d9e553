"""One row for each family of backbones: a thin twin of it, and what it promises.

A new family is one row here; `test_backbone_contract.py` asks the same questions of all
rows. What differs from family to family (its numbers against independent code, its own
options and traps) is in `test_backbones_*.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from method_table import CARDS as METHODS
from method_table import SMALL
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit import backbones
from geopeft_kit.backbones import Backbone, find_card

EVERYDAY = ("lora", "vpt", "bias", "norm", "ssf")
# Methods that need what a network does not have: spatial convolutions or stages;
# tokens; plain attention in the blocks; patches that share a grid with stride 32.
PLAIN_VIT = frozenset({"conv_adapter", "upetu"})
GROUPED_VIT = PLAIN_VIT | {"deflect"}
HIERARCHY = frozenset({"vpt", "deflect", "earth_adapter", "vit_adapter"})
SWIN = HIERARCHY | {"conv_adapter"}
CONVOLUTIONS = HIERARCHY | {
    "apla", "convpass", "delora", "fourierft", "mona", "randlora", "shira", "vera",
}  # fmt: skip
NO_MLP = CONVOLUTIONS | {
    "adaptformer", "houlsby", "quantised_adapter", "slr", "upetu",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One backbone of the contract.

    Attributes:
        name: of the card.
        card: what the thin twin changes of it; `architecture` is merged.
        options: of `load_backbone`.
        meta: what it reads of `meta`.
        refuses: methods that do not fit.
        idle: beginnings of the names of parameters that no map depends on.
        size: the only image size that it takes, or None.
        on_meta: whether it runs without memory; two parts of torchgeo look at values.
        ground_size: whether it has the option `resolution`.
    """

    name: str
    card: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    meta: tuple[str, ...] = ()
    refuses: frozenset[str] = PLAIN_VIT
    idle: tuple[str, ...] = ()
    size: int | None = None
    on_meta: bool = True
    ground_size: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


def vit(width: int = 48, heads: int = 3, **card: Any) -> dict[str, Any]:
    """A ViT with four thin blocks; further sizes by name."""
    architecture = {"heads": heads, **card.pop("architecture", {})}
    return {"width": width, "depth": 4, "architecture": architecture, **card}


def swin(width: str) -> dict[str, Any]:
    """A Swin with five thin blocks."""
    sizes = {width: 16, "depths": (1, 2, 1, 1), "heads": (1, 2, 4, 8)}
    return {"depth": 5, "architecture": sizes}


BOTH = ("date", "lonlat")
UNET = {"dims": (4, 6, 8, 32), "depths": (1, 2, 1, 1), "latent": 12}
PRITHVI = vit(image_size=64)
ROWS = (
    Row("prithvi_eo_v2_tiny_tl", PRITHVI, meta=BOTH),
    Row(
        "prithvi_eo_v2_tiny_tl", PRITHVI, {"dates": 2}, BOTH,
        PLAIN_VIT | {"vit_adapter", "deflect"},
    ),
    Row("prithvi_eo_v2_300", PRITHVI),
    Row("clay_v1", vit(64, 2, image_size=32), meta=BOTH, ground_size=True),
    Row("clay_v1_5", vit(64, 2, image_size=32), meta=BOTH),
    Row("terramind_v1_tiny", vit(image_size=64)),
    Row("terramind_v1_base", vit(image_size=64)),
    Row("galileo_nano", meta=("date",), refuses=GROUPED_VIT, ground_size=True),
    Row("dofa_base", vit()),
    Row("panopticon_base", vit(architecture={"attention_width": 48}),
        {"bands": ["B4", "B8", "VV", "HV"]}, refuses=PLAIN_VIT | {"vit_adapter"},
        on_meta=False),
    Row("copernicusfm_base", vit(), meta=BOTH, on_meta=False, ground_size=True),
    Row("scalemae_large", vit(), ground_size=True),
    Row("dino_mc_small", vit()),
    Row("satmae_large", vit()),
    Row("cross_scale_mae_base", vit()),
    Row("croma_base", vit(64, 16), refuses=GROUPED_VIT),
    Row("croma_base_s1", vit(64, 16), refuses=GROUPED_VIT),
    Row("ssl4eo_vit_small", vit()),
    Row("softcon_vit_small", vit(), refuses=PLAIN_VIT | {"vit_adapter"}),
    Row("satmae_multispectral_base", vit(architecture={"channel_code": 16}),
        refuses=GROUPED_VIT),
    Row("spectralgpt_base", vit(image_size=48), refuses=GROUPED_VIT),
    Row("phileo_unet_44m", {"image_size": 32, "depth": 10, "architecture": UNET},
        refuses=NO_MLP | {"ssf"}, idle=("head.", "encoder.head_"), size=32),
    Row("phileo_vit_100m", vit(32, 4, image_size=32, architecture={"head_width": 16}),
        refuses=GROUPED_VIT | {"vit_adapter"}, idle=("vit.pos_embed",)),
    Row("gfm_swin_base", swin("embed_dim"), {"image_size": 64}, refuses=SWIN),
    Row("satlas_swin_v2_t", swin("width"), refuses=SWIN | {"apla", "convpass"}),
    Row("timm:vit_tiny_patch16_224"),
    Row("timm:convnext_atto", refuses=CONVOLUTIONS),
    Row("timm:resnet18", refuses=NO_MLP | {"oft"}),
    Row("timm:efficientvim_m1", refuses=NO_MLP | {"conv_adapter"}),
)  # fmt: skip


def shrink(monkeypatch: Any, name: str, **changes: Any) -> None:
    """Let a name stand for a thin network for the rest of a test."""
    card = find_card(name)
    inside = {**card.architecture, **changes.pop("architecture", {})}
    small = replace(card, architecture=inside, **changes)
    monkeypatch.setitem(backbones.CARDS, name, small)


def twin(monkeypatch: Any, row: Row, weights: Any = None, **options: Any) -> Backbone:
    """The thin twin of a row, by `load_backbone`."""
    if row.card:
        shrink(monkeypatch, row.name, **row.card)
    return gk.load_backbone(row.name, weights=weights, **{**row.options, **options})


def stirred(backbone: Backbone) -> Backbone:
    """Zero biases, unit gains and tiny layer scales moved, so that each one shows."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "gamma" in name:
                parameter.fill_(0.5)
    return backbone


def image(backbone: Backbone, row: Row, step: int = 1) -> Tensor:
    """Two by three cells of the coarsest map, or of `step` pixels; or the only size."""
    step = max(*backbone.strides, step)
    size = (row.size, row.size) if row.size else (2 * step, 3 * step)
    shape = (2, len(backbone.bands), backbone.dates, *size)
    picture = torch.rand(shape) * 0.4
    return picture if backbone.dates > 1 else picture.squeeze(2)


def meta(backbone: Backbone, keys: Iterable[str] = BOTH) -> dict[str, Tensor]:
    """Date and place of two images."""
    date = torch.tensor([[2020.0, 33.0], [2019.0, 200.0]])
    both = {
        "date": date[:, None].expand(-1, backbone.dates, -1),
        "lonlat": torch.tensor([[151.2, -33.9], [-21.9, 64.1]]),
    }
    return {key: both[key] for key in keys}


def idle(backbone: Backbone, picture: Tensor, known: Any = None) -> set[str]:
    """Names of the network's own parameters that its maps do not depend on."""
    with torch.enable_grad():
        sum(m.square().mean() for m in backbone(picture, known)).backward()
    names = {n for n, p in backbone.model.named_parameters() if p.grad is None}
    backbone.zero_grad()
    return names


def refuses(backbone: Backbone) -> dict[str, str]:
    """Method -> why it does not serve the backbone."""
    reasons = {name: card.why_not(backbone) for name, card in METHODS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def check_method(
    backbone: Backbone, name: str, picture: Tensor, known: Any = None
) -> None:
    """A method on a backbone: its start as promised, gradients, and exact detach."""
    unused = idle(backbone, picture, known)
    with torch.no_grad():
        start = backbone(picture, known)
    state = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    adapter = gk.attach(backbone, name, **SMALL[name])
    with torch.enable_grad():
        maps = backbone(picture, known)
    assert [m.shape[1] for m in maps] == backbone.channels
    if adapter.identity_at_start:
        for one, other in zip(maps, start, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    else:
        assert not torch.equal(maps[-1], start[-1])
    if adapter.num_parameters:
        with torch.enable_grad():
            sum(m.square().mean() for m in maps).backward()
        seen = {key: p.grad for key, p in adapter.named_parameters()}
        assert {key for key, grad in seen.items() if grad is None} <= unused
        assert any(grad.any() for grad in seen.values() if grad is not None)
    adapter.detach()
    with torch.no_grad():
        for one, other in zip(backbone(picture, known), start, strict=True):
            assert torch.equal(one, other)
    after = backbone.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
