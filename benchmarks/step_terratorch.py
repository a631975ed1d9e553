"""TerraTorch's side of `step.py`: its factory, its PEFT, a plain training step.

Runs in TerraTorch's environment; the kit is on the path for its byte counter alone.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from terratorch.registry import BACKBONE_REGISTRY, MODEL_FACTORY_REGISTRY
from torch import Tensor, nn
from workers import serve

from geopeft_kit.training.tracker import count_saved_bytes

NECKS = [
    {"name": "SelectIndices", "indices": [2, 5, 8, 11]},
    {"name": "ReshapeTokensToImage"},
    {"name": "LearnedInterpolateToPyramidal"},
]
LORA = {"r": 8, "lora_alpha": 8, "target_modules": ["q_linear", "v_linear"]}
PROMPTS = 10


class Peer:
    """One model of TerraTorch's and its optimiser."""

    def build(
        self,
        mode: str,
        backbone: str,
        size: int,
        batch: int,
        folder: str,
        classes: int = 3,
        seed: int = 0,
    ) -> Any:
        """Build a mode, and write the weights that it starts from."""
        torch.manual_seed(seed)
        prompts = {"vpt": True, "vpt_n_tokens": PROMPTS} if mode == "vpt" else {}
        encoder = BACKBONE_REGISTRY.build(
            backbone, pretrained=False, num_frames=1, **prompts
        )
        start = {f"encoder.{n}": t.clone() for n, t in encoder.state_dict().items()}
        peft = {"method": "LORA", "replace_qkv": "qkv", "peft_config_kwargs": LORA}
        self.model: nn.Module = MODEL_FACTORY_REGISTRY.build(
            "EncoderDecoderFactory"
        ).build_model(
            task="segmentation",
            backbone=encoder,
            decoder="UNetDecoder",
            decoder_channels=[256, 128, 64, 32],
            num_classes=classes,
            necks=NECKS,
            peft_config=peft if mode == "lora" else None,
        )
        if mode in ("frozen", "vpt"):
            self.model.freeze_encoder()
        self.model.train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide differences
                nn.init.normal_(parameter, std=0.02)
        self.trained = {
            n: p for n, p in self.model.named_parameters() if p.requires_grad
        }
        state = self.model.state_dict()
        beside = {n: t for n, t in state.items() if not n.startswith("encoder.")}
        start |= beside | {n: state[n] for n in self.trained if n in state}
        save_file({n: t.clone() for n, t in start.items()}, Path(folder) / f"{mode}.st")
        self.optimiser = torch.optim.AdamW(self.trained.values(), lr=1e-4)
        self.image, self.mask = batch_of(size, batch)
        return {"trained": sum(p.numel() for p in self.trained.values())}

    def loss(self) -> Tensor:
        """Forward pass and loss."""
        self.output = self.model(self.image).output
        return nn.functional.cross_entropy(self.output, self.mask)

    def step(self) -> dict[str, float]:
        """CPU seconds of one training step."""
        began = time.process_time()
        self.optimiser.zero_grad()
        self.loss().backward()
        self.optimiser.step()
        return {"seconds": time.process_time() - began}

    def saved(self) -> dict[str, int]:
        """Bytes that autograd keeps in one step."""
        with count_saved_bytes(self.model) as kept:
            self.loss()
        return {"bytes": sum(kept.values())}

    def gradients(self, path: str) -> dict[str, Any]:
        """Write output and gradients of the model as it stands."""
        self.optimiser.zero_grad()
        self.loss().backward()
        found = {n: p.grad for n, p in self.trained.items() if p.grad is not None}
        tensors = {"output": self.output.detach(), **found}
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        return {}

    def learn(self, chips: str, answers: str) -> dict[str, Any]:
        """Train on the chips of a file in its order, then write classes."""
        file = load_file(chips)
        for which in file["order"]:
            self.optimiser.zero_grad()
            output = self.model(file["image"][which]).output
            wanted = file["mask"][which]
            nn.functional.cross_entropy(output, wanted, ignore_index=255).backward()
            self.optimiser.step()
        self.model.eval()
        with torch.no_grad():
            found = self.model(file["unseen"]).output.argmax(1)
        save_file({"classes": found}, answers)
        return {}

    def checkpoints(self, folder: str) -> dict[str, float]:
        """MiB of the files that TerraTorch's task leaves after a step."""
        import lightning
        from terratorch.tasks import SemanticSegmentationTask

        task = SemanticSegmentationTask(
            model=self.model, model_args={"num_classes": 3}, optimizer="AdamW",
            ignore_index=-1,
        )  # fmt: skip
        pairs = [
            {"image": i, "mask": m} for i, m in zip(self.image, self.mask, strict=True)
        ]
        trainer = lightning.Trainer(
            max_steps=1, logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, torch.utils.data.DataLoader(pairs, len(pairs)))
        found = {}
        for what, weights_only in (("to resume from", False), ("to hand on", True)):
            path = Path(folder) / "terratorch.ckpt"
            trainer.save_checkpoint(path, weights_only)
            found[what] = path.stat().st_size / 2**20
        return found


def batch_of(size: int, batch: int) -> tuple[Tensor, Tensor]:
    """Random pixels and classes, the same in both systems."""
    random = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 6, size, size, generator=random)
    return image, torch.randint(0, 3, (batch, size, size), generator=random)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    peer = Peer()
    names = ("build", "step", "saved", "gradients", "learn", "checkpoints")
    serve({name: getattr(peer, name) for name in names})
