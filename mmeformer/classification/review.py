# SPDX-License-Identifier: Apache-2.0
"""Compare classes of images with their labels."""

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
    best_precision,
    entries_of,
    ratios,
)
from mmeformer.results import Classification


class ClassificationReview(Review[Classification]):
    """Compares :class:`mmeformer.results.Classification`."""

    image_score = "probability of the right class"

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.labels: list[int] = []
        self.scores: list[np.ndarray] = []

    def truth(self, sample: Any) -> Classification | None:
        """See the base class; the right class with score 1."""
        if "gt_label" not in sample:
            return None
        scores = np.zeros(len(self.classes), np.float32)
        scores[int(sample.gt_label)] = 1
        return Classification(scores)

    def add(self, found: Classification, sample: Any) -> float | None:
        """See the base class."""
        self.labels.append(int(sample.gt_label))
        self.scores.append(found.scores)
        return float(found.scores[self.labels[-1]])

    def summary(self) -> Summary:
        """See the base class; precision and recall over the score, one class against the rest."""
        count = len(self.classes)
        labels = np.array(self.labels, np.int64)
        scores = np.reshape(self.scores, (-1, count))
        counts = np.zeros((count, count), np.int64)
        np.add.at(counts, (labels, scores.argmax(1)), 1)
        right, images = np.diag(counts), counts.sum(1)
        curves = tuple(
            _curve(self.classes[label], labels == label, scores[:, label])
            for label in np.flatnonzero(images)
        )
        ap = {curve.name: curve.ap for curve in curves}
        rows = tuple(
            zip(
                self.classes,
                images.tolist(),
                ratios(right, counts.sum(0)),
                ratios(right, images),
                map(ap.get, self.classes),
                strict=True,
            )
        )
        table = Table(("class", "images", "precision", "recall", "AP"), rows)
        remark = "Every image counts as its most likely class."
        return Summary(
            Confusion(counts, self.classes, "images", remark), table, curves, "one class by score"
        )

    @classmethod
    def statistics(cls, datasets: Sequence[BaseDataset]) -> Statistics:
        """See the base class."""
        classes = datasets[0].metainfo["classes"]
        labels = [int(entry["gt_label"]) for entry in entries_of(datasets)]
        amounts = np.bincount(np.array(labels, np.int64), minlength=len(classes))
        return Statistics(len(labels), tuple(classes), "labels", amounts, amounts)


def _curve(name: str, right: np.ndarray, scores: np.ndarray) -> Curve:
    """Precision over recall of the images of a class.

    Args:
        name: of the class.
        right: (N,) bool, whether an image is of the class; at least one is.
        scores: (N,), of the class.
    """
    found = np.cumsum(right[np.argsort(-scores, kind="stable")])
    recall, precision = found / right.sum(), found / np.arange(1, len(found) + 1)
    values = best_precision(recall, precision, RECALLS)
    return Curve(name, values, float(values.mean()))
