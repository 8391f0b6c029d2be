# SPDX-License-Identifier: Apache-2.0
"""The import finder of ``mmcv._ext`` and the status of the operators. Standard library only."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from typing import NamedTuple

from mmeformer.errors import UserError

__all__ = ["OperatorsError", "Status", "VARIABLE", "register", "status"]

VARIABLE = "MMEFORMER_OPERATORS"
"""Environment variable that chooses the operators; see :mod:`mmeformer.ops`."""

_CHOICES = ("auto", "torch", "compiled")
_EXTENSION = "mmcv._ext"
_SUBSTITUTE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "substitute.py")


class OperatorsError(UserError, ValueError):
    """:data:`VARIABLE` has an unknown value."""


class Status(NamedTuple):
    """Operators that ``mmcv.ops`` uses.

    Attributes:
        operators: ``"compiled"``: mmcv's own; ``"torch"``: the substitute of this package;
            ``"broken"``: ``mmcv.ops`` cannot be imported; ``"missing"``: there is no mmcv, it has
            no ``mmcv.ops``, or it has no compiled operators while the substitute is switched off.
        reason: explanation, in one line.
    """

    operators: str
    reason: str


class _Finder:
    """Finds ``mmcv._ext`` only, as :data:`VARIABLE` chose when it was registered."""

    def __init__(self, choice: str) -> None:
        self.choice = choice

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _EXTENSION or self.choice == "compiled":
            return None
        if self.choice not in _CHOICES:
            raise OperatorsError(
                f"{VARIABLE} is {self.choice!r}; set it to {', '.join(_CHOICES[:-1])} or "
                f"{_CHOICES[-1]}, or unset it"
            )
        spec = ModuleSpec(name, SourceFileLoader(name, _SUBSTITUTE), origin=_SUBSTITUTE)
        spec.has_location = True
        return spec


def register() -> None:
    """Make ``mmcv.ops`` find its operators as :data:`VARIABLE` says now.

    A later call replaces the choice, except for operators that are already imported. An unknown
    value raises an error when ``mmcv.ops`` imports its operators, not here: ``import mmeformer``
    must work so that ``mmeformer doctor`` can name the mistake.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    finder = _Finder(choice)
    # In place: Python and other packages hold references to this list.
    sys.meta_path[:] = [other for other in sys.meta_path if not isinstance(other, _Finder)]
    if choice == "auto":
        # Python's own finder comes first and finds a compiled extension.
        sys.meta_path.append(finder)
    else:
        sys.meta_path.insert(0, finder)
    if choice in ("auto", "torch"):
        from mmeformer.ops.placeholders import replace_placeholders

        replace_placeholders()


def status() -> Status:
    """Import ``mmcv.ops`` and report which operators it uses.

    An extension built for another torch may crash the process: if that is possible, call this in a
    subprocess.
    """
    try:
        importlib.import_module("mmcv.ops")
    except ModuleNotFoundError as error:
        if error.name == "mmcv":
            return Status("missing", "mmcv is not installed")
        if error.name == "mmcv.ops":
            return Status("missing", "this mmcv has no mmcv.ops (mmcv-lite leaves it out)")
        if error.name == _EXTENSION:
            reason = "mmcv was installed without compiled operators"
            choice = os.environ.get(VARIABLE)
            if choice == "compiled":
                reason += f", and {VARIABLE}=compiled switches the substitute off"
            return Status("missing", reason)
        return _broken(error)
    # A broken extension may raise anything.
    except Exception as error:
        return _broken(error)
    extension = sys.modules[_EXTENSION]
    if not getattr(extension, "IS_SUBSTITUTE", False):
        cuda = extension.get_compiling_cuda_version()
        cuda = "without CUDA" if cuda == "not available" else f"for CUDA {cuda}"
        return Status("compiled", f"mmcv's own, compiled {cuda}: {extension.__file__}")
    if os.environ.get(VARIABLE) == "torch":
        return Status("torch", f"{VARIABLE}=torch")
    return Status("torch", "mmcv was installed without compiled operators")


def _broken(error: BaseException) -> Status:
    text = " ".join(str(error).split())
    if isinstance(error, OperatorsError):
        return Status("broken", text)
    return Status("broken", f"{type(error).__name__}: {text}")
