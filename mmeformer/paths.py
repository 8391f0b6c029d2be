# SPDX-License-Identifier: Apache-2.0
"""Folders of the shipped configs and command lines, in a checkout and in an installed wheel."""

from pathlib import Path

from mmeformer.version import __version__

_PACKAGE = Path(__file__).resolve().parent


def _find(folder: str, package: Path) -> Path:
    # A wheel has them inside the package; a checkout (and an editable install) beside it. Only a
    # checkout has setup.py there, so that another project's site-packages/tools is never used.
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
    """Folder of the configs: ``_base_`` and one folder per task.

    Returns:
        Absolute path: ``configs`` of the checkout (also for editable installs), or
        ``mmeformer/.mim/configs`` of the installed wheel.

    Raises:
        FileNotFoundError: the folder is missing; the message says how to fix it.
    """
    return _find("configs", _PACKAGE)


def shipped_config(name: str) -> str:
    """Path of a shipped config, for ``_base_`` in configs elsewhere.

    mmengine evaluates ``_base_`` as an expression without the names of the config, so a config says
    ``_base_ = __import__("mmeformer").shipped_config("detection/...py")``. It then finds its base
    in a checkout and in a wheel, wherever either is.

    Args:
        name: path below ``configs/``.

    Raises:
        FileNotFoundError: this version has no such config.
    """
    path = config_dir() / name
    if path.is_file():
        return path.as_posix()
    raise FileNotFoundError(
        f"mmeformer {__version__} has no config {name}; set _base_ to another of {config_dir()}, "
        "or write the config again with mmeformer init"
    )


def tools_dir() -> Path:
    """Folder of ``train.py``, ``test.py`` and the other command lines.

    Returns:
        Absolute path: ``tools`` of the checkout (also for editable installs), or
        ``mmeformer/.mim/tools`` of the installed wheel.

    Raises:
        FileNotFoundError: the folder is missing; the message says how to fix it.
    """
    return _find("tools", _PACKAGE)
