# SPDX-License-Identifier: Apache-2.0
"""Write files atomically: a file is complete or not there, whatever happens."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Two letters at least: C:/ is a drive. pathlib makes https:/ of https://.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")
_STEM_LENGTH = 40
"""Characters of a file's stem that its draft repeats; file systems limit the length of names."""


def refuse_url(path: str | Path, name: str) -> None:
    """Raise if a URL was given for a local file or folder.

    Args:
        path: as it was given.
        name: what it is, for the message.

    Raises:
        ValueError: it is a URL.
    """
    if (found := _URL.match(str(path))) is not None:
        raise ValueError(f"{name} {found[1]}://{found[2]} is a URL; give a local path")


@contextmanager
def replacing(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Write a file or a folder under a temporary name, and rename it when it is complete.

    If the block fails, the draft is removed and an existing file stays as it was. A killed process
    leaves a hidden draft (see :func:`is_draft`). Nothing reads it, and no later write uses its
    name.

    Args:
        path: file or folder to write. Missing parent folders are created. A link is followed. An
            existing file or folder is replaced, a folder with all its content. Devices and pipes
            cannot be replaced and are written to directly.
        sync: wait until the content has reached the disk, so that ``path`` is complete even after a
            power failure.

    Yields:
        The draft: a path beside ``path`` with the same suffix, where nothing exists yet. The block
        creates a file or a folder there.

    Raises:
        OSError: it cannot be written; the error names ``path``.
        ValueError: it is a URL.
    """
    refuse_url(path, "output")
    target = Path(path).expanduser()
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _name_beside(target)
    try:
        yield draft
        if sync:
            _sync(draft)
        _move(draft, target)
        if sync and os.name == "posix":
            _sync_entry(target.parent)
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) != str(draft):
            raise
        # The user does not know the draft's name.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        _remove(draft)


def write_text(path: str | Path, text: str, sync: bool = False) -> None:
    """Write a text file in UTF-8; see :func:`replacing`."""
    with replacing(path, sync) as draft:
        draft.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, data: bytes | memoryview, sync: bool = False) -> None:
    """Write a file of bytes; see :func:`replacing`."""
    with replacing(path, sync) as draft:
        draft.write_bytes(data)


def relative_names(paths: Sequence[str | Path]) -> list[str]:
    """Paths below the folder that contains all of the files, with ``/``."""
    whole = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [Path(os.path.relpath(path, root)).as_posix() for path in whole]


def is_draft(path: str | Path) -> bool:
    """Whether a name is that of a draft: a file that is being written, or was never finished."""
    return re.fullmatch(r"\..*\.draft-[0-9a-f]{8}(\..*)?", Path(path).name) is not None


def _name_beside(target: Path) -> Path:
    stem = target.stem[:_STEM_LENGTH]
    return target.with_name(f".{stem}.draft-{secrets.token_hex(4)}{target.suffix}")


def _move(draft: Path, target: Path) -> None:
    if not (draft.is_dir() and target.is_dir()):
        os.replace(draft, target)
        return
    # A folder cannot be renamed onto one that has content.
    old = _name_beside(target)
    os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        os.rename(old, target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or all of a folder, is on the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
        if os.name == "posix":
            _sync_entry(path)
    else:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _sync_entry(folder: Path) -> None:
    """Wait until the names in a folder are on the disk (POSIX only)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
