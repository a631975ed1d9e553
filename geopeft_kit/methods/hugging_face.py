"""LoRA and its family, computed by Hugging Face `peft`. Taught in notebook 03.

`peft` wraps layers in place. Here it is given a small container with the target layers
instead of the backbone, and the wrapped layers are taken out of it as substitutes. On a
fused qkv matrix, q, k and v are presented to `peft` as layers of their own that read
their rows of the fused weight.

Source: Hu et al. 2021, LoRA, arXiv 2106.09685; Liu et al. 2024, DoRA, arXiv 2402.09353;
targets and rank as in the PEFT study of GFMs, arXiv 2504.17397.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from geopeft_kit.methods.base import (
    Block,
    Method,
    Replacement,
    check_above_zero,
    check_share,
    check_whole,
)
from geopeft_kit.methods.targets import Target, default_targets, find_targets

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone
    from geopeft_kit.methods.adapter import Adapter

PeftLayer = Any
"""A layer that `peft` wrapped; its attributes carry no types."""

ADAPTER = "default"  # the name that peft gives an adapter inside its layers
INITS: dict[str, Any] = {
    "default": True,
    "gaussian": "gaussian",
    "pissa": "pissa",
    "olora": "olora",
}
SHIFTING = ("pissa", "olora")  # starts that make peft change the frozen weight


class Rows(nn.Linear):
    """Some output rows of a Linear, seen as a Linear of its own.

    It owns nothing: weight and bias are read from the source at every access, so they
    follow it to another device and number type.

    Args:
        source: The fused layer.
        first: First row.
        last: One past the last row.
    """

    def __init__(self, source: nn.Linear, first: int, last: int) -> None:
        nn.Module.__init__(self)
        self._source = [source]  # in a list: no child, or state dicts would hold it
        self.first, self.last = first, last
        self.in_features, self.out_features = source.in_features, last - first

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rows of the source's weight, (last - first, in_features)."""
        return self._source[0].weight[self.first : self.last]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The rows of the source's bias."""
        bias = self._source[0].bias
        return None if bias is None else bias[self.first : self.last]


