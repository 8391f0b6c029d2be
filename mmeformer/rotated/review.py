# SPDX-License-Identifier: Apache-2.0
"""Compare rotated boxes with their labels, by the rules of DOTA's metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import BaseDataset

from mmeformer.report.review import (
    IOU_THR,
    SCORE_THR,
    Curve,
    ObjectReview,
    Statistics,
    Summary,
    Table,
    count_instances,
)
from mmeformer.results import RotatedDetections
from mmeformer.rotated.evaluation import IOU_THRS, GroundTruth, evaluate
from mmeformer.rotated.metric import ground_truth
from mmeformer.rotated_boxes import overlapping_pairs


class RotatedReview(ObjectReview[RotatedDetections]):
    """Compares :class:`mmeformer.results.RotatedDetections`."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.images: list[tuple[RotatedDetections, GroundTruth]] = []

    def truth(self, sample: Any) -> RotatedDetections | None:
        """See the base class."""
        target = ground_truth(sample.to_dict())
        if target is None:
            return None
        boxes = target.boxes[~target.ignored].astype(np.float32)
        return RotatedDetections(
            boxes, np.ones(len(boxes), np.float32), target.labels[~target.ignored]
        )

    def add(self, found: RotatedDetections, sample: Any) -> float | None:
        """See the base class."""
        target = ground_truth(sample.to_dict())
        assert target is not None, "an image without labels"
        self.images.append((found, target))
        shown = found.take(found.scores > SCORE_THR)
        iou = np.zeros((len(shown), len(target.labels)))
        first, second, overlap = overlapping_pairs(
            # Of any classes.
            shown.boxes,
            np.zeros(len(shown), np.int64),
            target.boxes,
            np.zeros(len(target.labels), np.int64),
        )
        iou[first, second] = overlap
        return self.count(shown.labels, target.labels, target.ignored, iou)

    def summary(self) -> Summary:
        """See the base class."""
        if not self.images:
            return Summary(self.confusion(), Table(("class",), ()))
        found = evaluate(self.images, len(self.classes), "area")
        row = IOU_THRS.index(IOU_THR)
        columns = (found.ap.mean(0), found.ap[row], found.recall[row])
        rows = zip(
            self.classes,
            found.objects.tolist(),
            *([None if np.isnan(v) else float(v) for v in column] for column in columns),
            strict=True,
        )
        table = Table(("class", "objects", "AP", "AP50", "recall50"), tuple(rows))
        curves = tuple(
            Curve(self.classes[label], found.precision[label], float(found.ap[row, label]))
            for label in np.flatnonzero(found.objects)
        )
        return Summary(self.confusion(), table, curves, f"rotated boxes at IoU {IOU_THR}")

    @classmethod
    def statistics(cls, datasets: Sequence[BaseDataset]) -> Statistics:
        """See the base class."""

        def area(corners: Sequence[float]) -> float:
            return cv2.contourArea(np.array(corners, np.float32).reshape(-1, 2))

        return count_instances(datasets, area, datasets[0].metainfo["classes"])
