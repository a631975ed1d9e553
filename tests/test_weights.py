"""Checkpoints: read without running anything, loaded strictly, found by name."""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import Site, serve
from safetensors.torch import save_file
from torch import Tensor, nn

from geopeft_kit import backbones, download
from geopeft_kit.backbones import find_card, load_backbone, weights
from geopeft_kit.backbones.card import WeightFile
from geopeft_kit.backbones.prithvi import METADATA_SCALES, encoder_state
from geopeft_kit.backbones.weights import (
    load_strictly,
    read_checkpoint,
    strip_prefixes,
)

NAME = "prithvi_eo_v2_tiny_tl"


@pytest.fixture(scope="module")
def encoder() -> dict[str, Tensor]:
    """Random weights of Prithvi tiny, by timm's keys."""
    torch.manual_seed(0)
    return load_backbone(NAME, weights=None).model.state_dict()


def upstream(encoder: dict[str, Tensor], prefix: str = "encoder.") -> dict[str, Tensor]:
    """The published layout of 2.0: prefixes, 3-D kernel, position table, decoder."""
    state = {prefix + key: tensor for key, tensor in encoder.items()}
    kernel = f"{prefix}patch_embed.proj.weight"
    state[kernel] = state[kernel].unsqueeze(2).contiguous()  # (D, C, 1, 16, 16)
    state[f"{prefix}pos_embed"] = torch.full((1, 785, 192), 7.0)  # 4 dates
    state |= {prefix + key: torch.full((1,), 0.3) for key in METADATA_SCALES}
    state |= {
        "decoder.mask_token": torch.zeros(1, 1, 512),
        "decoder.decoder_blocks.0.attn.qkv.weight": torch.zeros(1536, 512),
        "decoder.temporal_embed_dec.scale": torch.zeros(1),
    }
    return state


def same(backbone: backbones.Backbone, encoder: dict[str, Tensor]) -> bool:
    own = backbone.model.state_dict()
    return own.keys() == encoder.keys() and all(
        torch.equal(own[key], encoder[key]) for key in own
    )


class Code:
    """Pickles as a call of os.system."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def config_node(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as yacs.config.CfgNode."""
    module = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return node


# Reading


@pytest.mark.parametrize("zipped", [True, False])
def test_inert_classes_become_empty(
    tmp_path: Path, config_node: type, zipped: bool
) -> None:
    tensor = torch.arange(3.0)
    options = argparse.Namespace(lr=1e-3, nested=argparse.Namespace(seed=1))
    config = config_node(a=1, b=config_node(c=[2]))
    content = {"model": {"w": tensor}, "args": options, "config": config, "epoch": 3}
    path = tmp_path / "old.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    state = read_checkpoint(path)
    assert list(state) == ["w"] and torch.equal(state["w"], tensor)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_by_name_and_never_runs(tmp_path: Path, zipped: bool) -> None:
    trace, path = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"model": {"w": torch.ones(1)}, "hook": Code(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pt is refused: it holds \w+\.system"):
        read_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the trap does not work, so the test proves nothing"


def test_any_other_class_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "dated.pt"
    content = {"model": {"w": torch.ones(1)}, "when": datetime.date(2024, 1, 1)}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"datetime\.date"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.999])
