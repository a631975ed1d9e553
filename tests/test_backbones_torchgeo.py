"""Backbones of torchgeo: its own classes as the judge, its keys, units and traps."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import timm
import torch
import torchvision
from backbone_table import shrink
from hub_server import Site, serve
from plain_vit import stirred
from torch import Tensor, nn
from torchgeo import models
from torchgeo.models import croma as torchgeo_croma
from torchgeo.models import panopticon as torchgeo_panopticon
from torchgeo.models.copernicusfm import resize_abs_pos_embed
from torchvision.models import swin_transformer

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone, find_card, list_backbones, load_backbone
from geopeft_kit.backbones.band_plan import plan_bands
from geopeft_kit.backbones.card import BackboneCard, WeightFile
from geopeft_kit.backbones.copernicusfm import days_since_1970
from geopeft_kit.backbones.registry import BUILDERS
from geopeft_kit.backbones.vit import fixed_table
from geopeft_kit.backbones.weights import published
from geopeft_kit.bands import BANDS, resolve_bands

CARDS = [
    card
    for card in list_backbones()
    if any(file.torchgeo for file in card.weights.values())
]
WIDTH, DEPTH, HEADS = 48, 4, 3
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SMALL: dict[str, dict[str, Any]] = {
    "dofa_base": {},
    "copernicusfm_base": {},
    "panopticon_base": {"attention_width": 48, "side": 37},
    "ssl4eo_vit_small": {"layer_scale": False},
    "softcon_vit_small": {"layer_scale": True},
    "croma_base": {"heads": 16, "encoder": "s2_encoder"},
    "croma_base_s1": {"heads": 16, "encoder": "s1_encoder"},
}
SWIN = {"width": 16, "depths": (1, 2, 1, 1), "heads": (1, 2, 4, 8)}


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same families with four thin blocks (a Swin with five)."""
    for name, own in SMALL.items():
        width = 64 if "croma" in name else WIDTH
        sizes = {"heads": HEADS, **own}
        shrink(monkeypatch, name, width=width, depth=DEPTH, architecture=sizes)
    shrink(monkeypatch, "satlas_swin_v2_t", architecture=SWIN)


def saved(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "file.pth")
    return folder / "file.pth"


def picture(backbone: Backbone, size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, len(backbone.bands), size, size) * 0.4


def recorded(blocks: Any, run: Any) -> list[Tensor]:
    """What each block of a network gives while `run` is called."""
    seen: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *io: seen.append(io[2])) for b in blocks]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def assert_maps(maps: list[Tensor], tokens: list[Tensor]) -> None:
    """Maps (B, D, h, w) hold the last h*w tokens (B, N, D) of four blocks."""
    assert len(maps) == len(tokens) == 4
    for ours, theirs in zip(maps, tokens, strict=True):
        flat = ours.flatten(2).mT
        torch.testing.assert_close(flat, theirs[:, -flat.shape[1] :], **CLOSE)


# --- parity ---------------------------------------------------------------------------


def dofa() -> nn.Module:
    return models.DOFA(
        img_size=224, patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        num_classes=0,
    )  # fmt: skip


@pytest.mark.parametrize("bands", [None, ["B8A", "B2", "VV"], "rgb"])
def test_dofa_equals_torchgeo(twins: None, tmp_path: Path, bands: Any) -> None:
    theirs = stirred(dofa())
    published = {k: v for k, v in theirs.state_dict().items() if "fc_norm" not in k}
    ours = load_backbone("dofa_base", bands, saved(published, tmp_path))
    image = picture(ours, 224)
    micrometres = [BANDS[band].wavelength_um or 5.405 for band in ours.bands]
    pooled: list[Tensor] = []
    tokens = recorded(
        theirs.blocks,
        lambda: pooled.append(theirs(ours.normalised(image), micrometres)),
    )
    with torch.no_grad():
        maps = ours(image)
    assert_maps(maps, tokens)
    mean = theirs.fc_norm(maps[-1].mean(dim=(2, 3)))
    torch.testing.assert_close(mean, pooled[0], **CLOSE)


