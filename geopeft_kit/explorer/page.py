"""The explorer's page: where the panels stand, and when each is drawn.

Only the tab in view is drawn. Pictures and maps are kept, so that going back to a run
costs no more than showing them again.
"""

from __future__ import annotations

import base64
import importlib.util
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from geopeft_kit.data.chips import ChipData
from geopeft_kit.explorer import figures, panels
from geopeft_kit.explorer.bench import Bench, KeptRun, Preview, machine_memory
from geopeft_kit.explorer.choice import Choice
from geopeft_kit.explorer.controls import Controls, control
from geopeft_kit.maps.scene_map import SceneMap
from geopeft_kit.plots import METHOD_COLOURS

TABS = ("Picture", "Map", "Runs", "Code")
NOT_TRAINED = "not trained yet"


class Page:
    """Widgets and what they show.

    Args:
        bench: Previews, runs, predictions.
        controls: The choice.
        show: Which three bands a picture shows.
        height: Of the map, in pixels.

    Attributes:
        box: The whole widget.
        message: A sentence under the buttons, until the next drawing.
    """

    def __init__(
        self, bench: Bench, controls: Controls, show: Any, height: int
    ) -> None:
        self.bench, self.controls = bench, controls
        self.show, self.height, self.message = show, height, ""
        self._quiet = False
        self._pictures: dict[tuple, bytes] = {}
        self._maps: dict[tuple, SceneMap] = {}
        self._make_panels()
        self._make_tabs()
        side = widgets.VBox(
            [controls.box, self.buttons, self.saving, self.notes],
            layout={"width": "312px", "flex": "none", "padding": "0 12px 0 0"},
        )
        top = widgets.HBox(
            [self.parameters, self.memory, self.progress],
            layout={"width": "auto", "min_height": "186px"},  # no jump on a toggle
        )
        main = widgets.VBox(
            [top, self.picks, self.tabs], layout={"flex": "1 1 0", "min_width": "0"}
        )
        self.box = widgets.HBox([side, main], layout={"width": "100%"})
        self.box.add_class("gpk-explorer")

    def _make_panels(self) -> None:
        third = {"min_width": "0", "margin": "0 14px 6px 0"}
        self.parameters, self.memory, self.progress = (
            widgets.HTML(layout={**third, "flex": grow})
            for grow in ("1 1 0", "1 1 0", "1.3 1 0")
        )
        self.notes = widgets.HTML(layout={"width": "auto"})
        for name in ("parameters", "memory", "progress", "notes"):
            getattr(self, name).add_class(f"gpk-{name}")
        self.train_button = widgets.Button(
            description="Train", button_style="primary", layout={"width": "96px"}
        )
        self.cancel_button = widgets.Button(
            description="Cancel", disabled=True, layout={"width": "80px"}
        )
        self.bar = widgets.FloatProgress(
            max=1.0, layout={"flex": "1 1 0", "min_width": "0"}
        )
        self.train_button.add_class("gpk-train")
        self.cancel_button.add_class("gpk-cancel")
        self.buttons = widgets.HBox(
            [self.train_button, self.cancel_button, self.bar],
            layout={"width": "auto", "margin": "4px 0"},
        )

        self.save_button = widgets.Button(
            description="Save this run", disabled=True, layout={"width": "110px"}
        )
        self.folder = widgets.Text(layout={"flex": "1 1 0", "min_width": "0"})
        self.save_button.add_class("gpk-save")
        self.folder.add_class("gpk-folder")
        self.saving = widgets.HBox(
            [self.save_button, self.folder], layout={"width": "auto"}
        )

    def _make_tabs(self) -> None:
        self.run = control(widgets.Dropdown, "run", "run", options=[(NOT_TRAINED, "")])
        self.other = control(
            widgets.Dropdown, "swipe against", "other", options=[("truth", "")]
        )
        self.place = control(widgets.Dropdown, "chip", "place", options=[("", 0)])
        for one in (self.run, self.other, self.place):
            one.layout = {"flex": "1 1 0", "min_width": "0"}
            one.style.description_width = "initial"
        self.picks = widgets.HBox(
            [self.run, self.other, self.place], layout={"width": "auto"}
        )
        whole = "calc(100% - 4px)"  # less the margins that every widget has
        self.picture = widgets.Image(format="png", layout={"max_width": whole})
        self.picture.add_class("gpk-picture")
        self.table = widgets.HTML(layout={"width": "auto"})
        self.table.add_class("gpk-table")
        self.trade_off = widgets.Image(
            format="png",
            layout={"max_width": whole, "width": "684px", "display": "none"},
        )
        self.trade_off.add_class("gpk-trade-off")
        self.code = widgets.HTML(layout={"width": "auto"})
        self.stage = widgets.VBox(layout={"width": "auto"})
        self.tabs = widgets.Tab(
            [
                widgets.VBox([self.picture], layout={"align_items": "flex-start"}),
                self.stage,
                widgets.VBox(
                    [self.table, self.trade_off], layout={"align_items": "flex-start"}
                ),
                self.code,
            ],
            layout={"width": "auto"},
        )
        for number, title in enumerate(TABS):
            self.tabs.set_title(number, title)
        self.tabs.observe(lambda _: self._guarded(self._draw_tab), "selected_index")
        self.run.observe(self._go_to, names="value")
        for one in (self.other, self.place):
            one.observe(self._look_again, "value")

    def on_train(self, action: Callable[[], Any]) -> None:
        """What the Train button does; an error is shown, the widget lives on."""
        self.train_button.on_click(lambda _: self._guarded(action))

    def on_cancel(self, action: Callable[[], Any]) -> None:
        """What the Cancel button does."""
        self.cancel_button.on_click(lambda _: self._guarded(action))

    def on_save(self, action: Callable[[str | None], Any]) -> None:
        """What "Save this run" does with the folder beside it; None if it is empty."""

        def save() -> None:
            try:
                action(self.folder.value.strip() or None)
            except (OSError, ValueError, RuntimeError) as error:
                text = f"The run was not saved: {error}"
                self.notes.value = panels.message_html(text, "refused")
            else:
                self.folder.value = ""

        self.save_button.on_click(lambda _: self._guarded(save))

    def _look_again(self, change: Mapping[str, Any]) -> None:
        if not self._quiet:
            self._guarded(self._draw_tab)

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Do something for a click; without this its error would go to a log file."""
        try:
            action()
        except Exception:
            text = traceback.format_exc()
            self.notes.value = panels.message_html(text, "error", full=True)

    # --- drawing ----------------------------------------------------------------------

    def draw(self, training: bool, news: Mapping[str, Any], error: str) -> None:
        """Draw everything for the choice.

        Args:
            training: Whether a training is under way.
            news: What it told last.
            error: Traceback of the last training, or empty.
        """
        try:
            choice = self.controls.choice()
            self.bench.data_of(choice)
            preview = self.bench.preview(choice)
        except (ValueError, TypeError) as mistake:
            choice, preview = None, Preview(reason=str(mistake))
        self.choice = choice
        run = None if choice is None else self.bench.runs.get(choice.key)
        method = self.controls.method.value
        self.parameters.value = panels.parameters_html(preview, method)
        machine = machine_memory(self.bench.device)
        device = "this machine" if self.bench.device.type == "cpu" else "the GPU"
        self.memory.value = panels.memory_html(preview, machine, device)
        self.train_button.disabled = bool(training or run or preview.reason)
        self.train_button.description = "Train" if run is None else "Trained"
        self.cancel_button.disabled = not training
        self.save_button.disabled = training or run is None
        self.folder.placeholder = "" if run is None else run.free_folder
        self._draw_notes(preview, error)
        if training:
            self.draw_progress(news)
        else:
            self._draw_result(run)
        if choice is not None:
            self._offer(choice, run)
            self._draw_tab()

    def _draw_notes(self, preview: Preview, error: str) -> None:
        if error:
            self.notes.value = panels.message_html(error, "error", full=True)
        else:
            text, state = preview.reason or self.message, "message"
            state = "refused" if preview.reason else state
            self.notes.value = panels.message_html(text, state)
        self.message = ""

    def draw_progress(self, news: Mapping[str, Any]) -> None:
        """The training under way, whatever the controls say meanwhile."""
        choice: Choice = news["choice"]
        step, steps = news.get("step", 0), news.get("steps", 0)
        facts = f"{choice.title}: "
        if steps:
            share = f"step {step}/{steps}, {news['step_ms']:.0f} ms a step"
            facts += f"{share}, {news['memory']:,.0f} MiB in this process"
        else:
            facts += "the decoder's head start ..."
        self.bar.value = step / steps if steps else 0.0
        self.bar.bar_style = "info"
        self._draw_curves(choice, news, panels.escape(facts), "training")

    def _draw_result(self, run: KeptRun | None) -> None:
        self.bar.value = 1.0 if run else 0.0
        self.bar.bar_style = "success" if run else ""
        if run is None:
            text = "<small>Not trained yet.</small>"
            self.progress.value = panels.panel("Training", text, "untrained")
            return
        facts = (
            f"{run.name}: {run.resources['step_ms']:.0f} ms a step, "
            f"{run.memory:,.0f} MiB measured; held out {run.score():.3f}"
        )
        news = {"losses": run.losses, "rows": run.rows}
        self._draw_curves(run.choice, news, panels.escape(facts), f"run:{run.number}")

    def _draw_curves(
        self, choice: Choice, news: Mapping[str, Any], facts: str, state: str
    ) -> None:
        self.progress.value = panels.progress_html(
            news.get("losses", []),
            news.get("rows", []),
            self.bench.data[choice.data].task,
            choice.epochs,
            METHOD_COLOURS.get(choice.method, panels.GREY),
            facts,
            state,
        )

    def _offer(self, choice: Choice, run: KeptRun | None) -> None:
        """Runs to go to, runs to swipe against, chips to look at."""
        self._quiet = True
        try:
            kept = [(r.name, key) for key, r in self.bench.runs.items()]
            first = [] if run else [(NOT_TRAINED, "")]
            _offer(self.run, first + kept, choice.key if run else "")
            rivals = [
                (r.name, key)
                for key, r in self.bench.runs.items()
                if r is not run and self._same_data(r.choice, choice)
            ]
            _offer(self.other, [("truth", ""), *rivals], self.other.value)
            data = self.bench.data_of(choice)
            chips = data.dataset("test")
            table = chips.table
            places = [
                (f"{table.regions[row]}: {table.chips[row]}", position)
                for position in figures.positions_of(data)
                for row in [chips.rows[position]]
            ]
            _offer(self.place, places, self.place.value)
        finally:
            self._quiet = False

    @staticmethod
    def _same_data(one: Choice, other: Choice) -> bool:
        return (one.data, one.held_out) == (other.data, other.held_out)

    def _go_to(self, change: Mapping[str, Any]) -> None:
        """Show a kept run: the controls say its choice."""
        if not self._quiet and change["new"]:
            self.controls.set(self.bench.runs[change["new"]].choice)

    def _draw_tab(self) -> None:
        """Draw the tab in view."""
        choice = self.choice
        if choice is None:
            return
        data, run = self.bench.data_of(choice), self.bench.runs.get(choice.key)
        tab = TABS[self.tabs.selected_index or 0]
        if tab == "Picture":
            self.picture.value = self._picture(data, choice, run)
        elif tab == "Map":
            self.stage.children = (self._map(data, choice, run),)
        elif tab == "Runs":
            self.table.value = self._runs_table(run)
            self.trade_off.value = self._trade_off(choice, run)
            self.trade_off.layout.display = "" if self.bench.runs else "none"
        else:
            self.code.value = panels.code_html(self.bench.code(choice))

    def _runs_table(self, run: KeptRun | None) -> str:
        everything = list(self.bench.runs.values())
        return panels.runs_html(everything, run, len(self.bench.data) > 1)

    def _trade_off(self, choice: Choice, run: KeptRun | None) -> bytes:
        """Score against memory, of the runs that are scored on the same chips."""
        runs = self.bench.runs.values()
        same = [one for one in runs if self._same_data(one.choice, choice)]
        return figures.trade_off_png(same, run)

    def _picture(self, data: ChipData, choice: Choice, run: KeptRun | None) -> bytes:
        number = run.number if run else 0
        key = (choice.data, choice.held_out, number, self.place.value)
        if key not in self._pictures:
            self._pictures[key] = figures.chip_png(
                self.bench, data, run, self.place.value, self.show
            )
        return self._pictures[key]

    def _map(self, data: ChipData, choice: Choice, run: KeptRun | None) -> Any:
        """The map as a widget; its page where ipyleaflet is not installed."""
        rival = self.bench.runs.get(self.other.value)
        runs = [one for one in (run, rival) if one is not None]
        key = (choice.data, choice.held_out, *(one.number for one in runs))
        try:
            if key not in self._maps:
                self._maps[key] = figures.map_of(
                    self.bench, data, runs, self.show, self.height
                )
        except ValueError as reason:
            return widgets.HTML(panels.message_html(str(reason), "no-map"))
        if importlib.util.find_spec("ipyleaflet") is None:
            text = "ipyleaflet is not installed, so this is the map's page, no widget."
            bundle = self._maps[key]._repr_mimebundle_()["text/html"]
            return widgets.HTML(panels.message_html(text) + bundle)
        return self._maps[key].widget

    def as_html(self) -> str:
        """The page as it stands, for where no widget can live."""
        parts = [self.parameters, self.memory, self.progress, self.notes]
        text = "".join(part.value for part in parts)
        if self.choice is not None:
            choice = self.choice
            run = self.bench.runs.get(choice.key)
            text += _image(self._picture(self.bench.data_of(choice), choice, run))
            text += self._runs_table(run) + _image(self._trade_off(choice, run))
            text += panels.panel("Code", panels.listing(self.bench.code(choice)))
        return f"<div style='max-width:900px'>{text}</div>"


def _image(png: bytes) -> str:
    """A picture inside the page; nothing where there is none."""
    data = base64.b64encode(png).decode()
    return f"<img alt='' src='data:image/png;base64,{data}'>" if png else ""


def _offer(widget: Any, options: Sequence[tuple[str, Any]], value: Any) -> None:
    """Set options and value of a dropdown, touching it only where they change."""
    if list(widget.options) != list(options):
        widget.options = options
    values = [option[1] for option in options]
    widget.value = value if value in values else values[0]
