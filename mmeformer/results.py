# SPDX-License-Identifier: Apache-2.0
"""Results of all models: frozen records of numpy arrays, in pixels of the image.

Prediction, exported files, writers, metrics and evaluation share them. Only numpy is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmeformer.rotated_boxes import corners, rotated_nms
from mmeformer.windows import Window

Array = NDArray[Any]
SHOWN = 0.01
"""Probability from which pictures name a class that is not the most likely one."""
BEST = 5
"""Most classes of a classified image that are reported and drawn."""
NAME_PIXELS = 20000
"""Pixels of a picture per name. With more objects, names are left out, as they would cover the
picture; the colors show the classes."""


def category_id(label: int) -> int:
    """Category id in JSON files of a class index: COCO counts categories from 1."""
    return int(label) + 1


CATEGORY_IDS = "category_ids"
"""The entry of a checkpoint's ``dataset_meta`` with the id of each class in the annotation file."""


def category_ids(dataset_meta: Mapping[str, Any]) -> tuple[int, ...]:
    """Category ids in JSON files, by class index: those of the training data, else from 1.

    Args:
        dataset_meta: of a checkpoint.
    """
    count = len(dataset_meta["classes"])
    known = dataset_meta.get(CATEGORY_IDS) or ()
    return tuple(known) if len(known) == count else tuple(map(category_id, range(count)))


SCORE_THR = 0.3
"""Default score threshold of detections."""


def check_score_thr(score_thr: float) -> None:
    """Raise if a score threshold is out of range.

    Raises:
        ValueError: it is.
    """
    if not 0 <= score_thr < 1:
        raise ValueError(f"score threshold {score_thr} must be at least 0 and less than 1")


