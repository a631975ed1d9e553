"""A choice: everything that determines one run, and the code that repeats it."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from geopeft_kit.bands import resolve_bands
from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.simulated import simulated_data
from geopeft_kit.methods import MethodCard, list_methods

AS_GIVEN = ""  # the regions that the data itself holds out


@dataclass(frozen=True)
class Choice:
    """What was chosen, ready for JSON.

    Attributes:
        data: Label of the data set.
        held_out: Region to hold out; empty for those that the data holds out itself.
        backbone: Label of the backbone.
        options: Of the method, where they differ from their defaults, and `layers`.
        learning_rate: For what trains in the backbone; None for the method's own.
        seed: Of weights, order of chips and dropout.
    """

    data: str
    held_out: str
    backbone: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    decoder: str = "linear"
    epochs: int = 4
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        card = find_method(self.method)
        known = defaults_of(card)
        unknown = sorted(set(self.options) - set(known))
        if unknown:  # also keeps anything but names out of the code that is written
            raise ValueError(
                f"{self.method!r} has no option {', '.join(map(repr, unknown))}. It "
                f"has {', '.join(known)}."
            )
        changed = {k: v for k, v in self.options.items() if v != known[k]}
        object.__setattr__(self, "options", changed)

    @property
    def key(self) -> str:
        """One text per choice; equal choices have equal keys."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @property
    def title(self) -> str:
        """Method, whatever was changed, and decoder in a few words."""
        parts = dict(self.options)
        if self.learning_rate is not None:
            parts["learning rate"] = f"{self.learning_rate:g}"
        if self.seed:
            parts["seed"] = self.seed
        changed = ", ".join(f"{name} {value}" for name, value in parts.items())
        return f"{self.method}{f' ({changed})' if changed else ''} + {self.decoder}"

    @property
    def rate(self) -> float:
        """The learning rate: the chosen one, or the method's own; 0 if it has none."""
        own = find_method(self.method).learning_rate
        return (own or 0.0) if self.learning_rate is None else self.learning_rate

    def to_dict(self) -> dict[str, Any]:
        """The fields, plain JSON; tuples become lists."""
        return json.loads(json.dumps(asdict(self)))


def find_method(name: str) -> MethodCard:
    """The card of a method; ValueError if there is none."""
    cards = {card.name: card for card in list_methods()}
    if name not in cards:
        raise ValueError(f"no method {name!r}. Choose one of: {', '.join(cards)}.")
    return cards[name]


def defaults_of(card: MethodCard) -> dict[str, Any]:
    """Option -> default, read from the method's card; `layers` comes first."""
    texts = {name: text.split(" = ", 1)[1] for name, text in card.options.items()}
    return {"layers": "all"} | {k: ast.literal_eval(v) for k, v in texts.items()}


# --- code -----------------------------------------------------------------------------


def code_of(
    choice: Choice,
    data: ChipData,
    backbone: Mapping[str, Any],
    device: torch.device,
    saved: str = "",
) -> str:
    """Python code that repeats a run in an empty process and prints the same scores.

    Args:
        choice: What was chosen.
        data: The data set, with the choice's held-out region applied.
        backbone: Arguments of `load_backbone`, with `name`.
        device: Where the run was trained.
        saved: Folder that the run was saved in, or empty.
    """
    arguments = dict(backbone)
    name = arguments.pop("name")
    random = arguments.get("weights", "") is None or "random" in arguments.values()
    place = "" if device.type == "cpu" else f".to({_text(device.type)})"
    load = _call(
        "gk.load_backbone", [_text(name), "bands=data.bands"], _keywords(arguments)
    )
    attach = _call(
        "gk.attach", ["backbone", _text(choice.method)], _keywords(choice.options)
    )
    settings: dict[str, Any] = {"epochs": choice.epochs, "seed": choice.seed}
    if "val" in data.splits:
        settings["validate_every"] = 1
    if choice.learning_rate is not None:
        settings["learning_rate"] = choice.learning_rate
    parts = ["backbone", _text(choice.decoder), "data.task", "data.num_classes"]
    build = _call(
        "gk.build_model", parts, ["factor=data.factor"] if data.factor > 1 else []
    )
    lines = [
        "import torch",
        "",
        "import geopeft_kit as gk",
        "",
        f"data = {data_code(data)}",
        *(["torch.manual_seed(0)"] if random else []),
        f"backbone = {load}{place}",
        "",
        f"torch.manual_seed({choice.seed})",
        f"adapter = {attach}",
        f"model = {build}",
        f"run = {_call('gk.fit', ['model', 'data'], _keywords(settings))}",
        "",
        'print("validation", run.metrics.get("overall"))',
        'print("held out", gk.evaluate(model, data, "test")["overall"])',
    ]
    if saved:
        place = _text(saved)
        lines += ["", f"gk.save_model(model, {place})",
                  f"# In the next session: model = gk.load_model({place})"]  # fmt: skip
    return "\n".join(lines) + "\n"


def data_code(data: ChipData) -> str:
    """The call that makes this data set again.

    Simulated data is made anew from its recipe, so that the code runs on any machine;
    other data is read from its folder.
    """
    given = dict(data.hparams)
    recipe = data.info.extra.get("recipe", {}) if data.simulated else {}
    subsets = "".join(data.subsets)
    if data.factor > 1:
        subsets += f".for_super_resolution({data.factor})"
    from_recipe = (
        bool(recipe)
        and given["split"] == "region"
        and given["bands"] is None
        and given["test_regions"] is not None
        and given["seed"] == recipe["seed"]
    )
    if not from_recipe:
        folder = _text(str(Path(given.pop("folder")).resolve()))
        return _call("gk.ChipData", [folder], _changed(given, ChipData)) + subsets
    made = {k: v for k, v in recipe.items() if k not in ("task", "regions", "version")}
    made["test_regions"] = list(given["test_regions"])
    trained = set(recipe["regions"]) - set(made["test_regions"])
    made["train_regions"] = [r for r in recipe["regions"] if r in trained]
    for name in ("batch_size", "val_fraction", "augment", "buffer_m"):
        made[name] = given[name]
    keywords = _changed(made, ChipData, simulated_data)
    return _call("gk.simulated_data", [_text(recipe["task"])], keywords) + subsets


def _changed(values: Mapping[str, Any], *functions: Any) -> list[str]:
    """Keyword arguments that differ from the defaults of the functions."""
    defaults: dict[str, Any] = {}
    for function in functions:
        parameters = inspect.signature(function).parameters.items()
        defaults |= {name: parameter.default for name, parameter in parameters}
    if isinstance(defaults.get("bands"), str):  # a sensor's name
        defaults["bands"] = resolve_bands(defaults["bands"])
    kept = {k: v for k, v in values.items() if _plain(v) != _plain(defaults.get(k))}
    if not kept.get("shift"):
        kept.pop("shift", None)
    return _keywords(kept)


def _keywords(values: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as code; names in a saved explorer may be anything."""
    strange = [name for name in values if not name.isidentifier()]
    if strange:
        raise ValueError(f"{strange[0]!r} cannot be the name of an argument.")
    return [f"{name}={_text(value)}" for name, value in values.items()]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    """A value as code, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)


def _call(function: str, first: list[str], keywords: list[str]) -> str:
    """A call on one line where it fits, else one argument a line."""
    parts = [*first, *keywords]
    line = f"{function}({', '.join(parts)})"
    if len(line) <= 66:
        return line
    return "\n    ".join([f"{function}(", *(f"{part}," for part in parts)]) + "\n)"
