# SPDX-License-Identifier: Apache-2.0
"""Geometry of rotated boxes in numpy: corners, IoU and non-maximum suppression.

A box is five numbers: center x, center y, width and height in pixels, and the angle in radians from
the x axis towards the y axis. Prediction, evaluation and exported files use this module. For
training there is a rotated IoU with gradients in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TINY = 1e-12
_PAIRS = 1 << 13
"""Pairs of boxes that are compared at once; bounds memory."""


def corners(boxes: Array) -> Array:
    """Corners (N, 4, 2) float64 of boxes (N, 5), in turn around each box.

    In the order of mmrotate's ``rbox2qbox``.
    """
    boxes = np.asarray(boxes, np.float64)
    center, angle = boxes[:, None, :2], boxes[:, 4]
    along = np.stack([np.cos(angle), np.sin(angle)], -1) * boxes[:, 2, None] / 2
    across = np.stack([-np.sin(angle), np.cos(angle)], -1) * boxes[:, 3, None] / 2
    offsets = [along + across, along - across, -along - across, across - along]
    return center + np.stack(offsets, 1)


def rotated_iou(boxes1: Array, boxes2: Array) -> Array:
    """IoU of pairs of boxes, row by row.

    The area of the intersection of a polygon and an upright rectangle is one integral along the
    polygon's edges (Green's theorem): of ``clamp(y, low, high) d clamp(x, left, right)``.

    Args:
        boxes1: (N, 5), or (5,) to compare one box with all others.
        boxes2: (N, 5).

    Returns:
        (N,) float64 in [0, 1]; 0 for a pair without area.
    """
    x1, y1, w1, h1, angle1 = np.asarray(boxes1, np.float64).T
    x2, y2, w2, h2, angle2 = np.asarray(boxes2, np.float64).T
    # Origin in the center of the first box, axes along the sides of the second one.
    cos, sin = np.cos(angle2), np.sin(angle2)
    x2, y2 = (x2 - x1) * cos + (y2 - y1) * sin, (y2 - y1) * cos - (x2 - x1) * sin
    cos, sin = np.cos(angle1 - angle2), np.sin(angle1 - angle2)
    # Corners of the first box, one per row.
    signs_w, signs_h = np.array([[1], [-1], [-1], [1]]), np.array([[1], [1], [-1], [-1]])
    x_start = (signs_w * w1 * cos - signs_h * h1 * sin) / 2
    y_start = (signs_w * w1 * sin + signs_h * h1 * cos) / 2
    left, right, low, high = x2 - w2 / 2, x2 + w2 / 2, y2 - h2 / 2, y2 + h2 / 2

    x_end, y_end = np.roll(x_start, -1, 0), np.roll(y_start, -1, 0)
    x_from, x_to = np.clip(x_start, left, right), np.clip(x_end, left, right)
    slope = (y_end - y_start) / _nonzero(x_end - x_start)
    y_from = y_start + (x_from - x_start) * slope
    y_to = y_end + (x_to - x_end) * slope
    # Mean height of each edge between `low` and `high`.
    clipped_from, clipped_to = np.clip(y_from, low, high), np.clip(y_to, low, high)
    share = (clipped_to - clipped_from) / _nonzero(y_to - y_from)
    cut = (y_from - clipped_from) + (y_to - clipped_to)
    height = (clipped_from + clipped_to + share * cut) / 2

    area1, area2 = w1 * h1, w2 * h2
    intersection = np.clip(-((x_to - x_from) * height).sum(0), 0, np.minimum(area1, area2))
    union = area1 + area2 - intersection
    return np.where(union > _TINY, intersection / np.where(union > _TINY, union, 1), 0)


def overlapping_pairs(
    boxes1: Array, labels1: Array, boxes2: Array, labels2: Array
) -> tuple[Array, Array, Array]:
    """IoU of the pairs of boxes of equal labels that can overlap.

    Args:
        boxes1, labels1: (N, 5) and (N,).
        boxes2, labels2: (M, 5) and (M,).

    Returns:
        Indices into the first and the second boxes, and the IoU, each (P,).
    """
    chunks = [
        (first, second, rotated_iou(boxes1[first], boxes2[second]))
        for first, second in _meeting(boxes1, labels1, boxes2, labels2)
    ]
    if not chunks:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    first, second, iou = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    return first, second, iou


def rotated_nms(boxes: Array, scores: Array, labels: Array, iou_threshold: float) -> Array:
    """Greedy non-maximum suppression within each class.

    The result is that of mmcv's ``nms_rotated``, which compares every box with every other.

    Args:
        boxes: (N, 5).
        scores: (N,).
        labels: (N,), index of the class.
        iou_threshold: of two boxes of a class with a larger IoU, the lower score is removed.

    Returns:
        (K,) int64, indices of the boxes that stay, the best first; of equal scores, the first.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, labels = boxes[order], labels[order]
    stays = np.ones(len(order), bool)
    for first, second in _meeting(boxes, labels, boxes, labels):
        open_pairs = (first < second) & stays[first] & stays[second]
        first, second = first[open_pairs], second[open_pairs]
        over = rotated_iou(boxes[first], boxes[second]) > iou_threshold
        first, second = first[over], second[over]
        # The best box of each group removes the others, unless a better one has removed it.
        best, starts = np.unique(first, return_index=True)
        for box, others in zip(best, np.split(second, starts[1:]), strict=False):
            if stays[box]:
                stays[others] = False
    return order[stays]


