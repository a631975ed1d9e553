"""The command line of the data scripts: the same options everywhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common import SUBSETS, Source

from geopeft_kit.data import read_chip_folder


def main(
    source: Source,
    convert: Callable[..., Path],
    options: Callable[[argparse.ArgumentParser], None] | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a data script from the command line.

    Args:
        source: What the data set is.
        convert: Makes the chip folder; takes the folder of the upstream files (None:
            download), the root, and the options by name.
        options: Adds options of one data set alone.
        arguments: In place of the process's own.
    """
    parser = argparse.ArgumentParser(
        description=str(source), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("data"),
        help="the chip folder is made in here (default: data)",
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="folder",
        metavar="DIR",
        help="convert the upstream files in DIR; download nothing",
    )
    parser.add_argument(
        "--subset",
        choices=SUBSETS,
        default="full",
        help="small: a stated part, contained in full",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show source, sizes and licence, then stop",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make the chip folder again"
    )
    if options is not None:
        options(parser)
    settings = vars(parser.parse_args(arguments))
    print(source)
    if settings.pop("dry_run"):
        return
    try:
        folder = convert(settings.pop("folder"), settings.pop("root"), **settings)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. What was fetched is kept, nothing is half-converted; run "
            "again to go on.",
            file=sys.stderr,
        )
        sys.exit(130)
    print(summary(folder))


def chip_option(default: int) -> Callable[[argparse.ArgumentParser], None]:
    """Adds `--chip`, the size of the windows that large images are cut into.

    Args:
        default: Pixels.

    Returns:
        What `main` takes as `options`.
    """

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--chip",
            type=int,
            default=default,
            metavar="PIXELS",
            help=f"side of the windows that images are cut into (default: {default})",
        )

    return add


def summary(folder: Path) -> str:
    """What stands in a chip folder, in a few lines."""
    info, index = read_chip_folder(folder)
    counts = index.groupby(["region", index["split"].fillna("-")]).size()
    lines = [f"{info.name}: {len(index)} chips in {folder}"]
    lines += [
        f"  {region:<16} {split:<12} {n:>6}" for (region, split), n in counts.items()
    ]
    return "\n".join(lines)
