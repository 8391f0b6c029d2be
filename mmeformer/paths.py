# SPDX-License-Identifier: Apache-2.0
"""Where the shipped configs and command lines lie, in a checkout and in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _find(folder: str, package: Path) -> Path:
    # A wheel carries them inside the package; a checkout (and an editable install) beside it. The
    # checkout is known by its setup.py, so that a stranger's site-packages/tools is never taken.
    if (package.parent / "setup.py").is_file():
        candidate = package.parent / folder
    else:
        candidate = package / ".mim" / folder
    if candidate.is_dir():
        return candidate
    raise FileNotFoundError(
        f"mmeformer's {folder} are missing: {candidate} does not exist. The installation is "
        "damaged; reinstall mmeformer (in a checkout: `git restore` that folder)."
    )


def config_dir() -> Path:
    """Folder that holds ``_base_``, ``detection``, ``segmentation`` and ``rotated``.

    Returns:
        Absolute path: ``configs`` of the source checkout (also for editable installs) or of the
        installed wheel (``mmeformer/.mim/configs``).

    Raises:
        FileNotFoundError: the folder is missing; the message says how to mend it.
    """
    return _find("configs", _PACKAGE)


def tools_dir() -> Path:
    """Folder that holds ``train.py``, ``test.py`` and the other command lines.

    Returns:
        Absolute path: ``tools`` of the source checkout (also for editable installs) or of the
        installed wheel (``mmeformer/.mim/tools``).

    Raises:
        FileNotFoundError: the folder is missing; the message says how to mend it.
    """
    return _find("tools", _PACKAGE)
