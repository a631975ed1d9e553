"""`check_data`: what is wrong with a data set, before anything is trained on it.

Every chip is read once; each check turns what was read into findings, and each finding
says what to do next. Nothing is changed. Taught in
`notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd

from geopeft_kit.bands import BANDS
from geopeft_kit.data.chip_statistics import bands_table, classes_table, read_facts
from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.folder import FACTS, read_chip_folder
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.leakage import touching_chips
from geopeft_kit.data.own.scale_check import BRIGHT, StoredValues, propose_scale
from geopeft_kit.data.report import DataReport, Finding
from geopeft_kit.open_raster import Tags

RARE, MOST = 0.01, 0.95  # a class below, and above, is worth a word


def check_data(
    data: ChipData | str | os.PathLike[str], buffer_m: float = 0.0
) -> DataReport:
    """Look for what spoils training and scores.

    Args:
        data: A chip folder, or `ChipData`, whose splits are then the ones checked.
        buffer_m: Distance in metres within which chips of two splits are neighbours;
            0 finds those that touch.

    Returns:
        Findings, statistics of bands and classes, one row a chip, and pictures.

    Raises:
        FileNotFoundError: There is no chip folder.
        ValueError: The folder's index cannot be right, or no chip can be read.
    """
    if isinstance(data, ChipData):
        folder, info, index = data.folder, data.info, data.index
    else:
        folder = Path(data)
        if folder.is_dir() and not (folder / FACTS).exists():
            raise FileNotFoundError(
                f"{folder} is not a chip folder yet. Say what the files hold with "
                "gk.ChipData.from_pairs(images, masks, ...), then check its result."
            )
        info, index = read_chip_folder(folder)
    chips, pixels = read_facts(folder, info, index)
    bands = bands_table(pixels, info)
    classes = classes_table(chips, info)
    findings = [
        *_files(chips),
        *_sizes(chips),
        *_places(chips),
        *_pixel_sizes(chips),
        *_tags(chips),
        *_nodata(chips, info),
        *_range(bands, pixels, info, chips),
        *_labels(chips, classes),
        *_duplicates(chips),
        *_splits(chips),
        *_neighbours(index, chips, buffer_m),
    ]
    return DataReport(info, findings, bands, classes, chips, index)


def _files(chips: pd.DataFrame) -> Iterator[Finding]:
    broken = chips[chips["error"].notna()]
    if len(broken):
        yield Finding(
            "files", "error", f"{len(broken)} chips cannot be used: "
            f"{broken['error'].iloc[0]}", broken["chip"],
            "Correct these files, or leave them out and write the folder again.",
        )  # fmt: skip


def _sizes(chips: pd.DataFrame) -> Iterator[Finding]:
    sizes = chips["size"].value_counts()
    if len(sizes) > 1:
        yield Finding(
            "sizes", "warning", f"{len(sizes)} sizes: "
            + ", ".join(f"{size} ({n})" for size, n in sizes.head(3).items()),
            chips["chip"][chips["size"] != sizes.index[0]],
            "Cut them to one size, or use batch_size=1.",
        )  # fmt: skip


def _places(chips: pd.DataFrame) -> Iterator[Finding]:
    nowhere = chips["chip"][chips["crs"] == "(none)"]
    if len(nowhere):
        yield Finding(
            "CRS", "warning", f"{len(nowhere)} chips have no georeference", nowhere,
            "Neighbours cannot be found among them: give each a region by hand, and "
            "keep the chips of one scene together.",
        )  # fmt: skip
    systems = sorted(set(chips["crs"].dropna()) - {"(none)"})
    if len(systems) > 1:
        yield Finding(
            "CRS", "note", f"{len(systems)} systems: {', '.join(systems[:3])}",
            chips["chip"][chips["crs"] != chips["crs"].mode()[0]],
            "Nothing, if they are UTM zones. Otherwise check that pixels have one "
            "size in metres.",
        )  # fmt: skip


def _pixel_sizes(chips: pd.DataFrame) -> Iterator[Finding]:
    sizes = chips["pixel"].value_counts()
    if len(sizes) and sizes.index.max() > 1.5 * sizes.index.min():
        yield Finding(
            "pixel sizes", "warning", f"{len(sizes)} pixel sizes: "
            + ", ".join(f"{size:g} m ({n})" for size, n in sizes.head(3).items()),
            chips["chip"][chips["pixel"] != sizes.index[0]],
            "Warp them to one size: models take one resolution for all chips.",
        )  # fmt: skip


def _tags(chips: pd.DataFrame) -> Iterator[Finding]:
    said = chips[chips["tags"].fillna("") != ""]
    if len(said):
        yield Finding(
            "tags", "warning", f"{len(said)} files contradict the facts of the data "
            f"set: {said['tags'].iloc[0]}", said["chip"],
            "Find out which is right, and write the folder again with these facts.",
        )  # fmt: skip


def _nodata(chips: pd.DataFrame, info: DatasetInfo) -> Iterator[Finding]:
    share = chips["nodata"].mean()
    mostly = chips["chip"][chips["nodata"] > 0.5]
    if share:
        yield Finding(
            "nodata", "warning" if len(mostly) else "note",
            f"{share:.1%} of all pixels; {len(mostly)} chips are mostly nodata", mostly,
            "Leave out chips that are mostly nodata." if len(mostly) else
            "Nothing: nodata is 0 in the image and has no label.",
        )  # fmt: skip
    black = chips["chip"][chips["zeros"] > 0.01]
    if info.nodata is None and len(black):
        yield Finding(
            "nodata", "warning", f"{len(black)} chips have pixels that are 0 in every "
            "band, and nodata is not declared", black,
            "If 0 means no data, write the folder again with facts={'nodata': 0}.",
        )  # fmt: skip


def _range(
    bands: pd.DataFrame, pixels: np.ndarray, info: DatasetInfo, chips: pd.DataFrame
) -> Iterator[Finding]:
    optical = bands[[BANDS[name].kind == "optical" for name in bands.index]]
    wrong = optical[
        (optical["99 %"] > BRIGHT)
        | (optical["99 %"] < 2e-3)
        | (optical["1 %"] < -0.3)
        | (optical["median"] > 1)
    ]
    if len(wrong):
        number, offset, why = propose_scale(
            StoredValues(Tags(len(pixels), pixels.dtype.name, None, None, None), pixels)
        )
        yield Finding(
            "reflectance", "error", f"out of 0 to 1 in {', '.join(wrong.index)}: "
            f"{wrong['1 %'].min():.3g} to {wrong['99 %'].max():.3g}", chips["chip"][:0],
            f"Is the scale right? Stated are scale={info.scale}, offset={info.offset}; "
            f"perhaps it is scale={number:.6g}, offset={offset:.6g}: {why}. Nothing "
            "was changed: write the folder again with the right one.",
        )  # fmt: skip
    flat = bands.index[bands["lowest"] == bands["highest"]]
    if len(flat):
        yield Finding(
            "reflectance", "warning", f"{', '.join(flat)} is the same everywhere",
            chips["chip"][:0], "Check the order of the bands, and leave this one out.",
        )  # fmt: skip
    typical = chips["middle"].median()
    if typical > 0:
        odd = (chips["middle"] > 30 * typical) | (chips["middle"] < typical / 30)
        if odd.any():
            yield Finding(
                "reflectance", "warning", f"{odd.sum()} chips are 30 times as bright "
                "or as dark as the others", chips["chip"][odd],
                "Look at them: another scale, an empty image, or cloud.",
            )  # fmt: skip


def _labels(chips: pd.DataFrame, classes: pd.DataFrame) -> Iterator[Finding]:
    if "sentinel" in chips and (marked := chips[chips["sentinel"].notna()]).size:
        yield Finding(
            "targets", "warning", f"{len(marked)} masks repeat "
            f"{marked['sentinel'].iloc[0]:g}, far from all other values",
            marked["chip"], "If it means no label, say so: "
            "facts={'ignore_index': ...}, or write it as nodata of the masks.",
        )  # fmt: skip
    if "labelled" in chips:
        empty = chips["chip"][chips["labelled"] == 0]
    else:
        empty = chips["chip"][[_no_label(label) for label in chips["label"]]]
    if len(empty):
        yield Finding(
            "empty chips", "warning", f"{len(empty)} chips have no label at all", empty,
            "Leave them out of training and scores.",
        )  # fmt: skip
    constant = chips["chip"][chips["constant"].fillna(False).astype(bool)]
    if len(constant):
        yield Finding(
            "empty chips", "warning", f"{len(constant)} chips show one value in every "
            "pixel", constant, "Leave them out: there is nothing to see.",
        )  # fmt: skip
    used = classes[[name for name in classes if name in ("train", "val", "test")]]
    for split in used:
        missing = used.index[used[split] == 0]
        if len(missing):
            yield Finding(
                "class balance", "warning",
                f"no {', '.join(missing)} in {split}", chips["chip"][:0],
                "Choose other regions for this split, or merge the class: a score of "
                "a class that is not there says nothing.",
            )  # fmt: skip
    if len(classes) and len(classes.columns):
        share = classes.mean(axis=1)
        rare = share[(share > 0) & (share < RARE)]
        if len(rare) or share.max() > MOST:
            text = ", ".join(f"{name} {part:.2%}" for name, part in rare.items())
            most = f"{share.idxmax()} {share.max():.1%}"
            yield Finding(
                "class balance", "note", f"rare: {text or 'none'}; most is {most}",
                chips["chip"][:0],
                "Judge by mIoU or F1, not by accuracy; consider more chips of the "
                "rare class.",
            )  # fmt: skip


def _no_label(label: Any) -> bool:
    return not isinstance(label, list | np.ndarray) and bool(pd.isna(label))


def _duplicates(chips: pd.DataFrame) -> Iterator[Finding]:
    readable = chips[chips["pixels"].notna() & chips["constant"].eq(False)]
    same = readable[readable["pixels"].duplicated(keep=False)]
    if same.empty:
        return
    splits = same.groupby("pixels")["split"].transform("nunique")
    across, within = same[splits > 1], same[splits == 1]
    if len(across):
        yield Finding(
            "duplicates", "error", f"{len(across)} chips of different splits have the "
            "same pixels", across.sort_values("pixels")["chip"],
            "Keep one of each: a test on training chips measures memory.",
        )  # fmt: skip
    if len(within):
        yield Finding(
            "duplicates", "note", f"{len(within)} chips have the same pixels as "
            "another of their split", within.sort_values("pixels")["chip"],
            "Keep one of each, or they count twice.",
        )  # fmt: skip


def _splits(chips: pd.DataFrame) -> Iterator[Finding]:
    if set(chips["split"]) == {"(none)"}:
        names = ", ".join(sorted(set(chips["region"]))[:8])
        yield Finding(
            "splits", "note", "the folder has no split lists", chips["chip"][:0],
            "Check gk.ChipData(folder, test_regions=[...]) instead of the folder, to "
            f"see duplicates and neighbours across splits. Regions: {names}.",
        )  # fmt: skip
    odd = sorted(set(chips["split"]) & {"training", "validation", "testing", "valid"})
    if odd:
        yield Finding(
            "splits", "warning", f"a split is called {odd[0]!r}",
            chips["chip"][chips["split"] == odd[0]],
            "The kit trains on 'train', chooses on 'val' and judges on 'test'.",
        )  # fmt: skip


def _neighbours(
    index: gpd.GeoDataFrame, chips: pd.DataFrame, buffer_m: float
) -> Iterator[Finding]:
    split = pd.Series(chips["split"].to_numpy(), index.index)
    validation = split[split.isin(["train", "val"])].replace({"val": "test"})
    pairs = {
        "test": touching_chips(index, split, buffer_m),
        "val": touching_chips(index, validation.reindex(split.index), buffer_m),
    }
    for name, found in pairs.items():
        if found.empty:
            continue
        shared = found[found["overlap"] > 0.01]
        rest = "training or validation" if name == "test" else "training"
        if len(shared):
            what, level = f"show the same ground as {rest} chips", "error"
        else:
            what, level = f"touch {rest} chips, or are within {buffer_m:g} m", "warning"
        worst = shared if len(shared) else found
        yield Finding(
            "neighbours", level, f"{worst['test'].nunique()} {name} chips {what} (as "
            f"{worst['test'].iloc[0]} and {worst['train'].iloc[0]})",
            worst["test"].drop_duplicates(),
            "Hold whole regions out, with a buffer: from_pairs(..., buffer_m=500).",
        )  # fmt: skip
