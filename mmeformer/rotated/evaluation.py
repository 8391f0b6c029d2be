# SPDX-License-Identifier: Apache-2.0
"""Average precision of rotated boxes, by the rules of PASCAL VOC as mmrotate and DOTA apply them.

mmrotate's ``eval_rbbox_map`` gives the same numbers, with one exception: in an image where all
boxes are ignored it counts predictions on them as errors. It is also slower: it starts processes
that each import everything, and compares all boxes of a class once per threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmeformer.report.review import RECALLS, best_precision, envelope
from mmeformer.results import RotatedDetections
from mmeformer.rotated_boxes import overlapping_pairs

IOU_THRS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""The thresholds of AP 50:95."""

MODES = ("11points", "area")


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Labeled objects of one image.

    Args:
        boxes: ``(M, 5)``, see :class:`mmeformer.results.RotatedDetections`.
        labels: ``(M,)`` int64.
        ignored: ``(M,)`` bool: need not be found, and finding it is no error.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of every class.

    Args:
        ap: ``(10, C)`` float64, per threshold of :data:`IOU_THRS`; NaN for a class without objects.
        recall: ``(10, C)``, recall of all predictions of the class; NaN likewise.
        objects: ``(C,)``, number of objects that are not ignored.
        detections: ``(C,)``, number of predictions.
        precision: ``(C, 101)`` at the first threshold: the best precision at each recall of
            :data:`mmeformer.report.review.RECALLS` or a higher one; NaN likewise.
    """

    ap: np.ndarray
    recall: np.ndarray
    objects: np.ndarray
    detections: np.ndarray
    precision: np.ndarray


def match(detections: RotatedDetections, truth: GroundTruth) -> tuple[np.ndarray, np.ndarray]:
    """Find for each prediction the object of its class with the largest IoU.

    Returns:
        IoU ``(N,)`` and index of the object ``(N,)``; 0 and -1 where nothing overlaps. Among
        objects with equal IoU, one that is not ignored is preferred.
    """
    iou = np.zeros(len(detections.scores))
    index = np.full(len(detections.scores), -1)
    box, target, overlap = overlapping_pairs(
        detections.boxes, detections.labels, truth.boxes, truth.labels
    )
    # The last one written stays, so the best comes last.
    worst_first = np.lexsort((-target, ~truth.ignored[target], overlap))
    box, target, overlap = box[worst_first], target[worst_first], overlap[worst_first]
    iou[box], index[box] = overlap, target
    index[iou == 0] = -1
    return iou, index


def average_precision(recall: np.ndarray, precision: np.ndarray, mode: str) -> float:
    """Area below a precision-recall curve, after making its precision monotonically decreasing.

    Args:
        recall, precision: ``(N,)``, by increasing recall.
        mode: ``11points``, the mean at the recalls 0, 0.1, ..., 1 (VOC 2007; DOTA's server and
            mmrotate), or ``area`` (VOC 2010 and later).
    """
    if mode == "11points":
        return float(best_precision(recall, precision, np.arange(11) * 0.1).mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope(precision)[:-1]))


def evaluate(
    images: Sequence[tuple[RotatedDetections, GroundTruth]],
    num_classes: int,
    mode: str = "11points",
) -> Evaluation:
    """Average precision of every class at every threshold of :data:`IOU_THRS`.

    Predictions are matched in the order of their scores, each to the object of its class with the
    largest IoU. A prediction is correct if the IoU reaches the threshold and no better prediction
    has matched the object. It does not count if the object is ignored, and is wrong otherwise.

    Args:
        images: predictions and objects of each image.
        num_classes: C.
        mode: one of :data:`MODES`, see :func:`average_precision`.
    """
    found = [match(*image) for image in images]
    labels = np.concatenate([detections.labels for detections, _ in images])
    scores = np.concatenate([detections.scores for detections, _ in images])
    iou = np.concatenate([overlap for overlap, _ in found])
    # Number the objects of all images, so that each can be found once.
    starts = np.cumsum([0] + [len(truth.labels) for _, truth in images])
    target = np.concatenate(
        [
            np.where(index < 0, -1, index + start)
            for (_, index), start in zip(found, starts[:-1], strict=True)
        ]
    )
    target_labels = np.concatenate([truth.labels for _, truth in images])
    ignored = np.concatenate([truth.ignored for _, truth in images])
    objects = np.bincount(target_labels[~ignored], minlength=num_classes)

    ap, recall = (np.full((len(IOU_THRS), num_classes), np.nan) for _ in range(2))
    curves = np.full((num_classes, len(RECALLS)), np.nan)
    best_first = np.argsort(-scores, kind="stable")
    for label in np.flatnonzero(objects):
        own = best_first[labels[best_first] == label]
        for row, iou_thr in enumerate(IOU_THRS):
            hit = iou[own] >= iou_thr
            # Index -1 reads the last object, but `hit` is False there.
            counted = ~(hit & ignored[target[own]])
            hit, targets = hit[counted], target[own][counted]
            correct = np.zeros(len(hit), bool)
            correct[np.flatnonzero(hit)[np.unique(targets[hit], return_index=True)[1]]] = True
            found_so_far = np.cumsum(correct)
            recalls = found_so_far / objects[label]
            precision = found_so_far / np.arange(1, len(correct) + 1)
            ap[row, label] = average_precision(recalls, precision, mode)
            recall[row, label] = recalls[-1] if len(recalls) else 0
            if row == 0:
                curves[label] = best_precision(recalls, precision, RECALLS)
    detections = np.bincount(labels, minlength=num_classes)
    return Evaluation(ap, recall, objects, detections, curves)
