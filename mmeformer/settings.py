# SPDX-License-Identifier: Apache-2.0
"""Find settings of a config that nothing reads, and say which setting an error is about.

OpenMMLab's classes read many settings by name from plain dicts (``test_cfg``, ``paramwise_cfg``) or
take ``**kwargs`` that they drop, so a misspelled name changes nothing, without a word. There is no
list of what they read. But a name that does not occur in the source of the classes that a part of
the config names, nor in that of what they import, cannot be read by them.
"""

from __future__ import annotations

import inspect
import keyword
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import Registry

from mmeformer.errors import UserError

NAMES_OF_CLASSES = ("type", "constructor", "sampler_type")
"""Settings whose value names a class or function."""
FREE = ("custom_keys", "metainfo", "default_hooks", "caption_prompt")
"""Dicts whose keys the user chooses; names of their values are settings again."""
MISSPELLED = 2
"""Names in one dict that may all be misspelled."""
LIBRARIES = ("mmengine", "mmcv", "mmdet", "mmseg", "mmrotate", "mmpretrain", "mmeformer")
"""Packages whose modules hand settings on to each other."""
DATA_META = ("classes", "dropped_classes", "palette")
"""Names that data sets read from ``metainfo``."""
_LIKE_CLASSES = re.compile("class|categor|label|^names", re.IGNORECASE)
"""Names that people give to a list of classes."""


class SettingError(UserError, ValueError):
    """A setting would change nothing; the message has its path, its value and the nearest name."""


def check(config: Mapping, parts: Iterable[str]) -> list[str]:
    """Refuse settings that are misspelled, and log a warning of others that nothing reads.

    Call it when the classes of the config are imported.

    Args:
        config: of any task.
        parts: names of the config to look into, such as ``model``.

    Returns:
        The warnings. What they name resembles nothing that is read: usually it is left over from
        another model.

    Raises:
        SettingError: nothing reads a setting, and it resembles one that is read.
    """
    left = []
    for part in parts:
        named = _modules(config.get(part))
        if not all(map(_words, named)):
            # Without source, such as a class of a notebook: what it reads is not known.
            continue
        readers = [*_engine(), *_helpers(named)]
        for path, holder in _unread({part: config.get(part)}, readers):
            name = path[-1]
            text = _useless(path, holder[name])
            if near := _nearest(name, holder, readers):
                raise SettingError(f"{text}{_hint([dotted((*path[:-1], near))])}")
            print_log(text, "current", logging.WARNING)
            left.append(text)
    return left


def require_class_names(config: Mapping) -> None:
    """Refuse entries of ``metainfo`` that stand in place of those that data sets read.

    Users may add entries of their own. But ``class`` or ``class_names`` would leave the classes of
    a data set such as COCO in silence. mmengine cannot write a config with the former.

    Args:
        config: of any task; its classes need not be imported.

    Raises:
        SettingError: the message has the path, the value and the name that is read.
    """
    for path, metainfo in dicts(config):
        if len(path) < 2 or path[-1] != "metainfo" or not str(path[0]).endswith("_dataloader"):
            continue
        for name, value in metainfo.items():
            near = get_close_matches(str(name).lower(), DATA_META, n=1, cutoff=0.8)
            if not near and "classes" not in metainfo and _is_class_list(str(name), value):
                near = ["classes"]
            if near and name not in DATA_META:
                hint = _hint([dotted((*path, near[0]))])
                raise SettingError(f"{_useless((*path, name), value)}{hint}")


