# SPDX-License-Identifier: Apache-2.0
"""Labeled images as one plain structure, whatever format they were read from.

The readers in :mod:`mmeformer.formats` return it, and the starter of a task
(:mod:`mmeformer.starter`) writes it in the format that the task trains on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmeformer.checks.findings import Finding

Points = Sequence[float] | NDArray[np.float64]
"""``[x1, y1, x2, y2, ...]`` in pixels."""
SPLITS = ("train", "val", "test")
UNLABELED = 255
"""Value of pixels without a class in :attr:`LabeledData.read_mask`."""

BOXES, POLYGONS, CORNERS, MASKS, FOLDERS = "boxes", "polygons", "corners", "masks", "folders"
"""Kinds of labels: upright boxes, outlines, rotated boxes, one class per pixel, per image."""


@dataclass
class LabeledObject:
    """One object of an image; all numbers are pixels of the image as it is shown.

    Args:
        label: index of its class.
        box: x, y, width and height of its upright box.
        polygons: its outlines, each ``[x1, y1, x2, y2, ...]``.
        rle: its mask in COCO's run-length encoding, instead of polygons.
        corners: ``(x1, y1, ..., x4, y4)`` of its rotated box.
        crowd: whether it is a group of objects, which is neither learned nor evaluated.
        difficult: 0 means not difficult.
        place: of its label in the file, for people, such as ``line 3``.
    """

    label: int
    box: tuple[float, float, float, float]
    polygons: list[list[float]] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    corners: tuple[float, ...] | None = None
    crowd: bool = False
    difficult: int = 0
    place: str = ""

    @classmethod
    def outlined(cls, label: int, polygons: Sequence[Points], **kwargs) -> LabeledObject:
        """An object from its outlines."""
        plain = [[float(value) for value in polygon] for polygon in polygons]
        return cls(label, bounding_box(plain), plain, **kwargs)

    @classmethod
    def cornered(cls, label: int, corners: Points, **kwargs) -> LabeledObject:
        """An object from the four corners of its rotated box."""
        plain = tuple(float(value) for value in corners)
        return cls(label, bounding_box([plain]), corners=plain, **kwargs)

    def outlines(self) -> list[list[float]]:
        """Polygons around it: its own, else its rotated box, else its upright one."""
        if self.polygons:
            return self.polygons
        if self.corners is not None:
            return [list(self.corners)]
        x, y, width, height = self.box
        return [[x, y, x + width, y, x + width, y + height, x, y + height]]

    def quadrilateral(self) -> NDArray[np.float64]:
        """Corners (4, 2) of its rotated box: its own, else the smallest around its outlines."""
        if self.corners is not None:
            return np.reshape(np.array(self.corners, np.float64), (4, 2))
        if self.polygons:
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in self.polygons])
            return cv2.boxPoints(cv2.minAreaRect(points.astype(np.float32))).astype(np.float64)
        return np.reshape(np.array(self.outlines()[0]), (4, 2))

    def polygon_area(self) -> float:
        """Area of its polygons in square pixels; overlaps count several times."""
        points = (np.reshape(polygon, (-1, 1, 2)).astype(np.float32) for polygon in self.polygons)
        return float(sum(map(cv2.contourArea, points)))


@dataclass
class LabeledImage:
    """One image with its labels.

    Args:
        path: of the image, which stays where it is.
        width, height: in pixels, as it is shown (after the rotation of EXIF).
        objects: of detection.
        mask: file with the class of each pixel.
        pixels: number of pixels of each label in the mask, by label.
        label: class of the whole image.
        split: one of :data:`SPLITS`, or None if the data set does not say.
        source: file of its labels, if it has one of its own.
    """

    path: Path
    width: int
    height: int
    objects: list[LabeledObject] = field(default_factory=list)
    mask: Path | None = None
    pixels: dict[int, int] = field(default_factory=dict)
    label: int | None = None
    split: str | None = None
    source: Path | None = None


@dataclass
class LabeledData:
    """A data set.

    Args:
        format: name of its format, for people.
        root: its folder.
        kind: of its labels, such as :data:`BOXES`.
        classes: names, in the order of the labels.
        images: with labels.
        findings: problems of its files; errors name what was left out.
        notes: what people should know of how it was read, each one line.
        palette: color (red, green, blue) of each class, if the data set has any.
        read_mask: the labels (H, W) uint8 in a mask file, with :data:`UNLABELED`.
        tiles: folder of the images, if they are tiles that were cut from those of the data set.
        plain_masks: whether the mask files have these labels themselves.
    """

    format: str
    root: Path
    kind: str
    classes: tuple[str, ...]
    images: list[LabeledImage]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    palette: list[tuple[int, int, int]] | None = None
    read_mask: Callable[[Path], NDArray[np.uint8]] | None = None
    plain_masks: bool = False
    tiles: Path | None = None

    def of_split(self, split: str) -> list[LabeledImage]:
        """The images of one split."""
        return [image for image in self.images if image.split == split]

    def counts(self, split: str | None = None) -> Counter[int]:
        """Number of objects, pixels or images of each label, in one split or in all."""
        images = self.images if split is None else self.of_split(split)
        found: Counter[int] = Counter()
        for image in images:
            found.update(item.label for item in image.objects)
            found.update(image.pixels)
            if image.label is not None:
                found[image.label] += 1
        return found


def note_of_boxes(images: Sequence[LabeledImage]) -> list[str]:
    """A note if objects with only a box keep the outlines of the others from being learned."""
    items = [(image, item) for image in images for item in image.objects]
    boxes = [
        (image, item)
        for image, item in items
        if not item.polygons and item.rle is None and item.corners is None
    ]
    if not boxes or len(boxes) == len(items):
        return []
    image, item = boxes[0]
    return [
        f"{len(boxes)} of {len(items)} objects have a box but no outline, the first in "
        f"{image.source or image.path} {item.place}".rstrip()
        + ": outlines are not learned; to keep them, remove these boxes or draw their outlines"
    ]


def bounding_box(polygons: Sequence[Points]) -> tuple[float, float, float, float]:
    """x, y, width and height of the upright box around ``[x1, y1, x2, y2, ...]``."""
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    (left, top), (right, bottom) = points.min(0), points.max(0)
    return float(left), float(top), float(right - left), float(bottom - top)


def fill_polygons(polygons: Sequence[Points], height: int, width: int) -> NDArray[np.uint8]:
    """Mask (H, W) of the pixels whose centers lie inside a polygon (by the even-odd rule).

    OpenCV and Pillow fill the pixels on the outline too, which makes objects a pixel larger.

    Args:
        polygons: each ``[x1, y1, x2, y2, ...]`` in pixels.
        height, width: of the mask.
    """
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        x1, y1 = np.reshape(polygon, (-1, 2)).T
        x2, y2 = np.roll(x1, -1), np.roll(y1, -1)
        top, left = max(int(y1.min()), 0), max(int(x1.min()), 0)
        rows = max(min(math.ceil(y1.max()), height) - top, 0)
        columns = max(min(math.ceil(x1.max()), width) - left, 0)
        centers = np.arange(top, top + rows) + 0.5
        # (edges, rows): whether the edge crosses the row of centers, and where.
        edge, row = np.nonzero((y1[:, None] <= centers) != (y2[:, None] <= centers))
        share = (centers[row] - y1[edge]) / (y2 - y1)[edge]
        x = x1[edge] + share * (x2 - x1)[edge] - left
        turns = np.zeros((rows, columns + 1), np.int32)
        np.add.at(turns, (row, np.clip(np.ceil(x - 0.5), 0, columns).astype(int)), 1)
        inside = (turns[:, :-1].cumsum(1) % 2).astype(np.uint8)
        mask[top : top + rows, left : left + columns] |= inside
    return mask


def decode_rle(rle: dict[str, Any]) -> NDArray[np.uint8]:
    """Mask (H, W) of a COCO run-length encoding, compressed or not."""
    from pycocotools import mask as coco_mask

    if isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, *rle["size"])
    return np.asarray(coco_mask.decode(rle), np.uint8)


def encode_rle(mask: NDArray[Any]) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a mask (H, W), as JSON takes it."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(map(int, rle["size"])), counts=rle["counts"].decode())


def mask_box(mask: NDArray[Any]) -> tuple[float, float, float, float]:
    """x, y, width and height of the pixels of a mask (H, W) that are not 0; there must be some."""
    x, y, width, height = cv2.boundingRect(np.asarray(mask != 0, np.uint8))
    return float(x), float(y), float(width), float(height)
