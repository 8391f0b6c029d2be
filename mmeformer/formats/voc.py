# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC XML: upright boxes, outlines, and the rotated boxes of roLabelImg.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from mmeformer.bars import counted
from mmeformer.checks.findings import ERROR, Finding
from mmeformer.formats.label_files import joined
from mmeformer.formats.tree import (
    Options,
    Tree,
    sample,
)
from mmeformer.labeled import (
    CORNERS,
    POLYGONS,
    LabeledData,
    LabeledImage,
    LabeledObject,
    note_of_boxes,
)
from mmeformer.rotated_boxes import corners as corners_of

NAME = "Pascal VOC"


def find(tree: Tree) -> list[Path]:
    """Annotation files."""
    return [path for path in sample(tree.with_suffix(".xml")) if _begins(path)]


def _begins(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<annotation" in file.read(400)


def read(tree: Tree, options: Options) -> LabeledData:
    """Read all annotation files; lists or folders tell the splits."""
    findings: list[Finding] = []
    found: list[LabeledImage] = []
    labels: dict[str, int] = {}
    for path in counted(tree.with_suffix(".xml"), "label files read"):
        try:
            image = _read(path, tree, labels)
        except (ElementTree.ParseError, ValueError) as error:
            text = f"cannot be used: {error}"
            findings.append(Finding(ERROR, "bad label file", str(path), text))
            continue
        if image is not None:
            found.append(image)
    data = joined(NAME, tree, found, labels, findings, "annotation file")
    items = [item for image in data.images for item in image.objects]
    if items and all(item.corners for item in items):
        data.kind = CORNERS
    elif items and all(item.polygons for item in items):
        data.kind = POLYGONS
    data.notes += note_of_boxes(data.images)
    return data


def _read(path: Path, tree: Tree, labels: dict[str, int]) -> LabeledImage | None:
    root = ElementTree.fromstring(path.read_bytes())
    if root.tag != "annotation":
        return None
    named = root.findtext("filename") or ""
    split = tree.split_of(path)
    # Where the image was when it was labeled.
    place = root.findtext("path") or f"{root.findtext('folder') or ''}/{named}"
    image = tree.find_image(path.stem, path, split, place)
    if image is None or (named and Path(named).stem == path.stem):
        image = tree.find_image(named or path.stem, path, split, place) or image
    if image is None:
        raise ValueError(f"image {named or path.stem} is not below {tree.root}")
    width, height = (int(float(root.findtext(f"size/{key}") or 0)) for key in ("width", "height"))
    # The files of VOC itself count pixels from 1; labeling tools have corners from 0.
    first = 1 if "VOC" in (root.findtext("source/database") or "") else 0
    split = split or tree.split_of(image)
    found = LabeledImage(image, width, height, split=split, source=path)
    for number, entry in enumerate(root.iter("object"), start=1):
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"object {number} has no name")
        try:
            item = _object(entry, labels.setdefault(name, len(labels)), first)
        except (TypeError, ValueError) as error:
            raise ValueError(f"object {number} ({name}): {error}") from error
        item.difficult = int(entry.findtext("difficult") or 0)
        item.place = f"object {number} ({name})"
        found.objects.append(item)
    return found


def _object(entry: ElementTree.Element, label: int, first: int) -> LabeledObject:
    if (rotated := entry.find("robndbox")) is not None:
        box = [_number(rotated, key) for key in ("cx", "cy", "w", "h", "angle")]
        return LabeledObject.cornered(label, corners_of(np.array([box]))[0].ravel())
    if (polygon := entry.find("polygon")) is not None and len(polygon):
        points = [float(child.text or "nan") for child in polygon]
        if len(points) < 6 or len(points) % 2 or not all(map(math.isfinite, points)):
            raise ValueError(f"its polygon has {len(points)} numbers; it needs x1, y1, x2, y2, ...")
        return LabeledObject.outlined(label, [points])
    upright = entry.find("bndbox")
    if upright is None:
        raise ValueError("has no bndbox")
    left, top, right, bottom = (_number(upright, key) for key in ("xmin", "ymin", "xmax", "ymax"))
    left, top = left - first, top - first
    return LabeledObject(label, (left, top, right - left, bottom - top))


def _number(element: ElementTree.Element, key: str) -> float:
    text = element.findtext(key)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{element.tag} has {key} {text!r} instead of a number")
    return value