class FusedProjection(nn.Module):
    """A fused qkv Linear of which some parts are adapted.

    Plain LoRA adds its delta to the rows of the fused output, so the large product is
    computed once and not in three. Other methods compute their rows from the frozen
    ones, and the parts are put together again.

    Args:
        base_layer: The frozen fused layer.
        parts: "q", "k" or "v" -> the layer that `peft` made of those rows.
    """

    def __init__(self, base_layer: nn.Linear, parts: dict[str, PeftLayer]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Project (..., in_features) to (..., out_features)."""
        out = self.base_layer(x)
        width = out.shape[-1] // 3
        pieces: dict[int, Tensor] = {}
        for part, layer in self.parts.items():
            number = "qkv".index(part)
            rows = slice(number * width, (number + 1) * width)
            if _adds_delta(layer):
                out[..., rows] += _delta(layer, x).to(out.dtype)  # nothing saved
            else:
                pieces[number] = _adapted(layer, x, out[..., rows])
        if not pieces:
            return out
        frozen = out.split(width, dim=-1)
        return torch.cat([pieces.get(i, frozen[i]) for i in range(3)], dim=-1)


class _LowRank(Method):
    """What LoRA and DoRA share: options, injection, merging, export."""

    mergeable = True
    identity_at_start = True
    needs = "networks with Linear or ungrouped Conv2d layers in their blocks"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks whose blocks hold no layer that peft can wrap."""
        if default_targets(backbone.blocks):
            return None
        return "its blocks hold no Linear and no ungrouped convolution"

    def resolve(
        self, backbone: Backbone, blocks: list[Block], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Put the architecture's default targets, and alpha = rank, in the config."""
        if options["targets"] is None:
            options["targets"] = default_targets(blocks)
        if options["alpha"] is None:
            options["alpha"] = options["rank"]
        return options

    def folded(self, replacement: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each frozen weight, or its q, k, v rows, and the merged values."""
        original: Any = replacement.original
        substitute: PeftLayer = replacement.substitute
        if not isinstance(substitute, FusedProjection):
            yield original.weight, merged_weight(substitute)
            return
        thirds = original.weight.chunk(3)  # views: writing into them is enough
        for part, layer in substitute.parts.items():
            yield thirds["qkv".index(part)], merged_weight(layer)

    def export(self, adapter: Adapter, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` of peft.

        Raises:
            ValueError: The adapter starts from a changed copy of the frozen weights.
        """
        from geopeft_kit.methods.peft_files import write_peft_files

        init = adapter.config.get("init", "default")
        if init in SHIFTING:
            raise ValueError(
                f"init={init!r} subtracts the start from a copy of the frozen weights, "
                "and the plain timm model has no such copy. merge() the adapter and "
                "save the merged model, or attach with init='default'."
            )
        write_peft_files(adapter.substitutes(), folder)

    def _build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        targets: Sequence[str] | None,
        *,
        rank: int,
        alpha: float | None,
        dropout: float,
        init: str,
        rslora: bool = False,
        dora: bool = False,
    ) -> list[Replacement]:
        from peft import LoraConfig

        check_whole("rank", rank)
        check_share("dropout", dropout)
        check_above_zero("alpha", alpha)
        if init not in INITS:
            raise ValueError(f"init={init!r}; it can be {', '.join(INITS)}.")
        if not isinstance(rslora, bool):
            raise TypeError(f"rslora={rslora!r}; True or False is needed.")
        chosen = find_targets(blocks, targets or ())
        if init in SHIFTING:
            _check_linear(chosen, init)
        scale: Any = alpha  # peft declares whole numbers and computes with any
        config = LoraConfig(
            r=rank,
            lora_alpha=scale,
            lora_dropout=dropout,
            init_lora_weights=INITS[init],
            use_rslora=rslora,
            use_dora=dora,
        )
        layers = inject(config, [_presented(t, init in SHIFTING) for t in chosen])
        return _replacements(backbone.model, chosen, layers)


class Lora(_LowRank):
    """Low-rank updates W + (alpha / rank) B A of frozen matrices; B starts at zero.

    Default targets are q, v, fc1 and fc2 of a transformer block, fc1 and fc2 of a
    ConvNeXt block, the 1x1 convolutions of a ResNet-50 block, the 3x3 ones of a
    ResNet-18 block. On a fused qkv, q and v have their own A and B.

    `init`: "default" and "gaussian" start at the frozen network exactly. "pissa" and
    "olora" start A and B with the strongest directions of W and subtract them from a
    copy of it, which is the frozen network up to rounding, and costs that copy.
    """

    name = "lora"
    title = "LoRA"
    paper = "Hu et al. 2021, LoRA, arXiv 2106.09685"
    trained = "A (rank, in) and B (out, rank) beside each target"
    count_formula = "r * (in + out) per target; 14rD per ViT block by default"
    # The study's 15 LoRA runs chose 3.9e-4 to 9.8e-4, their median is 8.5e-4.
    learning_rate = 8e-4

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "default",
    ) -> list[Replacement]:
        """Wrap the target layers with peft's LoRA.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Rank r of the update.
            alpha: Scale of the update, alpha / rank; None for alpha = rank.
            dropout: Rate on the input of A.
            rslora: Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
            init: "default", "gaussian", "pissa" (arXiv 2404.02948) or "olora"
                (arXiv 2406.01775).
        """
        return self._build(
            backbone,
            blocks,
            targets,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            init=init,
            rslora=rslora,
        )


class Dora(_LowRank):
    """LoRA on the direction of W, and a trained length for each of its output rows.

    Targets, rank, alpha and dropout as for LoRA. Each row starts with its own length,
    so that nothing changes at the start.
    """

    name = "dora"
    title = "DoRA"
    paper = "Liu et al. 2024, DoRA, arXiv 2402.09353"
    trained = "LoRA's A and B, and one length per output row of each target"
    count_formula = "r * (in + out) + out per target"
    learning_rate = 8e-4  # as LoRA; ours

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        targets: Sequence[str] | None = None,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> list[Replacement]:
        """Wrap the target layers with peft's DoRA.

        Args:
            backbone: The backbone.
            blocks: The blocks to look for targets in.
            targets: Short names of layers; None for the architecture's default.
            rank: Rank r of the update.
            alpha: Scale of the update, alpha / rank; None for alpha = rank.
            dropout: Rate on the input of A.
        """
        return self._build(
            backbone,
            blocks,
            targets,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            init="default",
            dora=True,
        )


def inject(config: Any, layers: Sequence[nn.Module]) -> list[PeftLayer]:
    """Let `peft` wrap layers, and return the wrapped ones.

    Serves any tuner of peft that works layer by layer. The layers stay as they are:
    only the container they are put into is changed, and thrown away.

    Args:
        config: A peft configuration; its `target_modules` is set here.
        layers: Linear or Conv2d layers.

    Returns:
        One wrapped layer for each layer, in order.
    """
    from peft import inject_adapter_in_model

    container = nn.ModuleDict({f"layer_{i}": layer for i, layer in enumerate(layers)})
    config.target_modules = [f"layer_{i}" for i in range(len(layers))]
    # peft reads the device from the first parameter, and `Rows` have none of their own.
    place = torch.empty(0, device=cast(Tensor, layers[0].weight).device)
    container.register_parameter("place", nn.Parameter(place))
    inject_adapter_in_model(config, container, adapter_name=ADAPTER)
    wrapped: list[PeftLayer] = [container[name] for name in config.target_modules]
    for layer in wrapped:
        for holder, attribute in trained_tensors(layer).values():
            # Master weights of a half-precision backbone's adapter are in float32.
            tensor = getattr(holder, attribute)
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
    return wrapped


def merged_weight(layer: PeftLayer) -> Tensor:
    """Return the weight that a wrapped layer amounts to, by peft's own merging.

    Args:
        layer: A wrapped layer; it stays as it is.

    Raises:
        ValueError: The merged weight is not finite.
    """
    base = layer.get_base_layer()
    plain = _own_copy(base)
    layer.base_layer = plain
    try:
        layer.merge(safe_merge=True)
        return cast(Tensor, plain.weight.data)
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()


def trained_tensors(layer: PeftLayer) -> dict[str, tuple[nn.Module, str]]:
    """Return readable name -> (holder, attribute) of what a wrapped layer trains."""
    tensors = {}
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind, None)
        if held is None or ADAPTER not in held:
            continue
        if isinstance(held, nn.ModuleDict):
            tensors[kind] = (held[ADAPTER], "weight")
        else:  # a ParameterDict, as other tuners than LoRA use
            tensors[kind] = (held, ADAPTER)
    return tensors


