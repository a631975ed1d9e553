"""Adapters on disk: round trips, what is refused, and what plain `peft` reads."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_table import output, stir
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.files import hash_of
from geopeft_kit.methods import storage

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("norm", {"layers": "last:2"}),
    ("lora", {"rank": 3, "alpha": 5, "layers": [0, 3], "targets": ("q", "k", "fc2")}),
    ("lora", {"rank": 2, "init": "pissa"}),
    ("vpt", {"tokens": 3, "deep": False, "layers": [1, 2]}),
]


@functools.cache
def _made(name: str) -> Backbone:
    torch.manual_seed(0)
    return gk.load_backbone(name, weights=None).eval()


def make(name: str = "geopeft_tiny") -> Backbone:
    """The same small backbone every time; drawing random weights is the slow part."""
    return copy.deepcopy(_made(name))


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter = gk.attach(make(), "lora", rank=2)
    stir(adapter)
    return adapter.save(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "options"), METHODS, ids=[f"{m[0]}-{i}" for i, m in enumerate(METHODS)]
)
def test_round_trip(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    backbone = make()
    adapter = gk.attach(backbone, name, **options)
    stir(adapter)
    expected = output(backbone)
    folder = adapter.save(tmp_path / "adapter")
    assert backbone.adapter is adapter
    assert torch.equal(output(backbone), expected)

    other = make()
    loaded = gk.load_adapter(other, folder)
    assert torch.equal(output(other), expected)
    assert loaded.config == adapter.config
    assert loaded.num_parameters == adapter.num_parameters
    assert folder_size(folder) <= adapter.num_bytes + 30_000
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]


def test_statistics_that_moved_are_saved(tmp_path: Path) -> None:
    backbone, other = make("timm:resnet10t"), make("timm:resnet10t")
    adapter = gk.attach(backbone, "full")
    backbone.train()(torch.rand(2, len(backbone.bands), 64, 64))
    backbone.eval()
    folder = adapter.save(tmp_path / "adapter")
    frozen = output(other)
    gk.load_adapter(other, folder)
    assert torch.equal(output(other), output(backbone))
    assert not torch.allclose(output(other), frozen, atol=1e-3)


def test_the_description_is_readable(saved: Path) -> None:
    description = json.loads((saved / "adapter.json").read_text())
    assert description["method"] == "lora"
    assert description["config"]["rank"] == 2
    assert description["config"]["targets"] == ["q", "v", "fc1", "fc2"]
    assert description["backbone"]["name"] == "geopeft_tiny"
    assert len(description["backbone"]["weights_hash"]) == 64
    assert description["geopeft_kit"] == gk.__version__
    tensors = load_file(saved / "adapter.safetensors")
    assert tensors["blocks.3.mlp.fc1.lora_A"].shape == (2, 192)


def test_tensors_that_share_memory_and_of_all_types_are_written(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    tensors = {
        "blocks.0.a": shared,
        "blocks.1.a": shared,
        "blocks.2.a": shared.T,
        "blocks.10.fc1.weight": torch.randn(5).half(),
        "count": torch.tensor(7),
        "empty": torch.randn(0, 2),
    }
    of = {"name": "x", "weights_hash": ""}
    storage.write_adapter(tmp_path, "x", {}, of, tensors)
    found = storage.read_adapter(tmp_path).tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


OLD = Path(__file__).parent / "fixtures" / "old_adapters"  # written by version 0.1.0


@pytest.mark.parametrize("name", ["lora", "ia3", "boft", "quantised_adapter"])
def test_adapters_of_an_older_version_load(name: str, tmp_path: Path) -> None:
    backbone = gk.load_backbone("geopeft_tiny").eval()
    image = torch.linspace(0, 0.6, 6 * 32 * 32).view(1, 6, 32, 32)
    expected = torch.tensor(json.loads((OLD / "expected.json").read_text())[name])
    with torch.no_grad():
        frozen = backbone(image)[-1].flatten()[:8]
        adapter = gk.load_adapter(backbone, OLD / name)
        found = backbone(image)[-1].flatten()[:8]
    assert adapter.name == name
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(frozen, expected, atol=1e-3)
    again = adapter.save(tmp_path / "new format")
    assert storage.read_adapter(again).tensors.keys() == adapter.packed().keys()
    for key, tensor in storage.read_adapter(OLD / name).tensors.items():
        assert torch.equal(tensor, storage.read_adapter(again).tensors[key]), key


@pytest.mark.parametrize("lines", [[], [{"name": "a", "shape": [9], "dtype": "x"}]])
def test_an_index_of_format_1_that_does_not_fit_is_refused(
    tmp_path: Path, lines: list[Any]
) -> None:
    folder = shutil.copytree(OLD / "lora", tmp_path / "lora")
    edit(folder, tensors=lines)
    with pytest.raises(ValueError, match=r"does not hold the tensors .*lists"):
        storage.read_adapter(folder)


def test_saving_again_replaces_and_keeps_other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    backbone = make()
    adapter = gk.attach(backbone, "bias")
    stir(adapter)
    expected = output(backbone)
    adapter.save(saved)
    other = make()
    assert gk.load_adapter(other, saved).name == "bias"
    assert torch.equal(output(other), expected)
    assert (saved / "notes.txt").read_text() == "mine"
    assert len(list(saved.iterdir())) == 3


def test_saving_does_not_need_the_adapter_to_be_active(tmp_path: Path) -> None:
    backbone = make()
    lora, bias = gk.attach(backbone, "lora", rank=2), gk.attach(backbone, "bias")
    stir(lora)
    stir(bias)
    lora.save(tmp_path / "lora")
    assert backbone.adapter is bias
    lora.activate()
    expected = output(backbone)
    other = make()
    gk.load_adapter(other, tmp_path / "lora")
    assert torch.equal(output(other), expected)


def test_training_goes_on_after_loading(saved: Path) -> None:
    backbone = make()
    adapter = gk.load_adapter(backbone, saved)
    sum(m.square().mean() for m in backbone(torch.rand(1, 6, 16, 16))).backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_loading_leaves_the_random_generator_alone(saved: Path) -> None:
    backbone = make()
    before = torch.random.get_rng_state()
    gk.load_adapter(backbone, saved)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- what is refused ----------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter.json"
    description = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(description))


def retensor(folder: Path, change: Any) -> None:
    """Change the tensors and write a description that agrees with them."""
    found = storage.read_adapter(folder)
    storage.write_adapter(
        folder, found.method, found.config, found.backbone, change(found.tensors)
    )


def truncate(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k != "blocks.2.mlp.fc1.lora_A"}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return without(tensors) | {"blocks.9.mlp.fc1.lora_A": torch.zeros(2, 192)}


def reshaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"blocks.2.mlp.fc1.lora_A": torch.zeros(3, 192)}


DAMAGE = {
    "name": (
        lambda f: edit(f, backbone={"name": "galileo_nano", "weights_hash": "0"}),
        "'galileo_nano'.*'geopeft_tiny'.*load_backbone",
    ),
    "weights": (
        lambda f: edit(f, backbone={"name": "geopeft_tiny", "weights_hash": "a1" * 32}),
        r"other weights.*a1a1a1a1a1a1, this backbone's is [0-9a-f]{12}",
    ),
    "method": (lambda f: edit(f, method="lorra"), "no method 'lorra'"),
    "format": (lambda f: edit(f, format=9), "format 9.*reads formats 1 to 2"),
    "truncated tensors": (
        lambda f: truncate(f, "adapter.safetensors"),
        "adapter.safetensors is truncated or changed",
    ),
    "truncated description": (
        lambda f: truncate(f, "adapter.json"),
        "adapter.json is truncated",
    ),
    "not a dictionary": (
        lambda f: (f / "adapter.json").write_text("[]"),
        "format None",
    ),
    "missing": (
        lambda f: retensor(f, without),
        r"Missing: \['blocks.2.mlp.fc1.lora_A'\]",
    ),
    "unexpected": (
        lambda f: retensor(f, renamed),
        r"Unexpected: \['blocks.9.mlp.fc1.lora_A'\]",
    ),
    "shape": (
        lambda f: retensor(f, reshaped),
        r"blocks.2.mlp.fc1.lora_A has shape \(3, 192\).*\(2, 192\)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_refused_adapter_changes_nothing(saved: Path, kind: str) -> None:
    damage, text = DAMAGE[kind]
    damage(saved)
    backbone = make()
    active = gk.attach(backbone, "norm")
    stir(active)
    keys, before = list(backbone.state_dict()), output(backbone)
    flags = [p.requires_grad for p in backbone.parameters()]
    with pytest.raises(ValueError, match=text):
        gk.load_adapter(backbone, saved)
    assert backbone.adapter is active
    assert list(backbone.state_dict()) == keys
    assert [p.requires_grad for p in backbone.parameters()] == flags
    assert torch.equal(output(backbone), before)


def test_a_pickle_is_refused(saved: Path) -> None:
    path = saved / "adapter.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    edit(saved, sha256=hash_of(path))
    with pytest.raises(ValueError, match="not a safetensors file"):
        gk.load_adapter(make(), saved)


def test_other_weights_are_refused_and_merging_makes_other_weights(saved: Path) -> None:
    backbone = make()
    gk.load_adapter(backbone, saved).merge()
    with pytest.raises(ValueError, match="other weights"):
        gk.load_adapter(backbone, saved)


def test_missing_files_are_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.adapter.json"):
        gk.load_adapter(make(), tmp_path / "nowhere")
    (saved / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter.safetensors.*'adapter.json'"):
        gk.load_adapter(make(), saved)


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, saved: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make()
    adapter = gk.attach(backbone, "bias")
    folder = saved if exists else tmp_path / "new" / "adapter"
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if exists else None

    def no_space(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        adapter.save(folder)
    if exists:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    else:
        assert not folder.exists()
    assert backbone.adapter is adapter


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": None}, {"tensors": [{"name": "a"}]}, {"config": ["x"]},
        {"backbone": {}}, {"sha256": None}, {"method": []}, {"config": {"rank": 10**6}},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_is_checked_before_it_is_believed(
    tmp_path: Path, change: dict
) -> None:
    backbone = make()
    gk.attach(backbone, "lora").save(tmp_path)
    path = tmp_path / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"adapter\.json.*Copy the folder again"):
        gk.load_adapter(backbone, tmp_path)


# --- other processes, and plain peft ------------------------------------------------

PLAIN_PEFT = """
import sys, timm, torch
from peft import PeftModel
from safetensors.torch import load_file
folder, weights, result = sys.argv[1:]
model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
model.load_state_dict(load_file(weights))
model = PeftModel.from_pretrained(model, folder).eval()
image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    torch.save(model.forward_features(image), result)
assert "geopeft_kit" not in sys.modules
"""


def elsewhere(code: str, *arguments: Path) -> Tensor:
    """Run code in an empty process; its last argument is where its result goes."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(arguments[-1], weights_only=True)


