# SPDX-License-Identifier: Apache-2.0
"""mmrotate is needed for rotated boxes and for nothing else."""

import ast
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

import mmeformer


def test_missing_mmrotate_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmeformer.rotated", raising=False)
    monkeypatch.setitem(sys.modules, "mmrotate.models", None)
    with pytest.raises(ImportError, match="needs mmrotate") as error:
        importlib.import_module("mmeformer.rotated")
    extra = re.search(r"pip install 'mmeformer\[(\w+)\]'", str(error.value))[1]
    assert extra in importlib.metadata.metadata("mmeformer").get_all("Provides-Extra")


def test_only_the_rotated_part_imports_mmrotate():
    package = Path(mmeformer.__file__).parent
    # `split_dota` is a command of this task, and DOTA's text labels are a format of it.
    exempt = ("rotated", "commands", "formats")
    files = [path for path in package.rglob("*.py") if path.parent.name not in exempt]
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                names = [module] + [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                # The dot ends a name: `rotated_boxes` needs numpy alone.
                dotted = f"{name}."
                assert not dotted.startswith(("mmrotate.", "mmeformer.rotated.")), f"{path}: {name}"
                assert not dotted.lstrip(".").startswith("rotated."), f"{path}: {name}"
