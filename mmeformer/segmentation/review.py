# SPDX-License-Identifier: Apache-2.0
"""Compare label maps with label masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import BaseDataset

from mmeformer.report.review import (
    Confusion,
    Review,
    Statistics,
    Summary,
    Table,
    ratios,
    samples_of,
)
from mmeformer.results import Segmentation

COUNTED_MASKS = 200
"""Masks that are read for the statistics, evenly spread over the data set."""


class SegmentationReview(Review[Segmentation]):
    """Compares :class:`mmeformer.results.Segmentation`, by counting pixels.

    IoU and accuracy (recall) of a class are those of mmseg's ``IoUMetric``. Pixels whose label is
    no class (``ignore_index``) do not count.
    """

    image_score = "mean IoU of the classes in the image"

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.counts: np.ndarray = np.zeros((len(self.classes),) * 2, np.int64)

    def truth(self, sample: Any) -> Segmentation | None:
        """See the base class. Pixels to ignore are shown as the class that surrounds them most."""
        if "gt_sem_seg" not in sample:
            return None
        labels = _labels(sample)
        known = labels < len(self.classes)
        if not known.all() and known.any():
            # The drawing has a color for every class and none for other labels.
            nearest = cv2.distanceTransformWithLabels(
                (~known).astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
            )[1]
            of_place = np.zeros(nearest.max() + 1, labels.dtype)
            of_place[nearest[known]] = labels[known]
            labels = of_place[nearest]
        return Segmentation(np.where(labels < len(self.classes), labels, 0).astype(np.uint16))

    def add(self, found: Segmentation, sample: Any) -> float | None:
        """See the base class."""
        counts = confusion_of(_labels(sample), found.labels, len(self.classes))
        self.counts += counts
        present = counts.sum(1) > 0
        right = np.diag(counts)
        union = counts.sum(0) + counts.sum(1) - right
        return float((right[present] / union[present]).mean()) if present.any() else None

    def summary(self) -> Summary:
        """See the base class."""
        counts, right = self.counts, np.diag(self.counts)
        labeled, found = counts.sum(1), counts.sum(0)
        columns = (
            ratios(labeled, np.full(len(labeled), max(labeled.sum(), 1))),
            ratios(right, labeled + found - right),
            ratios(right, found),
            ratios(right, labeled),
        )
        rows = zip(self.classes, *columns, strict=True)
        table = Table(("class", "share of pixels", "IoU", "precision", "recall"), tuple(rows))
        remark = "Every labeled pixel counts once."
        return Summary(Confusion(counts, self.classes, "pixels", remark), table)

    @classmethod
    def statistics(cls, datasets: Sequence[BaseDataset]) -> Statistics:
        """See the base class."""
        classes = datasets[0].metainfo["classes"]
        samples = samples_of(datasets)
        chosen = samples[:: max(1, len(samples) // COUNTED_MASKS)][:COUNTED_MASKS]
        amounts, in_images = (np.zeros(len(classes), np.int64) for _ in range(2))
        for dataset, index in chosen:
            sample = dataset.pipeline(dataset.get_data_info(index))["data_samples"]
            labels = _labels(sample)
            counts = np.bincount(labels[labels < len(classes)], minlength=len(classes))
            amounts += counts
            in_images += counts > 0
        remark = ""
        if len(chosen) < len(samples):
            remark = f"counted in {len(chosen)} of {len(samples)} images, evenly spread"
        return Statistics(len(chosen), tuple(classes), "pixels", amounts, in_images, remark=remark)


def confusion_of(labels: np.ndarray, found: np.ndarray, count: int) -> np.ndarray:
    """Pixels (C, C) by label and prediction.

    Args:
        labels: (H, W); those from ``count`` on are ignored.
        found: (H, W), below ``count``.
        count: number of classes.
    """
    known = labels < count
    pairs = labels[known].astype(np.int64) * count + found[known]
    counts: np.ndarray = np.bincount(pairs, minlength=count**2).reshape(count, count)
    return counts


def _labels(sample: Any) -> np.ndarray:
    labels: np.ndarray = sample.gt_sem_seg.data.squeeze(0).cpu().numpy()
    # Negative labels are ignored too.
    return labels.astype(np.int64) & 0xFFFF