def plain_timm() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()


EXPORTS = [
    ("lora", {"rank": 3, "alpha": 5}),
    ("lora", {"rank": 4, "rslora": True, "layers": "last:2"}),
    ("lora", {"rank": 2, "targets": ("qkv", "proj")}),
    ("lora", {"rank": 2, "targets": ("k",)}),
    ("dora", {"rank": 3, "targets": ("q", "v", "fc2")}),
    ("dora", {"rank": 3, "targets": ("qkv",)}),
]


@pytest.mark.parametrize(
    ("name", "options"), EXPORTS, ids=[f"{m[0]}-{i}" for i, m in enumerate(EXPORTS)]
)
def test_export_loads_with_plain_peft(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    from peft import PeftModel

    backbone = make("timm:vit_tiny_patch16_224")
    network = backbone.model
    plain = copy.deepcopy(network)
    tokens = torch.randn(2, 5, 192)
    adapter = gk.attach(backbone, name, **options)
    stir(adapter)
    adapter.export(tmp_path / "peft")
    files = sorted(p.name for p in (tmp_path / "peft").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]

    loaded = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    with torch.no_grad():
        expected = network.norm(network.blocks(tokens))
        found = loaded.norm(loaded.blocks(tokens))
        start = copy.deepcopy(make("timm:vit_tiny_patch16_224").model).blocks(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(network.norm(start), expected, atol=1e-3)


def test_convolutions_export_too(tmp_path: Path) -> None:
    from peft import PeftModel

    backbone = make("timm:convnext_atto")
    plain = copy.deepcopy(backbone)
    adapter = gk.attach(backbone, "lora", rank=3)
    stir(adapter)
    adapter.export(tmp_path / "peft")
    PeftModel.from_pretrained(plain.model, tmp_path / "peft").eval()
    torch.testing.assert_close(output(plain), output(backbone), atol=1e-5, rtol=1e-5)


def test_export_of_fused_q_and_v_has_blocks_and_zero_rows_for_k(tmp_path: Path) -> None:
    backbone = make()
    adapter = gk.attach(backbone, "lora", rank=2, targets=("q", "v", "fc1"), layers=[0])
    stir(adapter)
    adapter.export(tmp_path / "peft")
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    up = state["base_model.model.blocks.0.attn.qkv.lora_B.weight"]  # (3D, 2r)
    assert up.shape == (576, 4)
    assert not up[192:384].any()  # k
    assert not up[:192, 2:].any()  # q has nothing of v's rank
    assert not up[384:, :2].any()
    assert up[:192, :2].all()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["rank_pattern"] == {"blocks.0.mlp.fc1": 2}


FOREIGN = {
    "lora": {"r": 3, "lora_alpha": 5, "target_modules": ["qkv", "fc1"]},
    "dora": {"r": 3, "target_modules": ["attn.proj", "fc2"], "use_dora": True},
    "some blocks, several ranks and scales": {
        "r": 3,
        "target_modules": ["qkv", "fc2"],
        "rank_pattern": {"fc2": 5},
        "alpha_pattern": {"qkv": 9},
        "use_rslora": True,
        "layers_to_transform": [0, 3],
        "layers_pattern": "blocks",
    },
}


class Wrapper(nn.Module):
    """Somebody's own model around the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encoder = network
        self.head = nn.Linear(192, 2)


def foreign(folder: Path, config: dict[str, Any], wrap: bool = False) -> Backbone:
    """Write an adapter with plain peft; return the backbone that computes with it."""
    from peft import LoraConfig, get_peft_model

    twin = make("timm:vit_tiny_patch16_224")
    model: Any = Wrapper(twin.model) if wrap else twin.model
    adapted = get_peft_model(model, LoraConfig(**config))
    stir(SimpleNamespace(parameters=lambda: _trainable(adapted)))
    adapted.save_pretrained(folder)
    return twin


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("config", FOREIGN.values(), ids=FOREIGN)
def test_a_plain_peft_folder_loads_and_is_saved_as_ours(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    twin = foreign(tmp_path / "theirs", config)
    backbone = make("timm:vit_tiny_patch16_224")
    adapter = gk.load_adapter(backbone, tmp_path / "theirs")
    torch.testing.assert_close(output(backbone), output(twin), atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "ours")
    other = make("timm:vit_tiny_patch16_224")
    gk.load_adapter(other, tmp_path / "ours")
    assert torch.equal(output(other), output(backbone))
    adapter.merge()
    torch.testing.assert_close(output(backbone), output(twin), atol=1e-4, rtol=1e-4)


def test_an_export_comes_back(tmp_path: Path) -> None:
    backbone, other = (make("timm:vit_tiny_patch16_224") for _ in range(2))
    adapter = gk.attach(backbone, "lora", rank=2, targets=("q", "v", "fc1"))
    stir(adapter)
    adapter.export(tmp_path)
    loaded = gk.load_adapter(other, tmp_path)
    assert (loaded.name, loaded.config["rank"]) == ("lora", 4)
    adapter.save(tmp_path)  # beside the export: the kit's own files count
    torch.testing.assert_close(output(other), output(backbone), atol=1e-5, rtol=1e-5)
    assert gk.load_adapter(other, tmp_path).config == adapter.config


def test_peft_folders_of_a_whole_model_load_without_its_head(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["fc1"], "modules_to_save": ["head"]}
    twin = foreign(tmp_path, config, wrap=True)
    backbone = make("timm:vit_tiny_patch16_224")
    with pytest.warns(UserWarning, match=r"Left out.*head.weight"):
        gk.load_adapter(backbone, tmp_path)
    torch.testing.assert_close(output(backbone), output(twin), atol=1e-5, rtol=1e-5)


def test_peft_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    foreign(tmp_path, FOREIGN["lora"])
    backbone = make("galileo_nano")
    before = output(backbone)
    with pytest.raises(ValueError, match=r"another network.*no layer .*qkv"):
        gk.load_adapter(backbone, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    changes = {
        "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
        "peft_type=IA3": {"peft_type": "IA3"},
    }
    for message, change in changes.items():
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            gk.load_adapter(backbone, tmp_path)
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.blocks.0.mlp.fc1.lora_B.bias"
    save_file(tensors | {key: torch.ones(768)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Variants with others cannot be read"):
        gk.load_adapter(backbone, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="Pickled files"):
        gk.load_adapter(backbone, tmp_path)
    assert torch.equal(output(backbone), before)
    assert backbone.adapter is None


@pytest.mark.slow
def test_export_loads_in_a_process_without_the_kit(tmp_path: Path) -> None:
    backbone = make("timm:vit_tiny_patch16_224")
    network = plain_timm()
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    backbone.model = network
    adapter = gk.attach(backbone, "lora", rank=3)
    stir(adapter)
    adapter.export(tmp_path / "peft")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.forward_features(image)
    found = elsewhere(
        PLAIN_PEFT,
        tmp_path / "peft",
        tmp_path / "timm.safetensors",
        tmp_path / "out.pt",
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bias", "vpt", "full"])
def test_methods_without_an_export_say_so(tmp_path: Path, name: str) -> None:
    adapter = gk.attach(make(), name)
    with pytest.raises(ValueError, match=f"'{name}' has no format.*lora, dora"):
        adapter.export(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_changed_frozen_weight_cannot_be_exported(tmp_path: Path) -> None:
    adapter = gk.attach(make(), "lora", rank=2, init="pissa")
    with pytest.raises(ValueError, match=r"init='pissa'.*merge"):
        adapter.export(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
