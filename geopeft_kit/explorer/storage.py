"""A saved explorer: one folder, no pickle.

`explorer.json` holds choices, histories, times and scores; each run has a folder that
`gk.load_model` reads as well. Frozen backbones and data are only named, and checked on
loading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geopeft_kit.data.chips import ChipData
from geopeft_kit.explorer.choice import Choice
from geopeft_kit.explorer.session import KeptRun, Session
from geopeft_kit.files import content_key, whole_folder
from geopeft_kit.saved_model import load_model, save_model

FORMAT = 2
NAME = "explorer.json"
RUN_FIELDS = ("number", "rows", "losses", "resources", "scores", "counts")


def save_session(
    session: Session, folder: str | Path, settings: Mapping[str, Any]
) -> Path:
    """Write a session, its runs and `settings` (plain JSON), whole or not at all.

    An explorer in the folder is replaced. Raises FileExistsError where it holds
    something else, OSError where it cannot be written.
    """
    folder = Path(folder).resolve()
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not (folder / NAME).is_file():
        raise FileExistsError(
            f"{folder} holds something that is not an explorer. Choose another folder."
        )
    with whole_folder(folder) as part:
        _write(session, part, settings)
    return folder


def _write(session: Session, folder: Path, settings: Mapping[str, Any]) -> None:
    from geopeft_kit import __version__

    runs = []
    for run in session.runs.values():
        with session.lock.borrow(run.model.backbone):
            save_model(session.activate(run), folder / _run_folder(run.number))
        fields = {name: getattr(run, name) for name in RUN_FIELDS}
        runs.append({"choice": run.choice.to_dict(), **fields})
    content = {
        "format": FORMAT,
        "geopeft_kit": __version__,
        "data": {label: fingerprint(data) for label, data in session.data.items()},
        "backbones": session.backbones,
        "settings": dict(settings),
        "runs": runs,
    }
    (folder / NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _run_folder(number: int) -> str:
    return f"run_{number:03d}"


def fingerprint(data: ChipData) -> str:
    """A hash over the chips, their split and the bands: what scores depend on."""
    rows = data.index[["chip", "split"]].astype(str).sort_values("chip").to_numpy()
    task = f"{data.task} by {data.factor}" if data.factor > 1 else data.task
    return content_key([task, list(data.bands), rows.tolist()])


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The content of `explorer.json`, checked as far as possible without data.

    Raises FileNotFoundError without such a file, ValueError for a truncated one or
    another format.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. explorer.save(folder) writes one."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is truncated or not an explorer: {error}. Copy the folder again."
        ) from error
    missing = {"data", "backbones", "settings", "runs"} - set(content)
    if found != FORMAT or missing:
        raise ValueError(
            f"{path} has format {found!r} and lacks {sorted(missing)}; this version "
            f"reads format {FORMAT}. Save the explorer again with this version."
        )
    return content


def check_data(content: Mapping[str, Any], data: Mapping[str, ChipData]) -> None:
    """Raise ValueError where the data is not what the runs were scored on."""
    if set(content["data"]) != set(data):
        raise ValueError(
            f"the explorer was made with the data {sorted(content['data'])}, and "
            f"{sorted(data)} was given. Pass the same, under the same labels."
        )
    for label, found in content["data"].items():
        if found != fingerprint(data[label]):
            raise ValueError(
                f"{label!r} has other chips, splits or bands than the data that the "
                "explorer was made with, so its scores would not be valid for it. Make "
                "the data with the same arguments."
            )


def fill_session(
    session: Session, content: Mapping[str, Any], folder: str | Path
) -> None:
    """Put the saved runs on a new session, without training.

    Raises ValueError where a file does not fit, or a backbone has other weights.
    """
    for saved in content["runs"]:
        choice = Choice(**saved["choice"])
        place = Path(folder) / _run_folder(int(saved["number"]))
        model = load_model(place, session.backbone_of(choice))
        model.adapter.deactivate()
        fields = {name: saved[name] for name in RUN_FIELDS}
        session.runs[choice.key] = KeptRun(
            choice=choice, adapter=model.adapter, model=model, **fields
        )