def test_dofa_takes_the_authors_own_file(twins: None, tmp_path: Path) -> None:
    state = stirred(dofa()).state_dict()
    plain = load_backbone("dofa_base", weights=saved(state, tmp_path))
    wanted = plain.weights_hash()  # now: the next file takes the mapped one's place
    extra = ("mask_token", "norm.weight", "projector.weight", "projector.bias")
    file = saved(state | {key: torch.zeros(3) for key in extra}, tmp_path)
    assert load_backbone("dofa_base", weights=file).weights_hash() == wanted


def copernicus() -> nn.Module:
    return models.CopernicusFM(
        img_size=224, patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS
    )


@pytest.mark.parametrize(
    ("patch", "size", "known"), [(16, 224, False), (16, 96, True), (8, 64, True)]
)
def test_copernicusfm_equals_torchgeo(
    twins: None, tmp_path: Path, patch: int, size: int, known: bool
) -> None:
    theirs = stirred(copernicus())
    published = {k: v for k, v in theirs.state_dict().items() if "fc_norm" not in k}
    ours = load_backbone(
        "copernicusfm_base",
        ["VH", "B12", "B3"],
        saved(published, tmp_path),
        patch=patch,
        resolution=10.0 if known else None,
    )
    image = picture(ours, size)
    meta, table = None, torch.full((2, 4), float("nan"))
    if known:
        lonlat = torch.tensor([[-70.5, -33.2], [151.0, 12.0]])
        meta = {
            "lonlat": lonlat,
            "date": torch.tensor([[[2020.0, 59.0]], [[2023.0, 0.0]]]),
        }
        days = [
            (datetime.date(2020, 2, 29) - datetime.date(1970, 1, 1)).days,
            (datetime.date(2023, 1, 1) - datetime.date(1970, 1, 1)).days,
        ]
        area = (patch * 10 / 1000) ** 2
        rest = torch.tensor([[days[0], area], [days[1], area]])
        table = torch.cat([lonlat, rest], dim=1)
    nano = [5e7, 2202.4, 559.8]
    width = [1e9, 174.0, 35.0]
    tokens = recorded(
        theirs.blocks,
        lambda: theirs(ours.normalised(image), table, nano, width, kernel_size=patch),
    )
    with torch.no_grad():
        assert_maps(ours(image, meta), tokens)
        if known:
            assert not torch.equal(ours(image)[0], ours(image, meta)[0])
            meta["lonlat"][1, 0] = float("nan")  # one unknown hides the batch's
            without = ours(image, {"date": meta["date"]})
            assert torch.equal(ours(image, meta)[0], without[0])


def test_days_are_counted_from_1970() -> None:
    dates = [datetime.date(y, m, 1) for y in (1970, 2000, 2024, 2101) for m in (1, 3)]
    rows = [[d.year, d.timetuple().tm_yday - 1] for d in dates]
    wanted = [(d - datetime.date(1970, 1, 1)).days for d in dates]
    assert days_since_1970(torch.tensor(rows)).tolist() == wanted


