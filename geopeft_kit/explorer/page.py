"""The explorer's page: its widgets, and when each is drawn.

Only the visible tab is drawn. Pictures and maps are cached, so that a run is shown
again at once.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets

from geopeft_kit.data.chips import ChipData
from geopeft_kit.explorer import figures, panels
from geopeft_kit.explorer.choice import Choice
from geopeft_kit.explorer.controls import Controls, control
from geopeft_kit.explorer.session import KeptRun, Preview, Session, machine_memory
from geopeft_kit.maps.scene_map import SceneMap
from geopeft_kit.maps.widget import named, set_options, tooltip

TABS = ("Picture", "Map", "Runs", "Code")
NOT_TRAINED = "not trained yet"
FILL = {"flex": "1 1 0", "min_width": "0"}  # share the room that is left
AUTO = {"width": "auto"}  # less the margins that every widget has
WRAP = {**AUTO, "flex_flow": "row wrap"}
SCROLL = {**AUTO, "overflow": "auto", "max_width": "100%"}


class Page:
    """Widgets and what they show.

    Args:
        session: Previews, runs, predictions.
        controls: The choice.
        show: Which three bands a picture shows.
        height: Of the map, in pixels.
        csv: Gives the table of runs for its download.

    Attributes:
        box: The whole widget.
        message: A sentence under the buttons, until the next drawing.
    """

    def __init__(
        self,
        session: Session,
        controls: Controls,
        show: Any,
        height: int,
        csv: Callable[[], str],
    ) -> None:
        self.session, self.controls = session, controls
        self.show, self.height, self.message, self.csv = show, height, "", csv
        self._quiet = False
        self._pictures: dict[tuple, str] = {}
        self._maps: dict[tuple, SceneMap] = {}
        self._scene: SceneMap | None = None  # the one in view
        self._make_panels()
        self._make_tabs()
        side = widgets.VBox(
            [controls.box, self.buttons, self.saving, self.notes],
            layout={"flex": "1 0 280px", "min_width": "0", "padding": "0 12px 0 0"},
        )
        top = widgets.HBox(
            [self.parameters, self.memory, self.progress],
            layout={**WRAP, "min_height": "186px"},  # no jump on a toggle
        )
        wide = {"flex": "1000 1 460px", "min_width": "0"}
        main = widgets.VBox([top, self.picks, self.tabs], layout=wide)
        box = widgets.HBox([side, main], layout={"width": "100%", "flex_flow": "wrap"})
        self.box = named(box, "explorer")

    def _make_panels(self) -> None:
        third = {"min_width": "0", "margin": "0 14px 6px 0"}
        self.parameters, self.memory, self.progress = (
            named(widgets.HTML(layout={**third, "flex": grow}), name)
            for name, grow in (("parameters", "1 1 190px"), ("memory", "1 1 190px"),
                               ("progress", "1.3 1 220px"))
        )  # fmt: skip
        self.notes = named(widgets.HTML(layout=AUTO), "notes")
        self.train_button = named(
            widgets.Button(
                description="Train", button_style="primary", layout={"width": "96px"}
            ),
            "train",
        )
        self.cancel_button = named(
            widgets.Button(
                description="Cancel",
                disabled=True,
                layout={"width": "80px"},
                **tooltip(
                    widgets.Button,
                    "stops the training; the notebook's stop button does not reach it",
                ),
            ),
            "cancel",
        )
        self.bar = widgets.FloatProgress(max=1.0, layout=FILL)
        self.buttons = widgets.HBox(
            [self.train_button, self.cancel_button, self.bar],
            layout={**AUTO, "margin": "4px 0"},
        )
        self.save_button = named(
            widgets.Button(
                description="Save this run", disabled=True, layout={"width": "110px"}
            ),
            "save",
        )
        self.folder = named(widgets.Text(layout=FILL), "folder")
        self.saving = widgets.HBox([self.save_button, self.folder], layout=AUTO)

    def _make_tabs(self) -> None:
        self.run, self.other, self.place = (
            control(widgets.Dropdown, label, name, options=[first])
            for label, name, first in (
                ("run", "run", (NOT_TRAINED, "")),
                ("swipe against", "other", ("truth", "")),
                ("chip", "place", ("", 0)),
            )
        )
        for one in (self.run, self.other, self.place):
            one.layout = {"flex": "1 1 160px", "min_width": "0"}
            one.style.description_width = "initial"
        self.picks = widgets.HBox([self.run, self.other, self.place], layout=WRAP)
        self.picture = widgets.HTML(layout=SCROLL)
        self.table = named(widgets.HTML(layout=SCROLL), "table")
        self.trade_off = widgets.HTML(layout=SCROLL)
        self.code = widgets.HTML(layout=AUTO)
        self.map_box = widgets.VBox(layout=AUTO)
        left = {"align_items": "flex-start"}
        self.tabs = widgets.Tab(
            [
                widgets.VBox([self.picture], layout=left),
                self.map_box,
                widgets.VBox([self.table, self.trade_off], layout=left),
                self.code,
            ],
            layout=AUTO,
        )
        for number, title in enumerate(TABS):
            self.tabs.set_title(number, title)
        self.tabs.observe(lambda _: self._guarded(self._draw_tab), "selected_index")
        self.run.observe(self._show_run, names="value")
        for one in (self.other, self.place):
            one.observe(self._redraw_tab, "value")
        self.place.observe(self._go_to_chip, "value")

    def on_click(self, button: widgets.Button, action: Callable[[], Any]) -> None:
        """What a button does; an error is shown, and the widget still works."""
        button.on_click(lambda _: self._guarded(action))

    def on_save(self, action: Callable[[str | None], Any]) -> None:
        """What "Save this run" does with the folder in the text field, or None."""

        def save() -> None:
            try:
                action(self.folder.value.strip() or None)
            except (OSError, ValueError, RuntimeError) as error:
                self._note(f"The run was not saved: {error}", "refused")
            else:
                self.folder.value = ""

        self.on_click(self.save_button, save)

    def _redraw_tab(self, change: Mapping[str, Any]) -> None:
        if not self._quiet:
            self._guarded(self._draw_tab)

    def _go_to_chip(self, _: Any) -> None:
        """Show the chip of the dropdown on the map."""
        if self._quiet or self._scene is None or self.choice is None:
            return
        chips = self.session.data_of(self.choice).dataset("test")
        row = chips.rows[self.place.value]
        shape = chips.table.index.geometry.iloc[row]
        if shape is not None:
            west, south, east, north = shape.bounds
            self._scene.go(((south, west), (north, east)))

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Do something for a click; without this its error would go to a log file."""
        try:
            action()
        except Exception:
            self._note(traceback.format_exc(), "error", full=True)

    def _note(self, text: str, state: str = "message", full: bool = False) -> None:
        """A sentence or, in full, a traceback under the buttons."""
        self.notes.value = panels.render("message", text, state, full)

    # --- drawing ----------------------------------------------------------------------

    def draw(self, training: bool, news: Mapping[str, Any], error: str) -> None:
        """Draw everything; `news` and `error` (a traceback) are the last training's."""
        try:
            choice = self.controls.choice()
            self.session.data_of(choice)
            preview = self.session.preview(choice)
        except (ValueError, TypeError) as mistake:
            choice, preview = None, Preview(reason=str(mistake))
        self.choice = choice
        run = None if choice is None else self.session.runs.get(choice.key)
        method = self.controls.method.value
        self.parameters.value = panels.parameters_html(preview, method)
        machine = machine_memory(self.session.device)
        device = "this machine" if self.session.device.type == "cpu" else "the GPU"
        self.memory.value = panels.memory_html(preview, machine, device)
        fits = sum(preview.memory.values()) < machine[0]
        self.train_button.disabled = bool(training or run or preview.reason or not fits)
        self.train_button.description = "Train" if run is None else "Trained"
        self.cancel_button.disabled = not training
        self.save_button.disabled = training or run is None
        self.folder.placeholder = "" if run is None else run.free_folder
        if error:
            self._note(error, "error", full=True)
        elif preview.reason:
            self._note(preview.reason, "refused")
        else:
            self._note(self.message)
        self.message = ""
        if training:
            self.draw_progress(news)
        else:
            self._draw_result(run)
        if choice is not None:
            self._offer(choice, run)
            self._draw_tab()

    def draw_progress(self, news: Mapping[str, Any]) -> None:
        """The running training, whatever the controls show."""
        choice: Choice = news["choice"]
        step, steps = news.get("step", 0), news.get("steps", 0)
        facts = f"{choice.title}: the decoder's head start ..."
        if steps:
            facts = (
                f"{choice.title}: step {step}/{steps}, {news['step_ms']:.0f} ms a "
                f"step, {news['memory']:,.0f} MiB in this process, steps end in "
                f"about {(steps - step) * news['step_ms'] / 1000:,.0f} s"
            )
        self.bar.value = step / steps if steps else 0.0
        self.bar.bar_style = "info"
        self._draw_curves(choice, news, facts, "training")

    def _draw_result(self, run: KeptRun | None) -> None:
        self.bar.value = 1.0 if run else 0.0
        self.bar.bar_style = "success" if run else ""
        if run is None:
            self.progress.value = panels.render(
                "nothing", "Training", "Not trained yet.", "untrained"
            )
            return
        facts = (
            f"{run.name}: {run.resources['step_ms']:.0f} ms a step, "
            f"{run.memory:,.0f} MiB measured; held out {run.score():.3f}"
        )
        news = {"losses": run.losses, "rows": run.rows}
        self._draw_curves(run.choice, news, facts, f"run:{run.number}")

    def _draw_curves(
        self, choice: Choice, news: Mapping[str, Any], facts: str, state: str
    ) -> None:
        self.progress.value = panels.progress_html(
            news.get("losses", []),
            news.get("rows", []),
            self.session.data[choice.data].task,
            choice.epochs,
            choice.method,
            facts,
            state,
        )

    def _offer(self, choice: Choice, run: KeptRun | None) -> None:
        """Fill the dropdowns: runs to show, runs to swipe against, chips."""
        self._quiet = True
        try:
            kept = [(r.name, key) for key, r in self.session.runs.items()]
            first = [] if run else [(NOT_TRAINED, "")]
            set_options(self.run, first + kept, choice.key if run else "")
            rivals = [
                (r.name, key)
                for key, r in self.session.runs.items()
                if r is not run and self._same_data(r.choice, choice)
            ]
            set_options(self.other, [("truth", ""), *rivals], self.other.value)
            data = self.session.data_of(choice)
            chips = data.dataset("test")
            table = chips.table
            places = [
                (f"{table.regions[row]}: {table.chips[row]}", position)
                for position in figures.positions_of(data)
                for row in [chips.rows[position]]
            ]
            set_options(self.place, places, self.place.value)
        finally:
            self._quiet = False

    @staticmethod
    def _same_data(one: Choice, other: Choice) -> bool:
        return (one.data, one.held_out) == (other.data, other.held_out)

    def _show_run(self, change: Mapping[str, Any]) -> None:
        """Set the controls to the choice of a kept run."""
        if not self._quiet and change["new"]:
            self.controls.set(self.session.runs[change["new"]].choice)

    def _draw_tab(self) -> None:
        """Draw the tab in view."""
        choice = self.choice
        if choice is None:
            return
        data, run = self.session.data_of(choice), self.session.runs.get(choice.key)
        tab = TABS[self.tabs.selected_index or 0]
        if tab == "Picture":
            self.picture.value = self._picture(data, choice, run)
        elif tab == "Map":
            self.map_box.children = (self._map(data, choice, run),)
        elif tab == "Runs":
            self.table.value = self._runs_table(run)
            self.trade_off.value = self._trade_off(choice, run)
        else:
            self.code.value = panels.render("code", self.session.code(choice))

    def _runs_table(self, run: KeptRun | None) -> str:
        everything = list(self.session.runs.values())
        return panels.runs_html(everything, run, len(self.session.data) > 1, self.csv())

    def _trade_off(self, choice: Choice, run: KeptRun | None) -> str:
        """Score against memory, of the runs that are scored on the same chips."""
        runs = self.session.runs.values()
        same = [one for one in runs if self._same_data(one.choice, choice)]
        if not same:
            return ""
        found = (f"{r.name} {r.score():.3f} with {r.memory:,.0f} MiB" for r in same)
        text = f"Held-out score against memory: {'; '.join(found)}."
        return panels.picture_html(figures.trade_off_png(same, run), text, "trade-off")

    def _picture(self, data: ChipData, choice: Choice, run: KeptRun | None) -> str:
        number = run.number if run else 0
        key = (choice.data, choice.held_out, number, self.place.value)
        if key not in self._pictures:
            png = figures.chip_png(self.session, data, run, self.place.value, self.show)
            labels = {number: label for label, number in self.place.options}
            text = f"Chip {labels[self.place.value]}: image and truth"
            text += "." if run is None else f", prediction and errors of {run.name}."
            self._pictures[key] = panels.picture_html(png, text, "picture")
        return self._pictures[key]

    def _map(self, data: ChipData, choice: Choice, run: KeptRun | None) -> Any:
        """The map as a widget; its page where ipyleaflet is not installed."""
        rival = self.session.runs.get(self.other.value)
        runs = [one for one in (run, rival) if one is not None]
        key = (choice.data, choice.held_out, *(one.number for one in runs))
        try:
            if key not in self._maps:
                self._maps[key] = figures.map_of(
                    self.session, data, runs, self.show, self.height
                )
        except ValueError as reason:
            return widgets.HTML(panels.render("message", str(reason), "no-map"))
        if importlib.util.find_spec("ipyleaflet") is None:
            text = "ipyleaflet is not installed, so this is the map's page, no widget."
            bundle = self._maps[key]._repr_mimebundle_()["text/html"]
            return widgets.HTML(panels.render("message", text) + bundle)
        scene, before = self._maps[key], self._scene
        widget = scene.widget
        if before not in (None, scene) and before.title == scene.title:
            scene.like(before)
        self._scene = scene
        return widget

    def as_html(self) -> str:
        """The page as it is now, for places without widgets."""
        shown = [self.parameters, self.memory, self.progress, self.notes]
        parts, code = [part.value for part in shown], ""
        if self.choice is not None:
            choice, run = self.choice, self.session.runs.get(self.choice.key)
            parts.append(self._runs_table(run))
            parts.append(self._picture(self.session.data_of(choice), choice, run))
            parts.append(self._trade_off(choice, run))
            code = self.session.code(choice)
        return panels.render("whole_page", parts, code)
