# SPDX-License-Identifier: Apache-2.0
"""The names that the package imports from OpenMMLab's libraries: all exist, whatever the version.

``python tests/test_libraries.py`` lists them. The tests of the configs build what those name.
"""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mmeformer"
LIBRARIES = ("mmengine", "mmcv", "mmdet", "mmseg", "mmrotate", "mmpretrain")
# Arguments by keyword that our subclasses and calls rely on beyond the names themselves.
ARGUMENTS = {
    "mmengine.runner.load_checkpoint": ["model", "filename", "map_location"],
    "mmengine.runner.Runner.from_cfg": ["cfg"],
    "mmcv.ops.batched_nms": ["boxes", "scores", "idxs", "nms_cfg"],
    "mmdet.models.utils.multi_apply": ["func"],
}


@cache
def imported_names() -> set[str]:
    """Dotted names that the package's source imports, inside functions too."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    return found


def used_names(library: str) -> set[str]:
    """Dotted names that the package's source imports from a library."""
    return {name for name in imported_names() if name.split(".")[0] == library}


def resolve(name: str):
    """The object of a dotted name; ImportError or AttributeError if there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(resolve(parent), attribute)


def missing(names) -> list[str]:
    """Those of the names that the installed libraries lack, with the reason."""
    found = []
    for name in sorted(names):
        try:
            resolve(name)
        except (ImportError, AttributeError, ValueError) as error:
            found.append(f"{name}: {error}")
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_imported_name_exists(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    names = used_names(library)
    assert names, "the source was not read"
    assert missing(names) == []


def test_a_name_that_is_gone_is_noticed():
    assert [line.split(":")[0] for line in missing(["mmengine.Config", "mmengine.Confog"])] == [
        "mmengine.Confog"
    ]


def test_arguments_exist():
    for name, arguments in ARGUMENTS.items():
        parameters = inspect.signature(resolve(name)).parameters
        assert [argument for argument in arguments if argument not in parameters] == [], name


if __name__ == "__main__":
    for library in LIBRARIES:
        names = sorted(used_names(library))
        print(f"{library}: {len(names)}", *names, sep="\n  ")
