"""timm: DINOv3, state-space models, other sizes of Swin, and a net from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from backbone_table import check_method, refuses
from plain_vit import assert_close, stirred
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import geopeft_kit as gk
from geopeft_kit.backbones import find_card, load_backbone, timm_zoo

DINO = "timm:vit_small_patch16_dinov3.lvd1689m"


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# --- DINOv3 ---------------------------------------------------------------------------


def small_dino(*_: object) -> nn.Module:
    return timm.create_model(
        "vit_small_patch16_dinov3",
        num_classes=0,
        dynamic_img_size=True,
        embed_dim=48,
        depth=4,
        num_heads=3,
    )


@pytest.fixture
def thin_dino(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The name stands for a network of four thin blocks."""
    monkeypatch.setattr(timm_zoo, "_network", small_dino)
    timm_zoo.make_card.cache_clear()
    yield
    timm_zoo.make_card.cache_clear()


def meta_layout(model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names of Meta's own repository."""
    state = {
        "mask_token": torch.zeros(1, 48),
        "rope_embed.periods": torch.ones(4),
    }
    for key, tensor in model.state_dict().items():
        key = key.replace("reg_token", "storage_tokens")
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[key] = tensor
        if key.endswith("qkv.weight"):
            state[key.replace("weight", "bias_mask")] = torch.zeros(144)
            state[key.replace("weight", "bias")] = torch.zeros(144)
    return state


@pytest.mark.usefixtures("thin_dino")
@pytest.mark.parametrize("layout", ["timm", "meta"])
def test_dino_equals_timms_class(tmp_path: Path, layout: str) -> None:
    theirs = stirred(small_dino())
    state = theirs.state_dict() if layout == "timm" else meta_layout(theirs)
    torch.save(state, tmp_path / "dino.pth")
    ours = load_backbone(DINO, weights=tmp_path / "dino.pth")
    assert ours.num_prefix_tokens == 5  # class and four registers
    for height, width in ((64, 64), (48, 96)):
        image = torch.rand(2, 3, height, width)
        maps = theirs.forward_intermediates(
            ours.normalised(image), indices=4, intermediates_only=True
        )
        last = theirs.forward_features(ours.normalised(image))[:, 5:]
        maps[3] = last.mT.unflatten(2, (height // 16, width // 16))
        assert_close(ours(image), maps)


@pytest.mark.usefixtures("thin_dino")
def test_dino_takes_methods_that_wrap_its_blocks() -> None:
    backbone = load_backbone(DINO, weights=None)
    stirred(backbone.model)
    image = torch.rand(1, 3, 32, 64)
    methods = ["lora", "vpt", "bias", "norm", "ssf", "adaptformer", "mona"]
    for name in (*methods, "houlsby", "convpass"):
        check_method(backbone, name, image)
    assert "VisionTransformer" in refuses(backbone)["deflect"]


@pytest.mark.usefixtures("thin_dino")
def test_prompts_are_not_turned_and_leave_the_patches_their_places() -> None:
    backbone = load_backbone(DINO, weights=None)
    stirred(backbone.model)
    backbone(torch.rand(1, 3, 32, 64))
    attention, turns = backbone.model.blocks[0].attn, backbone.rotary.rotations
    tokens = torch.rand(1, 5 + 2 + 8, 48)
    head = tokens.shape[2] // 3
    still = torch.cat([torch.zeros(2, head), torch.ones(2, head)], dim=1)
    hook = attention._forward_pre_hooks
    wanted = attention(tokens)
    saved = dict(hook)
    hook.clear()
    by_hand = attention(tokens, rope=torch.cat([still, turns]))
    hook.update(saved)
    torch.testing.assert_close(wanted, by_hand)


def test_dino_of_satellite_images_on_its_card() -> None:
    name = "timm:vit_large_patch16_dinov3.sat493m"
    card = find_card(name)
    assert card.licence == "dinov3-license"
    assert "satellite images" in card.notes and "photographs" not in card.notes
    assert card.normalisation.mean == (0.43, 0.411, 0.296)
    assert (card.width, card.depth, card.patch) == (1024, 24, 16)
    with torch.device("meta"):
        backbone = load_backbone(name, weights=None)
    found = sum(p.numel() for p in backbone.model.parameters())
    assert found == card.parameters and abs(found - 303.1e6) < 1e5
    with pytest.raises(ValueError, match="is a Eva"):
        find_card("timm:eva02_tiny_patch14_224")


# --- state-space models and their control ---------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["efficientvim_m1", pytest.param("mambaout_femto", marks=pytest.mark.slow)],
)
def test_lora_works_on_1x1_convolutions(name: str) -> None:
    backbone = load_backbone(f"timm:{name}", weights=None)
    stirred(backbone.model)  # fresh ones end in values of 1e-10
    image = torch.rand(1, 3, 64, 64)
    adapter = gk.attach(backbone, "lora", rank=2)
    wrapped = {n.split(".lora")[0] for n, _ in adapter.named_parameters()}
    assert len(wrapped) >= len(backbone.blocks)
    if name == "efficientvim_m1":
        assert not any(isinstance(m, nn.Linear) for m in backbone.model.modules())
    adapter.detach()
    check_method(backbone, "lora", image)


@pytest.mark.slow
def test_merged_lora_on_a_state_space_model_is_the_same_network() -> None:
    backbone = load_backbone("timm:efficientvim_m1", weights=None)
    stirred(backbone.model)
    image = torch.rand(1, 3, 64, 64)
    before = backbone(image)
    adapter = gk.attach(backbone, "lora", rank=2)
    for parameter in adapter.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    adapted = backbone(image)
    assert not torch.allclose(adapted[3], before[3], atol=1e-2)
    adapter.merge()
    for merged, beside in zip(backbone(image), adapted, strict=True):
        scale = beside.abs().max().item()
        torch.testing.assert_close(merged, beside, atol=1e-4 * scale, rtol=1e-3)


# --- Swin at other sizes --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 256])
def test_swin_adapts_to_the_image(size: int) -> None:
    name = "timm:swin_tiny_patch4_window7_224.ms_in22k"
    card = find_card(name)
    assert (card.licence, card.image_size) == ("mit", 224)
    assert "huggingface.co" in card.source
    ours = load_backbone(name, weights=None, image_size=size)
    # timm pads each map to whole windows; a map smaller than a window is one window
    theirs = SwinTransformer(
        img_size=size, strict_img_size=False, num_classes=0, window_size=7
    ).eval()
    theirs.load_state_dict(ours.model.state_dict())
    image = torch.rand(1, 3, size, size)
    x = theirs.patch_embed(ours.normalised(image))
    maps = []
    for stage in theirs.layers:
        x = stage(x)
        maps.append(x.permute(0, 3, 1, 2))
    maps[3] = theirs.norm(x).permute(0, 3, 1, 2)
    assert_close(ours(image), maps)
    assert [m.shape[-1] for m in maps] == [size // s for s in ours.strides]
    assert ours(torch.rand(1, 3, 96, 160))[3].shape[-2:] == (3, 5)


# --- from scratch ---------------------------------------------------------------------


def test_from_scratch_is_random_on_purpose(tmp_path: Path) -> None:
    with torch.device("meta"):
        backbone = load_backbone("unet_resnet50", "hls")
        radar = load_backbone("unet_resnet50", ["VV", "VH"], new_bands="random")
        assert backbone.model.conv1.in_channels == 6
        assert radar.model.conv1.in_channels == 2
        with pytest.raises(ValueError, match="new_bands='random'"):
            load_backbone("unet_resnet50", ["VV", "VH"])
        torch.save({"conv1.weight": torch.zeros(64, 6, 7, 7)}, tmp_path / "own.pth")
        with pytest.raises(ValueError, match="missing"):
            load_backbone("unet_resnet50", weights=tmp_path / "own.pth")
    assert backbone.card.licence == "none: random weights"
    assert "no published weights" in backbone.card.cannot


@pytest.mark.slow
def test_the_unet_from_scratch_trains_whole() -> None:
    backbone = load_backbone("unet_resnet50", "hls")
    model = gk.build_model(backbone, decoder="unet", num_classes=2).train()
    image = torch.rand(2, 6, 64, 64)
    with torch.enable_grad():
        logits = model(image)
        logits.square().mean().backward()
    assert logits.shape == (2, 2, 64, 64)
    assert all(p.grad is not None for p in backbone.parameters())
