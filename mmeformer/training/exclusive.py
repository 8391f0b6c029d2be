# SPDX-License-Identifier: Apache-2.0
"""One training at a time in a work directory, with its own checkpoints and logs only."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmeformer.errors import TrainingError, UserError
from mmeformer.files import is_draft
from mmeformer.work_dirs import BEST, POINTER, REPORT, SCALARS, find_config, named_checkpoint

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".training.lock"
"""File that a training locks while it runs, with the number of its process."""
PATIENCE = 10.0
"""Seconds to wait for a training that is ending: a killed one frees its memory first."""
INTERIM = "interim_iter_"
"""Begin of the names of checkpoints that the next one replaces."""
CHECKPOINTS = (BEST, "epoch_*.pth", "iter_*.pth", f"{INTERIM}*.pth")
"""Names of a training's checkpoints; other files are the user's."""
EARLIER = "earlier_"
"""Begin of the names of folders for earlier trainings."""


@contextmanager
def only_training(work_dir: str | Path) -> Iterator[None]:
    """Keep other processes from training in a work directory.

    The system ends a lock with its process, also a killed one. Its worker processes do not hold it,
    so a run can be resumed at once. File systems without locks are not guarded.

    Raises:
        TrainingError: another process is training there.
    """
    if fcntl is None:
        yield
        return
    try:
        file = Path(work_dir, LOCK).open("a+", encoding="utf-8")
    except OSError:
        # Not writable: the first checkpoint says so.
        yield
        return
    with file:
        until = time.monotonic() + PATIENCE
        while not _locked(file.fileno()):
            if time.monotonic() > until:
                file.seek(0)
                raise TrainingError(
                    f"another training ({file.read().strip() or 'unknown process'}) runs in "
                    f"{work_dir}: wait for its end, or train with another --work-dir"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Another error is that of a file system without locks.
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def earlier_checkpoints(folder: Path, template: str) -> list[Path]:
    """Checkpoints in a folder, the newest first.

    Args:
        folder: a work directory, or the ``out_dir`` of ``CheckpointHook``.
        template: ``filename_tmpl`` of ``CheckpointHook``.
    """
    found = {
        path
        for pattern in (*CHECKPOINTS, re.sub(r"\{[^}]*\}", "*", template))
        for path in folder.glob(pattern)
        if path.is_file() and not is_draft(path)
    }
    if (named := named_checkpoint(folder)) and (folder / named.name).is_file():
        found.add(folder / named.name)
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def earlier_runs(folder: Path, own: Path) -> list[Path]:
    """Folders of the runs in a work directory that have logged numbers.

    Args:
        folder: a work directory.
        own: ``log_dir`` of the run that begins, which is left out.
    """
    runs = (path.parent.parent for path in folder.glob(SCALARS))
    return sorted(run for run in runs if run.resolve() != own.resolve())


def set_aside(folder: Path, checkpoints: list[Path], runs: list[Path]) -> Path:
    """Move what an earlier training has left to a folder of its own.

    That is a work directory too: it also gets the report and a copy of the config.

    Args:
        folder: with all of it.
        checkpoints: see :func:`earlier_checkpoints`.
        runs: see :func:`earlier_runs`.

    Returns:
        The new folder, ``earlier_`` and the time of the newest checkpoint or run.

    Raises:
        OSError: they cannot be moved.
    """
    newest = max(path.stat().st_mtime for path in checkpoints or runs)
    stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(newest))
    target = folder / f"{EARLIER}{stamp}"
    target.mkdir(exist_ok=True)
    # The out_dir of CheckpointHook has no config.
    with suppress(UserError):
        config = find_config(folder)
        shutil.copy2(config, target / config.name)
    for path in [folder / POINTER, folder / REPORT, *checkpoints, *runs]:
        if path.exists():
            os.replace(path, target / path.name)
    return target