def chosen_labels(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Labels of the classes that a user wants to see.

    Args:
        names: of these classes.
        classes: names of all classes, by label.

    Raises:
        ValueError: there is no such class, or there are no names.
    """
    # A string is a sequence too, of its letters.
    if isinstance(names, str):
        raise ValueError(f"classes is {names!r}, but must be a list of names: [{names!r}]")
    if not len(names):
        raise ValueError("classes is empty, so nothing would be reported; None reports all")
    if unknown := [name for name in names if name not in classes]:
        raise ValueError(f"the model has no class {unknown}, only {list(classes)}")
    return [classes.index(name) for name in names]


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Feature maps of a backbone.

    Args:
        levels: each (C_i, H_i, W_i) ``float32``, the finest first.
    """

    levels: tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Classification:
    """The class of a whole image.

    Args:
        scores: (C,) ``float32``, probability of every class.
    """

    scores: Array

    @property
    def label(self) -> int:
        """Index of the most likely class."""
        return int(self.scores.argmax())

    def best(self, count: int) -> list[int]:
        """Indices of the ``count`` most likely classes, the best first; all if there are fewer."""
        order: list[int] = np.argsort(-self.scores, kind="stable")[:count].tolist()
        return order

    def shown(self, count: int) -> list[int]:
        """Those of the best that a picture names: the first, and others from :data:`SHOWN` on."""
        first, *others = self.best(count)
        return [first, *(label for label in others if self.scores[label] >= SHOWN)]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The class of every pixel.

    Args:
        labels: (H, W), index of the class.
    """

    labels: Array

    def colors(self, palette: Sequence[Sequence[int]] | Array) -> Array:
        """Picture (H, W, 3) ``uint8`` in RGB, with ``palette`` (classes, 3)."""
        colors: Array = np.asarray(palette, np.uint8)[self.labels]
        return colors


def mask_extent(mask: Array) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom edge of the pixels of a mask (H, W) that are not 0.

    Returns:
        In pixels, right and bottom exclusive; None if there are no such pixels.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Mask:
    """The pixels of one object, stored only for the rectangle around them.

    Args:
        x, y: left and top edge of the rectangle in pixels of the image; may be negative.
        width, height: of the rectangle; 0 if there are no pixels.
        bits: its pixels row by row, eight per byte (``numpy.packbits``).
    """

    x: int
    y: int
    width: int
    height: int
    bits: bytes

    @classmethod
    def from_array(cls, pixels: Array, x: int = 0, y: int = 0) -> Mask:
        """Make a mask from ``pixels`` (H, W) ``bool``, the first of which is at (x, y)."""
        extent = mask_extent(pixels)
        if extent is None:
            return cls(x, y, 0, 0, b"")
        left, top, right, bottom = extent
        crop = pixels[top:bottom, left:right]
        height, width = crop.shape
        return cls(x + left, y + top, width, height, np.packbits(crop).tobytes())

    @classmethod
    def from_scores(
        cls, scores: Array, box: Array, threshold: float, image_size: tuple[int, int]
    ) -> Mask:
        """Make a mask of the pixels where probabilities on a grid over a box reach a threshold.

        Between grid points probabilities are interpolated bilinearly; outside the box they are 0.
        Source: mmdet's ``FCNMaskHead``.

        Args:
            scores: (S, S).
            box: (4,), left, top, right and bottom edge.
            threshold: smallest probability of a pixel.
            image_size: height and width; pixels beyond the image are left out.
        """
        left, top, right, bottom = (float(edge) for edge in box)
        height, width = image_size
        rows = range(max(int(np.floor(top)) - 1, 0), min(int(np.ceil(bottom)) + 1, height))
        columns = range(max(int(np.floor(left)) - 1, 0), min(int(np.ceil(right)) + 1, width))
        if not rows or not columns or right <= left or bottom <= top:
            return cls(0, 0, 0, 0, b"")
        # The box is upright: interpolation is one small matrix per direction.
        vertical = _interpolation(rows, top, bottom, scores.shape[0])
        horizontal = _interpolation(columns, left, right, scores.shape[1])
        pixels = vertical @ scores @ horizontal.T >= threshold
        return cls.from_array(pixels, columns.start, rows.start)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.array()))

    def array(self) -> Array:
        """Pixels of the rectangle, (height, width) ``bool``."""
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.height * self.width)
        return bits.reshape(self.height, self.width).astype(bool)

    def moved(self, x: int, y: int) -> Mask:
        """The same pixels, moved by (x, y)."""
        return replace(self, x=self.x + x, y=self.y + y)

    def union(self, others: Sequence[Mask]) -> Mask:
        """The pixels of this mask and of others."""
        masks = [mask for mask in (self, *others) if mask.bits]
        if not masks:
            return self
        x, y = min(mask.x for mask in masks), min(mask.y for mask in masks)
        width = max(mask.x + mask.width for mask in masks) - x
        height = max(mask.y + mask.height for mask in masks) - y
        pixels = np.zeros((height, width), bool)
        for mask in masks:
            mask.moved(-x, -y).paste(pixels)
        return Mask.from_array(pixels, x, y)

    def paste(self, image: Array) -> None:
        """Set the pixels in ``image`` (H, W) ``bool``; those beyond it are left out."""
        left, top = max(self.x, 0), max(self.y, 0)
        right = min(self.x + self.width, image.shape[1])
        bottom = min(self.y + self.height, image.shape[0])
        if left < right and top < bottom:
            image[top:bottom, left:right] |= self.array()[
                top - self.y : bottom - self.y, left - self.x : right - self.x
            ]


def _interpolation(pixels: range, start: float, stop: float, places: int) -> Array:
    """Weights (pixels, places) of ``places`` grid points from ``start`` to ``stop``, per pixel."""
    centers = np.arange(pixels.start, pixels.stop, dtype=np.float32) + 0.5
    position = (centers - start) / (stop - start) * places - 0.5
    distance = np.abs(position[:, None] - np.arange(places))
    weights: Array = np.maximum(1 - distance, 0).astype(np.float32)
    return weights


@dataclass(frozen=True, eq=False)
class Detections:
    """Objects of an image with upright boxes, the best first.

    Args:
        boxes: (N, 4) ``float32``: left, top, right and bottom edge.
        scores: (N,) ``float32``, from 0 to 1.
        labels: (N,) ``int64``, index of the class.
        image_size: height and width of the image.
        instance_masks: N masks, or None from a model without them. :meth:`masks` gives them as one
            array.
        track_ids: (N,) ``int64``, the same for an object in all frames of a video, from 1; 0 for
            objects without a track; None where nothing was tracked.
    """

    boxes: Array
    scores: Array
    labels: Array
    image_size: tuple[int, int]
    instance_masks: tuple[Mask, ...] | None = None
    track_ids: Array | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[Detections], image_size: tuple[int, int]) -> Detections:
        """All objects of ``parts``, which are of one image, in their order."""
        masks: tuple[Mask, ...] | None = None
        if parts and all(part.instance_masks is not None for part in parts):
            masks = tuple(mask for part in parts for mask in part.instance_masks or ())
        return cls(*_concatenated(parts, 4), image_size, masks)

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.scores)

    def take(self, which: Any) -> Detections:
        """The objects that indices, a slice or a mask (N,) choose."""
        which = _indices(which, len(self))
        masks = self.instance_masks
        return replace(
            self,
            boxes=self.boxes[which],
            scores=self.scores[which],
            labels=self.labels[which],
            instance_masks=None if masks is None else tuple(masks[index] for index in which),
            track_ids=None if self.track_ids is None else self.track_ids[which],
        )

    def moved(self, x: int, y: int, image_size: tuple[int, int]) -> Detections:
        """The same objects in another image, moved by (x, y)."""
        masks = self.instance_masks
        return replace(
            self,
            boxes=self.boxes + np.array([x, y, x, y], np.float32),
            image_size=image_size,
            instance_masks=None if masks is None else tuple(mask.moved(x, y) for mask in masks),
        )

    def upright_boxes(self) -> Array:
        """(N, 4): the boxes."""
        return self.boxes

    def masks(self) -> Array:
        """Pixels of every object, (N, H, W) ``bool``.

        Raises:
            ValueError: the model has no masks.
        """
        if self.instance_masks is None:
            raise ValueError("this model predicts boxes without masks")
        masks = np.zeros((len(self), *self.image_size), bool)
        for image, mask in zip(masks, self.instance_masks, strict=True):
            mask.paste(image)
        return masks


@dataclass(frozen=True, eq=False)
class RotatedDetections:
    """Rotated objects of an image, the best first.

    Args:
        boxes: (N, 5) ``float32``: center x and y, width, height in pixels, and angle in radians
            from the x axis towards the y axis (le135: from -pi/4 to 3/4 pi).
        scores: (N,) ``float32``, from 0 to 1.
        labels: (N,) ``int64``, index of the class.
        track_ids: see :class:`Detections`.
    """

    boxes: Array
    scores: Array
    labels: Array
    track_ids: Array | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[RotatedDetections]) -> RotatedDetections:
        """All objects of ``parts`` in their order; ``parts`` may be empty."""
        return cls(*_concatenated(parts, 5))

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.scores)

    def take(self, which: Any) -> RotatedDetections:
        """The objects that indices, a slice or a mask (N,) choose."""
        which = _indices(which, len(self))
        ids = None if self.track_ids is None else self.track_ids[which]
        return RotatedDetections(self.boxes[which], self.scores[which], self.labels[which], ids)

    def moved(self, x: float, y: float) -> RotatedDetections:
        """The same objects, moved by (x, y)."""
        return replace(self, boxes=self.boxes + np.array([x, y, 0, 0, 0], np.float32))

    def scaled(self, scale: float) -> RotatedDetections:
        """The same objects in an image that was resized by ``scale``."""
        return replace(self, boxes=self.boxes * np.array([scale] * 4 + [1], np.float32))

    @classmethod
    def merged(
        cls,
        places: Sequence[Window],
        results: Iterable[RotatedDetections],
        iou_threshold: float,
    ) -> RotatedDetections:
        """The objects of a whole image, by rotated NMS within each class.

        Args:
            places: windows of the image, see :mod:`mmeformer.windows`.
            results: of each window, in its own pixels.
            iou_threshold: see :func:`mmeformer.rotated_boxes.rotated_nms`.
        """
        parts = [found.moved(*window[:2]) for found, window in zip(results, places, strict=True)]
        return cls.concatenate(parts).suppressed(iou_threshold)

    def suppressed(self, iou_threshold: float) -> RotatedDetections:
        """The objects that rotated NMS within each class keeps, the best first."""
        return self.take(rotated_nms(self.boxes, self.scores, self.labels, iou_threshold))

    def corners(self) -> Array:
        """(N, 4, 2): x and y of the corners, in turn around the box."""
        return corners(self.boxes)

    def upright_boxes(self) -> Array:
        """(N, 4) ``float32``: left, top, right and bottom edge of the box around each object."""
        points = self.corners().astype(np.float32)
        return np.concatenate([points.min(1), points.max(1)], axis=1)


def _concatenated(
    parts: Sequence[Detections] | Sequence[RotatedDetections], numbers: int
) -> tuple[Array, Array, Array]:
    """Boxes, scores and labels of all parts; with the right shapes and types if there are none."""
    return (
        np.concatenate([np.zeros((0, numbers), np.float32), *(part.boxes for part in parts)]),
        np.concatenate([np.zeros(0, np.float32), *(part.scores for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
    )


def _indices(which: Any, count: int) -> Array:
    indices: Array = np.arange(count)[which]
    return indices
