"""The stop button: a `KeyboardInterrupt` that says what is kept, and everything alive.

Lightning answers Ctrl-C, and the stop button of a notebook, with `sys.exit(1)` and
leaves the signal ignored. `except KeyboardInterrupt` then catches nothing, and a kernel
whose widget started the training ends.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from torch import nn

from geopeft_kit.training.out_of_memory import let_go


def stoppable(
    train: Callable[[], None], network: nn.Module, say: Callable[[], str]
) -> None:
    """Run a training; if the user stops it, free what it held and say what is kept.

    The network is in eval mode afterwards, without gradients. `say` gives the text of
    the KeyboardInterrupt.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        train()
        return
    except (KeyboardInterrupt, SystemExit) as error:
        by_lightning = isinstance(error.__context__, KeyboardInterrupt)
        if isinstance(error, SystemExit) and not by_lightning:
            raise
        let_go(network, error)
    if by_lightning:
        signal.signal(signal.SIGINT, handler)
    raise KeyboardInterrupt(say())


def what_is_kept(
    epochs: int, planned: int, folder: str | Path | None, written: bool
) -> str:
    """What a stopped training leaves after `epochs` full ones, and how to resume."""
    after = f"stopped after {epochs} of {planned} epochs; the model is intact, and "
    if written:
        return (
            f"{after}{folder} holds the last complete epoch. To go on from there: the "
            f"same call with folder={str(folder)!r}, resume=True."
        )
    if folder is not None:
        return (
            f"{after}no epoch of this run was complete, so there is no checkpoint to "
            "resume from. Build the model again to start over."
        )
    return (
        f"{after}nothing was written. With folder=... a stopped run can be resumed "
        "from its last complete epoch."
    )
