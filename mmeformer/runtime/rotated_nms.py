# SPDX-License-Identifier: Apache-2.0
"""Overlap and non-maximum suppression of rotated boxes in numpy.

ONNX has no operator for rotated boxes, so exported graphs end with all candidates. The overlap is
computed as in :mod:`mmeformer.ops.iou` (Green's theorem; see there), without its gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_TINY = 1e-12


def rotated_iou(box: NDArray[Any], boxes: NDArray[Any]) -> NDArray[Any]:
    """IoU of ``box`` (5,) with each of ``boxes`` (N, 5): (N,) ``float64`` in [0, 1].

    Boxes are center x, center y, width, height in pixels and angle in radians. A pair of boxes
    without area has IoU 0.
    """
    x1, y1, w1, h1, angle1 = np.asarray(box, np.float64)
    x2, y2, w2, h2, angle2 = np.asarray(boxes, np.float64).T
    # Origin in the center of `box`, axes along the sides of the other one.
    cos, sin = np.cos(angle2), np.sin(angle2)
    x2, y2 = (x2 - x1) * cos + (y2 - y1) * sin, (y2 - y1) * cos - (x2 - x1) * sin
    cos, sin = np.cos(angle1 - angle2), np.sin(angle1 - angle2)
    signs_w, signs_h = np.array([1, -1, -1, 1]), np.array([1, 1, -1, -1])
    x_start = (signs_w * w1 * cos[:, None] - signs_h * h1 * sin[:, None]) / 2
    y_start = (signs_w * w1 * sin[:, None] + signs_h * h1 * cos[:, None]) / 2
    left, right = (x2 - w2 / 2)[:, None], (x2 + w2 / 2)[:, None]
    low, high = (y2 - h2 / 2)[:, None], (y2 + h2 / 2)[:, None]

    x_end, y_end = np.roll(x_start, -1, 1), np.roll(y_start, -1, 1)
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
    intersection = np.clip(-((x_to - x_from) * height).sum(1), 0, np.minimum(area1, area2))
    union = area1 + area2 - intersection
    return np.where(union > _TINY, intersection / np.where(union > _TINY, union, 1), 0)


def rotated_nms(
    boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], iou_threshold: float
) -> NDArray[Any]:
    """Indices of the boxes to keep, the best first; only boxes of one class suppress each other.

    Args:
        boxes: (N, 5), as in :func:`rotated_iou`.
        scores: (N,).
        labels: (N,).
        iou_threshold: of two boxes that overlap more than this, the worse one goes.
    """
    order = np.argsort(-scores, kind="stable")
    radius = np.hypot(boxes[:, 2], boxes[:, 3]) / 2
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        apart = np.hypot(*(boxes[order, :2] - boxes[best, :2]).T)
        near = np.flatnonzero(
            (labels[order] == labels[best]) & (apart < radius[order] + radius[best])
        )
        overlap = rotated_iou(boxes[best], boxes[order[near]])
        order = np.delete(order, near[overlap > iou_threshold])
    return np.array(kept, np.int64)


def _nonzero(length: NDArray[Any]) -> NDArray[Any]:
    """``length`` as a divisor: 1 where it is zero, as the dividend is then zero as well."""
    return np.where(np.abs(length) > _TINY, length, 1)