def prepare_flips(config: Mapping) -> None:
    """Check the shares of every ``RandomFlip`` and make them floats, in place: mmcv takes no 0.

    Args:
        config: of any task; its classes need not be imported.

    Raises:
        SettingError: a share is no number from 0 to 1, they are more than 1 together, or not one
            for each direction.
    """
    for path, step in _flips(config):
        prob = step["prob"]
        shares = prob if isinstance(prob, (list, tuple)) else [prob]
        directions = _listed(step.get("direction", "horizontal"))
        if (
            not all(isinstance(share, (int, float)) and share >= 0 for share in shares)
            or sum(shares) > 1
            or (shares is prob and len(shares) != len(directions))
        ):
            raise SettingError(
                f"{dotted((*path, 'prob'))}={short(prob)} must be the share of flipped images, or "
                f"a list with one for {', '.join(directions)}; none negative, together at most 1"
            )
        step["prob"] = [float(share) for share in shares] if shares is prob else float(prob)
        if shares is prob:
            step["direction"] = directions


def flip_directions(part: Any) -> set[str]:
    """Directions in which the ``RandomFlip`` of a part of a config flip images.

    Args:
        part: such as a pipeline; of a config that :func:`prepare_flips` has checked.
    """
    found = set()
    for _, step in _flips(part):
        directions, prob = _listed(step.get("direction", "horizontal")), step["prob"]
        shares = prob if isinstance(prob, list) else [prob] * len(directions)
        found |= {name for name, share in zip(directions, shares, strict=True) if share}
    return found


def _flips(part: Any) -> Iterator[tuple[tuple, Any]]:
    """All ``RandomFlip`` of a part of a config, with their paths."""
    for path, step in dicts(part):
        if type_name(step) == "RandomFlip" and "prob" in step:
            yield path, step


def type_name(part: Mapping) -> str:
    """Name of the class that a dict of a config stands for, without scope and module.

    Args:
        part: such as a step of a pipeline; its ``type`` is a name or a class.

    Returns:
        Such as ``RandomFlip``; empty if there is no type.
    """
    kind = part.get("type", "")
    return (kind if isinstance(kind, str) else str(kind.__name__)).rpartition(".")[2]


def without_annotations(pipeline: Iterable[Any]) -> list[Any]:
    """Steps of a test pipeline that an image without annotations passes."""
    return [
        step
        for step in pipeline
        if "Annotation" not in (name := type_name(step)) and name != "ConvertBoxType"
    ]


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _is_class_list(name: str, value: Any) -> bool:
    """Whether a setting can only be meant for names of classes, or a file of them."""
    return isinstance(value, (str, list, tuple)) and bool(_LIKE_CLASSES.search(name))


def _useless(path: Sequence, value: Any) -> str:
    return f"{dotted(path)}={short(value)} changes nothing: nothing reads {path[-1]} there"


def import_classes(scopes: Iterable[str]) -> None:
    """Import the classes that the registries of some scopes have, such as ``mmdet``."""
    for registry in _registries():
        if registry.scope in scopes:
            registry.import_from_location()


