# SPDX-License-Identifier: Apache-2.0
"""Start a command once per GPU, or that many times on the CPU, on one node or several.

What torchrun does, without restarts of single processes: the run goes on with ``--resume``. The
environment variables are those of torch.distributed (``env://``) and of torchrun. In exchange
signals reach the training as they are, and it has the time that it needs to save a checkpoint.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch

from mmeformer import signals
from mmeformer.errors import UserError
from mmeformer.signals import PREEMPTED, SIGNALS

GRACE = 10.0
"""Seconds in which processes may end by themselves after another one has failed.

Over gloo they notice at once. Over NCCL they may wait for it, in calls that no signal ends.
"""
FORWARDED = (
    *SIGNALS,
    *(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)),
)
"""Signals that the processes get too."""
_ERROR_SHOWN = "MMEFORMER_ERROR_TOLD"
"""Environment variable with the file that exists once a process has printed its error."""
_POLL = 0.1
# Imports are those of this process, whatever the current folder has.
_ENTRY = (
    "import sys; sys.path[:] = {path!r}; from mmeformer.signals import end_with_starter; "
    "end_with_starter(); from mmeformer.commands.__main__ import main; sys.exit(main())"
)


def needed(gpus: int | None, launcher: str) -> bool:
    """Whether ``--gpus`` asks for processes that are still to be started.

    Args:
        gpus: of this node; None if the option was not given.
        launcher: the option that says who has started this process.

    Raises:
        UserError: this process was started by a launcher, or the machine has fewer GPUs.
    """
    if gpus is None:
        return False
    if launcher != "none":
        raise UserError(
            f"--gpus {gpus} starts the processes itself: leave out --launcher {launcher}"
        )
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"--gpus {gpus} starts the processes itself, but this is one of {size} that a launcher "
            "has started: give --launcher pytorch in place of --gpus"
        )
    found = torch.cuda.device_count()
    if 0 < found < gpus:
        raise UserError(f"--gpus {gpus}, but this machine has {found}: use --gpus {found}")
    return gpus > 1 or _nodes() > 1


def start(arguments: Sequence[str], gpus: int) -> int:
    """Run ``mmeformer ARGUMENTS`` in one process per GPU; returns the exit status.

    Several nodes: call it on each, with ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR`` and, if 29500 is
    taken, ``MASTER_PORT`` in the environment.

    Args:
        arguments: of the command line, for each process.
        gpus: number of processes on this node.

    Raises:
        UserError: the environment says nothing usable about the nodes.
    """
    shared = _environment(gpus)
    if not torch.cuda.is_available():
        print(f"no GPU: {gpus} processes on the CPU, over gloo", flush=True)
    command = [sys.executable, "-c", _ENTRY.format(path=sys.path), *arguments]
    first = int(shared["GROUP_RANK"]) * gpus
    with tempfile.TemporaryDirectory() as folder:
        shared[_ERROR_SHOWN] = str(Path(folder, "told"))
        ranks = [dict(RANK=str(first + rank), LOCAL_RANK=str(rank)) for rank in range(gpus)]
        return run(command, [shared | rank for rank in ranks])


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run a command once per environment, until all have ended.

    The first signal is handed on; another one, a second or more later, kills the processes. If one
    fails, the others have :data:`GRACE` seconds to end.

    Args:
        command: program and arguments.
        environments: variables of each process, in addition to those of this one.

    Returns:
        :data:`~mmeformer.signals.PREEMPTED` if a process returned it, else the first status that is
        not 0 (128 + N for signal N, as in the shell), else 0.
    """
    workers: list[subprocess.Popen] = []
    codes: list[int] = []
    signaled_at, end = math.inf, math.inf
    with _recorded_signals() as arrived:
        try:
            for environment in environments:
                # In a session of its own, a process gets a signal once: from here.
                workers.append(
                    subprocess.Popen(
                        command, env={**os.environ, **environment}, start_new_session=True
                    )
                )
            running = dict(enumerate(workers))
            while running:
                time.sleep(_POLL)
                while arrived:
                    number, moment = arrived.pop(0)
                    if signaled_at == math.inf:
                        signaled_at = moment
                        _send(running.values(), number)
                    elif moment - signaled_at >= signals.DELAY:
                        end = moment
                for rank, worker in list(running.items()):
                    if (code := worker.poll()) is None:
                        continue
                    del running[rank]
                    codes.append(code)
                    if code == 0 or signaled_at < math.inf:
                        continue
                    if code == PREEMPTED:
                        # A signal to it alone. Who waits for it leaves by the same signal.
                        signaled_at = time.monotonic()
                        _send(running.values(), signal.SIGTERM)
                    else:
                        end = min(end, time.monotonic() + GRACE)
                        if code < 0:
                            _report(rank, len(workers), -code)
                if time.monotonic() >= end:
                    _kill(running.values())
        finally:
            _kill(worker for worker in workers if worker.poll() is None)
    failed = [code for code in codes if code]
    code = PREEMPTED if PREEMPTED in failed else next(iter(failed), 0)
    return 128 - code if code < 0 else code


def shows_error() -> bool:
    """Whether this process prints its error: of those of :func:`start`, the first on each node."""
    path = os.environ.get(_ERROR_SHOWN)
    if path is None:
        return True
    try:
        Path(path).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        # The one that started this process is gone, with the folder, or the disk is full. An error
        # that each process prints is better than one that none prints.
        return True
    return True


@contextmanager
def _recorded_signals() -> Iterator[list[tuple[int, float]]]:
    """Signals that arrive inside, with their times, in place of what they did before."""
    arrived: list[tuple[int, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append((number, time.monotonic()))

    before = {number: signal.getsignal(number) for number in FORWARDED}
    # For the thread of leave_on_signals().
    trained, signals.trained = signals.trained, True
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, note)
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if not arrived:
            signals.trained = trained


def _send(workers, number: int) -> None:
    for worker in workers:
        worker.send_signal(number)


def _kill(workers) -> None:
    """End processes and those that they have started."""
    for worker in workers:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


def _report(rank: int, count: int, number: int) -> None:
    hint = "; was the memory full?" if number == signal.SIGKILL else ""
    print(
        f"error: process {rank + 1} of {count} was ended by {signal.Signals(number).name}{hint}",
        file=sys.stderr,
    )


def _environment(gpus: int) -> dict[str, str]:
    """What all processes of this node share."""
    nodes, node = _nodes(), _number("NODE_RANK", 0)
    if node >= nodes:
        raise UserError(f"NODE_RANK={node} must be below NNODES={nodes}; the first node has 0")
    if nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"NNODES={nodes} needs MASTER_ADDR in the environment: the address of the first node"
        )
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT") or ("29500" if nodes > 1 else _free_port())
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    threads = str(max(1, cores // gpus))
    return dict(
        MASTER_ADDR=address,
        MASTER_PORT=port,
        WORLD_SIZE=str(nodes * gpus),
        LOCAL_WORLD_SIZE=str(gpus),
        GROUP_RANK=str(node),
        # Else each process would take all cores.
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", threads),
        MKL_NUM_THREADS=os.environ.get("MKL_NUM_THREADS", threads),
    )


def _nodes() -> int:
    if (nodes := _number("NNODES", 1)) < 1:
        raise UserError(f"NNODES={nodes} must be at least 1")
    return nodes


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment must be a whole number")
    return int(text)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
