"""Long-lived processes that a benchmark commands in turn, one JSON line at a time.

Two systems that are timed one after the other meet two different machines: what else
runs changes by the minute. So both stay alive, each in its own environment, and take
turns step by step; only one computes at a time, and ratios are taken turn by turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Action = Callable[..., dict[str, Any]]


class Worker:
    """A script of this folder that runs `serve`, in an environment of its own.

    Args:
        script: Name of the script.
        python: Interpreter of the environment.
        log: File for what the process prints.

    Raises:
        RuntimeError: From `ask`, where the process died; the text is its last output.
    """

    def __init__(self, script: str, python: Path | str, log: Path) -> None:
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(python), str(ROOT / "benchmarks" / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=os.environ | one,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Let the process do something, wait, and return what it answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{do} failed: {self.log.read_text()[-3000:]}")
        return json.loads(answer)

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(actions: Mapping[str, Action]) -> None:
    """Answer commands on standard input until it is closed.

    Libraries print on standard output too, so that it is kept for answers alone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed from now on goes where errors go
    for line in sys.stdin:
        command = json.loads(line)
        answer = actions[command.pop("do")](**command)
        print(json.dumps(answer), file=answers, flush=True)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios of turns, and both medians.

    Args:
        ours: One number a turn.
        theirs: The peer's, in the same turns.
    """
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": statistics.median(each),
        "low": min(each),
        "high": max(each),
        "turns": len(each),
    }
