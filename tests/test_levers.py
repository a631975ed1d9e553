"""Levers of memory and time: equal numbers where that is claimed, and less memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import geopeft_kit as gk
from geopeft_kit.data.batch import Batch
from geopeft_kit.training.batch_size import with_batch_size
from geopeft_kit.training.checkpointing import checkpointed
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.frozen_precision import frozen_held_in
from geopeft_kit.training.prefix_cache import Prefix, first_trained_block
from geopeft_kit.training.step import make_loss, rule_of, step
from geopeft_kit.training.tracker import count_saved_bytes
from tests.test_training import copy_state, make_model
from tests.toy import BANDS, toy_data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEOPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def gradients(model, how: str | None = None) -> tuple[dict, int]:
    """Gradients of one batch, and the bytes kept for them."""
    torch.manual_seed(1)
    batch = {
        "image": torch.rand(4, 6, 32, 32),
        "mask": torch.randint(0, 2, (4, 32, 32)),
    }
    loss, rule = make_loss(model.task), rule_of(model)
    model.train().zero_grad()
    with checkpointed(model, how):
        with count_saved_bytes(model) as saved:
            value = step(model, Batch.of(batch), loss, rule=rule)
        value.backward()
    named = model.named_parameters()
    return {n: p.grad for n, p in named if p.grad is not None}, sum(saved.values())


def shaken(method: str, **options):
    """A model whose method is past its start: zeros would hide differences."""
    model = make_model(method, decoder="unet", **options)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


EVERYDAY = ("lora",)
OTHERS = [
    card.name
    for card in gk.list_methods()
    if card.name not in (*EVERYDAY, "frozen")
    and card.supports(gk.load_backbone("geopeft_tiny", weights=None))
]


@pytest.mark.parametrize("how", ["blocks", "mlp"])
@pytest.mark.parametrize(
    "method",
    [*EVERYDAY, *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)],
)
def test_checkpointing_changes_no_bit(method: str, how: str) -> None:
    model = shaken(method)
    plain, kept = gradients(model)
    again, less = gradients(model, how)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert less < kept
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_checkpointing_changes_no_bit_of_bf16_either() -> None:
    """The two memory levers together; and 16 bits point where 32 do."""
    model = shaken("lora")
    exact = torch.cat([g.flatten() for g in gradients(model)[0].values()])
    with frozen_held_in(model, "bf16"), torch.autocast("cpu", torch.bfloat16):
        plain, kept = gradients(model)
        again, less = gradients(model, "blocks")
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert less < kept
    rounded = torch.cat([g.flatten() for g in plain.values()])
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.95


@pytest.mark.slow
def test_checkpointed_batch_norms_count_a_batch_once() -> None:
    torch.manual_seed(0)
    backbone = gk.load_backbone(
        "timm:resnet18", BANDS, weights=None, new_bands="random"
    )
    model = gk.build_model(backbone, "linear")
    start = copy_state(model)
    ends = []
    for how in (None, "blocks"):
        model.load_state_dict(start)
        gradients(model, how)
        ends.append(copy_state(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)
    assert not torch.equal(
        start["backbone.model.bn1.running_mean"],
        ends[0]["backbone.model.bn1.running_mean"],
    )


def test_no_mlp_no_lever() -> None:
    backbone = gk.load_backbone(
        "timm:resnet18", BANDS, weights=None, new_bands="random"
    )
    with pytest.raises(ValueError, match="have no MLP"):
        gradients(gk.build_model(backbone, "linear"), "mlp")


def trained(data: gk.ChipData, method: str = "lora", epochs: int = 2, **arguments):
    """Final weights of what trained, and the run."""
    options = {"layers": arguments.pop("layers")} if "layers" in arguments else {}
    model = make_model(method, **options)
    run = gk.fit(model, data, epochs, head_start="none", progress=False, **arguments)
    return copy_state(model), run


@pytest.mark.slow
def test_fit_with_levers_that_change_no_bit(data: gk.ChipData) -> None:
    plain, first = trained(data)
    for lever in ({"checkpointing": "blocks"}, {"checkpointing": "mlp"}):
        state, run = trained(data, **lever)
        assert all(torch.equal(plain[n], state[n]) for n in plain), lever
        assert run.resources.activations_mib < first.resources.activations_mib


@pytest.mark.slow
def test_frozen_bf16_is_mixed_precision_bit_for_bit(data: gk.ChipData) -> None:
    """Mixed precision rounds a frozen matrix at each use; here it is rounded once."""
    mixed, first = trained(data, precision="bf16-mixed")
    held, run = trained(data, frozen_precision="bf16")
    assert all(torch.equal(mixed[n], held[n]) for n in mixed)
    assert run.resources.weights_mib < 0.65 * first.resources.weights_mib
    assert run.resources.activations_mib < first.resources.activations_mib
    assert run.metrics == first.metrics


def test_frozen_weights_come_back(data: gk.ChipData) -> None:
    model = make_model("lora")
    before = copy_state(model)
    with pytest.raises(RuntimeError, match="on the way"), frozen_held_in(model, "bf16"):
        assert any(p.dtype == torch.bfloat16 for p in model.parameters())
        scores = gk.evaluate(model, data, "val")["overall"]  # as early stopping does
        assert 0 <= scores["miou"] <= 1
        raise RuntimeError("on the way")
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert all(after[n].dtype == t.dtype for n, t in before.items())


SIXTEEN_LEVELS = """
    import torch
    import geopeft_kit as gk
    from geopeft_kit.training.frozen_precision import quantised
    from tests.test_levers import copy_state, gradients, shaken

    model = shaken("lora")
    before = copy_state(model)
    plain, _ = gradients(model)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    with quantised(model), torch.autocast("cpu", torch.bfloat16):
        rounded, _ = gradients(model)
    assert plain.keys() == rounded.keys()
    one = torch.cat([g.flatten() for g in plain.values()])
    two = torch.cat([g.flatten() for g in rounded.values()])
    print(float(torch.cosine_similarity(one, two, dim=0)))
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
"""


@pytest.mark.slow
def test_four_bits_train_almost_alike(repo: Path) -> None:
    """bitsandbytes' own layers, on the CPU, where it computes too."""
    pytest.importorskip("bitsandbytes")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(repo), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(SIXTEEN_LEVELS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert float(run.stdout.splitlines()[-1]) > 0.9


def test_four_bits_are_refused_kindly(data: gk.ChipData) -> None:
    with pytest.raises(ValueError, match="serves 'lora'"):
        trained(data, "vpt", frozen_precision="nf4")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            trained(data, frozen_precision="nf4")


@pytest.mark.slow
def test_fused_adamw_trains_alike(data: gk.ChipData) -> None:
    plain, _ = trained(data)
    fused, _ = trained(data, optimiser="fused")
    for name in plain:
        torch.testing.assert_close(plain[name], fused[name], atol=1e-5, rtol=1e-4)


def test_8bit_is_refused_kindly(
    data: gk.ChipData, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torchao", "torchao.optim", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install torchao"):
        trained(data, optimiser="8bit")
    with pytest.raises(ValueError, match="allowed are adamw, fused, 8bit"):
        trained(data, optimiser="sgd")


@pytest.mark.slow
def test_cached_variants_are_the_augmented_images(tmp_path: Path) -> None:
    data = toy_data(tmp_path)
    augmented = gk.ChipData(data.folder, split="index", batch_size=4, augment=True)
    plain, _ = trained(augmented, "frozen", cache_features=False)
    cached, _ = trained(augmented, "frozen", cache_features=True)
    for name in plain:
        torch.testing.assert_close(plain[name], cached[name], atol=2e-5, rtol=1e-4)


def test_large_caches_lie_on_disk_and_are_found_again(
    data: gk.ChipData, cache: Path
) -> None:
    model = make_model("frozen")
    small = FeatureCache(model, data.dataloader("train"))
    assert not cache.exists()
    large = FeatureCache(model, data.dataloader("train"), limit_mib=0.001)
    (folder,) = cache.iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = FeatureCache(model, data.dataloader("train"), limit_mib=0.001)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    for one, two, three in zip(small.maps, large.maps, again.maps, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    with torch.no_grad():
        model.backbone.model.norm.bias.add_(0.01)  # other weights, another name
    FeatureCache(model, data.dataloader("train"), limit_mib=0.001)
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_is_said(
    data: gk.ChipData, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GEOPEFT_CACHE"):
        FeatureCache(make_model("frozen"), data.dataloader("train"), limit_mib=0.001)
    assert not cache.exists()


@pytest.mark.slow
def test_prefix_cache_trains_like_the_images(data: gk.ChipData) -> None:
    plain, _ = trained(data, layers="last:2")
    cached, run = trained(data, layers="last:2", cache_prefix=True, validate_every=1)
    for name in plain:
        torch.testing.assert_close(plain[name], cached[name], atol=2e-5, rtol=1e-4)
    assert run.history["val_miou"].iloc[-1] == pytest.approx(
        run.metrics["overall"]["miou"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["timm:swin_tiny_patch4_window7_224", "timm:convnext_atto", "timm:resnet18"]
)
def test_prefix_of_stages(name: str) -> None:
    torch.manual_seed(0)
    options = {"image_size": 64} if "swin" in name else {}
    backbone = gk.load_backbone(
        name, BANDS, weights=None, new_bands="random", **options
    )
    gk.attach(backbone, "last_blocks", number=1)
    model = gk.build_model(backbone, "unet").eval()
    prefix, image = Prefix(model), torch.rand(2, 6, 64, 64)
    with torch.no_grad():
        stored = prefix.record(Batch.of({"image": image}))
        for one, two in zip(
            model.features(image), prefix.features(stored, (64, 64)), strict=True
        ):
            torch.testing.assert_close(one, two)


def test_prefix_is_refused_where_it_cannot_serve() -> None:
    assert first_trained_block(make_model("lora", layers="last:2")) == 4
    for method, message in (
        ("lora", "the first block trains"),
        ("frozen", "nothing trains"),
        ("bias", "trains outside the blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            Prefix(make_model(method))


@pytest.mark.slow
def test_batch_size_of_one_run(data: gk.ChipData) -> None:
    model = make_model("lora")
    run = gk.fit(model, data, 1, batch_size=2, head_start="none", progress=False)
    assert run.settings["batch_size"] == 2 and data.batch_size == 4
    for wrong in (0, "large", 2.0):
        with pytest.raises(ValueError, match="whole number from 1"):
            gk.fit(model, data, 1, batch_size=wrong, progress=False)


@pytest.mark.slow
def test_automatic_batch_fits_and_moves_nothing(data: gk.ChipData) -> None:
    model = make_model("lora")
    estimate = gk.estimate_memory(model, 4, image_size=32)
    fixed = estimate.total_mib - 4 * estimate.per_image_mib
    room = (fixed + 6.5 * estimate.per_image_mib) / 1024
    run = gk.fit(
        model, data, 1, batch_size="auto", memory_gib=room, head_start="none",
        progress=False,
    )  # fmt: skip
    assert run.settings["batch_size"] == 6
    other = make_model("lora")
    gk.fit(other, with_batch_size(data, 6), 1, head_start="none", progress=False)
    same = copy_state(other)
    assert all(torch.equal(same[n], t) for n, t in model.state_dict().items())
    with pytest.raises(MemoryError, match="cheapest ways out"):
        gk.fit(make_model("full"), data, 1, batch_size="auto", memory_gib=0.001)


STARVED = """
    import resource, sys
    from pathlib import Path
    import torch
    import geopeft_kit as gk
    from tests.test_training import make_model
    from tests.toy import toy_data

    data = toy_data(Path(sys.argv[1]), size=64, chips=48, batch_size=32)
    few = data.subset(4)
    model = make_model("full", decoder="unet")
    gk.fit(model, few, 1, batch_size=2, head_start="none", progress=False)
    gk.estimate_memory(model, 2)  # what is imported later takes room as well
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    limit = used + 250 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(
        resource.RLIMIT_AS)[1]))
    try:
        gk.fit(model, data, 1, head_start="none", memory_gib=0.25, progress=False)
    except MemoryError as error:
        print(error)
    image = data.dataset("train")[0]["image"][None]
    print("alive", tuple(model(image).shape))
    run = gk.fit(model, few, 1, batch_size=2, checkpointing="blocks",
                 head_start="none", progress=False)
    print("trained", len(run.history))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="setrlimit as Linux has it")
def test_a_real_failed_allocation_leaves_all_alive(tmp_path: Path, repo: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(STARVED), str(tmp_path / "data")]
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    ways = [line for line in lines if line[:2] in ("1.", "2.", "3.")]
    assert len(ways) == 3 and all("fit(..., " in way for way in ways)
    assert "out of memory: 'full' at batch 32" in run.stdout
    assert "alive (1, 2, 64, 64)" in lines
    assert "trained 1" in lines
