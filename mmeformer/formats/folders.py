# SPDX-License-Identifier: Apache-2.0
"""Class folders: ``cat/1.jpg``, ``dog/2.jpg``, or ``train/cat/1.jpg`` and the like."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmeformer.checks.findings import Finding
from mmeformer.formats.lists import split_by_lists
from mmeformer.formats.masks import MASK_FOLDER
from mmeformer.formats.tree import Options, Tree, read_sizes, split_word
from mmeformer.labeled import FOLDERS, LabeledData, LabeledImage

NAME = "class folders"
_NO_CLASSES = {"images", "image", "imgs", "img", "jpegimages", "data"}


class _Place(NamedTuple):
    """Folders of an image that can be its class, from the outermost, and the split above them."""

    folders: tuple[str, ...]
    split: str | None


def find(tree: Tree) -> list[Path]:
    """Images in at least two folders that can be classes."""
    places = _places(tree)
    return list(places) if len({place.folders[0] for place in places.values()}) > 1 else []


def in_mask_folder(path: Path, tree: Tree) -> bool:
    """Whether an image lies below a folder such as ``masks``, which is no class."""
    folders = path.relative_to(tree.root).parts[:-1]
    return any(MASK_FOLDER.match(folder.lower()) for folder in folders)


def _places(tree: Tree) -> dict[Path, _Place]:
    """Images in class folders; the first folder of each place is the class.

    Folders around all classes, such as that of an unpacked archive, are passed, and so are folders
    of splits. ``train`` and ``test`` are splits if they have class folders below; beside ``bus``
    and ``car``, without folders below, they are classes themselves.
    """
    places = {}
    for path in tree.images:
        if not in_mask_folder(path, tree):
            folders = path.relative_to(tree.root).parts[:-1]
            folders = tuple(name for name in folders if name.lower() not in _NO_CLASSES)
            places[path] = _Place(folders, None)
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
    places = _places(tree)
    classes = sorted({place.folders[0] for place in places.values()})
    findings: list[Finding] = []
    sizes = read_sizes(places, findings)
    images = [
        LabeledImage(
            path, *sizes[path], label=classes.index(place.folders[0]), split=_split_of(place)
        )
        for path, place in places.items()
        if path in sizes
    ]
    data = LabeledData(NAME, tree.root, FOLDERS, tuple(classes), images, findings)
    split_by_lists(tree, images, data.notes)
    if loose := [path for path in tree.images if path not in places]:
        shown = loose[0].relative_to(tree.root)
        data.notes.append(
            f"{len(loose)} images are in no class folder and left out, such as {shown}"
        )
    return data