@pytest.mark.parametrize("prefix", ["", "model."])
def test_panopticon_equals_torchgeo(
    twins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    create = timm.create_model
    monkeypatch.setattr(  # torchgeo's class has no option for its size
        torchgeo_panopticon.timm,
        "create_model",
        lambda name: create(name, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS),
    )
    theirs = stirred(models.Panopticon(attn_dim=48, embed_dim=WIDTH, img_size=224))
    table = torch.randn(1, 1 + 37 * 37, WIDTH)
    published = theirs.model.state_dict() | {
        "pos_embed": table,
        "mask_token": torch.zeros(1, WIDTH),
    }
    with torch.no_grad():
        theirs.model.pos_embed.copy_(resize_abs_pos_embed(table, 16, 37))
    file = saved({f"{prefix}{k}": v for k, v in published.items()}, tmp_path)
    ours = load_backbone("panopticon_base", ["B4", "B11", "HH", "VH"], file)
    image = picture(ours, 224)
    # red 0.6646 um, SWIR 1.6137 um; transmitted H, received H; V, then H
    ids = torch.tensor([[665, 1614, -3, -2]] * 2)
    tokens = recorded(
        theirs.model.blocks,
        lambda: theirs({"imgs": ours.normalised(image), "chn_ids": ids}),
    )
    tokens[-1] = theirs.model.norm(tokens[-1])
    with torch.no_grad():
        assert_maps(ours(image), tokens)


@pytest.mark.parametrize("radar", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_croma_equals_torchgeo(
    twins: None, tmp_path: Path, radar: bool, nested: bool
) -> None:
    theirs = models.CROMA(
        encoder_dim=64, encoder_depth=2 * DEPTH if radar else DEPTH, image_size=40
    )
    stirred(theirs)
    state: dict[str, Any] = theirs.state_dict()
    if nested:  # as the authors' file
        parts = ("s1_encoder", "s1_GAP_FFN", "s2_encoder", "s2_GAP_FFN")
        state = {part: getattr(theirs, part).state_dict() for part in parts}
        state["joint_encoder"] = theirs.joint_encoder.state_dict()
    name = "croma_base_s1" if radar else "croma_base"
    ours = load_backbone(name, weights=saved(state, tmp_path))
    image = picture(ours, 40)
    encoder = theirs.s1_encoder if radar else theirs.s2_encoder
    # A block ends where its FFN's output is added, so the stream is followed here.
    x = image_tokens = encoder.linear_input(
        ours.normalised(image)
        .unfold(2, 8, 8)
        .unfold(3, 8, 8)
        .permute(0, 2, 3, 1, 4, 5)
        .flatten(3)
        .flatten(1, 2)
    )
    tokens = []
    for attention, ffn in encoder.transformer.layers:
        x = attention(x, theirs.attn_bias) + x
        x = ffn(x) + x
        tokens.append(x)
    tokens[-1] = encoder.transformer.norm_out(x)
    key = "sar" if radar else "optical"
    other = torch.rand(2, 12 if radar else 2, 40, 40)
    sar, optical = (
        (ours.normalised(image), other) if radar else (other, ours.normalised(image))
    )
    whole = theirs(sar, optical)[f"{key}_encodings"]
    torch.testing.assert_close(tokens[-1], whole, **CLOSE)
    assert image_tokens.shape == (2, 25, 64)
    with torch.no_grad():
        assert_maps(ours(image), tokens)


def test_croma_bias_fits_any_grid() -> None:
    """At the size of torchgeo's table the same numbers; tokens in front are at 0."""
    from geopeft_kit.backbones.base import TokenGrid
    from geopeft_kit.backbones.croma import DistanceBias

    bias = DistanceBias(16, TokenGrid(3, 3))
    theirs = torchgeo_croma.get_2dalibi(16, 9)
    torch.testing.assert_close(bias.table(torch.zeros(1, 9, 8)), theirs)
    longer = bias.table(torch.zeros(1, 11, 8))
    torch.testing.assert_close(longer[..., 2:, 2:], theirs)
    assert not longer[..., :2, :].any()
    assert not longer[..., :2].any()
    bias.grid.height, bias.grid.width = 1, 9
    assert bias.table(torch.zeros(1, 9, 8))[0, 0, 0, 8] == 8 * theirs[0, 0, 0, 1]


@pytest.mark.parametrize("size", [64, 96, pytest.param(256, marks=pytest.mark.slow)])
def test_satlas_equals_torchvision(twins: None, tmp_path: Path, size: int) -> None:
    theirs = swin_transformer.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=SWIN["width"],
        depths=list(SWIN["depths"]),
        num_heads=list(SWIN["heads"]),
        window_size=[8, 8],
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )
    theirs.features[0][0] = nn.Conv2d(9, SWIN["width"], 4, 4)  # as torchgeo does
    stirred(theirs)
    state = {f"backbone.backbone.{k}": v for k, v in theirs.state_dict().items()}
    ours = load_backbone("satlas_swin_v2_t", weights=saved(state, tmp_path))
    image = picture(ours, size, batch=1)
    stages = recorded(theirs.features[1::2], lambda: theirs(ours.normalised(image)))
    stages[-1] = theirs.norm(stages[-1])
    with torch.no_grad():
        maps = ours(image)
    for found, stage in zip(maps, stages, strict=True):
        torch.testing.assert_close(found, stage.permute(0, 3, 1, 2), **CLOSE)
    assert [m.shape[1] for m in maps] == ours.channels == [16, 32, 64, 128]
    assert [size // m.shape[2] for m in maps] == ours.strides


def ssl4eo(name: str, **options: Any) -> nn.Module:
    factory = (
        models.vit_small_patch14_dinov2 if "softcon" in name
        else models.vit_small_patch16_224
    )  # fmt: skip
    model = factory(
        None, in_chans=13, img_size=224, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        num_classes=0, **options,
    )  # fmt: skip
    return stirred(model)


LAYOUTS = ["torchgeo", "moco", "dino", "without norm"]


@pytest.mark.parametrize("name", ["ssl4eo_vit_small", "softcon_vit_small"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ssl4eo_vits_equal_torchgeo(
    twins: None, tmp_path: Path, name: str, layout: str
) -> None:
    theirs = ssl4eo(name)
    state = theirs.state_dict()
    content: dict[str, Any] = {**state, "head.weight": torch.zeros(2)}
    if layout == "moco":
        twin = {f"module.momentum_encoder.{k}": v + 1 for k, v in state.items()}
        content = {f"module.base_encoder.{k}": v for k, v in content.items()}
        rest = {"module.predictor.0.weight": torch.zeros(2)}
        content = {"state_dict": content | twin | rest}
    elif layout == "dino":
        own = {f"module.backbone.{k}": v for k, v in state.items()}
        own["module.head.last_layer.weight_g"] = torch.zeros(2)
        content = {"teacher": own, "epoch": 99}
    elif layout == "without norm":
        content = {k: v for k, v in state.items() if not k.startswith("norm.")}
        with torch.no_grad():
            theirs.norm.weight.fill_(1)
            theirs.norm.bias.fill_(0)
    ours = load_backbone(name, weights=saved(content, tmp_path))
    image = picture(ours, 224)
    tokens = recorded(theirs.blocks, lambda: theirs(ours.normalised(image)))
    tokens[-1] = theirs.norm(tokens[-1])
    with torch.no_grad():
        assert_maps(ours(image), tokens)


@pytest.mark.slow
def test_ssl4eo_resnet_equals_torchgeo(tmp_path: Path) -> None:
    theirs = models.resnet50(None, in_chans=13, num_classes=7)
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if "running_mean" in name:
                buffer.normal_()
    theirs.eval()
    state = {f"module.encoder_q.{k}": v for k, v in theirs.state_dict().items()}
    slow = {k.replace("_q.", "_k."): v * 0 for k, v in state.items()}
    queue = {"module.queue": torch.zeros(2), "module.queue_ptr": torch.zeros(1)}
    file = saved({"state_dict": state | slow | queue}, tmp_path)
    ours = load_backbone("decur_resnet50", weights=file)
    image = picture(ours, 64, batch=1)
    with torch.no_grad():
        wanted = theirs.forward_intermediates(
            ours.normalised(image), indices=4, intermediates_only=True
        )
        for found, stage in zip(ours(image), wanted, strict=True):
            torch.testing.assert_close(found, stage, **CLOSE)


# --- keys, counts, files and pixel values of the full sizes ---------------------------

# name -> torchgeo's factory, numbers of the sheet in millions, and what is left out
FULL: dict[str, tuple[Any, float, tuple[str, ...]]] = {
    "dofa_base": (models.dofa_base_patch16_224, 111.3, ("fc_norm", "pos_embed")),
    "dofa_large": (models.dofa_large_patch16_224, 337.1, ("fc_norm", "pos_embed")),
    "panopticon_base": (lambda **_: models.Panopticon(img_size=518).model, 99.0, ()),
    "copernicusfm_base": (
        models.copernicusfm_base, 139.5,
        ("fc_norm", "pos_embed", "patch_embed_variable"),
    ),
    "croma_base": (
        models.croma_base, 194.4, ("s1_", "s2_GAP", "joint")
    ),
    "croma_large": (models.croma_large, 672.6, ("s1_", "s2_GAP", "joint")),
    "croma_base_s1": (models.croma_base, 194.4, ("s2_", "s1_GAP", "joint")),
    "satlas_swin_v2_t": (models.swin_v2_t, 28.4, ("head",)),
    "satlas_swin_v2_b": (models.swin_v2_b, 87.9, ("head",)),
    "ssl4eo_vit_small": (models.vit_small_patch16_224, 22.7, ()),
    "ssl4eo_vit_base": (models.vit_base_patch16_224, 87.8, ()),
    "softcon_vit_small": (models.vit_small_patch14_dinov2, 22.4, ()),
    "softcon_vit_base": (models.vit_base_patch14_dinov2, 87.2, ()),
    "ssl4eo_resnet50": (models.resnet50, 23.5, ()),
}  # fmt: skip


def own_model(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """torchgeo's full-size network on the meta device, for the card's bands."""
    factory = FULL[name][0]
    options: dict[str, Any] = {}
    if "dofa" in name or "copernicus" in name:
        options = {"num_classes": 0}
    if "ssl4eo" in name or "softcon" in name:
        options = {"num_classes": 0, "in_chans": 13}
    if "softcon" in name:
        options["img_size"] = 224
    # A list of 225 * 225 slices on the meta device: slow, and no parameter.
    monkeypatch.setattr(torchgeo_croma, "get_2dalibi", lambda **_: torch.zeros(1))
    with torch.device("meta"):
        model = factory(**options)
        if "satlas" in name:
            first = model.features[0][0]
            model.features[0][0] = nn.Conv2d(9, first.out_channels, 4, 4)
    return model


EVERYDAY = ("dofa_base", "copernicusfm_base", "croma_base")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EVERYDAY else [pytest.mark.slow])
        for name in FULL
    ],
)
def test_full_sizes_on_the_meta_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of the sheet, and every key and shape of torchgeo's class is taken."""
    _, millions, left_out = FULL[name]
    theirs = own_model(name, monkeypatch)
    counts = {key: p.numel() for key, p in theirs.named_parameters()}
    total = sum(counts.values())
    if "satlas" in name:  # the sheet counts three bands
        total -= 6 * 16 * theirs.features[0][0].out_channels
    assert total / 1e6 == pytest.approx(millions, abs=0.06)
    card = find_card(name)
    kept = sum(n for key, n in counts.items() if not key.startswith(left_out or "-"))
    assert card.parameters == kept
    plan = plan_bands(card)
    state = dict(theirs.state_dict())
    ours = BUILDERS[card.family](card, plan, state)
    assert sum(p.numel() for p in ours.model.parameters()) == card.parameters


def of_torchgeo(file: WeightFile) -> Any:
    """What torchgeo's enum says about a file: url, transforms, meta."""
    enum, _, member = str(file.torchgeo).partition(".")
    return getattr(models, enum)[member].value


@pytest.mark.parametrize(
    ("card", "tag"),
    [
        pytest.param(card, tag, id=f"{card.name}-{tag}")
        for card in CARDS
        for tag in card.weights
    ],
)
def test_files_and_pixel_values_are_torchgeos(card: BackboneCard, tag: str) -> None:
    theirs, file = of_torchgeo(card.weights[tag]), published(card.weights[tag])
    path = f"/{file.repo}/resolve/{file.revision}/{file.file}"
    assert urlsplit(theirs.url).path == path
    assert file.sha256 is None  # torchgeo tells its first digits only
    if tag != "default" and "ssl_method" in theirs.meta:
        assert theirs.meta["ssl_method"].replace("-", "").startswith(tag)
    if "bands" in theirs.meta:
        assert card.bands == resolve_bands(list(theirs.meta["bands"]))
    steps = theirs.transforms if isinstance(theirs.transforms, nn.Sequential) else []
    steps = [s for s in steps if isinstance(s, torchvision.transforms.v2.Normalize)]
    if not steps or card.name == "scalemae_large":
        return
    (step,) = steps
    count = len(card.bands)
    mean, std = (
        list(map(float, v)) * (count if len(v) == 1 else 1)
        for v in (step.mean, step.std)
    )
    if "satlas" in card.name:  # 8-bit true colour: 255 stands for reflectance 0.3558
        std[:3] = [3558.0] * 3
    assert card.normalisation.mean == pytest.approx(mean)
    assert card.normalisation.std == pytest.approx(std)
    assert card.normalisation.scale == (1.0 if card.name.endswith("_s1") else 1e4)


def test_the_file_is_the_one_that_the_installed_torchgeo_names(
    twins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later torchgeo, another hash: its file is downloaded, and found in a folder."""
    state = {k: v for k, v in dofa().state_dict().items() if "fc_norm" not in k}
    path = "/owner/name/resolve/abc/dofa-0123abcd.pth"
    entry = SimpleNamespace(value=SimpleNamespace(url=f"https://hf.co{path}"))
    monkeypatch.setattr(models, "DOFABase16_Weights", {"DOFA_MAE": entry})
    monkeypatch.setenv("GEOPEFT_CACHE", str(tmp_path))
    with serve(Site(content=saved(state, tmp_path).read_bytes(), path=path)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.root)
        backbone = load_backbone("dofa_base")
    (file,) = tmp_path.rglob("dofa-0123abcd.pth")
    again = load_backbone("dofa_base", weights=file.parent)
    assert again.weights_hash() == backbone.weights_hash()


@pytest.mark.parametrize("name", ["croma_base", "croma_base_s1"])
def test_croma_stretches_two_deviations_to_0_and_1(name: str) -> None:
    card = find_card(name)
    source = find_card("softcon_vit_small_s1" if "s1" in name else "softcon_vit_small")
    for band, low, width in zip(
        card.bands, card.normalisation.mean, card.normalisation.std, strict=True
    ):
        place = source.bands.index(band)
        mean, std = source.normalisation.mean[place], source.normalisation.std[place]
        assert (low, low + width) == pytest.approx((mean - 2 * std, mean + 2 * std))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_cards_say_what_is_known(card: Any) -> None:
    assert card.licence and card.licence_code
    assert card.paper and card.notes and card.cannot
    assert "Not tested with the published file" in card.cannot
    assert ("decibel" in card.notes) == any(
        band in ("VV", "VH") for band in (*card.bands, *card.also_reads)
    )


# --- bands, sizes, traps --------------------------------------------------------------


SPECTRAL = ["dofa_base", "panopticon_base", "copernicusfm_base"]


@pytest.mark.parametrize("name", SPECTRAL)
def test_any_band_with_a_wavelength_is_read(twins: None, name: str) -> None:
    names = ["PAN", "RED", "YELLOW", "TIR_1", "VV"]
    backbone = load_backbone(name, bands=names, weights=None)
    assert backbone.bands == tuple(names)
    size = 2 * backbone.strides[0]
    image = torch.rand(1, 5, size, size, requires_grad=True)
    backbone(image)[-1].square().sum().backward()
    assert (image.grad.abs().amax(dim=(0, 2, 3)) > 0).all()
    # decibels of Sentinel-1 come out as standard scores, temperatures as they are
    values = torch.tensor([0.1, 0.1, 0.1, 300.0, -12.59 + 5.26]).view(1, 5, 1, 1)
    scores = backbone.normalised(values).flatten()
    assert scores[3:].tolist() == pytest.approx([300.0, 1.0], abs=1e-3)
    with pytest.raises(ValueError, match=r"does not know NDVI.*PAN.*VV"):
        load_backbone(name, bands=["RED", "NDVI"], weights=None)
    with pytest.raises(ValueError, match="NDVI has no wavelength"):
        load_backbone(name, bands=["RED", "NDVI"], weights=None, new_bands="random")
    ignoring = load_backbone(
        name, bands=["RED", "NDVI"], weights=None, new_bands="ignore"
    )
    assert ignoring(torch.rand(1, 2, size, size))[0].shape[0] == 1


def test_units_of_wavelengths(twins: None) -> None:
    def embedding(name: str) -> Any:
        return load_backbone(name, ["B2", "B12"], weights=None).model.patch_embed

    assert embedding("dofa_base").wavelengths == [0.4927, 2.2024]
    assert embedding("panopticon_base").channels == [493, 2202]
    copernicus = embedding("copernicusfm_base")
    assert copernicus.wavelengths == pytest.approx([492.7, 2202.4])
    assert copernicus.bandwidths == pytest.approx([65, 174])


@pytest.mark.parametrize("name", ["dofa_base", "copernicusfm_base"])
def test_random_weights_have_positions_where_torchgeo_has_zeros(
    twins: None, name: str
) -> None:
    theirs = dofa() if "dofa" in name else copernicus()
    assert theirs.pos_embed.count_nonzero() == 0
    backbone = load_backbone(name, weights=None)
    table = backbone.model.pos_embed
    torch.testing.assert_close(table[0, 1:], fixed_table(WIDTH, 14, 14))
    assert not table[0, 0].any()
    assert "pos_embed" not in dict(backbone.named_parameters())
    flat = torch.full((1, 13, 64, 64), 0.2)
    with torch.no_grad():
        first = backbone(flat)[0]
    assert first.std(dim=(2, 3)).max() > 1e-3


@pytest.mark.parametrize("options", [{"patch": 2}, {"patch": 16.0}])
def test_copernicusfm_refuses_options(twins: None, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        load_backbone("copernicusfm_base", weights=None, **options)


def test_softcon_is_no_tag_of_the_ssl4eo_card() -> None:
    with pytest.raises(ValueError, match=r"tags: 'default', 'dino', 'moco', 'mae'"):
        load_backbone("ssl4eo_vit_small", weights="softcon")
    assert "SoftCon and DeCUR have separate cards" in (
        find_card("ssl4eo_vit_small").cannot
    )


def test_lora_on_satlas_serves_the_mlps_only(twins: None) -> None:
    backbone = load_backbone("satlas_swin_v2_t", weights=None)
    adapter = gk.attach(backbone, "lora", rank=2)
    assert adapter.config["targets"] == ["fc1", "fc2"]
    with pytest.raises(ValueError, match="none of the chosen blocks"):
        gk.attach(backbone, "lora", targets=["q"])


# --- the list -------------------------------------------------------------------------


def test_list_is_filtered_by_licence_sensor_and_size() -> None:
    everything = gk.list_backbones()
    mit = gk.list_backbones(licence="mit")
    assert mit and all(card.licence == "MIT" for card in mit)
    both = gk.list_backbones(licence=["MIT", "Apache-2.0"])
    assert {card.licence for card in both} == {"MIT", "Apache-2.0"}
    radar = {card.name for card in gk.list_backbones(sensor="sentinel1")}
    assert {"croma_base_s1", "dofa_base", "panopticon_base"} <= radar
    assert "croma_base" not in radar
    cirrus = gk.list_backbones(sensor=["B10"])
    assert cirrus and all("CIRRUS" in (*c.bands, *c.also_reads) for c in cirrus)
    small = gk.list_backbones(max_parameters=25e6)
    assert small and all(card.parameters <= 25e6 for card in small)
    one = gk.list_backbones(sensor="sentinel2_l1c", max_parameters=22_381_440)
    assert [card.name for card in one] == ["softcon_vit_small"]
    assert not gk.list_backbones(licence="MIT", sensor="sentinel1", max_parameters=1)
    assert gk.list_backbones() == everything


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"licence": "GPL"}, ValueError, r"no backbone has licence='GPL'.*'MIT'"),
        ({"licence": [3]}, TypeError, "licence=3"),
        ({"sensor": "sentinel9"}, ValueError, "unknown band 'sentinel9'.*sentinel1"),
        ({"max_parameters": 0}, ValueError, "max_parameters=0: a number above 0"),
        ({"max_parameters": "1M"}, ValueError, "max_parameters='1M'"),
        ({"max_parameters": True}, ValueError, "max_parameters=True"),
    ],
)
def test_filters_that_make_no_sense(wrong: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        gk.list_backbones(**wrong)
