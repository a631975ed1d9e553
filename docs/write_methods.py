"""Write docs/methods.md, and the tables of methods in README and cheat-sheet.

    python docs/write_methods.py

They are not edited by hand: change the card of a method, and run this again.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

import geopeft_kit as gk
from geopeft_kit.backbones import Backbone
from geopeft_kit.methods import MethodCard
from geopeft_kit.methods.base import FAMILIES, combining, linear_only

PAGE = Path(__file__).with_name("methods.md")
CHEATSHEET = PAGE.with_name("cheatsheet.md")
README = PAGE.parent.parent / "README.md"
BEGIN = "<!-- written by docs/write_methods.py -->"
END = "<!-- end of what docs/write_methods.py writes -->"
# One network for each kind; the tables hold for its relatives.
ARCHITECTURES = {
    "ViT": "geopeft_tiny",
    "Galileo": "galileo_nano",
    "Swin": "timm:swin_tiny_patch4_window7_224",
    "ConvNeXt": "timm:convnext_tiny",
    "ResNet": "timm:resnet50",
}
ESCAPED = r"\|"
# Family -> its name in README; the other three cells of its line in the cheat-sheet.
FAMILY_FACTS = {
    "ends": (
        "the two ends, and between",
        ("none, all, or some blocks", "nothing (they merge)", "a floor and a ceiling"),
    ),
    "existing weights": (
        "existing weights",
        ("thousands", "nothing (they merge)", "the sensor or the season shifted"),
    ),
    "low rank": (
        "low rank and relatives, computed by Hugging Face `peft` (all but `slr`)",
        ("hundreds of thousands", "nothing (they merge)", "the default"),
    ),
    "prompts": (
        "prompts",
        (
            "tokens x width x depth",
            "longer sequences",
            "the network must stay untouched",
        ),
    ),
    "adapters": (
        "small networks in the blocks",
        ("up to millions", "their own layers", "dense maps, convolutional backbones"),
    ),
    "side networks": (
        "a side network",
        ("13.7 million on a ViT-B", "its own layers", "a plain ViT needs four scales"),
    ),
    "Earth observation": (
        "for Earth observation",
        (
            "up to millions",
            "their own layers",
            "bands that the backbone never saw, change",
        ),
    ),
}
TEXT = """\
# Every method

Written by `python docs/write_methods.py` from the cards that `gk.list_methods()` gives.
`gk.attach(backbone, name)` puts a method on a frozen backbone; an error says why one
does not fit, and which do.

## What each one trains

D width, L blocks, r rank, h bottleneck width, n prompts. "Identity at start" and
"mergeable" are meant for the default options. An adapter says what holds for its own:
`adapter.identity_at_start`, `adapter.mergeable`. `gk.combine` adds up several adapters
of {combining}.

{methods}
## Which method serves which architecture

{serves}
Asked of {asked}.
Smaller relatives have fewer kinds of layer: ConvNeXt atto to nano have no Linear layers
({linear_only}), ResNet-18 and -34 no 1x1 convolutions (`oft`).

Where it says no, this is the reason that `attach` gives:

{reasons}
## Options

Every method also takes `layers`: `"all"`, `"last:4"`, or a list of block numbers.

