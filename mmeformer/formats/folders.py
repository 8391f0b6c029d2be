# SPDX-License-Identifier: Apache-2.0
"""Class folders: ``cat/1.jpg``, ``dog/2.jpg``, or ``train/cat/1.jpg`` and the like."""

from __future__ import annotations

from pathlib import Path

from mmeformer.checks.findings import Finding
from mmeformer.formats.tree import Options, Tree, read_sizes, split_word
from mmeformer.labeled import FOLDERS, LabeledData, LabeledImage

NAME = "class folders"
_NO_CLASSES = {"images", "image", "imgs", "img", "jpegimages", "data"}


def find(tree: Tree) -> list[Path]:
    """Images in at least two folders that can be classes."""
    classes = _classes(tree)
    return list(classes) if len(set(classes.values())) > 1 else []


def _classes(tree: Tree) -> dict[Path, str]:
    """Class by image: the first folder below the root, or below a split."""
    found = {}
    for path in tree.images:
        parts = path.relative_to(tree.root).parts[:-1]
        parts = tuple(
            part for part in parts if split_word(part) is None and part.lower() not in _NO_CLASSES
        )
        if parts:
            found[path] = parts[0]
    return found


def read(tree: Tree, options: Options) -> LabeledData:
    """The images of all class folders."""
    by_image = _classes(tree)
    classes = sorted(set(by_image.values()))
    findings: list[Finding] = []
    sizes = read_sizes(by_image, findings)
    images = [
        LabeledImage(path, *sizes[path], label=classes.index(name), split=tree.split_of(path))
        for path, name in by_image.items()
        if path in sizes
    ]
    data = LabeledData(NAME, tree.root, FOLDERS, tuple(classes), images, findings)
    if loose := [path for path in tree.images if path not in by_image]:
        shown = loose[0].relative_to(tree.root)
        data.notes.append(
            f"{len(loose)} images are in no class folder and left out, such as {shown}"
        )
    return data
