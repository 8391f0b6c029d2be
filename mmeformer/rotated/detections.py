# SPDX-License-Identifier: Apache-2.0
"""Rotated boxes of one image as plain arrays: overlaps, suppression, merging of patches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import shapely
import torch
from mmdet.structures.bbox import get_box_tensor

from mmeformer.ops.iou import rotated_iou
from mmeformer.rotated.patches import parse_patch_name

MERGE_IOU = 0.1
"""IoU above which the less certain of two boxes goes, when windows of an image are merged: that of
the published recipe's NMS and of mmrotate's merging."""

# Bounds of memory: pairs whose IoU is computed at once, and boxes whose neighbours are looked up.
_PAIRS, _BOXES = 1 << 16, 1 << 12


class Detections(NamedTuple):
    """Predictions of one image.

    Args:
        boxes: ``(N, 5)`` float32: centre x, centre y, width, height in pixels, angle in radians.
        scores: ``(N,)`` float32.
        labels: ``(N,)`` int64, index of the class.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    @classmethod
    def from_instances(cls, instances: Mapping) -> Detections:
        """From ``pred_instances`` of an mmdet data sample (or of its ``to_dict()``).

        Raises:
            ValueError: the boxes are not rotated boxes.
        """
        arrays = cls(
            get_box_tensor(instances["bboxes"]).detach().cpu().float().numpy(),
            instances["scores"].detach().cpu().float().numpy(),
            instances["labels"].detach().cpu().long().numpy(),
        )
        check_rotated(arrays.boxes)
        return arrays

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """All boxes of ``parts``, in their order; no parts make no boxes."""
        empty = cls(np.zeros((0, 5), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        return cls(*(np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True)))

    def take(self, which: np.ndarray) -> Detections:
        """The boxes that an index array or a mask chooses."""
        return Detections(*(array[which] for array in self))

    def moved(self, x: float, y: float) -> Detections:
        """The same boxes, their centres moved by pixels."""
        return self._replace(boxes=self.boxes + np.array([x, y, 0, 0, 0], np.float32))

    def suppressed(self, iou_thr: float) -> Detections:
        """What rotated NMS within each class leaves, the best first."""
        return self.take(rotated_nms(self.boxes, self.scores, self.labels, iou_thr))


def check_rotated(boxes: np.ndarray) -> None:
    """Make sure that boxes have five numbers.

    Raises:
        ValueError: they have not.
    """
    if boxes.shape[-1] != 5:
        raise ValueError(
            f"boxes of {boxes.shape[-1]} numbers instead of 5 (centre, size, angle); give them the "
            "type 'rbox', in the pipeline by ConvertBoxType"
        )


def _rectangles(boxes: np.ndarray) -> np.ndarray:
    """Upright rectangles around rotated boxes, as shapely geometries."""
    x, y, width, height, angle = boxes.astype(np.float64).T
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    reach_x, reach_y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
    return shapely.box(x - reach_x, y - reach_y, x + reach_x, y + reach_y)


def _pair_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """IoU of aligned boxes ``(N, 5)``; ``(N,)`` float64."""
    iou = np.empty(len(boxes1))
    for start in range(0, len(boxes1), _PAIRS):
        part = slice(start, start + _PAIRS)
        pair = (torch.from_numpy(boxes[part].astype(np.float64)) for boxes in (boxes1, boxes2))
        iou[part] = rotated_iou(*pair).numpy()
    return iou


def overlapping_pairs(
    boxes1: np.ndarray, labels1: np.ndarray, boxes2: np.ndarray, labels2: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU of those pairs of boxes of equal labels that can overlap, found by a spatial index.

    Args:
        boxes1, labels1: ``(N, 5)`` and ``(N,)``.
        boxes2, labels2: ``(M, 5)`` and ``(M,)``.

    Returns:
        Indices into the first and the second boxes, and IoU, each ``(P,)``.
    """
    first, second = shapely.STRtree(_rectangles(boxes2)).query(_rectangles(boxes1))
    same = labels1[first] == labels2[second]
    first, second = first[same], second[same]
    return first, second, _pair_iou(boxes1[first], boxes2[second])


def rotated_nms(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_thr: float
) -> np.ndarray:
    """Greedy non-maximum suppression within each class.

    The result is that of mmcv's ``nms_rotated``, which compares every box with every other: on a
    CPU 4,000 boxes spread over an image take it seconds. Here a spatial index names the neighbours.

    Args:
        boxes: ``(N, 5)``, see :class:`Detections`.
        scores: ``(N,)``.
        labels: ``(N,)``.
        iou_thr: of two boxes of a class with a larger IoU the one with the lower score goes.

    Returns:
        Indices of the boxes that stay, the best first; of equal scores, the first in the input.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, labels = boxes[order], labels[order]
    rectangles = _rectangles(boxes)
    tree = shapely.STRtree(rectangles)
    alive = np.ones(len(order), bool)
    for start in range(0, len(order), _BOXES):
        part = start + np.flatnonzero(alive[start : start + _BOXES])
        first, second = tree.query(rectangles[part])
        first = part[first]
        wanted = (second > first) & alive[second] & (labels[first] == labels[second])
        first, second = first[wanted], second[wanted]
        overlap = _pair_iou(boxes[first], boxes[second]) > iou_thr
        first, second = first[overlap], second[overlap]
        # The tree answers in the order of the question.
        begins, ends = (np.searchsorted(first, part, side) for side in ("left", "right"))
        for box, begin, end in zip(part, begins, ends, strict=True):
            if alive[box]:
                alive[second[begin:end]] = False
    return order[alive]


def merge_patches(
    patches: Iterable[tuple[str, Detections]], iou_thr: float = MERGE_IOU
) -> dict[str, Detections]:
    """Predictions of whole images from those of their patches.

    Args:
        patches: pairs of a patch's name, ``NAME__SIZE__X___Y``, and its predictions.
        iou_thr: see :func:`rotated_nms`.

    Returns:
        Per image name, in the order of their first patch, boxes in pixels of the image.

    Raises:
        ValueError: a name is not that of a patch.
    """
    parts = defaultdict(list)
    for name, detections in patches:
        patch = parse_patch_name(name)
        parts[patch.image].append(detections.moved(patch.x, patch.y))
    return {
        image: Detections.concatenate(found).suppressed(iou_thr) for image, found in parts.items()
    }
