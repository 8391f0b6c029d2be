# SPDX-License-Identifier: Apache-2.0
"""Checks of DOTA label files and their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from mmeformer.checks.findings import ERROR, WARNING, Finding, errors_first, first_of
from mmeformer.checks.images import UNREADABLE, check_images, in_threads, read_header
from mmeformer.images import PLAIN, Reading
from mmeformer.rotated.dota import DotaObject, read_labels

# A box narrower than this many pixels has no area to learn from.
THIN = 1e-3


def check_dota(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    classes: Sequence[str],
    dropped_classes: Sequence[str] = (),
    *,
    training: bool = True,
    limit: int | None = None,
    decode: bool = False,
    reading: Reading | None = PLAIN,
) -> list[Finding]:
    """Check label files and images.

    Reads all label files, and the header and both ends of the first ``limit`` images.

    Args:
        images, labels: files by name without suffix; see
            :func:`mmeformer.rotated.dota.list_images` and ``list_labels``.
        classes: names of the classes.
        dropped_classes: names whose objects are left out on purpose.
        training: warn about classes that do not occur.
        limit: number of images to read; None reads all.
        decode: decode these images in full.
        reading: see :func:`mmeformer.checks.images.check_images`.

    Returns:
        The problems, errors first; kinds: ``bad label line``, ``unknown class``, ``empty box``,
        ``crossed corners``, ``outside image``, ``image without labels``, ``labels without image``,
        ``unused class``, ``unreadable image``, ``bands or depth``, ``deep image``.
    """
    findings: list[Finding] = []
    counts: Counter[str] = Counter()
    sizes = image_sizes([stem for stem in images if stem in labels][:limit], images)
    for stem in (stem for stem in images if stem in labels):
        path = str(labels[stem])
        try:
            objects = read_labels(path)
        except (ValueError, OSError) as error:
            text = str(error).removeprefix(f"label file {path} ")
            findings.append(Finding(ERROR, "bad label line", path, text))
            continue
        for item in objects:
            finding = _object_finding(path, item, classes, dropped_classes, sizes.get(stem))
            if finding is not None:
                findings.append(finding)
            if finding is None or finding.severity == WARNING:
                counts[item.name] += 1
    if labels:
        findings += [
            Finding(WARNING, "image without labels", str(images[stem]), "counts as empty")
            for stem in images
            if stem not in labels
        ]
    findings += [
        Finding(WARNING, "labels without image", str(labels[stem]), "are not used; add the image")
        for stem in labels
        if stem not in images
    ]
    if labels and training and (unused := [name for name in classes if not counts[name]]):
        folder = str(next(iter(labels.values())).parent)
        text = f"{first_of(unused, 20)} have no usable object and cannot be learned"
        findings.append(Finding(WARNING, "unused class", folder, text))
    paths = [str(path) for path in images.values()][:limit]
    return errors_first(findings + check_images(paths, decode=decode, reading=reading))


def image_sizes(stems: Sequence[str], images: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    """Width and height of images, without those that cannot be read."""

    def size(stem: str) -> tuple[int, int] | None:
        try:
            header = read_header(str(images[stem]))
        except UNREADABLE:
            return None
        return header.width, header.height

    found = zip(stems, in_threads(size, stems, "images read"), strict=True)
    return {stem: size for stem, size in found if size is not None}


def _object_finding(
    path: str,
    item: DotaObject,
    classes: Sequence[str],
    dropped: Sequence[str],
    image_size: tuple[int, int] | None,
) -> Finding | None:
    where = f"line {item.line}"
    if item.name in dropped:
        return None
    if item.name not in classes:
        text = f"{where}: {item.name!r} is not a class of the config; correct one of them, or set "
        return Finding(ERROR, "unknown class", path, text + "metainfo.dropped_classes")
    if is_thin(item):
        return Finding(ERROR, "empty box", path, f"{where}: the corners enclose no area; remove it")
    if image_size is not None and (finding := outside_finding(path, item, image_size)):
        return finding
    if _crosses(item.polygon):
        text = f"{where}: the outline crosses itself; write the corners in the order of the outline"
        return Finding(WARNING, "crossed corners", path, text)
    return None


def is_thin(item: DotaObject) -> bool:
    """Whether an object has no area to learn from."""
    return min(cv2.minAreaRect(item.polygon.astype(np.float32))[1]) < THIN


def outside_finding(path: str, item: DotaObject, image_size: tuple[int, int]) -> Finding | None:
    """A finding if no part of an object of the label file ``path`` lies in its image.

    Args:
        path: of the label file.
        item: the object.
        image_size: width and height in pixels.
    """
    low, high = item.polygon.min(0), item.polygon.max(0)
    if (high > 0).all() and (low < image_size).all():
        return None
    text = (
        f"line {item.line}: x from {low[0]:.0f} to {high[0]:.0f} and y from {low[1]:.0f} to "
        f"{high[1]:.0f} px lie outside the image of {image_size[0]} x {image_size[1]} px; remove "
        "the object, or use the image that was labeled"
    )
    return Finding(ERROR, "outside image", path, text)


def _crosses(polygon: np.ndarray) -> bool:
    """Whether opposite sides of a quadrilateral (4, 2) cross."""
    a, b, c, d = polygon
    return _sides_cross(a, b, c, d) or _sides_cross(b, c, d, a)


def _sides_cross(a, b, c, d) -> bool:
    def turn(p, q, r) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0
