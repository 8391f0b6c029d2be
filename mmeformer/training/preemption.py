# SPDX-License-Identifier: Apache-2.0
"""Stop a training on a signal of the scheduler, with a checkpoint to resume from.

The training saves a checkpoint and exits with :data:`~mmeformer.signals.PREEMPTED`. Before the
first iteration there is nothing to save, and the process ends at once.
"""

from __future__ import annotations

import atexit
import multiprocessing
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

from mmeformer import signals
from mmeformer.signals import PREEMPTED, SIGNALS


class Preempted(SystemExit):
    """The run stops because of a signal; the exit status is that of ``PREEMPTED``."""

    def __init__(self) -> None:
        signals.stopped = True
        super().__init__(PREEMPTED)


class _Interrupted(BaseException):
    """Ends an evaluation in which a signal arrived; no ``except Exception`` catches it."""


class StopRequest:
    """Context manager that notes signals instead of ending the process.

    The first signal is a request, which the training asks for after every iteration. A second one
    ends the process at once, as if it was not handled. A request that nobody has asked for before
    the end of the training is then sent again.
    """

    SAME = 1.0
    """Seconds in which another signal counts as the same: launchers pass on what the system has
    sent to all processes of the group already."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal that arrived."""
        self.interrupted = False
        """Whether an evaluation was cut short."""
        self._time = 0.0
        self._evaluating = False
        self._raised = False
        """Whether a signal has ended an evaluation by an exception."""
        self._handlers: dict[int, Any] = {}
        self._process = 0

    @property
    def trained(self) -> bool:
        """Whether there is something to save. Until then a signal ends the run at once."""
        return signals.trained

    @trained.setter
    def trained(self, value: bool) -> None:
        signals.trained = value

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        signals.stopped = False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.trained = False
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if kind is None and self.signal is not None:
            os.kill(os.getpid(), signal.Signals[self.signal])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A data worker, which is about to ignore signals.
            return
        if not self.trained:
            signals.leave(number)
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self._time = time.monotonic()
            if self._evaluating:
                self._raised = True
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
            except BaseException as error:
                # The signal, or what the evaluation has made of it.
                if not (isinstance(error, _Interrupted) or self._raised):
                    raise
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


def ignoring_signals(init: Callable[[int], None] | None) -> Callable[[int], None]:
    """An init function of data workers that also makes them ignore the signals of schedulers.

    Schedulers send them to all processes; the last iteration still needs its data. At the end of
    Python, multiprocessing would send SIGTERM to workers that wait for more work, and wait for
    them: they are killed before.
    """
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    return partial(_init_worker, init)


def _end_workers() -> None:
    # PyTorch takes the end of a worker for an error.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)
