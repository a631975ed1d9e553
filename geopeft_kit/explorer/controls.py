"""The explorer's controls: core ipywidgets that make a `Choice`.

The options of a method are read from its card, so a method that is added later has its
controls at once.
"""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from geopeft_kit.decoders import DECODERS
from geopeft_kit.explorer.choice import AS_GIVEN, Choice, defaults_of, find_method
from geopeft_kit.explorer.session import Session
from geopeft_kit.maps.widget import named
from geopeft_kit.model import WHOLE_IMAGE_TASKS


def control(kind: Callable[..., Any], label: str, name: str, **settings: Any) -> Any:
    """A labelled widget of a class, as wide as its column; `gpk-name` in CSS."""
    made = kind(
        description=label,
        layout={"width": "auto", "margin": "2px 0"},
        style={"description_width": "92px"},
        **settings,
    )
    return named(made, name)


class Controls:
    """Controls for the data sets and backbones of a session, and for methods.

    Attributes:
        box: The controls, one below the other.
    """

    def __init__(self, session: Session, methods: Sequence[str]) -> None:
        self.session = session
        self._listeners: list[Callable[[], None]] = []
        self._quiet = False
        titles = [(f"{m}: {find_method(m).title}", m) for m in methods]
        first = "lora" if "lora" in methods else methods[0]
        pick = widgets.Dropdown
        self.data = control(pick, "data", "data", options=list(session.data))
        self.held_out = control(pick, "held out", "held-out", options=[("", AS_GIVEN)])
        self.backbone = control(
            pick, "backbone", "backbone", options=list(session.backbones)
        )
        self.method = control(pick, "method", "method", options=titles, value=first)
        self.options = widgets.VBox(layout={"width": "auto"})
        self.decoder = control(pick, "decoder", "decoder", options=[*DECODERS])
        self.epochs = control(
            widgets.BoundedIntText, "epochs", "epochs", value=4, min=1, max=10_000
        )
        self.rate = control(
            widgets.Text, "learning rate", "rate", continuous_update=False
        )
        self.seed = control(
            widgets.BoundedIntText, "seed", "seed", value=0, min=0, max=2**31
        )
        self._texts: dict[str, Any] = {}
        self._offer_regions()
        self._offer_options()
        for one in self._all():
            one.observe(self._changed, names="value")
        self.box = widgets.VBox(
            [self.data, self.held_out, self.backbone, self.method, self.options,
             self.decoder, self.epochs, self.rate, self.seed],
            layout={"width": "auto"},
        )  # fmt: skip
        if len(session.data) < 2:
            self.data.layout.display = "none"

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function after each change."""
        self._listeners.append(listener)

    def choice(self) -> Choice:
        """What the controls say. Raises ValueError for a text that is not a value."""
        return Choice(
            data=self.data.value,
            held_out=self.held_out.value,
            backbone=self.backbone.value,
            method=self.method.value,
            options={
                name: _read(text, name == "targets")
                for name, text in self._texts.items()
            },  # fmt: skip
            decoder=self.decoder.value,
            epochs=self.epochs.value,
            learning_rate=_rate(self.rate.value),
            seed=self.seed.value,
        )

    def set(self, choice: Choice) -> None:
        """Set the controls to a choice; listeners are called once, at the end.

        Raises ValueError where something is not offered.
        """
        self._quiet = True
        try:
            _put(self.data, choice.data)
            self._offer_regions()
            own = [choice.held_out] == self._given()
            for one, value in (
                (self.held_out, AS_GIVEN if own else choice.held_out),
                (self.backbone, choice.backbone),
                (self.method, choice.method),
                (self.decoder, choice.decoder),
            ):
                _put(one, value)
            self._offer_options(choice.options)
            self.epochs.value, self.seed.value = choice.epochs, choice.seed
            rate = choice.learning_rate
            self.rate.value = "" if rate is None else f"{rate:g}"
        finally:
            self._quiet = False
        self._tell()

    def _all(self) -> list[Any]:
        return [self.data, self.held_out, self.backbone, self.method, self.decoder,
                self.epochs, self.rate, self.seed]  # fmt: skip

    def _changed(self, change: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        self._quiet = True  # what follows from a change is part of it
        try:
            if change["owner"] is self.data:
                self._offer_regions()
            if change["owner"] is self.method:
                self._offer_options()
        finally:
            self._quiet = False
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _offer_regions(self) -> None:
        """The regions of the data; and the one decoder that whole images have."""
        data = self.session.data[self.data.value]
        given = self._given()
        label = f"as given: {', '.join(given)}"
        offered = self.session.regions(self.data.value)
        regions = [(region, region) for region in offered if [region] != given]
        self.held_out.options = [(label, AS_GIVEN), *regions]
        whole = data.task in WHOLE_IMAGE_TASKS
        names = ["linear"] if whole else [*DECODERS]
        if list(self.decoder.options) != names:
            self.decoder.options = names

    def _given(self) -> list[str]:
        """The regions that the data itself holds out."""
        index = self.session.data[self.data.value].index
        return sorted(
            index.loc[index["split"] == "test", "region"].astype(str).unique()
        )

    def _offer_options(self, values: Mapping[str, Any] | None = None) -> None:
        """One control for each option of the method."""
        for one in self._texts.values():
            one.unobserve_all()
            one.close()
        card = find_method(self.method.value)
        defaults = defaults_of(card)
        rate = card.learning_rate
        own = "not used" if rate is None else f"default: {rate:g}"
        self.rate.placeholder = own
        self._texts = {
            name: _option_control(name, {**defaults, **(values or {})}[name])
            for name in defaults
        }
        for one in self._texts.values():
            one.observe(self._changed, names="value")
        self.options.children = tuple(self._texts.values())


def _option_control(name: str, value: Any) -> Any:
    """A control that fits the type of an option's value."""
    settings: dict[str, Any] = {"value": value}
    kind = widgets.Text
    if isinstance(value, bool):
        kind = widgets.Checkbox
    elif isinstance(value, int):
        kind = widgets.IntText
    elif isinstance(value, float):
        kind = widgets.FloatText
        settings["step"] = 0.1
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        settings["value"] = "" if text is None else str(text)
        settings["placeholder"] = "default"
    if kind is not widgets.Checkbox:
        settings["continuous_update"] = False
    return control(kind, name.replace("_", " "), f"option-{name}", **settings)


def _read(widget: Any, many: bool) -> Any:
    """The value of an option: texts hold numbers, words, or words between commas.

    `many`: a lone word is a list of one.
    """
    value = widget.value
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        words = [word.strip() for word in text.split(",")]
        return words if many or len(words) > 1 else text


def _rate(text: str) -> float | None:
    if not text.strip():
        return None
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(
        f"the learning rate is {text!r}; write a number above 0 as 1e-3, or leave it "
        "empty for the method's own."
    )


def _put(widget: Any, value: Any) -> None:
    """Set a choice, with an error that lists what there is."""
    options = [o[1] if isinstance(o, tuple) else o for o in widget.options]
    if value not in options:
        raise ValueError(
            f"{value!r} is not offered. There is {', '.join(map(repr, options))}."
        )
    widget.value = value
