# SPDX-License-Identifier: Apache-2.0
"""Random rotated boxes, and shapely as the judge of their overlaps."""

import numpy as np
import shapely
import shapely.affinity

from mmeformer.results import RotatedDetections


def outline(box):
    """A rotated box (centre, size, angle) as a shapely polygon."""
    x, y, width, height, angle = map(float, box)
    upright = shapely.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return shapely.affinity.rotate(upright, angle, origin=(x, y), use_radians=True)


def polygon_iou(boxes1, boxes2):
    """IoU of all pairs, ``(N, M)``."""
    iou = np.zeros((len(boxes1), len(boxes2)))
    for row, first in enumerate(map(outline, boxes1)):
        for column, second in enumerate(map(outline, boxes2)):
            common = first.intersection(second).area
            iou[row, column] = common / (first.area + second.area - common)
    return iou


def random_boxes(generator, count, side):
    """Boxes of 5 to 40 px with centres in a square."""
    return np.concatenate(
        [
            generator.uniform(0, side, (count, 2)),
            generator.uniform(5, 40, (count, 2)),
            generator.uniform(-np.pi / 4, 3 * np.pi / 4, (count, 1)),
        ],
        axis=1,
    ).astype(np.float32)


def random_detections(generator, count, side, classes=3):
    """Random boxes with scores that differ."""
    scores = generator.permutation(count).astype(np.float32) / max(count, 1)
    labels = generator.integers(0, classes, count)
    return RotatedDetections(random_boxes(generator, count, side), scores, labels)