def _meeting(
    boxes1: Array, labels1: Array, boxes2: Array, labels2: Array
) -> Iterator[tuple[Array, Array]]:
    """Pairs of equal labels whose upright rectangles overlap or touch, about ``_PAIRS`` at once.

    Yields:
        Indices into the first and the second boxes. The first ones increase, and all pairs of a
        first box are in one chunk.
    """
    if not len(boxes1) or not len(boxes2):
        return
    left1, top1, right1, bottom1 = _bounds(boxes1)
    left2, top2, right2, bottom2 = _bounds(boxes2)
    # Shift classes apart along the x axis, so that one sweep finds the neighbors of all classes.
    start = min(left1.min(), left2.min())
    stride = max(right1.max(), right2.max()) - start + 1
    shift1, shift2 = labels1 * stride - start, labels2 * stride - start
    left1, right1, left2, right2 = left1 + shift1, right1 + shift1, left2 + shift2, right2 + shift2
    by_left = np.argsort(left2, kind="stable")
    # A rectangle that meets a box starts left of its right edge, and at most the largest width left
    # of its left edge.
    widest = (right2 - left2).max()
    begins = np.searchsorted(left2[by_left], left1 - widest, "left")
    counts = np.searchsorted(left2[by_left], right1, "right") - begins
    total = np.cumsum(counts)
    row = 0
    while row < len(counts):
        done = total[row - 1] if row else 0
        stop = max(row + 1, int(np.searchsorted(total, done + _PAIRS, "right")))
        own = counts[row:stop]
        first = np.repeat(np.arange(row, stop), own)
        # For each row, the positions `begins` to `begins + counts` in the order of the left edges.
        skipped = total[row:stop] - own - done - begins[row:stop]
        second = by_left[np.arange(len(first)) - np.repeat(skipped, own)]
        for meets in (
            lambda i, j: right2[j] >= left1[i],
            lambda i, j: top2[j] <= bottom1[i],
            lambda i, j: bottom2[j] >= top1[i],
            lambda i, j: labels2[j] == labels1[i],
        ):
            chosen = meets(first, second)
            first, second = first[chosen], second[chosen]
        yield first, second
        row = stop


def _bounds(boxes: Array) -> tuple[Array, Array, Array, Array]:
    """Upright rectangles around boxes (N, 5): left, top, right and bottom, each (N,) float64."""
    x, y, width, height, angle = np.asarray(boxes, np.float64).T
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    reach_x, reach_y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
    return x - reach_x, y - reach_y, x + reach_x, y + reach_y


def _nonzero(length: Array) -> Array:
    """``length`` as a divisor: 1 where it is zero, as the dividend is then zero as well."""
    return np.where(np.abs(length) > _TINY, length, 1)
