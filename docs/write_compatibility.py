"""Write docs/compatibility.md: which method and which decoder serve which backbone.

    python docs/write_compatibility.py

Every backbone is built at full size on the meta device, which has shapes and no
numbers, and every method is asked. The page is not edited by hand: change the
`why_not` of a method, and write it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.decoders import DECODERS

PAGE = Path(__file__).with_name("compatibility.md")
# One of each kind of timm network, beside the named backbones.
TIMM = (
    "timm:vit_base_patch16_224",
    "timm:swin_base_patch4_window7_224",
    "timm:convnext_base",
    "timm:resnet50",
    "timm:mambaout_base",
    "timm:efficientvim_m1",
)
CLASSES = 2
# What a reason says about one network only: its row of the table tells that already.
PARTICULAR = {
    r"; (?:its|the) layout is '\w+'": "",
    r"(?:the layout|of the layout) '\w+'": "this network",
    r"the blocks this network": "the blocks",
    r"its block [\w.]+ \(\w+\)": "a block of it",
    r"its norm [\w.]+ has": "one of its norms has",
    r"this is an? \w+$": "this is another class",
}
TEXT = """\
# What fits what

Written by `python docs/write_compatibility.py`: each backbone is built at full size on
torch's meta device, and each method is asked whether it fits. `gk.attach` asks the
same question, and its error gives the same reason.

## Backbone and method

"yes": `gk.attach(backbone, method)` takes it, with default options. A number: it does
not fit, and [the reasons](#reasons) below say why. `timm:` names stand for their kind:
any other of timm's ViT, Swin, ConvNeXt, ResNet, MambaOut and EfficientViM loads too.

{methods}
## Reasons

{reasons}
## Backbone and decoder

Maps are what the backbone gives: channels at a stride in pixels, shallow to deep. Where
all four have one stride, the neck of `unet` and `upernet` makes four scales of them.
Each number is what the decoder trains with {classes} classes and default options, in
millions; a decoder that does not fit would say "no". A method may change the maps:
`vit_adapter` gives four scales of its own.

{decoders}
`linear` also answers for whole images (classification, multilabel); the other three
answer for pixels only. All four serve segmentation, regression and change.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    names = [card.name for card in gk.list_backbones()] + list(TIMM)
    reasons: dict[str, int] = {}  # reason -> its number on the page
    method_rows, decoder_rows = [], []
    for name in names:
        backbone = load(name)
        method_rows.append(row(f"`{name}`", *method_cells(backbone, reasons)))
        decoder_rows.append(row(f"`{name}`", *decoder_cells(backbone)))
    methods = (f"`{card.name}`" for card in gk.list_methods())
    decoders = (f"`{decoder}`" for decoder in DECODERS)
    return TEXT.format(
        methods=table(["backbone", *methods], method_rows),
        reasons=reason_list(reasons),
        classes=CLASSES,
        decoders=table(["backbone", "maps", *decoders], decoder_rows),
    )


def load(name: str) -> Backbone:
    """Load a backbone at full size, without memory for its weights."""
    with torch.device("meta"):
        return gk.load_backbone(name, weights=None)


def method_cells(backbone: Backbone, reasons: dict[str, int]) -> Iterable[str]:
    """Yield "yes", or the number of the reason; new reasons get the next number."""
    for card in gk.list_methods():
        reason = card.why_not(backbone)
        if reason is None:
            yield "yes"
            continue
        for particular, general in PARTICULAR.items():
            reason = re.sub(particular, general, reason)
        number = reasons.setdefault(reason, len(reasons) + 1)
        yield f"[{number}](#reason-{number})"


def decoder_cells(backbone: Backbone) -> Iterable[str]:
    """Yield the maps in words, then what each decoder trains, in millions."""
    pairs = list(zip(backbone.channels, backbone.strides, strict=True))
    words = [f"{channels} at {stride}" for channels, stride in pairs]
    yield f"4 x {words[0]}" if len(set(words)) == 1 else ", ".join(words)
    side = 2 * max(backbone.strides)
    for decoder in DECODERS:
        with torch.device("meta"):
            model = gk.build_model(backbone, decoder, num_classes=CLASSES)
            maps = [torch.empty(1, c, side // s, side // s) for c, s in pairs]
        chosen = [maps[i] for i in model.decoder.reads]
        answer = model.from_features(chosen, (side, side))
        fits = answer.shape == (1, CLASSES, side, side)
        trained = sum(tensor.numel() for tensor in model.decoder_parameters())
        yield f"{trained / 1e6:.2f}" if fits else "no"


def reason_list(reasons: dict[str, int]) -> str:
    """One line a reason, with an anchor that the table points at."""
    lines = (f'- <a id="reason-{n}"></a>**{n}** {text}.' for text, n in reasons.items())
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[str]) -> str:
    """A Markdown table."""
    return "\n".join([row(*head), row(*["---"] * len(head)), *rows]) + "\n"


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
