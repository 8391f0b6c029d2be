# SPDX-License-Identifier: Apache-2.0
"""How far a command is: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import time

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
