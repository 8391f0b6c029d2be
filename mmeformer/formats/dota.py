# SPDX-License-Identifier: Apache-2.0
"""DOTA text labels, of whole images or patches, with or without splits.

Format: https://captain-whu.github.io/DOTA/dataset.html; see :mod:`mmeformer.rotated.dota`.
"""

from __future__ import annotations

from pathlib import Path

from mmeformer.checks.findings import ERROR, Finding
from mmeformer.formats.lists import split_by_lists
from mmeformer.formats.tree import (
    Options,
    Tree,
    add_labeled,
    note_of_unlabeled,
    read_sizes,
    read_text,
)
from mmeformer.labeled import CORNERS, LabeledData, LabeledImage, LabeledObject

NAME = "DOTA"
_TRIED = 20


def find(tree: Tree) -> list[Path]:
    """Label files."""
    paths = _texts(tree)
    return [path for path in paths[:: max(1, len(paths) // _TRIED)] if _looks_like_labels(path)]


def _texts(tree: Tree) -> list[Path]:
    stems = {path.stem for path in tree.images}
    return [path for path in tree.with_suffix(".txt") if path.stem in stems]


def _looks_like_labels(path: Path) -> bool:
    try:
        lines = [line.split() for line in read_text(path).splitlines()]
    except ValueError:
        return False
    first = next((fields for fields in lines if len(fields) > 1), [])
    if len(first) not in (9, 10):
        return False
    try:
        corners = [float(field) for field in first[:8]]
    except ValueError:
        return False
    # A YOLO line has its class first and shares of the image after it.
    return max(map(abs, corners[1:])) > 1


def read(tree: Tree, options: Options) -> LabeledData:
    """Read all label files; folders or lists tell the splits."""
    # Needs mmrotate, which finding does not.
    from mmeformer.rotated.dota import read_labels

    findings: list[Finding] = []
    texts = _texts(tree)
    images: dict[Path, list] = {}
    label_files: dict[Path, Path] = {}
    for path in texts:
        try:
            objects = read_labels(path)
        except ValueError as error:
            text = " ".join(str(error).removeprefix(f"label file {path} ").split())
            findings.append(Finding(ERROR, "bad label file", str(path), text))
            continue
        image = tree.find_image(path.stem, path, tree.split_of(path))
        if image is None:
            continue
        add_labeled(images, image, objects, path, label_files, findings)
    sizes = read_sizes(images, findings)
    classes = sorted({item.name for objects in images.values() for item in objects})
    label = {name: index for index, name in enumerate(classes)}
    found = [
        LabeledImage(
            path,
            *sizes[path],
            [
                LabeledObject.cornered(
                    label[item.name], item.polygon.ravel(), difficult=item.difficult
                )
                for item in objects
            ],
            split=tree.split_of(label_files[path]) or tree.split_of(path),
            source=label_files[path],
        )
        for path, objects in images.items()
        if path in sizes
    ]
    notes: list[str] = []
    split_by_lists(tree, found, notes)
    notes += note_of_unlabeled(tree, label_files, "label file")
    others = set(tree.with_suffix(".txt")).difference(texts)
    if lost := sorted(path for path in others if _looks_like_labels(path)):
        notes.append(f"{len(lost)} label files have no image, such as {lost[0]}")
    return LabeledData(NAME, tree.root, CORNERS, tuple(classes), found, findings, notes)
