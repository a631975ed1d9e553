"""PhilEO: counts, parity with PyTorch functions on the same tensors, locks, methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbone_table import refuses, shrink
from plain_vit import (
    State,
    assert_close,
    block,
    block_shapes,
    norm,
    random_state,
)
from torch import Tensor

import geopeft_kit as gk
from geopeft_kit.backbones import find_card, load_backbone

UNET, VIT = "phileo_unet_44m", "phileo_vit_100m"
SIZE, DIMS, DEPTHS, LATENT = 32, (4, 6, 8, 32), (1, 2, 1, 1), 12
WIDTH, HEADS, OUT = 32, 4, 16
PER_CHANNEL = ("scale", "bias")


@pytest.fixture
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    sizes = {"dims": DIMS, "depths": DEPTHS, "latent": LATENT}
    shrink(monkeypatch, UNET, image_size=SIZE, architecture=sizes, depth=10)
    sizes = {"heads": HEADS, "head_width": OUT}
    shrink(monkeypatch, VIT, image_size=SIZE, architecture=sizes, width=WIDTH, depth=4)
    with torch.no_grad():
        yield


def test_counts_of_the_public_code() -> None:
    # That the cards count their networks is tested for all cards at once.
    assert f"{find_card('phileo_unet_44m').parameters / 1e6:.3f}" == "43.668"
    assert f"{find_card('phileo_unet_200m').parameters / 1e6:.3f}" == "206.861"
    assert f"{find_card('phileo_vit_100m').parameters / 1e6:.2f}" == "111.09"
    assert f"{find_card('phileo_vit_300m').parameters / 1e6:.2f}" == "318.61"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "millions"), [("100m", 111.83), ("300m", 320.08)])
def test_counts_with_patches_of_16_pixels(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = load_backbone(f"phileo_vit_{size}", weights=None, patch=16).model
    found = sum(parameter.numel() for parameter in model.parameters())
    assert round(found / 1e6, 2) == millions
    assert f"{millions} M with patch=16" in find_card(f"phileo_vit_{size}").notes


# --- the U-Net ------------------------------------------------------------------------


def cnn_shapes(prefix: str, inputs: int, outputs: int, size: int) -> dict:
    """A block's tensors under the names of building_blocks.py."""
    hidden = max(1, outputs // 16)
    spatial = (outputs, size, size)
    shapes = {
        "squeeze.excitation.0.weight": (hidden, outputs),
        "squeeze.excitation.2.weight": (outputs, hidden),
        "norm1.weight": spatial,
        "norm1.bias": spatial,
        "norm2.weight": spatial,
        "norm2.bias": spatial,
        "conv1.weight": (outputs, inputs, 1, 1),
        "conv2.weight": (outputs, outputs, 3, 3),
        "conv3.weight": (outputs, outputs, 1, 1),
        "conv3.bias": (outputs,),
    } | scaler_shapes("scaler.", outputs)
    if inputs != outputs:
        shapes["matcher.weight"] = (outputs, inputs, 1, 1)
    return {prefix + key: shape for key, shape in shapes.items()}


def scaler_shapes(prefix: str, channels: int) -> dict:
    return {
        f"{prefix}{side}_skip{what}": (1, channels, 1, 1)
        for side in "xy"
        for what in PER_CHANNEL
    }


def layer_shapes(prefix: str, *shape: int) -> dict:
    return {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}


def norm_shapes(prefix: str, *shape: int) -> dict:
    return {f"{prefix}.weight": shape, f"{prefix}.bias": shape}


def unet_state() -> State:
    sizes = [SIZE // 2**level for level in range(4)]
    flat = DIMS[-1] * sizes[-1] ** 2
    shapes = cnn_shapes("stem.", 10, DIMS[0], SIZE)
    shapes |= cnn_shapes("head.", DIMS[0], 10, SIZE)
    for level, (width, depth, size) in enumerate(zip(DIMS, DEPTHS, sizes, strict=True)):
        up = len(DIMS) - 1 - level
        shapes |= scaler_shapes(f"encoder.block_scalers.{level}.", width)
        shapes |= scaler_shapes(f"decoder.block_scalers.{up}.", width)
        shapes |= scaler_shapes(f"decoder.skip_scalers.{up}.", width)
        for number in range(depth):
            for place in (f"encoder.blocks_down.{level}", f"decoder.blocks_up.{up}"):
                shapes |= cnn_shapes(f"{place}.{number}.", width, width, size)
        if level < 3:
            deeper, down = DIMS[level + 1], f"encoder.downsample.{level}.0"
            shapes |= layer_shapes(down, deeper, width, 1, 1)
            step = f"decoder.upsamplers.{up - 1}"
            shapes[f"{step}.1.weight"] = (width, deeper, 3, 3)
            shapes |= norm_shapes(f"{step}.2", width, size, size)
    corner = (DIMS[-1], sizes[-1], sizes[-1])
    shapes |= norm_shapes("encoder.prelinear_norm", *corner)
    shapes |= norm_shapes("decoder.latent_norm", *corner)
    shapes |= norm_shapes("decoder.prehead_norm", DIMS[0], SIZE, SIZE)
    shapes |= layer_shapes("encoder.linear_encode.1", LATENT, flat)
    shapes |= norm_shapes("encoder.linear_encode.2", LATENT)
    shapes |= layer_shapes("decoder.linear_decode", flat, LATENT)
    for name, count in {
        "clouds": 4,
        "landcover": 11,
        "buildings": 1,
        "coords": 4,
    }.items():
        shapes |= layer_shapes(f"encoder.head_{name}.0", count, LATENT)
    return random_state(shapes)


def scaled(state: State, prefix: str, x: Tensor, y: Tensor) -> Tensor:
    gx, gy = state[f"{prefix}x_skipscale"], state[f"{prefix}y_skipscale"]
    return gx * x + state[f"{prefix}x_skipbias"] + gy * y + state[f"{prefix}y_skipbias"]


def bordered(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel)


def cnn(state: State, prefix: str, x: Tensor, act=F.gelu) -> Tensor:
    shortcut = x
    if f"{prefix}matcher.weight" in state:
        shortcut = F.conv2d(x, state[f"{prefix}matcher.weight"])
    y = F.conv2d(x, state[f"{prefix}conv1.weight"])
    y = act(norm(state, f"{prefix}norm1", y, 1e-5))
    y = bordered(y, state[f"{prefix}conv2.weight"])
    y = act(norm(state, f"{prefix}norm2", y, 1e-5))
    y = F.conv2d(y, state[f"{prefix}conv3.weight"], state[f"{prefix}conv3.bias"])
    gate = F.gelu(y.mean((2, 3)) @ state[f"{prefix}squeeze.excitation.0.weight"].T)
    gate = (gate @ state[f"{prefix}squeeze.excitation.2.weight"].T).sigmoid()
    return act(scaled(state, f"{prefix}scaler.", y * gate[..., None, None], shortcut))


def stack(state: State, blocks: str, scaler: str, depth: int, x: Tensor) -> Tensor:
    before = x
    for number in range(depth):
        x = cnn(state, f"{blocks}.{number}.", x)
    return scaled(state, scaler, x, before)


def plain_unet(state: State, image: Tensor) -> list[Tensor]:
    x = cnn(state, "stem.", image)
    skips = []
    for level, depth in enumerate(DEPTHS):
        blocks = f"encoder.blocks_down.{level}"
        x = stack(state, blocks, f"encoder.block_scalers.{level}.", depth, x)
        skips.append(x)
        if level < 3:
            down = f"encoder.downsample.{level}.0"
            x = F.conv2d(x, state[f"{down}.weight"], state[f"{down}.bias"])
            x = F.max_pool2d(x, 2)
    shape = x.shape
    x = F.gelu(norm(state, "encoder.prelinear_norm", x, 1e-5).flatten(1))
    for name in ("encoder.linear_encode.1", "decoder.linear_decode"):
        x = F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
        if "encode." in name:
            x = norm(state, "encoder.linear_encode.2", x, 1e-5)
    x = norm(state, "decoder.latent_norm", x.view(shape), 1e-5)
    maps = []
    for level, depth in enumerate(reversed(DEPTHS)):
        x = scaled(state, f"decoder.skip_scalers.{level}.", x, skips[-1 - level])
        blocks = f"decoder.blocks_up.{level}"
        x = stack(state, blocks, f"decoder.block_scalers.{level}.", depth, x)
        maps.append(x)
        if level < 3:
            step = f"decoder.upsamplers.{level}"
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = bordered(x, state[f"{step}.1.weight"])
            x = F.gelu(norm(state, f"{step}.2", x, 1e-5))
    maps[-1] = norm(state, "decoder.prehead_norm", maps[-1], 1e-5)
    return maps[::-1]


def save(state: State, path: Path) -> Path:
    torch.save({"model": state, "epoch": 3, "best_score": -1.0}, path)
    return path


@pytest.mark.usefixtures("shrunken")
def test_unet_equals_plain_pytorch(tmp_path: Path) -> None:
    state = unet_state()
    file = save(state, tmp_path / "phileo_cnn_epoch_3.pt")
    ours = load_backbone(UNET, weights=file)
    image = torch.rand(2, 10, SIZE, SIZE)
    maps = ours(image)
    assert_close(maps, plain_unet(state, image))
    assert [m.shape[1] for m in maps] == ours.channels == list(DIMS)
    assert [SIZE // m.shape[2] for m in maps] == ours.strides == [1, 2, 4, 8]

    some = load_backbone(UNET, ["RED", "NIR_BROAD", "BLUE"], file)
    whole = torch.zeros(2, 10, SIZE, SIZE)
    whole[:, [2, 3, 0]] = image[:, :3]  # RED, NIR_BROAD, BLUE in the loader's order
    assert_close(some(image[:, :3]), plain_unet(state, whole))

    del state["decoder.latent_norm.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(decoder.latent_norm.bias\)"):
        load_backbone(UNET, weights=save(state, tmp_path / "broken.pt"))


@pytest.mark.usefixtures("shrunken")
def test_unet_is_locked_to_its_size() -> None:
    backbone = load_backbone(UNET, weights=None)
    with pytest.raises(ValueError, match=r"40 x 32 px.*locked to 32 x 32 px"):
        backbone(torch.rand(1, 10, 40, 32))
    with pytest.raises(ValueError, match=r"image_size=64.*locked to 32"):
        load_backbone(UNET, weights=None, image_size=64)
    assert load_backbone(UNET, weights=None, image_size=SIZE).image_size == SIZE
    with pytest.raises(ValueError, match=r"cannot be downloaded.*huggingface.co"):
        load_backbone(UNET)


@pytest.mark.usefixtures("shrunken")
def test_unet_refuses_methods_with_a_reason_and_takes_a_decoder() -> None:
    backbone = load_backbone(UNET, weights=None)
    image = torch.rand(2, 10, SIZE, SIZE)
    reasons = refuses(backbone)
    assert "gain for every pixel" in reasons["ssf"]
    assert "token sequence" in reasons["vpt"]
    with pytest.raises(ValueError, match="pads with the values at its border"):
        gk.attach(backbone, "lora", targets=("conv2",))
    model = gk.build_model(backbone, decoder="unet", num_classes=3)
    assert model(image).shape == (2, 3, SIZE, SIZE)


# --- ViT-UPerNet ----------------------------------------------------------------------


def unit_shapes(prefix: str, inputs: int, size: int) -> dict:
    """mmseg's ConvModule: convolution and batch norm."""
    shapes = {f"{prefix}.conv.weight": (OUT, inputs, size, size)}
    for name in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{prefix}.bn.{name}"] = (OUT,)
    return shapes


def vit_state(patch: int, stem: bool) -> State:
    """Everything under the names of vit_upernet_pretraining.py."""
    encoder, decoder = "encoder.vit_encoder", "decoder.decoder_upernet"
    side, channels = SIZE // patch, (WIDTH // 4, WIDTH // 2, WIDTH, WIDTH)
    shapes = {
        f"{encoder}.cls_token": (1, 1, WIDTH),
        f"{encoder}.pos_embed": (1, 1 + side * side, WIDTH),
    }
    shapes |= layer_shapes(f"{encoder}.patch_embed.proj", WIDTH, 10, patch, patch)
    shapes |= norm_shapes(f"{encoder}.norm", WIDTH)
    for number in range(4):
        shapes |= block_shapes(f"{encoder}.blocks.{number}.", WIDTH, split=False)
    half, quarter = WIDTH // 2, WIDTH // 4
    for name, inputs, outputs in (
        ("fpn1.0", WIDTH, half),
        ("fpn1.3", half, quarter),
        ("fpn2.0", WIDTH, half),
    ):
        shapes[f"decoder.{name}.weight"] = (inputs, outputs, 2, 2)
        shapes[f"decoder.{name}.bias"] = (outputs,)
    for name in ("fpn1.1", "fpn2.1"):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"decoder.{name}.{part}"] = (half,)
    for number in range(4):
        shapes |= unit_shapes(f"{decoder}.psp_modules.{number}.1", WIDTH, 1)
    for number in range(3):
        shapes |= unit_shapes(f"{decoder}.lateral_convs.{number}", channels[number], 1)
        shapes |= unit_shapes(f"{decoder}.fpn_convs.{number}", OUT, 3)
    shapes |= unit_shapes(f"{decoder}.bottleneck", WIDTH + 4 * OUT, 3)
    shapes |= unit_shapes(f"{decoder}.fpn_bottleneck", 4 * OUT, 3)
    if stem:
        shapes |= cnn_shapes("stem.", 10, 10, SIZE)
    state = random_state(shapes)
    for key in state:
        if key.endswith("running_var"):
            state[key] = 0.5 + state[key].abs()
    counters = {
        key.replace("running_var", "num_batches_tracked"): torch.tensor(7)
        for key in state
        if key.endswith("running_var")
    }
    return state | counters


def rest(state: State) -> State:
    """What the file holds besides: heads, and the neck a second time."""
    again = {
        key.replace("decoder.fpn", "decoder.sample_list_base."): tensor
        for key, tensor in state.items()
        if key.startswith("decoder.fpn")
    }
    return again | {
        "encoder.linear_proj.weight": torch.zeros(LATENT, WIDTH),
        "encoder.head_clouds.weight": torch.zeros(4, LATENT),
        "encoder.head_coords.0.bias": torch.zeros(4),
        "decoder.decoder_upernet.conv_seg.weight": torch.zeros(10, OUT, 1, 1),
        "head.conv1.weight": torch.zeros(10, 10, 1, 1),
    }


def unit(state: State, prefix: str, x: Tensor) -> Tensor:
    kernel = state[f"{prefix}.conv.weight"]
    return bn(state, f"{prefix}.bn", F.conv2d(x, kernel, padding="same"))


def bn(state: State, prefix: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{prefix}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).relu()


def turned(state: State, prefix: str, x: Tensor) -> Tensor:
    weight, bias = state[f"{prefix}.weight"], state[f"{prefix}.bias"]
    return F.conv_transpose2d(x, weight, bias, stride=2)


def like(x: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(x, other.shape[2:], mode="bilinear")


def plain_vit(state: State, image: Tensor, patch: int) -> list[Tensor]:
    encoder, neck, head = "encoder.vit_encoder", "decoder.", "decoder.decoder_upernet"
    if "stem.conv1.weight" in state:
        image = cnn(state, "stem.", image, F.leaky_relu)
    proj = f"{encoder}.patch_embed.proj"
    x = F.conv2d(image, state[f"{proj}.weight"], state[f"{proj}.bias"], stride=patch)
    grid = x.shape[2:]
    first = state[f"{encoder}.cls_token"].expand(len(x), -1, -1)
    x = torch.cat([first, x.flatten(2).mT], dim=1) + state[f"{encoder}.pos_embed"]
    taps = []
    for number in range(4):
        x = block(state, f"{encoder}.blocks.{number}.", x, HEADS, 1e-5)
        seen = norm(state, f"{encoder}.norm", x, 1e-5) if number == 3 else x
        taps.append(seen[:, 1:].mT.unflatten(2, grid))
    one = bn(state, f"{neck}fpn1.1", turned(state, f"{neck}fpn1.0", taps[0]))
    levels = [
        turned(state, f"{neck}fpn1.3", one),
        bn(state, f"{neck}fpn2.1", turned(state, f"{neck}fpn2.0", taps[1])),
        taps[2],
        F.max_pool2d(taps[3], 2),
    ]
    deep = levels[3]
    pooled = [
        like(
            unit(state, f"{head}.psp_modules.{i}.1", F.adaptive_avg_pool2d(deep, n)),
            deep,
        )
        for i, n in enumerate((1, 2, 3, 6))
    ]
    out = [unit(state, f"{head}.lateral_convs.{i}", levels[i]) for i in range(3)]
    out.append(unit(state, f"{head}.bottleneck", torch.cat([deep, *pooled], dim=1)))
    for i in (3, 2, 1):
        out[i - 1] = out[i - 1] + like(out[i], out[i - 1])
    out = [unit(state, f"{head}.fpn_convs.{i}", out[i]) for i in range(3)] + [out[3]]
    joined = torch.cat([like(x, out[0]) for x in out], dim=1)
    return [unit(state, f"{head}.fpn_bottleneck", joined), *out[1:]]


@pytest.mark.usefixtures("shrunken")
@pytest.mark.parametrize(("patch", "stem"), [(4, True), (4, False), (16, True)])
def test_vit_equals_plain_pytorch(tmp_path: Path, patch: int, stem: bool) -> None:
    state = vit_state(patch, stem)
    file = save(state | rest(state), tmp_path / "vit.pt")
    ours = load_backbone(VIT, weights=file, patch=patch)
    image = torch.rand(2, 10, SIZE, SIZE)
    maps = ours(image)
    assert_close(maps, plain_vit(state, image, patch))
    strides = [patch // 4, patch // 2, patch, 2 * patch]
    assert [SIZE // m.shape[2] for m in maps] == ours.strides == strides
    other = 20 - patch
    with pytest.raises(ValueError, match=rf"patches of {patch} px.*patch={patch}"):
        load_backbone(VIT, weights=file, patch=other)


@pytest.mark.usefixtures("shrunken")
def test_vit_with_a_stem_is_locked(tmp_path: Path) -> None:
    state = vit_state(4, stem=True)
    file = save(state | rest(state), tmp_path / "vit.pt")
    ours = load_backbone(VIT, weights=file)
    with pytest.raises(ValueError, match="locked to 32 x 32 px"):
        ours(torch.rand(1, 10, 64, 64))
    with pytest.raises(ValueError, match="needs all its bands"):
        load_backbone(VIT, ["RED"], file)
    with pytest.raises(ValueError, match="takes 4 or 16"):
        load_backbone(VIT, weights=None, patch=8)
