# SPDX-License-Identifier: Apache-2.0
"""Compare predictions on labeled images with their labels: the interface that tasks implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from mmengine.dataset import BaseDataset

from mmeformer.bars import counted

SCORE_THR = 0.3
"""Score above which a detection counts in the confusion matrix and in the scores of images."""
IOU_THR = 0.5
"""Smallest IoU of a detection and the object that it finds."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is given, as in COCO."""

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often things of one class were predicted as another.

    Args:
        counts: (rows, columns) int64: rows by label, columns by prediction. If things can be missed
            or made up, the last row is for predictions without a label, the last column for labels
            without a prediction.
        names: of the classes.
        unit: what is counted, such as ``objects``.
        remark: by which rule, one sentence.
    """

    counts: np.ndarray
    names: tuple[str, ...]
    unit: str
    remark: str

    @property
    def has_background(self) -> bool:
        """Whether there are a last row and column for nothing."""
        return len(self.counts) > len(self.names)


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision over recall of one class.

    Args:
        name: of the class.
        precision: (101,) at :data:`RECALLS`: the best precision at this recall or a higher one.
        ap: average precision, 0 to 1.
    """

    name: str
    precision: np.ndarray
    ap: float


@dataclass(frozen=True)
class Table:
    """Numbers of every class.

    Args:
        header: names of the columns; the first is that of the class.
        rows: per class its name and numbers; None where there is none.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


@dataclass(frozen=True, eq=False)
class Summary:
    """What the comparison of all images gives.

    Args:
        confusion: of the classes.
        table: of the classes.
        curves: of the classes that have objects; none for results without scores.
        curves_title: what the curves are of.
    """

    confusion: Confusion
    table: Table
    curves: tuple[Curve, ...] = ()
    curves_title: str = ""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Labels of a data set.

    Args:
        images: number of images.
        names: of the classes.
        unit: of ``amounts``, such as ``objects``.
        amounts: (C,) per class.
        in_images: (C,) number of images that have the class.
        sizes: (N,) square root of every object's area in pixels; None for labels of pixels.
        remark: one sentence, or "".
    """

    images: int
    names: tuple[str, ...]
    unit: str
    amounts: np.ndarray
    in_images: np.ndarray
    sizes: np.ndarray | None = None
    remark: str = ""