{options}"""


def page() -> str:
    """Return the whole page as Markdown."""
    cards, backbones = gk.list_methods(), load_backbones()
    refusals = {card.name: refused(card, backbones) for card in cards}
    text = TEXT.format(
        methods=method_table(cards),
        combining=", ".join(f"`{name}`" for name in combining()),
        linear_only=", ".join(f"`{name}`" for name in linear_only()),
        serves=serving_table(refusals),
        asked=", ".join(f"`{name}`" for name in ARCHITECTURES.values()),
        reasons=reason_list(refusals),
        options=option_table(cards),
    )
    link = r"[arXiv \1](https://arxiv.org/abs/\1)"
    return re.sub(r"arXiv (\d{4}\.\d{5})", link, text)


def with_table(path: Path, table: str) -> str:
    """Return a page with another table between its two marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(f"{BEGIN}\n\n")
    after = rest.partition(f"\n{END}")[2]
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def readme_table(cards: list[MethodCard]) -> str:
    """One line per family: its methods, and a few words on some."""
    lines = [row("group", "methods"), row("---", "---")]
    for family in FAMILIES:
        members = (
            f"`{card.name}`" + (f" ({card.note})" if card.note else "")
            for card in cards
            if card.family == family
        )
        lines.append(row(FAMILY_FACTS[family][0], ", ".join(members)))
    return "\n".join(lines) + "\n"


def cheatsheet_table(cards: list[MethodCard]) -> str:
    """One line per family: its methods, their size and cost, when to think of them."""
    lines = [
        row("family", "numbers trained", "costs at prediction", "think of it when"),
        row(*["---"] * 4),
    ]
    for family in FAMILIES:
        names = ", ".join(f"`{card.name}`" for card in cards if card.family == family)
        lines.append(row(f"{family}: {names}", *FAMILY_FACTS[family][1]))
    return "\n".join(lines) + "\n"


def method_table(cards: list[MethodCard]) -> str:
    """The facts of every card."""
    facts = ("trains", "count", "identity at start", "mergeable", "serves", "paper")
    lines = [row("method", *facts), row(*["---"] * (1 + len(facts)))]
    for card in cards:
        cells = (
            f"`{card.name}`: {card.title}",
            card.trained,
            card.count_formula.replace("*", r"\*"),  # no italics
            "yes" if card.identity_at_start else "**no**",
            "yes" if card.mergeable else "no",
            card.needs,
            card.paper,
        )
        lines.append(row(*cells))
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Path -> what it has to hold."""
    cards = gk.list_methods()
    return {
        PAGE: page(),
        README: with_table(README, readme_table(cards)),
        CHEATSHEET: with_table(CHEATSHEET, cheatsheet_table(cards)),
    }


def load_backbones() -> dict[str, Backbone]:
    """Load each architecture without memory for its weights."""
    with torch.device("meta"):
        return {
            kind: gk.load_backbone(name, weights=None)
            for kind, name in ARCHITECTURES.items()
        }


def refused(card: MethodCard, backbones: dict[str, Backbone]) -> dict[str, str]:
    """Architecture -> why the method does not fit it; empty where it fits them all."""
    reasons = {kind: card.why_not(backbone) for kind, backbone in backbones.items()}
    return {kind: reason for kind, reason in reasons.items() if reason is not None}


def serving_table(refusals: dict[str, dict[str, str]]) -> str:
    """Methods against architectures."""
    lines = [row("method", *ARCHITECTURES), row(*["---"] * (1 + len(ARCHITECTURES)))]
    for name, reasons in refusals.items():
        words = ("no" if kind in reasons else "yes" for kind in ARCHITECTURES)
        lines.append(row(f"`{name}`", *words))
    return "\n".join(lines) + "\n"


def reason_list(refusals: dict[str, dict[str, str]]) -> str:
    """One line for each method and reason."""
    lines = []
    for name, reasons in refusals.items():
        for reason in dict.fromkeys(reasons.values()):
            kinds = ", ".join(
                kind for kind, other in reasons.items() if other == reason
            )
            lines.append(f"- `{name}`, {kinds}: {reason}.")
    return "\n".join(lines) + "\n"


def option_table(cards: list[MethodCard]) -> str:
    """The options that each method spells out in its signature."""
    lines = [row("method", "options"), row("---", "---")]
    for card in cards:
        options = (f"`{name}: {kind}`" for name, kind in card.options.items())
        lines.append(row(f"`{card.name}`", ", ".join(options) or "none"))
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    """One line of a Markdown table; a type such as `str | None` holds its sign."""
    return f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
