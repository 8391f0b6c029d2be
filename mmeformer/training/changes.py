# SPDX-License-Identifier: Apache-2.0
"""Settings that differ between a checkpoint's config and the one it is resumed with.

The user has changed them, or a shipped config that the file inherits has changed with the version.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

PARTS = ("model", "train_dataloader.dataset")
"""What decides the losses; :mod:`mmeformer.training.schedule` compares the schedule."""
_NOTHING = "None"


def changed(before: str, now: str, most: int = 8) -> list[str]:
    """Settings below :data:`PARTS` that differ, each as ``name before -> now``.

    The texts are read and not run, as a checkpoint may be a stranger's.

    Args:
        before, now: configs as mmengine writes them (``pretty_text``); empty if there is none.
        most: how many to name.
    """
    if not before or not now:
        return []
    try:
        old, new = dict(_settings(before)), dict(_settings(now))
    except (SyntaxError, RecursionError):
        return []
    found = [
        f"{name} {_short(old.get(name, _NOTHING))} -> {_short(new.get(name, _NOTHING))}"
        for name in {**old, **new}
        if old.get(name, _NOTHING) != new.get(name, _NOTHING)
    ]
    rest = len(found) - most
    return found[:most] + ([f"and {rest} more"] if rest > 0 else [])


def _settings(text: str) -> Iterator[tuple[str, str]]:
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            for name, value in _leaves(line.value, line.targets[0].id):
                # Weights to start from are not read on resuming.
                if name.startswith(PARTS) and ".init_cfg" not in name:
                    yield name, value


def _leaves(node: ast.expr, path: str) -> Iterator[tuple[str, str]]:
    """Dotted names and values below a value that is a text of literals and ``dict(...)``."""
    if isinstance(node, ast.Call):
        for entry in node.keywords:
            yield from _leaves(entry.value, f"{path}.{entry.arg}")
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            yield from _leaves(value, f"{path}.{ast.unparse(key) if key else ''}".replace("'", ""))
    elif isinstance(node, (ast.List, ast.Tuple)) and any(
        isinstance(item, (ast.Call, ast.Dict)) for item in node.elts
    ):
        for index, item in enumerate(node.elts):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, ast.unparse(node)


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."
