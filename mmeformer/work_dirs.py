# SPDX-License-Identifier: Apache-2.0
"""What a training leaves in its work directory: the config, the checkpoints, the logged numbers."""

from __future__ import annotations

from pathlib import Path

from mmeformer.errors import UserError
from mmeformer.files import is_draft

POINTER = "last_checkpoint"
"""File of mmengine that names the latest checkpoint."""
BEST = "best_*.pth"
"""Name of the best checkpoint, with its metric and its epoch or iteration."""
REPORT = "report.html"
_RUNS = "*/vis_data"
"""Folders of runs, which exist before the first checkpoint."""
SCALARS = f"{_RUNS}/scalars.json"
"""Logged numbers of mmengine's ``LocalVisBackend``, one file per run, named by its start."""


def is_work_dir(folder: Path) -> bool:
    """Whether a training has begun in a folder."""
    return Path(folder, POINTER).is_file() or any(folder.glob(_RUNS))


def find_config(work_dir: str | Path) -> Path:
    """The config that the newest run in a work directory was started with, complete.

    Raises:
        UserError: there is none.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise UserError(f"{work_dir} is not a folder; give the work directory of a training")
    found = [path for path in work_dir.glob("*.py") if not is_draft(path)]
    # A copy of the local visualizer.
    found = found or list(work_dir.glob(f"{_RUNS}/config.py"))
    if not found:
        below = sorted(work_dir.glob(f"*/{POINTER}"))
        hint = f" such as {below[0].parent}" if below else ""
        raise UserError(
            f"{work_dir} has no config (*.py), so it is not the work directory of a training; give "
            f"the folder that training wrote (--work-dir){hint}, or the config too"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def best_checkpoint(work_dir: str | Path) -> Path | None:
    """The best checkpoint by validation; of several metrics, the newest. None if there is none."""
    found = [path for path in Path(work_dir).glob(BEST) if not is_draft(path)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def named_checkpoint(work_dir: str | Path) -> Path | None:
    """The file that :data:`POINTER` names, which may have been moved since; None if it has none."""
    pointer = Path(work_dir, POINTER)
    text = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    return Path(text) if text else None


def last_checkpoint(work_dir: str | Path) -> Path | None:
    """The latest checkpoint, also in a folder that was moved; None if there is none."""
    work_dir = Path(work_dir)
    if named := named_checkpoint(work_dir):
        for path in (work_dir / named.name, named):
            if path.is_file():
                return path
    best = set(work_dir.glob(BEST))
    found = [path for path in work_dir.glob("*.pth") if path not in best and not is_draft(path)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def choose_checkpoint(work_dir: str | Path) -> Path:
    """The best checkpoint of a work directory, else the last.

    Raises:
        UserError: there is none.
    """
    found = best_checkpoint(work_dir) or last_checkpoint(work_dir)
    if found is None:
        raise UserError(f"{work_dir} has no checkpoint (*.pth) yet; train longer, or give its file")
    return found
