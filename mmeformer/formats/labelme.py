# SPDX-License-Identifier: Apache-2.0
"""LabelMe: one JSON file of shapes for each image; also AnyLabeling and X-AnyLabeling.

Format: https://github.com/wkentaro/labelme, ``labelme/label_file.py`` and ``labelme/shape.py``.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmeformer.bars import counted
from mmeformer.checks.findings import ERROR, WARNING, Finding
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
    encode_rle,
    mask_box,
)

NAME = "LabelMe"
_CIRCLE = 32
"""Corners of the polygon that stands for a circle."""
_NOT_AREAS = ("point", "points", "line", "linestrip")


def find(tree: Tree) -> list[Path]:
    """Label files."""
    found = []
    for path in sample(tree.named_like_images(".json")):
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            continue
        if isinstance(content, dict) and "shapes" in content:
            found.append(path)
    return found


def read(tree: Tree, options: Options) -> LabeledData:
    """Read all label files; folders or lists tell the splits."""
    findings: list[Finding] = []
    found: list[LabeledImage] = []
    labels: dict[str, int] = {}
    kinds: set[str] = set()
    for path in counted(tree.with_suffix(".json"), "label files read"):
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict) or "shapes" not in content:
                continue
            found.append(_read(content, path, tree, labels, kinds, findings))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            text = f"cannot be used: {error}"
            findings.append(Finding(ERROR, "bad label file", str(path), text))
    data = joined(NAME, tree, found, labels, findings, "label file")
    if kinds == {"rotation"}:
        data.kind = CORNERS
    elif kinds != {"rectangle"}:
        data.kind = POLYGONS
        for image in data.images:
            for item in image.objects:
                if item.rle is None:
                    item.polygons = item.outlines()
    return data


def _read(
    content: dict[str, Any],
    path: Path,
    tree: Tree,
    labels: dict[str, int],
    kinds: set[str],
    findings: list[Finding],
) -> LabeledImage:
    name = content.get("imagePath") or path.stem
    split = tree.split_of(path)
    named = tree.find_image(path.stem, path, split)
    image = tree.find_image(str(name), path, split) or named
    if image is None:
        raise ValueError(f"image {name} is not below {tree.root}")
    if named is not None and named != image and named.parent == image.parent:
        if image.stem != named.stem:
            # After renaming, the labels would go to another image.
            raise ValueError(
                f"it is named like {named}, but imagePath is {name}; rename it, or correct "
                "imagePath"
            )
    width, height = (int(content.get(key) or 0) for key in ("imageWidth", "imageHeight"))
    split = split or tree.split_of(image)
    found = LabeledImage(image, width, height, split=split, source=path)
    groups: dict[tuple[int, Any], LabeledObject] = {}
    for number, shape in enumerate(content["shapes"], start=1):
        kind = shape.get("shape_type") or "polygon"
        name = str(shape.get("label") or "").strip()
        if not name:
            raise ValueError(f"shape {number} has no label")
        if kind in _NOT_AREAS:
            text = f"shape {number} ({name}) is a {kind}, which encloses nothing: left out"
            findings.append(Finding(WARNING, "no area", str(path), text))
            continue
        label = labels.setdefault(name, len(labels))
        try:
            item = _object(shape, kind, label, found)
        except (ValueError, TypeError, KeyError, binascii.Error) as error:
            raise ValueError(f"shape {number} ({name}): {error}") from error
        item.place = f"shape {number} ({name})"
        kinds.add(kind)
        # Parts of one object have the same group.
        group = (label, shape.get("group_id"))
        if group[1] is not None and group in groups and item.polygons and groups[group].polygons:
            groups[group].polygons += item.polygons
            merged = LabeledObject.outlined(label, groups[group].polygons)
            groups[group].box = merged.box
            continue
        groups[group] = item
        found.objects.append(item)
    return found


def _object(shape: dict, kind: str, label: int, image: LabeledImage) -> LabeledObject:
    points = np.array(shape.get("points"), np.float64)
    if points.ndim != 2 or points.shape[1:] != (2,) or not np.isfinite(points).all():
        raise ValueError("points must be pairs of numbers")
    if kind == "rectangle" and len(points) >= 2:
        (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
        return LabeledObject(label, (left, top, right - left, bottom - top))
    if kind == "circle" and len(points) == 2:
        radius = float(np.hypot(*(points[1] - points[0])))
        angles = np.arange(_CIRCLE) * 2 * math.pi / _CIRCLE
        ring = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
        return LabeledObject.outlined(label, [ring.ravel()])
    if kind == "rotation" and len(points) == 4:
        return LabeledObject.cornered(label, points.ravel())
    if kind == "polygon" and len(points) >= 3:
        return LabeledObject.outlined(label, [points.ravel()])
    if kind == "mask" and len(points) == 2:
        return _mask(shape, points, label, image)
    raise ValueError(f"a {kind} with {len(points)} points is not known")


def _mask(shape: dict, points: np.ndarray, label: int, image: LabeledImage) -> LabeledObject:
    data = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
    part = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    if part is None or not part.any():
        raise ValueError("the mask is empty or no image")
    left, top = (int(round(value)) for value in points[0])
    whole = np.zeros((image.height, image.width), np.uint8)
    target = whole[top : top + part.shape[0], left : left + part.shape[1]]
    if not target.size:
        size = f"{image.width} x {image.height} px"
        raise ValueError(f"the mask lies outside its image of {size}; correct it")
    target[:] = part[: target.shape[0], : target.shape[1]] > 0
    if not whole.any():
        raise ValueError("the part of the mask in its image is empty; remove it")
    return LabeledObject(label, mask_box(whole), rle=encode_rle(whole))
