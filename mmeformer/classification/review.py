# SPDX-License-Identifier: Apache-2.0
"""Compare predicted classes of images with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from mmeformer.report.review import (
    RECALLS,
    Confusion,
    Curve,
    Review,
    Statistics,
    Summary,
    Table,
)
from mmeformer.results import Classification


class ClassificationReview(Review[Classification]):
    """Compares :class:`mmeformer.results.Classification`.

    Precision, recall and F1 of a class are those of mmpretrain's ``SingleLabelMetric``, average
    precision that of its ``AveragePrecision``: how well the probability of a class finds its images
    among all.
    """

    image_score = "probability of the labeled class"

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.labels: list[int] = []
        self.scores: list[np.ndarray] = []

    def truth(self, sample: Any) -> Classification | None:
        """See the base class; the labeled class has the probability 1."""
        if "gt_label" not in sample:
            return None
        return Classification(np.eye(len(self.classes), dtype=np.float32)[_label(sample)])

    def add(self, found: Classification, sample: Any) -> float | None:
        """See the base class."""
        label = _label(sample)
        self.labels.append(label)
        self.scores.append(found.scores)
        return float(found.scores[label])

    def summary(self) -> Summary:
        """See the base class."""
        count = len(self.classes)
        labels = np.array(self.labels, np.int64)
        scores = np.array(self.scores, np.float32).reshape(-1, count)
        counts: np.ndarray = np.zeros((count, count), np.int64)
        np.add.at(counts, (labels, scores.argmax(1)), 1)
        curves = {
            label: _curve(self.classes[label], scores[:, label], labels == label)
            for label in np.unique(labels).tolist()
        }
        rows = []
        for label, name in enumerate(self.classes):
            right, images, predicted = (
                counts[label, label],
                counts[label].sum(),
                counts[:, label].sum(),
            )
            rows.append(
                (
                    name,
                    int(images),
                    _ratio(right, predicted),
                    _ratio(right, images),
                    _ratio(2 * right, images + predicted),
                    curves[label].ap if label in curves else None,
                )
            )
        header = ("class", "images", "precision", "recall (accuracy)", "F1", "AP")
        remark = "Every image counts once, as its most likely class."
        return Summary(
            Confusion(counts, self.classes, "images", remark),
            Table(header, tuple(rows)),
            tuple(curves.values()),
            "every class against the others",
        )

    @classmethod
    def statistics(cls, datasets: Sequence[BaseDataset]) -> Statistics:
        """See the base class."""
        classes = tuple(datasets[0].metainfo["classes"])
        labels: list[int] = []
        for dataset in datasets:
            dataset.full_init()
            labels += [dataset.get_data_info(index)["gt_label"] for index in range(len(dataset))]
        amounts = np.bincount(np.array(labels, np.int64), minlength=len(classes))
        return Statistics(len(labels), classes, "images", amounts, amounts)


def _label(sample: Any) -> int:
    return int(sample.gt_label.item())


def _curve(name: str, scores: np.ndarray, right: np.ndarray) -> Curve:
    """Precision over recall of the images with the highest scores.

    Args:
        name: of the class.
        scores: (N,) probability of the class.
        right: (N,) bool, whether an image has the class; one at least has.
    """
    order = np.argsort(-scores, kind="stable")
    found = right[order].cumsum()
    recall = found / found[-1]
    precision = found / np.arange(1, len(order) + 1)
    ap = float(precision[right[order]].mean())
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # The last image has the recall 1.
    return Curve(name, best[np.searchsorted(recall, RECALLS)], ap)


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
