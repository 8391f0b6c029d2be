# SPDX-License-Identifier: Apache-2.0
"""How far a command is: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 30
"""Seconds between lines if the output is not a terminal."""
COUNT_EVERY = 10
"""Seconds between lines of :func:`counted`."""

LARGE = 100_000_000
"""Bytes of a JSON file that takes seconds to read."""

Item = TypeVar("Item")


def counted(items: Collection[Item], text: str) -> Iterator[Item]:
    """Go through items, and say on stderr how many are done, every :data:`COUNT_EVERY` seconds.

    Small data sets are read in less, without a line.

    Args:
        items: of any kind.
        text: of the line, before the numbers.
    """
    said = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) >= said + COUNT_EVERY:
            said = now
            print(f"{text}: {done:,} of {len(items):,}", file=sys.stderr, flush=True)
        yield item


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; says on stderr that a file of :data:`LARGE` bytes is read.

    Raises:
        OSError: the file cannot be read.
        ValueError, RecursionError: it is not JSON.
    """
    if (size := Path(path).stat().st_size) >= LARGE:
        print(f"reading {path} ({size / 1e6:.0f} MB)", file=sys.stderr, flush=True)
    return json.loads(Path(path).read_bytes())


def in_notebook() -> bool:
    """Whether a notebook shows the output, of a cell or of a command after ``!``.

    The latter has a terminal, but the notebook follows no movements of the cursor: each change of a
    bar would be a line, and mix with others. Jupyter sets the one variable, ipykernel the other.
    """
    return "JPY_PARENT_PID" in os.environ or "inline" in os.environ.get("MPLBACKEND", "")


def output() -> Console:
    """The standard output, for bars."""
    return Console(force_terminal=False if in_notebook() else None)


class Bars(Progress):
    """Progress bars with numbers and the time left.

    Args:
        console: to draw on.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._printed = time.monotonic()

    def line(self, text: str, task: TaskID) -> None:
        """In place of a bar: print a text and the time left, every :data:`LINE_EVERY` seconds."""
        now = time.monotonic()
        if self.console.is_terminal or now <= self._printed + LINE_EVERY:
            return
        self._printed = now
        seconds = self.tasks[task].time_remaining
        left = "" if seconds is None else f", {seconds / 60:.0f} min left"
        self.console.print(f"{text}{left}", markup=False, highlight=False)