def test_truncated_files_say_so(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"whole{suffix}"
    state = {"a": torch.randn(64, 64), "b": torch.randn(64)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert read_checkpoint(path)["a"].equal(state["a"])
    cut = tmp_path / f"cut{suffix}"
    content = path.read_bytes()
    cut.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        read_checkpoint(cut)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    page = tmp_path / "page.pt"
    page.write_text("<!doctype html><title>Sign in</title>")
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        read_checkpoint(page)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_checkpoint(tmp_path / "empty.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        read_checkpoint(tmp_path / "nowhere.pt")


# Keys


def test_prefixes_are_stripped_but_never_merged() -> None:
    state = {"module.model.a": torch.ones(1), "b": torch.ones(1)}
    assert set(strip_prefixes(state, ("module.", "model."))) == {"a", "b"}
    with pytest.raises(ValueError, match=r"'a' twice"):
        strip_prefixes({"module.a": torch.ones(1), "a": torch.ones(1)}, ("module.",))


def test_strict_errors_name_and_count() -> None:
    model = nn.ModuleDict({f"l{i}": nn.Linear(2, 2, bias=False) for i in range(9)})
    state = {f"l{i}.weight": torch.ones(2, 2) for i in range(9)}
    load_strictly(model, state, "toy")
    assert torch.equal(model["l8"].weight, torch.ones(2, 2))

    with pytest.raises(ValueError, match=r"toy: 8 missing \(l1.weight.* and 3 more\)"):
        load_strictly(model, {"l0.weight": torch.ones(2, 2)}, "toy")
    with pytest.raises(ValueError, match=r"1 unexpected \(extra\)"):
        load_strictly(model, state | {"extra": torch.ones(1)}, "toy")
    wrong = state | {"l3.weight": torch.ones(2, 5)}
    with pytest.raises(ValueError, match=r"l3.weight \(2, 5\) instead of \(2, 2\)"):
        load_strictly(model, wrong, "toy")


@pytest.mark.parametrize(
    "prefix",
    ["encoder.", "", "module.", "model.encoder.", "encoder._timm_module."],
)
def test_prithvi_loads_every_published_layout(
    tmp_path: Path, encoder: dict[str, Tensor], prefix: str
) -> None:
    path = tmp_path / "weights.pt"
    content = {"state_dict": upstream(encoder, prefix), "args": argparse.Namespace()}
    torch.save(content, path)
    backbone = load_backbone(NAME, weights=path)
    assert same(backbone, encoder)
    assert set(backbone.metadata_scales) == set(METADATA_SCALES)
    assert all(
        float(scale) == pytest.approx(0.3)
        for scale in backbone.metadata_scales.values()
    )
    assert float(backbone.model.pos_embed.abs().max()) <= 1, "the table was loaded"


def test_prithvi_v1_layout(encoder: dict[str, Tensor]) -> None:
    state = upstream(encoder, "")
    state = {
        key.removeprefix("decoder."): tensor
        for key, tensor in state.items()
        if not key.endswith(".scale")
    }  # flat: decoder_blocks..., mask_token
    kept, scales = encoder_state(state)
    assert kept.keys() == encoder.keys() and not scales


def test_prithvi_metadata_scalars_belong_to_tl(encoder: dict[str, Tensor]) -> None:
    state = upstream(encoder)
    kept, _ = encoder_state(state)  # a model without them: they are unexpected
    assert set(METADATA_SCALES) <= set(kept)
    del state[f"encoder.{METADATA_SCALES[0]}"]
    with pytest.raises(ValueError, match=r"lacks temporal_embed_enc\.scale"):
        encoder_state(state, METADATA_SCALES)


def test_prithvi_strict_errors(tmp_path: Path, encoder: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pt"
    state = upstream(encoder)
    del state["encoder.blocks.3.mlp.fc1.bias"]
    state["encoder.blocks.3.mlp.fc9.bias"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(ValueError) as caught:
        load_backbone(NAME, weights=path)
    text = str(caught.value)
    assert "1 missing (blocks.3.mlp.fc1.bias)" in text
    assert "1 unexpected (blocks.3.mlp.fc9.bias)" in text and NAME in text

    several = upstream(encoder)
    kernel = "encoder.patch_embed.proj.weight"
    several[kernel] = several[kernel].expand(-1, -1, 3, -1, -1)
    with pytest.raises(ValueError, match="spans 3 dates"):
        encoder_state(several, METADATA_SCALES)


# Finding


def test_a_tag_a_file_or_a_folder(tmp_path: Path, encoder: dict[str, Tensor]) -> None:
    file = tmp_path / "Prithvi_EO_V2_tiny_TL.pt"
    torch.save(upstream(encoder), file)
    assert same(load_backbone(NAME, weights=str(file)), encoder)
    assert same(load_backbone(NAME, weights=tmp_path), encoder)
    with pytest.raises(ValueError, match=r"'best' is neither .* \(tags: 'default'\)"):
        load_backbone(NAME, weights="best")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"none of the files .*Prithvi_EO_V2_tiny_TL"):
        load_backbone(NAME, weights=tmp_path / "empty")


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: dict[str, Tensor]
) -> Iterator[Site]:
    """A hub that publishes Prithvi tiny at its address, and an empty cache."""
    path = tmp_path / "published.pt"
    torch.save(upstream(encoder), path)
    repo = "ibm-nasa-geospatial/Prithvi-EO-2.0-tiny-TL"
    address = f"/{repo}/resolve/main/Prithvi_EO_V2_tiny_TL.pt"
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("GEOPEFT_CACHE", str(tmp_path / "cache"))
    with serve(Site(content=path.read_bytes(), path=address)) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.root)
        yield site


def test_public_weights_are_downloaded_once(
    hub: Site, encoder: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut_after = [1_000_000]
    assert same(load_backbone(NAME), encoder)
    assert len(hub.ranges) == 2
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there
    assert same(load_backbone(NAME), encoder)


def test_a_card_with_a_checksum_is_held_to_it(
    hub: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = replace(find_card(NAME).weights["default"], sha256="0" * 64)
    card = replace(find_card(NAME), weights={"default": file})
    monkeypatch.setitem(backbones.CARDS, NAME, card)
    with pytest.raises(RuntimeError, match=f"expected {'0' * 64}"):
        load_backbone(NAME)


def test_no_network_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match=r"No connection to .*weights=<local path>"):
        load_backbone("prithvi_eo_v2_100_tl")


def test_packaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PACKAGED", tmp_path)
    with pytest.raises(FileNotFoundError, match="weights=None"):
        load_backbone("geopeft_tiny")
    state = load_backbone("geopeft_tiny", weights=None).model.state_dict()
    half = {key: tensor.half() for key, tensor in state.items()}
    save_file(half, tmp_path / "geopeft_tiny.safetensors")
    backbone = load_backbone("geopeft_tiny")
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert same(backbone, {key: tensor.float() for key, tensor in half.items()})
    with pytest.raises(ValueError, match="packaged"):
        weights.weight_url(WeightFile("x"))


LOAD = """
import re, sys
from geopeft_kit.backbones import load_backbone
load_backbone("prithvi_eo_v2_tiny_tl", weights=None)  # imports and allocator
def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
before = peak()
backbone = load_backbone("prithvi_eo_v2_100_tl", weights=sys.argv[1])
size = sum(p.nbytes for p in backbone.model.parameters())
total = sum(float(p.detach().sum()) for p in backbone.model.parameters())
print((peak() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loading_costs_the_weights_once(tmp_path: Path, suffix: str) -> None:
    with torch.device("meta"):
        model = load_backbone("prithvi_eo_v2_100_tl", weights=None).model
    state = {key: torch.zeros(t.shape) for key, t in model.state_dict().items()}
    state |= {key: torch.ones(1) for key in METADATA_SCALES}
    state = {f"encoder.{key}": tensor for key, tensor in state.items()}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    command = [sys.executable, "-c", LOAD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.2
