# SPDX-License-Identifier: Apache-2.0
"""DOTA text labels, of whole images or patches, with or without splits.

Format: https://captain-whu.github.io/DOTA/dataset.html; see :mod:`mmeformer.rotated.dota`.
"""

from __future__ import annotations

from pathlib import Path

from mmeformer.bars import counted
from mmeformer.checks.findings import ERROR, Finding
from mmeformer.formats.label_files import joined
from mmeformer.formats.tree import (
    Options,
    Tree,
    read_text,
    sample,
)
from mmeformer.labeled import CORNERS, LabeledData, LabeledImage, LabeledObject

NAME = "DOTA"


def find(tree: Tree) -> list[Path]:
    """Label files."""
    return [path for path in sample(tree.named_like_images(".txt")) if _looks_like_labels(path)]


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
    texts = tree.named_like_images(".txt")
    found: list[LabeledImage] = []
    labels: dict[str, int] = {}
    for path in counted(texts, "label files read"):
        try:
            objects = read_labels(path)
        except ValueError as error:
            text = " ".join(str(error).removeprefix(f"label file {path} ").split())
            findings.append(Finding(ERROR, "bad label file", str(path), text))
            continue
        split = tree.split_of(path)
        image = tree.find_image(path.stem, path, split)
        if image is None:
            continue
        labeled = LabeledImage(image, 0, 0, split=split or tree.split_of(image), source=path)
        for item in objects:
            label = labels.setdefault(item.name, len(labels))
            corners = item.polygon.ravel()
            labeled.objects.append(LabeledObject.cornered(label, corners, difficult=item.difficult))
        found.append(labeled)
    data = joined(NAME, tree, found, labels, findings, "label file")
    data.kind = CORNERS
    others = set(tree.with_suffix(".txt")).difference(texts)
    if lost := sorted(path for path in others if _looks_like_labels(path)):
        data.notes.append(f"{len(lost)} label files have no image, such as {lost[0]}")
    return data
