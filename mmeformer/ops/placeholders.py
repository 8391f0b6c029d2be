# SPDX-License-Identifier: Apache-2.0
"""Operators for modules that were imported before the finder was registered.

mmdet, mmseg and mmrotate import most operators like this, and go on without them::

    try:
        from mmcv.ops import batched_nms
    except ImportError:
        def batched_nms(...):
            raise RuntimeError("... requires mmcv to be compiled with ops ...")

:func:`replace_placeholders` runs those imports again. Classes that inherit from a placeholder keep
it; our models use none of them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType

__all__ = ["replace_placeholders"]

_PACKAGES = ("mmdet", "mmseg", "mmrotate")


def replace_placeholders() -> None:
    """Give the modules of mmdet, mmseg and mmrotate the operators that they failed to import.

    Nothing happens where ``mmcv.ops`` is imported already, or where it still cannot be.
    """
    if "mmcv.ops" in sys.modules:
        return
    early = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in _PACKAGES and module is not None
    ]
    wanted = [(module, entry) for module in early for entry in _failed_imports(module)]
    if not wanted:
        return
    try:
        importlib.import_module("mmcv.ops")
    except Exception:
        # A broken extension: the placeholders say what is missing, and the doctor why.
        return
    replaced = {}
    for module, (source, name, alias) in wanted:
        operator = getattr(importlib.import_module(source), name, None)
        placeholder = vars(module).get(alias)
        if operator is None:
            continue
        setattr(module, alias, operator)
        if placeholder is not None:
            replaced[id(placeholder)] = (placeholder, operator)
    # Other modules may have imported the placeholder by its name.
    for module in early:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)][1])


def _failed_imports(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    """Module, name and local name of the operators that ``module`` imports in a ``try`` block."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return
    if "mmcv.ops" not in source:
        return
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Try):
            continue
        for statement in node.body:
            if not isinstance(statement, ast.ImportFrom):
                continue
            module_name = statement.module or ""
            if module_name == "mmcv.ops" or module_name.startswith("mmcv.ops."):
                for alias in statement.names:
                    yield module_name, alias.name, alias.asname or alias.name
