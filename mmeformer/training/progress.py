# SPDX-License-Identifier: Apache-2.0
"""Progress bar of a training in a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmeformer.bars import in_notebook


class ProgressHook(Hook):
    """Shows a bar with the time left, the loss and the best metric while a training runs.

    All other output scrolls above the bar, less what :func:`for_people` holds back.
    :class:`mmeformer.training.runner.Runner` adds this hook in the main process if the output is a
    terminal. Elsewhere there are the lines of mmengine's ``LoggerHook``.

    Args:
        console: of rich; None takes the standard output.
    """

    # After every hook that changes what is shown.
    priority = "LOWEST"

    SECONDS = 0.1
    """Time between two updates of the bar."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout)
        self.bar: Progress | None = None
        self.streams: list[tuple[logging.StreamHandler, Any]] = []
        self.shown = 0.0

    @staticmethod
    def is_wanted() -> bool:
        """Whether this process writes to a terminal and is the main one."""
        return is_main_process() and sys.stdout.isatty() and not in_notebook()

    def before_train(self, runner: Runner) -> None:
        """Start the bar."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        # A thread that draws would hold a lock while data workers are forked.
        self.bar = Progress(*columns, console=self.console, auto_refresh=False, expand=True)
        self.training = self.bar.add_task("train", text="", total=runner.max_iters)
        self.validation = self.bar.add_task("validate", text="", visible=False)
        self.bar.update(self.training, completed=runner.iter)
        outputs = sys.stdout, getattr(self.console, "file", None)
        self.bar.start()
        # The handlers of mmengine keep the stream of their start, around which rich cannot draw.
        for handler in getattr(runner.logger, "handlers", ()):
            is_stream = isinstance(handler, logging.StreamHandler)
            if is_stream and any(handler.stream is output for output in outputs):
                self.streams.append((handler, handler.stream))
                handler.setStream(sys.stdout)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Show the iteration, its loss, the time left and the best metric so far."""
        if self.bar is None:
            return
        done = runner.iter + 1
        if time.monotonic() < self.shown + self.SECONDS and done < runner.max_iters:
            return
        self.shown = time.monotonic()
        self.bar.update(self.training, completed=done, text=self._text(runner))
        self.bar.refresh()

    def _text(self, runner: Runner) -> str:
        hub = runner.message_hub
        parts = []
        if (seconds := hub.get_info("eta")) is not None:
            parts.append(f"eta {timedelta(seconds=int(seconds))}")
        if "train/loss" in hub.log_scalars:
            loss = hub.get_scalar("train/loss")
            parts.append(f"loss {loss.mean(min(10, len(loss.data[0]))):.3f}")
        if best := best_metric(runner):
            parts.append(f"best {best[0].rpartition('/')[2]} {best[1]:.3f}")
        return "  ".join(parts)

    def before_val(self, runner: Runner) -> None:
        """Show a second bar."""
        if self.bar is not None:
            total = len(runner.val_dataloader)
            self.bar.reset(self.validation, total=total, visible=True)
            self.bar.refresh()

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Show the batches that are done."""
        if self.bar is None:
            return
        self.bar.update(self.validation, completed=batch_idx + 1)
        if time.monotonic() >= self.shown + self.SECONDS:
            self.shown = time.monotonic()
            self.bar.refresh()

    def after_val(self, runner: Runner) -> None:
        """Remove the second bar."""
        if self.bar is not None:
            self.bar.update(self.validation, visible=False)
            self.bar.update(self.training, text=self._text(runner))
            self.bar.refresh()

    def after_train(self, runner: Runner) -> None:
        """End the bar."""
        self.close()

    def close(self) -> None:
        """End the bar and give the streams back; also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        for handler, stream in self.streams:
            handler.setStream(stream)
        self.streams = []


def for_people() -> list[Callable[[logging.LogRecord], bool]]:
    """Filters for the handler of the standard output; what they hold back is in the log file.

    That is what the bar shows, and in a notebook too hundreds of lines at the start: the
    environment, the config, the hooks, and the options of every parameter.
    """
    if ProgressHook.is_wanted():
        return [is_brief, is_not_in_bar]
    return [is_brief] if in_notebook() else []


def is_brief(record: logging.LogRecord) -> bool:
    """Whether a record is not one of those by the hundred."""
    place = record.module, record.funcName
    return place != ("runner", "_log_env") and not record.getMessage().startswith(HIDDEN_STARTS)


def is_not_in_bar(record: logging.LogRecord) -> bool:
    """Whether the bar does not show what a record says."""
    return record.module != "logger_hook" or record.funcName not in IN_BAR


IN_BAR = ("after_train_iter", "after_val_iter")
"""Functions of mmengine's ``LoggerHook``."""
HIDDEN_STARTS = ("paramwise_options -- ", "Hooks will be executed")


def best_metric(runner: Runner) -> tuple[str, float] | None:
    """Name and best value of the metric that chooses the best checkpoint; None if there is none."""
    for hook in runner.hooks:
        names = getattr(hook, "key_indicators", None) if isinstance(hook, CheckpointHook) else None
        if names:
            key = "best_score" if len(names) == 1 else f"best_score_{names[0]}"
            value = runner.message_hub.get_info(key)
            return None if value is None else (names[0], float(value))
    return None
