# SPDX-License-Identifier: Apache-2.0
"""Class folders: ``cat/1.jpg``, ``dog/2.jpg``, or ``train/cat/1.jpg`` and the like."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmeformer.checks.findings import Finding
from mmeformer.formats.lists import split_by_lists
from mmeformer.formats.masks import find as find_masks
from mmeformer.formats.masks import in_mask_folder
from mmeformer.formats.tree import IMAGE_FOLDERS, Options, Tree, read_sizes, split_word
from mmeformer.labeled import FOLDERS, LabeledData, LabeledImage

NAME = "class folders"
FORMAT = "folders"
"""What ``--format`` takes for it."""


class _Place(NamedTuple):
    """Folders of an image that can be its class, from the outermost, and the split above them."""

    folders: tuple[str, ...]
    split: str | None


def find(tree: Tree) -> list[Path]:
    """Images in at least two folders that can be classes."""
    places = _places(tree)
    return list(places) if len(_classes(places)) > 1 else []


def doubtful_classes(tree: Tree) -> str:
    """In words: folders such as ``masks`` and ``images`` that may be classes, with the option that
    says so; empty if there are none."""
    asked = _classes(_places(tree, asked=True))
    if len(asked) < 2 or not (more := sorted(asked - _classes(_places(tree)))):
        return ""
    return f"to take {' and '.join(more)} for classes too, add --format {FORMAT}"


def _classes(places: dict[Path, _Place]) -> set[str]:
    return {place.folders[0] for place in places.values()}


def _places(tree: Tree, asked: bool = False) -> dict[Path, _Place]:
    """Images in class folders; the first folder of each place is the class.

    Folders around all classes, such as that of an unpacked archive, are passed, and so are folders
    of splits. ``train`` and ``test`` are splits if they have class folders below; beside ``bus``
    and ``car``, without folders below, they are classes themselves.

    Args:
        tree: of the data set.
        asked: the user says that folders are classes. Then so are ``images`` with images directly
            in it, and ``masks`` without the names of other images.
    """
    places = {}
    masks = set(find_masks(tree)) if asked else ()
    for path in tree.images:
        if not in_mask_folder(path, tree) or (asked and path not in masks):
            folders = path.relative_to(tree.root).parts[:-1]
            kept = folders[-1:] if asked else ()
            folders = tuple(
                name
                for name in folders[: len(folders) - len(kept)]
                if name.lower() not in IMAGE_FOLDERS
            )
            places[path] = _Place((*folders, *kept), None)
    outermost = True
    while True:
        places = {path: place for path, place in places.items() if place.folders}
        names = {place.folders[0] for place in places.values()}
        splits = {name for name in names if split_word(name)}
        around = {
            place.folders[0]
            for place in places.values()
            if any(split_word(name) is None for name in place.folders[1:])
        }
        if len(names) > 1:
            # Below a split there is another one only if an archive wraps each: train/train/cat.
            around &= splits if outermost or splits == names else set()
        if around and len(names) > 1:
            # Where one is a split, so is one whose only class has a split's name: val/train.
            around = {p.folders[0] for p in places.values() if len(p.folders) > 1} & splits
        if not around:
            # Splits alone, with images directly below, have no classes.
            return {} if outermost and splits == names else places
        outermost = outermost and not around & splits
        # Images beside splits, or beside the classes in a wrapping folder, have no class.
        places = {
            path: _Place(place.folders[1:], split_word(place.folders[0]) or place.split)
            for path, place in places.items()
            if place.folders[0] in around
        }


def _split_of(place: _Place) -> str | None:
    """The split above the class, else the innermost one below: ``train/cat``, ``cat/train``."""
    below = [split_word(name) for name in place.folders[:0:-1]]
    return place.split or next(filter(None, below), None)


def read(tree: Tree, options: Options) -> LabeledData:
    """The images of all class folders."""
    places = _places(tree, asked=options.format == FORMAT)
    classes = sorted(_classes(places))
    labels = {name: label for label, name in enumerate(classes)}
    findings: list[Finding] = []
    sizes = read_sizes(places, findings)
    images = [
        LabeledImage(path, *sizes[path], label=labels[place.folders[0]], split=_split_of(place))
        for path, place in places.items()
        if path in sizes
    ]
    data = LabeledData(NAME, tree.root, FOLDERS, tuple(classes), images, findings)
    split_by_lists(tree, images, data.notes)
    if loose := [path for path in tree.images if path not in places]:
        shown = loose[0].relative_to(tree.root)
        doubt = "" if options.format else doubtful_classes(tree)
        data.notes.append(
            f"{len(loose)} images are in no class folder and left out, such as {shown}"
            f"{doubt and f'; {doubt}'}"
        )
    return data
