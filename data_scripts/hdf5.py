"""HDF5 files for the data sets that come as such; needs h5py, which is an extra."""

from __future__ import annotations

import ast
import io
import pickletools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        RuntimeError: h5py is missing, or the file cannot be read.
    """
    try:
        import h5py
    except ImportError as error:
        raise RuntimeError(
            f"{path.name} is an HDF5 file, which needs h5py: pip install h5py"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be read: {error}. Copy or download it again."
        ) from error
    with file:
        try:
            yield file
        except (OSError, KeyError) as error:
            raise RuntimeError(
                f"{path} cannot be read: {error}. Copy or download it again."
            ) from error


def pickled_label(text: str, path: Path) -> int:
    """The label in a pickled dictionary, read without running the pickle.

    GEO-Bench keeps a sample's label in an attribute that is the text of a pickle, and a
    pickle can run code when it is loaded. Its instructions can be listed without
    running any: the number that follows the key "label" is the label.

    Args:
        text: The attribute, a bytes literal.
        path: For the message.

    Returns:
        The label.

    Raises:
        ValueError: There is no such number.
    """
    try:
        steps = list(pickletools.genops(io.BytesIO(ast.literal_eval(text))))
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{path} holds no readable label: {error}.") from error
    steps = [
        s for s in steps if s[0].name not in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
    ]
    for (_, key, _), (_, value, _) in zip(steps, steps[1:], strict=False):
        if key == "label" and type(value) is int:
            return value
    raise ValueError(f"{path} holds no whole number as its label.")