def _replacements(
    model: nn.Module, targets: list[Target], layers: list[PeftLayer]
) -> list[Replacement]:
    """Turn wrapped layers into replacements; parts of a fused layer share one."""
    groups: dict[str, list[tuple[Target, PeftLayer]]] = {}
    for target, layer in zip(targets, layers, strict=True):
        groups.setdefault(target.path, []).append((target, layer))
    replacements = []
    for path, members in groups.items():
        target, substitute = members[0]
        tensors = trained_tensors(substitute)
        if target.part is not None:
            parts = {str(t.part): layer for t, layer in members}
            substitute = FusedProjection(cast(nn.Linear, target.layer), parts)
            tensors = {
                f"{part}.{leaf}": place
                for part, layer in parts.items()
                for leaf, place in trained_tensors(layer).items()
            }
        replacements.append(Replacement.at(model, path, substitute, tensors))
    return replacements


def _presented(target: Target, changed: bool) -> nn.Module:
    """Return the layer that peft gets to see; a copy if peft is going to change it."""
    layer: nn.Module = target.layer
    if target.part is not None:
        layer = Rows(cast(nn.Linear, layer), *target.rows)
    return _own_copy(layer) if changed else layer


def _own_copy(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, Rows):
        return copy.deepcopy(layer)
    bias = layer.bias
    plain = nn.Linear(
        layer.in_features, layer.out_features, bias=bias is not None, device="meta"
    )
    plain.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain


def _check_linear(targets: list[Target], init: str) -> None:
    for target in targets:
        if not isinstance(target.layer, nn.Linear):
            raise ValueError(
                f"init={init!r} is for Linear layers, and {target.path} is a "
                f"{type(target.layer).__name__}. Use init='default' or 'gaussian'."
            )


def _adds_delta(layer: PeftLayer) -> bool:
    """True for plain LoRA on rows of the frozen weight itself."""
    variants = getattr(layer, "lora_variant", None)
    return variants == {} and isinstance(layer.get_base_layer(), Rows)


def _delta(layer: PeftLayer, x: Tensor) -> Tensor:
    """What plain LoRA adds to the output of its rows."""
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    x = layer.lora_dropout[ADAPTER](x.to(down.weight.dtype))
    return up(down(x)) * layer.scaling[ADAPTER]


def _adapted(layer: PeftLayer, x: Tensor, frozen: Tensor) -> Tensor:
    """The output of an adapted part, from the frozen output where that is of use."""
    variant = getattr(layer, "lora_variant", {}).get(ADAPTER)
    if variant is None or not isinstance(layer.get_base_layer(), Rows):
        return layer(x)
    x = x.to(layer.lora_A[ADAPTER].weight.dtype)
    adapted = variant.forward(layer, active_adapter=ADAPTER, x=x, result=frozen)
    return adapted.to(frozen.dtype)
