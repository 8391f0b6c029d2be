# SPDX-License-Identifier: Apache-2.0
"""The order of imports, read from the source: no circles, and nothing imports what is above it."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mmeformer
from mmeformer.tasks import TASKS

PACKAGE = Path(mmeformer.__file__).parent
ROOT = PACKAGE.parent

TASK_ROOMS = set(TASKS)
SHARED_ROOMS = {"checks", "training", "inference", "deploy", "runtime", "report"}
ABOVE_TASKS = {"commands", "quickstart", "own_data", "formats"}
"""Import the rooms of tasks, and are imported by none of them."""
BELOW_CHECKPOINTS = {"backbones", "layers", "ops"}
"""Know the network and nothing of where its weights come from or what it is used for."""
NETWORK_FILES = BELOW_CHECKPOINTS | {"", "errors", "files", "registry", "variants", "version"}
"""Of this project, what :data:`BELOW_CHECKPOINTS` may import."""

RUNTIME_LIBRARIES = {"numpy", "cv2", "onnxruntime"}
"""All that the runtime, and what it imports of this project, may import."""


def imports_of(path: Path, name: str) -> set[str]:
    """Dotted names that a file imports, those inside functions too.

    Args:
        path: of the file.
        name: of the module, to which relative imports relate.

    ``from a import b`` gives ``a.b``: which of the two is the module is for :func:`module_of`.
    """
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            found.update(f"{source}.{alias.name}" for alias in node.names)
    return found


def module_of(dotted: str, modules) -> str | None:
    """The longest beginning of a dotted name that is one of the modules."""
    while dotted and dotted not in modules:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def read_package(root: Path) -> dict[str, set[str]]:
    """Module name -> dotted names it imports, for every file of the package ``root``."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = imports_of(path, name)
    return found


def room_of(module: str) -> str:
    """``mmeformer.deploy.fold`` -> ``deploy``; "" for the package itself."""
    return (module.split(".") + [""])[1]


def inner_edges(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports."""
    return {
        module: {module_of(dotted, imports) for dotted in names} - {None, module}
        for module, names in imports.items()
    }


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first one also last; empty if there are none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def imports():
    return read_package(PACKAGE)


@pytest.fixture(scope="module")
def edges(imports):
    return inner_edges(imports)


def crossings(edges, sources, allowed) -> list[str]:
    """Edges from rooms ``sources`` to rooms for which ``allowed`` is false."""
    return [
        f"{module} imports {target}"
        for module, targets in edges.items()
        if room_of(module) in sources
        for target in sorted(targets)
        if not allowed(room_of(target))
    ]


def test_files_do_not_import_each_other(edges):
    assert circle_in(edges) == []


def test_networks_know_nothing_of_checkpoints_and_tasks(imports, edges):
    assert crossings(edges, BELOW_CHECKPOINTS, NETWORK_FILES.__contains__) == []
    libraries = {task.scope for task in TASKS.values()}
    assert not [
        f"{module} imports {name}"
        for module, names in imports.items()
        if room_of(module) in BELOW_CHECKPOINTS
        for name in sorted(names)
        if name.split(".")[0] in libraries
    ]


def test_one_room_imports_mmpretrain(imports):
    """Its import takes seconds, for which nothing else should wait."""
    importers = {
        room_of(module)
        for module, names in imports.items()
        if any(name.split(".")[0] == "mmpretrain" for name in names)
    }
    assert importers == {"classification"}


def test_shared_rooms_know_tasks_by_name_only(edges):
    above = TASK_ROOMS | ABOVE_TASKS
    assert crossings(edges, SHARED_ROOMS, lambda room: room not in above) == []


def test_tasks_do_not_know_what_uses_them(edges):
    # Their quickstarts are rows of it.
    above = ABOVE_TASKS - {"quickstart"}
    assert crossings(edges, TASK_ROOMS, lambda room: room not in above) == []
    assert crossings(edges, {"formats"}, lambda room: room not in above - {"formats"}) == []


def test_shared_rooms_do_not_import_each_other(edges):
    rooms: dict[str, set[str]] = {room: set() for room in SHARED_ROOMS}
    for module, targets in edges.items():
        if (room := room_of(module)) in rooms:
            rooms[room] |= {room_of(target) for target in targets} & SHARED_ROOMS - {room}
    assert circle_in(rooms) == []


def test_only_tools_import_commands(edges):
    # `python -m mmeformer` is the command.
    rooms = {room_of(module) for module in edges} - {"commands", "__main__"}
    assert crossings(edges, rooms, lambda room: room != "commands") == []
    for folder in ("benchmarks", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            named = {name for name in imports_of(path, path.stem) if "mmeformer.commands" in name}
            assert not named, path


def loaded_with(rooms: set[str], edges: dict[str, set[str]]) -> set[str]:
    """Modules of rooms, and all that importing them may import, packages around them included."""
    waiting = [module for module in edges if room_of(module) in rooms]
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module and module not in found:
            found.add(module)
            waiting += [*edges[module], module.rpartition(".")[0]]
    return found


def test_the_runtime_needs_three_libraries(imports, edges):
    # Other runtimes than onnxruntime are imported when a file is loaded in them.
    allowed = RUNTIME_LIBRARIES | {"ai_edge_litert", "executorch", "openvino"}
    allowed = allowed | {"mmeformer"} | sys.stdlib_module_names
    modules = loaded_with({"runtime"}, edges)
    assert {"mmeformer", "mmeformer.tasks", "mmeformer.runtime.decoders"} <= modules
    assert not [
        f"{module} imports {name}"
        for module in sorted(modules)
        for name in sorted(imports[module])
        if name.split(".")[0] not in allowed
        # ExecuTorch's Python runtime takes and gives PyTorch's tensors.
        and (module, name) != ("mmeformer.runtime.executorch", "torch")
    ]


def test_a_circle_is_found(tmp_path):
    """Imports inside functions and relative ones count, dotted names in strings do not."""
    package = tmp_path / "house"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "room" / "__init__.py").write_text("from .first import one\n")
    (package / "room" / "first.py").write_text("one = 'house.room.second:two'\n")
    (package / "room" / "second.py").write_text("def two():\n    from house.room import one\n")
    edges = inner_edges(read_package(package))
    assert edges["house.room"] == {"house.room.first"}
    assert edges["house.room.second"] == {"house.room"}
    assert circle_in(edges) == []
    (package / "room" / "first.py").write_text("def one():\n    from . import second\n")
    assert set(circle_in(inner_edges(read_package(package)))) == {
        "house.room",
        "house.room.first",
        "house.room.second",
    }
