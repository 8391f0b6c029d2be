# SPDX-License-Identifier: Apache-2.0
"""Check the class names and palettes that configs give as ``metainfo``, and models against them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.registry import DATASETS
from torch import nn

from mmeformer.checks.findings import first_of
from mmeformer.settings import flip_directions, type_name

COUNTING_HOOKS = ("NumClassCheckHook", "SegNumClassCheckHook", "ClassNumCheckHook")
"""Hooks that compare the number of classes once the data are loaded; configs may leave them out."""
OTHER_COUNTS = ("rpn_head", "semantic_head")
"""Parts of a model that have classes of their own, as in mmdet's ``NumClassCheckHook``."""


def class_names(names: str | Sequence[str] | None, key: str = "classes") -> tuple[str, ...]:
    """Class names as a tuple.

    Args:
        names: as in the config; None means none.
        key: entry of ``metainfo``, for messages.

    Raises:
        ValueError: ``names`` is a single text instead of a sequence.
    """
    if isinstance(names, str):
        raise ValueError(
            f"metainfo {key} is the text {names!r}; a single class needs a comma: "
            f"{key} = ({names!r},)"
        )
    return tuple(names or ())


def require_classes(classes: Sequence[str]) -> None:
    """Raise ValueError if there are no class names."""
    if not classes:
        raise ValueError("the data set has no class names; set metainfo=dict(classes=(...))")


def require_color_per_class(palette: Sequence, classes: Sequence[str]) -> None:
    """Raise ValueError unless the palette has one color for each class."""
    if len(palette) != len(classes):
        raise ValueError(
            f"metainfo palette has {len(palette)} colors for {len(classes)} classes "
            f"{first_of(list(classes), 20)}; give one (red, green, blue) for each class, or no "
            "palette"
        )


def require_count(model: Any, classes: Sequence[str], place: str = "the data set") -> None:
    """Raise ValueError if parts of a model have another ``num_classes`` than a data set.

    With too few classes they fail in an assertion on the GPU; with too many they train outputs that
    no label uses.

    Args:
        model: of any task, also in wrappers for several processes or test-time augmentation.
        classes: of the data set.
        place: the data set in the config, for the message.
    """
    while hasattr(model, "module"):
        model = model.module
    counts = {
        # The name of mmpretrain's attribute is not that of its setting.
        f"model.{name.replace('loss_module', 'loss')}.num_classes": module.num_classes
        for name, module in model.named_modules()
        if name
        and not name.endswith(OTHER_COUNTS)
        and getattr(module, "num_classes", None) is not None
    }
    if wrong := [f"{path}={count}" for path, count in counts.items() if count != len(classes)]:
        raise ValueError(
            f"{' and '.join(wrong)}, but {place} has {len(classes)} classes "
            f"{first_of(list(classes))}; set num_classes={len(classes)}, or correct "
            "metainfo.classes"
        )


def require_counts(config: Mapping, model: nn.Module, splits: Sequence[str]) -> str | None:
    """Compare a model with the data sets of a config before they are loaded.

    Args:
        config: of any task.
        model: built from the config.
        splits: of the data that are to be loaded.

    Returns:
        In place of the error, a message, if the config has none of :data:`COUNTING_HOOKS`.

    Raises:
        ValueError: see :func:`require_count`.
    """
    hooks = {type_name(hook) for hook in config.get("custom_hooks") or ()}
    try:
        for split in splits:
            name = f"{split}_dataloader"
            dataset = (config.get(name) or {}).get("dataset")
            for path, settings in flat(dataset, f"{name}.dataset"):
                if classes := _configured(settings):
                    require_count(model, classes, path)
    except ValueError as error:
        if hooks & set(COUNTING_HOOKS):
            raise
        return str(error)
    return None


def mirrored(classes: Sequence[str]) -> tuple[str, str] | None:
    """Two classes that are each other's mirror image by their names: turn_left, turn_right."""
    known = {name.lower(): name for name in classes}
    for name in classes:
        other = name.lower().replace("left", "right")
        if other != name.lower() and other in known:
            return name, known[other]
    return None


def mirrored_by_flips(config: Mapping, split: str) -> str | None:
    """A message if a config flips images of one class into those of another one.

    Args:
        config: with ``{split}_dataloader``; of ``load_config``.
        split: such as ``"train"``.
    """
    loader = config.get(f"{split}_dataloader") or {}
    # Both, diagonal, is a turn by 180 degrees.
    if not flip_directions(loader) - {"diagonal"}:
        return None
    for _, settings in flat(loader.get("dataset")):
        if pair := mirrored(_configured(settings)):
            return (
                f"a mirrored {pair[0]} looks like a {pair[1]}, but RandomFlip mirrors images: "
                "leave it out, or let its direction be diagonal"
            )
    return None


def flat(settings: Any, path: str = "dataset") -> Iterator[tuple[str, Mapping]]:
    """Configs of the data sets inside wrappers such as ``ConcatDataset``, with their paths."""
    if not isinstance(settings, Mapping):
        return
    key = next((key for key in ("datasets", "dataset") if settings.get(key) is not None), None)
    if key is None:
        yield path, settings
    elif isinstance(settings[key], Mapping):
        yield from flat(settings[key], f"{path}.{key}")
    else:
        for index, item in enumerate(settings[key]):
            yield from flat(item, f"{path}.{key}.{index}")


def _configured(settings: Mapping) -> tuple[str, ...]:
    """Classes of a data set's config; none if only its files tell."""
    if any("class" in name for name in settings):
        # An argument of mmpretrain's, which may be a file, or one that the data set will refuse.
        return ()
    kind = settings["type"]
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    # Of mmengine's BaseDataset: adds what the class itself knows.
    load = getattr(kind, "_load_metainfo", None)
    found = load(copy.deepcopy(settings.get("metainfo"))) if load else {}
    return class_names(found.get("classes"))
