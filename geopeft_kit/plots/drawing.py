"""What figures are drawn with: panels, and pictures and masks at their place."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geopeft_kit.pictures import Colours, as_numpy, class_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_panels(count: int, columns: int | None = None, side: float = 3.2) -> Any:
    """A figure that no global state holds on to, and a flat list of its axes."""
    from matplotlib.figure import Figure

    columns = columns or count
    rows = -(-count // columns)
    size = (side * columns + 0.4, side * rows + 0.4)

    class NotebookFigure(Figure):
        """Draws itself in a notebook, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            return figure_png(self, bbox_inches="tight")

    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def figure_png(figure: Figure, **options: Any) -> bytes:
    """A figure as the bytes of a PNG file; `options` are those of `savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def extent_of(sample: Mapping[str, Any]) -> tuple[list[float], str] | None:
    """(west, east, south, north) and unit of a georeferenced sample, else None."""
    if "bounds" not in sample or not sample.get("crs"):
        return None
    import rasterio.crs

    west, south, east, north = (float(v) for v in as_numpy(sample["bounds"]).ravel())
    if rasterio.crs.CRS.from_user_input(sample["crs"]).is_geographic:
        return [west, east, south, north], "degrees"
    return [west / 1000, east / 1000, south / 1000, north / 1000], "km"


def draw_picture(
    axis: Axes, picture: np.ndarray, place: Any, title: str, **kwargs: Any
) -> None:
    """One picture with its axes named.

    Args:
        axis: Where.
        picture: (H, W) or (H, W, 3).
        place: From `extent_of`; None counts pixels.
        title: Above it.
        **kwargs: Of `imshow`.
    """
    extent, unit = place or (None, "pixels")
    axis.imshow(picture, extent=extent, interpolation="nearest", **kwargs)
    names = ("column", "row") if place is None else ("easting", "northing")
    if unit == "degrees":
        names = ("longitude", "latitude")
    axis.set(xlabel=f"{names[0]} ({unit})", ylabel=f"{names[1]} ({unit})")
    axis.set_title(plain_text(title), fontsize="medium")
    axis.ticklabel_format(useOffset=False)
    axis.locator_params(nbins=4)
    axis.tick_params(labelsize="small")


def draw_mask(
    axis: Axes,
    mask: Any,
    place: Any,
    title: str,
    classes: Sequence[str],
    colours: Colours | None,
    ignore_index: int,
) -> None:
    """A class mask in its colours; unlabelled pixels are grey."""
    from matplotlib.colors import ListedColormap

    values = np.ma.masked_equal(as_numpy(mask), ignore_index)
    table = ListedColormap(class_colours(classes, colours))
    axis.set_facecolor("0.85")
    draw_picture(
        axis, values, place, title, cmap=table, vmin=-0.5, vmax=len(classes) - 0.5
    )


def class_legend(
    figure: Figure, classes: Sequence[str], colours: Colours | None
) -> None:
    """Colour patches and names of the classes, under a figure's panels."""
    from matplotlib.patches import Patch

    pairs = zip(classes, class_colours(classes, colours), strict=True)
    figure.legend(
        handles=[
            Patch(facecolor=c, edgecolor="0.4", label=plain_text(n)) for n, c in pairs
        ],
        loc="outside lower center",
        ncols=min(6, len(classes)),
        fontsize="small",
        frameon=False,
    )


def plain_text(text: Any) -> str:
    """Text as it is: a "$" in a class name starts no formula."""
    return str(text).replace("$", r"\$")
