# SPDX-License-Identifier: Apache-2.0
"""Stop a training on a signal of the scheduler, with a checkpoint to resume from.

Slurm (``--signal``), spot machines and Kubernetes announce that they take a machine away by SIGTERM
or SIGUSR1. The training then saves a checkpoint and exits with :data:`PREEMPTED`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size

PREEMPTED = 175
"""Exit status of a run that was stopped by a signal and has saved a checkpoint.

That of a temporary failure (75, ``sysexits.h``) plus 100: srun returns the highest status of its
tasks, where 128 + N means that signal N killed one.
"""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(SystemExit):
    """The run stops because of a signal; the exit status is :data:`PREEMPTED`."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class _Interrupted(BaseException):
    """Ends an evaluation in which a signal arrived; no ``except Exception`` catches it."""


class StopRequest:
    """Context manager that notes signals instead of ending the process.

    The first signal is a request, which the training asks for after every iteration. A second one
    ends the process at once, as if it was not handled.
    """

    SAME = 1.0
    """Seconds in which another signal counts as the same: launchers pass on what the system has
    sent to all processes of the group already."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal that arrived."""
        self.trained = False
        """Whether there is something to save. Until then a signal ends the run at once."""
        self.interrupted = False
        """Whether an evaluation was cut short."""
        self._time = 0.0
        self._evaluating = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.trained:
            raise Preempted
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self._time = time.monotonic()
            if self._evaluating:
                raise _Interrupted
        elif time.monotonic() - self._time >= self.SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def interruptible(self, evaluate: Callable[[Any], dict]) -> Callable[[Any], dict]:
        """``evaluate``, which a signal ends; it then returns no scores.

        Only the main process evaluates, for minutes, while the others wait for its scores.
        """

        def replacement(results: Any) -> dict:
            try:
                try:
                    self._evaluating = True
                    if self.signal is not None:
                        raise _Interrupted
                    scores = evaluate(results)
                finally:
                    # A signal may arrive up to here.
                    self._evaluating = False
            except _Interrupted:
                self.interrupted = True
                return {}
            return scores

        return replacement


def anywhere(*flags: bool) -> list[bool]:
    """Each flag, or True if it is set in any process. All processes have to call this."""
    if get_world_size() == 1:
        return list(flags)
    shared = torch.tensor([float(flag) for flag in flags])
    all_reduce(shared, "max")
    return shared.bool().tolist()


def deaf_worker(init: Callable[[int], None] | None) -> Callable[[int], None]:
    """Init function of data workers that leaves these signals to the training process.

    Schedulers send them to all processes; the last iteration still needs its data. Workers end when
    the training process does.
    """
    return partial(_init_worker, init)


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)
