"""`Explorer`: one widget to choose, train, compare, and copy the code of.

Everything the buttons do is a method as well, so that a script or the next cell can do
it: `choose`, `train`, `wait`, `cancel`, `runs`, `model`, `code`, `save_run`, `save`,
`load`.

Controls are core ipywidgets; panels are HTML, pictures PNG. Only the map needs
ipyleaflet; without it the stand-alone page of the same map is shown.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd

from geopeft_kit.data.chips import ChipData
from geopeft_kit.explorer.choice import Choice
from geopeft_kit.explorer.controls import Controls
from geopeft_kit.explorer.page import TABS, Page
from geopeft_kit.explorer.session import KeptRun, Preview, Session
from geopeft_kit.explorer.storage import (
    check_data,
    fill_session,
    read_settings,
    save_session,
)
from geopeft_kit.explorer.threads import (
    Cancelled,
    MainThreadQueue,
    TrainingThread,
    stop_trainings,
)
from geopeft_kit.maps.widget import show_bundle, view_bundle
from geopeft_kit.methods import list_methods
from geopeft_kit.model import Model
from geopeft_kit.saved_model import save_model


class Explorer:
    """A widget over backbones, methods, decoders and data.

    Args:
        data: A data set, or several by label.
        backbones: Names of backbones, or label -> arguments of `load_backbone` with
            `name` among them. A choice loads its backbone, so name those whose weights
            are on this machine.
        methods: Methods to offer; None offers all. Unsuitable ones show the reason.
        show: Which three bands a picture shows: "true", "false", "swir".
        height: Of the map, in pixels.

    Raises:
        ValueError: No data, no backbone, or an unknown method.
        TypeError: `data` is a path.

    Example:
        >>> explorer = gk.Explorer(gk.simulated_data("burn", chips_per_region=8))
        >>> explorer.choose(method="lora", options={"rank": 4}, epochs=2)
        >>> explorer.train().wait()
        >>> print(explorer.code)
    """

    def __init__(
        self,
        data: ChipData | Mapping[str, ChipData],
        backbones: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("geopeft_tiny",),
        methods: Sequence[str] | None = None,
        show: str | Sequence[str] = "true",
        height: int = 440,
    ) -> None:
        if isinstance(data, str | Path):
            raise TypeError(
                f"data is the path {str(data)!r}: pass gk.ChipData({str(data)!r}), or "
                "several of them by label."
            )
        sets = {str(data.name): data} if isinstance(data, ChipData) else dict(data)
        if not isinstance(backbones, Mapping):
            backbones = {name: {"name": name} for name in backbones}
        if not sets or not backbones:
            raise ValueError(
                "the explorer needs at least one data set and one backbone."
            )
        chosen = list(methods or [card.name for card in list_methods()])
        self.session = Session(sets, backbones)
        self._settings = {"methods": chosen, "show": show, "height": height}
        self._main_thread = MainThreadQueue()
        self._thread: TrainingThread | None = None
        self._error: str = ""
        self._news: dict[str, Any] = {}
        self.controls = Controls(self.session, chosen)
        self.page = Page(
            self.session, self.controls, show, height,
            lambda: self.runs.to_csv(index=False),
        )  # fmt: skip
        # The second of two quick clicks arrives before the button is greyed out.
        self.page.on_click(
            self.page.train_button, lambda: self.training or self.train()
        )
        self.page.on_click(self.page.cancel_button, self.cancel)
        self.page.on_save(self.save_run)
        self.controls.listen(self._refresh)
        if stop_trainings():
            self.page.message = (
                "The training of the explorer before this was cancelled."
            )
        self._refresh()

    # --- choose -----------------------------------------------------------------------

    @property
    def choice(self) -> Choice:
        """What the controls say."""
        return self.controls.choice()

    def choose(self, **changes: Any) -> Explorer:
        """Change the controls.

        Args:
            **changes: Fields of the choice: data, held_out, backbone, method, options
                (a dict), decoder, epochs, learning_rate, seed. A new method begins
                with its own options.

        Raises:
            ValueError: A value that is not offered, or an unknown option.
            TypeError: An unknown field.
        """
        if "method" in changes:
            changes.setdefault("options", {})
        self.controls.set(replace(self.choice, **changes))
        return self

    @property
    def preview(self) -> Preview:
        """Sizes and predicted memory of the choice, or why it cannot be trained."""
        return self.session.preview(self.choice)

    @property
    def code(self) -> str:
        """The cell that repeats the choice in an empty process."""
        return self.session.code(self.choice)

    # --- train ------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether a training is under way."""
        return self._thread is not None

    def train(self) -> Explorer:
        """Train the choice in the background; a choice that has a run shows it.

        Using the page meanwhile does not change the run. A cell that draws torch's
        random numbers meanwhile does, where a method uses dropout.

        Raises:
            RuntimeError: A training is under way.
            ValueError: The choice cannot be trained.
        """
        if self.training:
            raise RuntimeError("a training is under way: wait for it, or cancel it.")
        choice, preview = self.choice, self.preview
        if preview.reason is not None:
            raise ValueError(preview.reason)
        if choice.key in self.session.runs:
            self._refresh()
            return self
        self._error, self._news = "", {"choice": choice}
        self.session.lock.stop.clear()
        self._thread = TrainingThread(self.session.lock, self._work, choice)
        self._refresh()
        self._thread.start()
        return self

    def wait(self) -> Explorer:
        """Wait until the training has ended; the page is redrawn meanwhile.

        Raises:
            RuntimeError: The training failed; the text is the whole traceback.
            KeyboardInterrupt: You stopped the cell; the training is cancelled too.
        """
        try:
            while self._thread is not None:
                self._thread.join(0.1)
                self._main_thread.run()
        except KeyboardInterrupt:
            self.cancel()
            raise
        if self._error:
            raise RuntimeError(self._error)
        return self

    def cancel(self) -> Explorer:
        """Stop the training after its current step and discard the run."""
        self.session.lock.stop.set()
        return self

    def _work(self, choice: Choice) -> None:
        """The training thread."""
        run, error, message = None, "", ""
        try:
            run = self.session.train(choice, self._report)
        except Cancelled:
            message = "Cancelled; the run was discarded."
        except BaseException:  # shown in full on the page, and raised by `wait`
            error = traceback.format_exc()
        self._main_thread.put(self._ended, run, error, message)

    def _report(self, news: dict[str, Any]) -> None:
        self._main_thread.put(self._show_progress, news)

    def _show_progress(self, news: dict[str, Any]) -> None:
        self._news |= news
        if self.training:
            self.page.draw_progress(self._news)

    def _ended(self, run: KeptRun | None, error: str, message: str) -> None:
        self._thread, self._error = None, error
        if run is not None:
            self.session.runs[run.choice.key] = run
        self.page.message = message
        self._refresh()

    # --- runs -------------------------------------------------------------------------

    @property
    def shown(self) -> KeptRun | None:
        """The run of the choice, if it was trained."""
        try:
            return self.session.runs.get(self.choice.key)
        except ValueError:
            return None

    @property
    def model(self) -> Model:
        """The model of the choice, its adapter active.

        Raises:
            RuntimeError: A training is under way, or the choice was not trained.
        """
        run = self.shown
        if self.training or run is None:
            raise RuntimeError(
                "the choice has no trained model yet: call train() and wait() first."
            )
        return self.session.activate(run)

    @property
    def runs(self) -> pd.DataFrame:
        """All runs: choice, cost and scores, one row a run."""
        return pd.DataFrame([_row(run) for run in self.session.runs.values()])

    def show(self, tab: str) -> Explorer:
        """Open a tab of the page: "Picture", "Map", "Runs" or "Code"."""
        if tab not in TABS:
            raise ValueError(f"no tab {tab!r}. Choose one of: {', '.join(TABS)}.")
        self.page.tabs.selected_index = TABS.index(tab)
        return self

    def _refresh(self) -> None:
        """Draw what the controls say; the adapter of an existing run is activated."""
        self.page.draw(self.training, self._news, self._error)
        if self.shown is not None and not self.training:
            self.session.activate(self.shown)

    # --- on disk ----------------------------------------------------------------------

    def save_run(self, folder: str | Path | None = None) -> Path:
        """Save the model of the choice for `gk.load_model(folder)`.

        The code of the run then includes it.

        Args:
            folder: As for `gk.save_model`; None takes a new one below `runs`.

        Raises:
            RuntimeError: A training is under way, or the choice was not trained.
            FileExistsError: The folder holds something else.
            OSError: The place cannot be written.
        """
        model, run = self.model, cast(KeptRun, self.shown)
        name = str(run.free_folder if folder is None else folder)
        place = save_model(model, name)
        run.saved = name
        self.page.message = (
            f"Saved. In the next session: model = gk.load_model({name!r})"
        )
        self._refresh()
        return place

    def save(self, folder: str | Path) -> Path:
        """Write choices, adapters, decoders and scores, whole or not at all.

        Args:
            folder: Created if needed; an explorer in it is replaced.

        Raises:
            RuntimeError: A training is under way.
            FileExistsError: The folder holds something else.
        """
        if self.training:
            raise RuntimeError("a training is under way: wait for it, or cancel it.")
        settings = {**self._settings, "choice": self.choice.to_dict()}
        place = save_session(self.session, folder, settings)
        self._refresh()  # the shown run's adapter is activated again
        return place

    @classmethod
    def load(
        cls, folder: str | Path, data: ChipData | Mapping[str, ChipData]
    ) -> Explorer:
        """Load a saved explorer, without training.

        Args:
            folder: Written by `save`.
            data: The same data: it is compared by chips, splits and bands.

        Raises:
            FileNotFoundError: There is no explorer in the folder.
            ValueError: Truncated files, other data, or other weights of a backbone.
        """
        content = read_settings(folder)
        settings = dict(content["settings"])
        choice = Choice(**settings.pop("choice"))
        explorer = cls(data, content["backbones"], **settings)
        check_data(content, explorer.session.data)
        fill_session(explorer.session, content, folder)
        explorer.controls.set(choice)
        return explorer

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict:
        """The widget, and for exported pages its last state as HTML."""
        twin = {"text/plain": repr(self), "text/html": self.page.as_html()}
        return twin | view_bundle(self.page.box)

    def _ipython_display_(self) -> None:
        show_bundle(self._repr_mimebundle_())

    def __repr__(self) -> str:
        return f"Explorer({len(self.session.runs)} runs)"


def _row(run: KeptRun) -> dict[str, Any]:
    choice = run.choice
    overall = {
        f"{split} {name}": value
        for split, scores in run.scores.items()
        for name, value in scores.get("overall", {}).items()
    }
    return {
        "run": run.name,
        "data": choice.data,
        "held out": choice.held_out or "as given",
        "backbone": choice.backbone,
        "method": choice.method,
        "decoder": choice.decoder,
        "epochs": choice.epochs,
        "learning_rate": choice.rate,
        "options": json.dumps(choice.to_dict()["options"]),
        "seed": choice.seed,
        "adapter": run.counts["adapter"],
        "trained": run.counts["adapter"] + run.counts["decoder"],
        "step_ms": run.resources["step_ms"],
        "memory_mib": run.memory,
        **overall,
    }