class Review(ABC, Generic[Result]):
    """Collects predictions and labels image by image.

    Args:
        classes: names, by label.
    """

    image_score: str
    """What :meth:`add` returns, in words."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    @abstractmethod
    def truth(self, sample: Any) -> Result | None:
        """The labels of a data sample as a result, to be drawn; None if it has none.

        Args:
            sample: OpenMMLab's data sample, packed without resizing.
        """

    @abstractmethod
    def add(self, found: Result, sample: Any) -> float | None:
        """Add an image.

        Args:
            found: prediction, with low scores too.
            sample: see :meth:`truth`.

        Returns:
            How well the prediction fits, 0 to 1; None if there is nothing to find or found.
        """

    @abstractmethod
    def summary(self) -> Summary:
        """The comparison of all images so far."""

    def shown(self, found: Result) -> Result:
        """The part of a prediction that pictures show."""
        return found

    @classmethod
    @abstractmethod
    def statistics(cls, datasets: Sequence[BaseDataset]) -> Statistics:
        """Count the labels of data sets with the same classes."""


def best_precision(recall: np.ndarray, precision: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """The best precision at each of ``recalls`` or a higher recall; 0 where none is reached.

    Args:
        recall, precision: ``(N,)``, by increasing recall.
        recalls: ``(K,)``.
    """
    best: np.ndarray = envelope(precision)[np.searchsorted(recall, recalls)]
    return best


def envelope(precision: np.ndarray) -> np.ndarray:
    """``(N + 1,)``: the largest precision from each place on, and a 0 for what is not reached."""
    return np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)


def pair_up(iou: np.ndarray, same: np.ndarray) -> list[tuple[int, int]]:
    """Pair detections with the objects that they overlap most, each at most once.

    Args:
        iou: (N, M) of detections and objects.
        same: (N, M) bool, whether the classes are equal; they decide between equal overlaps.

    Returns:
        Indices of the pairs with at least :data:`IOU_THR`, the largest IoU first.
    """
    found, target = np.nonzero(iou >= IOU_THR)
    order = np.lexsort((~same[found, target], -iou[found, target]))
    pairs, used_found, used_target = [], set(), set()
    for first, second in zip(found[order].tolist(), target[order].tolist(), strict=True):
        if first not in used_found and second not in used_target:
            used_found.add(first)
            used_target.add(second)
            pairs.append((first, second))
    return pairs


class ObjectReview(Review[Result]):
    """Comparison of objects with scores: its confusion matrix and the scores of images.

    A subclass computes overlaps and average precision.
    """

    image_score = f"F1 of the objects above score {SCORE_THR} at IoU {IOU_THR}"

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        side = len(self.classes) + 1
        self.counts: np.ndarray = np.zeros((side, side), np.int64)

    def shown(self, found: Any) -> Any:
        """See the base class; what is above :data:`SCORE_THR`."""
        return found.take(found.scores > SCORE_THR)

    def count(
        self, labels: np.ndarray, target_labels: np.ndarray, ignored: np.ndarray, iou: np.ndarray
    ) -> float | None:
        """Count the detections above :data:`SCORE_THR` of one image.

        Detections and objects are paired by their overlap, whatever their classes. A detection on
        an object to ignore does not count.

        Args:
            labels: (N,) of detections.
            target_labels: (M,) of objects.
            ignored: (M,) bool: objects that need not be found.
            iou: (N, M).

        Returns:
            F1 of the image, see :meth:`Review.add`.
        """
        real = ~ignored
        nothing = len(self.classes)
        same = labels[:, None] == target_labels
        pairs = pair_up(iou[:, real], same[:, real])
        found = np.full(len(labels), nothing)
        missed = np.ones(int(real.sum()), bool)
        for first, second in pairs:
            found[first] = target_labels[real][second]
            missed[second] = False
        on_ignored = (iou[:, ignored] >= IOU_THR).any(1) & (found == nothing)
        np.add.at(self.counts, (found[~on_ignored], labels[~on_ignored]), 1)
        np.add.at(self.counts, (target_labels[real][missed], nothing), 1)
        correct = int((found == labels).sum())
        total = int((~on_ignored).sum()) + int(real.sum())
        return 2 * correct / total if total else None

    def confusion(self) -> Confusion:
        """The matrix of all images so far."""
        return Confusion(
            self.counts,
            self.classes,
            "objects",
            f"Detections above score {SCORE_THR} and objects are paired by overlap, from IoU "
            f"{IOU_THR} on, whatever their classes.",
        )


def count_instances(
    datasets: Sequence[BaseDataset], area: Any, classes: Sequence[str]
) -> Statistics:
    """Statistics of data sets whose entries have ``instances``, as mmdet's and mmrotate's.

    Args:
        datasets: see :meth:`Review.statistics`.
        area: function from an instance's ``bbox`` to its area.
        classes: names, by label.
    """
    amounts, in_images = (np.zeros(len(classes), np.int64) for _ in range(2))
    sizes, images = [], 0
    for entry in entries_of(datasets):
        images += 1
        kept = [item for item in entry.get("instances", ()) if not item.get("ignore_flag")]
        labels = np.array([item["bbox_label"] for item in kept], np.int64)
        amounts += np.bincount(labels, minlength=len(classes))
        in_images[np.unique(labels)] += 1
        sizes += [max(float(area(item["bbox"])), 0.0) ** 0.5 for item in kept]
    return Statistics(images, tuple(classes), "objects", amounts, in_images, np.array(sizes))


def samples_of(datasets: Sequence[BaseDataset]) -> list[tuple[BaseDataset, int]]:
    """All samples of data sets: each the data set and its index there."""
    for dataset in datasets:
        dataset.full_init()
    return [(dataset, index) for dataset in datasets for index in range(len(dataset))]


def entries_of(datasets: Sequence[BaseDataset]) -> Iterable[dict]:
    """What data sets know of each of their images, without loading it."""
    for dataset, index in counted(samples_of(datasets), "labels counted"):
        yield dataset.get_data_info(index)


def ratios(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    """``part / whole``; None where there is nothing."""
    return [
        float(first / second) if second else None for first, second in zip(part, whole, strict=True)
    ]
