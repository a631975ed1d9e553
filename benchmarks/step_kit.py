"""The kit's side of `step.py`: the same weights, and the levers of `fit`."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from workers import serve

import geopeft_kit as gk
from geopeft_kit.decoders import UNetDecoder
from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import checkpointed
from geopeft_kit.training.frozen_precision import frozen_held_in
from geopeft_kit.training.plan import Plan
from geopeft_kit.training.step import compute_loss
from geopeft_kit.training.task import Task
from geopeft_kit.training.tracker import count_saved_bytes

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "frozen": ("frozen", {}),
    "lora": ("lora", {"rank": 8, "alpha": 8, "targets": ("q", "v")}),
    "vpt": ("vpt", {"tokens": 10, "dropout": 0.0}),
}
# What stands in the peer's keys -> what stands in the kit's.
RENAMED = {
    "encoder.base_model.model.": "backbone.model.",
    "encoder.": "backbone.model.",
    "neck.2.fpn1.": "decoder.neck.enlarge.0.",
    "neck.2.fpn2.": "decoder.neck.enlarge.1.",
    "decoder.decoder.": "decoder.body.",
    "head.head.2.": "decoder.head.",
}


class PeerUNet(UNetDecoder):
    """TerraTorch's UNet: batch norms, and a last block at the size of the finest map.

    The kit's own has group norms, and its last block works at twice that size.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _with_batch_norm(self)

    def fuse(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four scales -> (B, width/8, H'/4, W'/4)."""
        return self.body([maps[0], *maps])


def _with_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, nn.BatchNorm2d(child.num_channels))
        else:
            _with_batch_norm(child)


def kit_name(name: str) -> str:
    """A parameter's name in the kit, from TerraTorch's."""
    if "vpt_prompt_embeddings" in name:
        return f"backbone.model.blocks.{name.rpartition('.')[2]}.prompts"
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    for part in "qv":
        name = name.replace(f"qkv.{part}_linear.", f"qkv.parts.{part}.")
    return name


class Kit:
    """Models of the kit, one for each setting of a mode, that take steps in turn."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}

    def build(self, setting: str, **arguments: Any) -> dict[str, Any]:
        """Build a setting of a mode."""
        self.runs[setting] = Run(**arguments)
        trained = self.runs[setting].trained
        return {"trained": sum(p.numel() for p in trained.values())}

    def step(self, setting: str) -> dict[str, Any]:
        """CPU seconds of one training step."""
        return {"seconds": self.runs[setting].step()}

    def saved(self, setting: str) -> dict[str, Any]:
        """Bytes that autograd keeps in one step."""
        return {"bytes": self.runs[setting].saved()}

    def gradients(self, setting: str, path: str) -> dict[str, Any]:
        """Write output and gradients of the model as it stands."""
        tensors = self.runs[setting].gradients()
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        return {}

    def learn(self, setting: str, chips: str, answers: str) -> dict[str, Any]:
        """Train on the chips of a file in its order, then write classes."""
        self.runs[setting].learn(chips, answers)
        return {}

    def compare(self, one: str, two: str) -> dict[str, Any]:
        """Relative differences of outputs and gradients in two files.

        Args:
            one: The reference; names may be TerraTorch's.
            two: What is compared with it.
        """
        first = {kit_name(name): t for name, t in load_file(one).items()}
        second = load_file(two)
        if first.keys() != second.keys():
            raise ValueError(f"not in both: {sorted(first.keys() ^ second.keys())}")
        names = sorted(first.keys() - {"output"})
        joined = [
            torch.cat([file[name].flatten().double() for name in names])
            for file in (first, second)
        ]
        return {
            "output": relative(first["output"].double(), second["output"].double()),
            "gradients": relative(*joined),
        }

    def clear(self) -> dict[str, Any]:
        """Forget all settings of a mode."""
        for run in self.runs.values():
            run.levers.close()
        self.runs.clear()
        return {}


class Run:
    """One model with levers on, and its optimiser.

    Args:
        mode: Key of `METHODS`.
        backbone: Name of the backbone.
        size: Pixels along a side.
        batch: Images.
        folder: Where the peer's start lies.
        levers: Arguments of `fit`: cache_features, checkpointing, precision,
            frozen_precision, optimiser.
        classes: How many the head tells apart.
    """

    def __init__(
        self,
        mode: str,
        backbone: str,
        size: int,
        batch: int,
        folder: str,
        levers: dict[str, Any],
        classes: int = 3,
    ) -> None:
        start = Path(folder) / f"{mode}.st"
        model = same_model(mode, backbone, size, start, classes)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        plan = Plan(
            learning_rate=1e-4,
            decoder_learning_rate=1e-4,
            weight_decay=0.01,
            optimiser=levers.get("optimiser", "adamw"),
        )
        self.task = Task(model, plan, total_steps=1)  # without a warm-up
        made: Any = self.task.configure_optimizers()
        self.optimiser = made["optimizer"]
        self.batch: dict[str, Any] = batch_of(size, batch, classes)
        self.mixed = levers.get("precision") == "bf16-mixed"
        if levers.get("cache_features"):  # the first epoch, which is not timed
            with torch.no_grad():
                self.batch["features"] = model.eval().features(self.batch.pop("image"))
        self.levers = ExitStack()
        held = frozen_held_in(model, levers.get("frozen_precision"))
        self.levers.enter_context(held)
        self.levers.enter_context(checkpointed(model, levers.get("checkpointing")))
        model.train()

    def loss(self) -> Tensor:
        """Forward pass and loss, in the precision that Lightning would set."""
        with (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
            if self.mixed
            else nullcontext()
        ):
            output = self.task(self.batch)
            self.output = output.detach().float()
            return compute_loss(output, self.batch["mask"], "segmentation")

    def step(self) -> float:
        """CPU seconds of one training step."""
        began = time.process_time()
        self.optimiser.zero_grad()
        self.loss().backward()
        self.optimiser.step()
        return time.process_time() - began

    def learn(self, chips: str, answers: str) -> None:
        """Train on the chips of a file in its order, then write classes."""
        file = load_file(chips)
        for which in file["order"]:
            self.batch |= {"image": file["image"][which], "mask": file["mask"][which]}
            self.step()
        self.task.eval()
        with torch.no_grad():
            found = self.task(self.batch | {"image": file["unseen"]}).argmax(1)
        save_file({"classes": found}, answers)

    def saved(self) -> int:
        """Bytes that autograd keeps in one step."""
        with count_saved_bytes(self.task.model) as kept:
            self.loss()
        return sum(kept.values())

    def gradients(self) -> dict[str, Tensor]:
        """Output, and gradients of what trains."""
        self.optimiser.zero_grad()
        self.loss().backward()
        found = {n: p.grad for n, p in self.trained.items() if p.grad is not None}
        return {"output": self.output, **found}


def same_model(
    mode: str, backbone: str, size: int, start: Path, classes: int = 3
) -> Model:
    """The peer's model in the kit: its encoder's checkpoint, then all the rest."""
    state = load_file(start)
    method, options = METHODS[mode]
    extra = ("lora", "vpt_prompt")
    encoder = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("encoder.") and not any(word in name for word in extra)
    }
    checkpoint = start.with_suffix(".safetensors")
    save_file(encoder, checkpoint)
    network = gk.load_backbone(
        backbone, weights=checkpoint, image_size=size, normalise=False
    )
    gk.attach(network, method, **options)
    decoder = PeerUNet(network.channels, network.strides, classes)
    config = {"decoder": "unet", "task": "segmentation", "num_classes": classes}
    model = Model(network, decoder, config)
    rest = {kit_name(n): t for n, t in state.items() if n not in encoder}
    found = model.load_state_dict(rest, strict=False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    missing = {n for n in found.missing_keys if n in trained}
    if found.unexpected_keys or (missing and mode != "full"):
        raise ValueError(f"the two models differ: {found.unexpected_keys}, {missing}")
    return model


def relative(reference: Tensor, other: Tensor) -> float:
    """|a - b| / |a|."""
    return float((reference - other).norm() / reference.norm())


def batch_of(size: int, batch: int, classes: int = 3) -> dict[str, Any]:
    """Random pixels and classes, the same in both systems."""
    random = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 6, size, size, generator=random)
    mask = torch.randint(0, classes, (batch, size, size), generator=random)
    return {"image": image, "mask": mask, "size": (size, size)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kit = Kit()
    names = ("build", "step", "saved", "gradients", "learn", "compare", "clear")
    serve({name: getattr(kit, name) for name in names})