def explain(error: Exception, config: Mapping) -> str | None:
    """What to say of an error about a name in a config: its path, its value and the nearest name.

    Args:
        error: of building something from the config, as Python or mmengine raise it.
        config: of that.

    Returns:
        One line; None if the error is about something else.
    """
    if isinstance(error, TypeError):
        match = re.search(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
        return match and _refused(match[1], match[2], config)
    if isinstance(error, KeyError) and error.args:
        match = re.match(r"(\S+) is not in the \S+?::(.+?) registry", str(error.args[0]))
        return match and _unregistered(match[1], match[2], config)
    return None


def _refused(function: str, name: str, config: Mapping) -> str | None:
    """What to say of a function or method that has no argument ``name``."""
    owner, _, last = f".{function}".rpartition(".")
    maker = owner.rpartition(".")[2] if last == "__init__" else last

    def likely(place: tuple[tuple, Mapping]) -> int:
        path, holder = place
        made = {base.__name__ for cls in _classes(holder.get("type")) for base in _bases(cls)}
        # Functions are mmengine's set_randomness and PyTorch's clip_grad_norm_, say.
        return 2 * (maker in made) + (last == "__init__" or str(path[-1]) in last)

    places = [place for place in dicts(config) if name in place[1] and place[0]]
    best = max(places, key=likely, default=None)
    if best is None or not likely(best):
        return None
    path, holder = best
    known = _arguments(holder)
    others = [key for key in holder if key not in (name, "type")]
    elsewhere = [dotted((*place, name)) for place, _ in places if place != path]
    near = get_close_matches(name, [*known, *others], n=1)
    if "metainfo" in known and "classes" not in known and _is_class_list(name, holder[name]):
        near = ["metainfo.classes"]
    hint = _hint([dotted((*path, other)) for other in near] or elsewhere)
    if not hint and known:
        hint = f"; it has {', '.join(known)}"
    kind = holder.get("type", path[-1])
    return f"{dotted((*path, name))}={short(holder[name])}: {_title(kind)} has no {name}{hint}"


def _unregistered(name: str, kind: str, config: Mapping) -> str | None:
    """What to say of a class that no registry of its kind has."""
    for path, holder in dicts(config):
        for key in NAMES_OF_CLASSES:
            if holder.get(key) == name:
                hint = _hint(get_close_matches(name, _registered(kind), n=1))
                hint = hint or "; if it is your own, name its module in custom_imports"
                return f"{dotted((*path, key))}={name}: {name} is not in the {kind} registry{hint}"
    return None


def _hint(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""


def _title(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _bases(cls: Any) -> Sequence[Any]:
    """A class and its bases, without ``object``; a function alone."""
    return inspect.getmro(cls)[:-1] if inspect.isclass(cls) else [cls]


def _arguments(holder: Mapping) -> list[str]:
    """Names of the arguments of what is built from a dict, those in ``**kwargs`` too."""
    found: dict[str, None] = {}
    for cls in _classes(holder.get("type")):
        for item in _bases(cls):
            if inspect.isclass(item) and "__init__" not in vars(item):
                continue
            parameters = _parameters(item)
            found |= dict.fromkeys(item.name for item in parameters if item.kind in _NAMED)
            if not any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters):
                break
    return [name for name in found if name != "self"]


def _parameters(item: Any) -> Sequence[inspect.Parameter]:
    try:
        return [*inspect.signature(item).parameters.values()]
    except (TypeError, ValueError):
        # Compiled code does not tell.
        return []


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_of_mmengine(kind: Any, cls: type) -> bool:
    """Whether a ``type`` is a class of mmengine, in any of the ways that configs name it."""
    if not isinstance(kind, str):
        return kind is cls
    place, _, name = kind.rpartition(".")
    return name == cls.__name__ and place.split(".")[0] in ("", "mmengine")


def dotted(path: Sequence) -> str:
    """A path of a config as ``--cfg-options`` has it."""
    return ".".join(map(str, path))


def short(value: Any) -> str:
    """A value of a config for a message."""
    text = repr(value.to_dict() if hasattr(value, "to_dict") else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dicts(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Mapping]]:
    """All dicts of a config, with their paths."""
    if isinstance(value, (Mapping, Config)):
        yield path, value
    for key, item in _items(value):
        yield from dicts(item, (*path, key))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, (Mapping, Config)):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _unread(part: Mapping, readers: Sequence[str]) -> Iterator[tuple[tuple, Mapping]]:
    """Paths of the names in a part of a config that are not in the readers, and their dicts."""
    todo: list[tuple[tuple, Any]] = [((), part)]
    while todo:
        path, value = todo.pop()
        # Such as backend_args and init_kwargs: handed to other libraries.
        if path and str(path[-1]).endswith("args"):
            continue
        todo += [((*path, key), item) for key, item in _items(value)]
        if not path or not isinstance(value, Mapping):
            continue
        if "type" in value and not _classes(value["type"]):
            # Of a library with classes of its own: what it reads is not known.
            del todo[-len(value) :]
        elif path[-1] not in FREE:
            names = [key for key in value if isinstance(key, str) and key.isidentifier()]
            # mmengine takes an evaluator with `metrics` for one of another class.
            strict = path[0].endswith("_evaluator")
            known = _arguments(value)
            names = [
                key
                for key in names
                if not any(key in _words(item) for item in readers)
                or (strict and _is_like(key, known))
            ]
            if len(names) > max(MISSPELLED, len(value) / 2):
                # The same for most names of a dict: they are for another library.
                del todo[-len(value) :]
                continue
            yield from (((*path, key), value) for key in names)


def _is_like(name: str, known: Sequence[str]) -> bool:
    """Whether a name is none of the known ones, but a misspelling of one."""
    return name not in (*known, *NAMES_OF_CLASSES) and bool(
        get_close_matches(name, known, cutoff=0.85)
    )


def _nearest(name: str, holder: Mapping, readers: Sequence[str]) -> str | None:
    """The name that ``name`` is a misspelling of, if any."""
    arguments = _arguments(holder)
    fits = [*arguments, *DATA_META, *holder]
    for known, cutoff in ((fits, 0.83), (set().union(*map(_words, readers)), 0.88)):
        near = get_close_matches(name.lower(), set(known) - {name}, n=1, cutoff=cutoff)
        if near:
            return (get_close_matches(name, arguments, n=1) or near)[0]
    return None


def _engine() -> list[str]:
    """Modules of mmengine, which reads settings in all parts, and PyTorch's data loader."""
    names = [name for name in sorted(sys.modules) if name.split(".")[0] == "mmengine"]
    return [*names, "torch.utils.data.dataloader"]


def _modules(value: Any) -> set[str]:
    """Modules of all classes that a part of a config names, and of their bases."""
    return {
        base.__module__
        for _, holder in dicts(value)
        for name in NAMES_OF_CLASSES
        for cls in _classes(holder.get(name))
        for base in _bases(cls)
        if base.__module__ != "builtins"
    }


def _helpers(modules: set[str]) -> list[str]:
    """Modules, what they import, and of OpenMMLab's what that imports; nearest first."""
    helpers = modules.union(*map(_imported, modules))
    theirs = set().union(*(_imported(module) for module in helpers if _is_ours(module)))
    return [
        *sorted(modules),
        *sorted(helpers - modules),
        *sorted(filter(_is_ours, theirs - helpers)),
    ]


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


@cache
def _words(module: str) -> frozenset[str]:
    """Words in the source of a module."""
    file = getattr(sys.modules.get(module), "__file__", None)
    # Some modules are compiled, some are made while the program runs.
    if not file or Path(file).suffix != ".py" or not Path(file).is_file():
        return frozenset()
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    return frozenset(re.findall(r"[^\W\d]\w*", text)) - set(keyword.kwlist)


@cache
def _imported(module: str) -> frozenset[str]:
    """Modules whose names a module imports."""
    found = set()
    for value in list(vars(sys.modules[module]).values()) if module in sys.modules else ():
        name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
        if isinstance(name, str) and name != "builtins":
            found.add(name)
    return frozenset(found)


def _classes(kind: Any) -> list[Any]:
    """Classes and functions that a ``type`` may mean: of its name, in its scope, if that has it."""
    if not isinstance(kind, str):
        return [kind] if callable(kind) else []
    name, scope = kind.rpartition(".")[2], kind.partition(".")[0]
    having = [registry for registry in _registries() if name in registry.module_dict]
    # mmpretrain has an EfficientFormer too.
    nearest = [registry for registry in having if registry.scope == scope] or having
    found = [registry.module_dict[name] for registry in nearest]
    # mmdet takes pooling and NMS from there by name.
    operator = getattr(sys.modules.get("mmcv.ops"), name, None)
    return [*found, operator] if callable(operator) else found


def _registries() -> Iterator[Registry]:
    todo = [item for item in vars(mmengine.registry).values() if isinstance(item, Registry)]
    while todo:
        registry = todo.pop()
        yield registry
        todo += registry.children.values()


def _registered(kind: str) -> set[str]:
    """Names in all registries of a kind, such as ``model``."""
    return {
        name for registry in _registries() if registry.name == kind for name in registry.module_dict
    }
