# SPDX-License-Identifier: Apache-2.0
"""Signals by which schedulers announce that they take a machine away, and the exit status for them.

Slurm (``--signal``), spot machines and Kubernetes send SIGTERM or SIGUSR1. A training notes them
(:mod:`mmeformer.training.preemption`); while nothing is trained a process ends at once. This module
imports only the standard library: the command calls it before it imports torch, for seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType

PREEMPTED = 175
"""Exit status of a run that was stopped by a signal and goes on with ``--resume``.

That of a temporary failure (75, ``sysexits.h``) plus 100: srun returns the highest status of its
tasks, where 128 + N means that signal N killed one.
"""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

_PR_SET_PDEATHSIG = 1

DELAY = 1.0
"""Seconds in which a signal reaches all processes of a run."""


trained = False
"""Whether a training has something to save, so that its own handler decides."""

stopped = False
"""Whether a signal has stopped the training, which has said so; the process is about to end."""


def leave_on_signals() -> None:
    """From here on a signal ends this process by :func:`leave`, unless it ignores signals.

    Python calls handlers between two of its instructions. A call may wait for long (for the other
    processes, say, at the start of torch.distributed), so that a thread watches the signals too.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_leave_or_die, os.getpid()))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Signals of a copy of this process are its own.
    os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
    threading.Thread(target=_watch, args=(reading,), daemon=True, name="signals").start()


def leave(number: int) -> None:
    """End the process at once with exit status :data:`PREEMPTED`, and a line that says why.

    No line if the training has been stopped by a signal before.

    Not by an exception: it would pass through whatever runs at this moment. mmengine makes a
    SyntaxError of everything that is raised while it formats a config, and Python drops what is
    raised in ``__del__``.

    Args:
        number: of the signal.
    """
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
        # There may be no output, or this signal has interrupted a flush.
        sys.stdout.flush()
    if not stopped:
        line = (
            f"stopped by {signal.Signals(number).name} while nothing was trained: nothing is lost. "
            f"Continue with --resume (exit status {PREEMPTED})\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
    os._exit(PREEMPTED)


def end_with_starter() -> None:
    """Let the process that has started this one send SIGTERM when it ends, even by SIGKILL.

    Without it, processes of a killed launcher would train on and hold their GPUs. Linux only
    (``prctl(2)``).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def before_errors() -> Iterator[None]:
    """Context manager that holds errors back until a signal had the time to arrive.

    For one of several processes: one that a signal has ended leaves the others with an error, and
    they get the signal too, which decides the exit status.
    """
    try:
        yield
    except RuntimeError:
        time.sleep(DELAY)
        raise


def _watch(reading: int) -> None:
    while text := os.read(reading, 1):
        # Of a training that saves and ends meanwhile, the signal is answered.
        if text[0] in SIGNALS and not trained:
            # The handler is faster, if it can run.
            time.sleep(DELAY)
            if not trained:
                leave(text[0])


def _leave_or_die(owner: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() == owner:
        leave(number)
    # A copy of the process, such as a worker of a pool: as if nobody handled the signal.
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
