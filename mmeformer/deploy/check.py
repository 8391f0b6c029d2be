# SPDX-License-Identifier: Apache-2.0
"""Compare the results of an exported file with those of the model in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmeformer.errors import UserError
from mmeformer.rotated_boxes import rotated_iou
from mmeformer.runtime import Classification, Pyramid, Segmentation

RAW_TOLERANCE = 1e-4
"""Largest allowed difference of a raw tensor, as a share of its largest value."""

MATCHED = 0.99
"""Smallest allowed share of detections that have a counterpart."""

MATCH_IOU = 0.99
MATCH_SCORE = 1e-3

LABELS_DIFFER = 1e-3
"""Largest allowed share of pixels of another class: two classes can score the same up to rounding.
"""


class CheckFailed(UserError, RuntimeError):
    """The results of an exported model differ from those of the model in PyTorch."""


class Comparison:
    """Results of comparing an exported model with the model in PyTorch.

    Args:
        title: what was compared.

    Attributes:
        lines: one per comparison, to print.
        failures: the lines beyond tolerance; empty if there are none.
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.lines: list[str] = []
        self.failures: list[str] = []

    def add(self, line: str, ok: bool) -> None:
        """Add a result."""
        self.lines.append(line + ("" if ok else "  <- beyond tolerance"))
        if not ok:
            self.failures.append(line)

    def report(self, write: Callable[[str], None]) -> None:
        """Write the title and the lines."""
        write(f"{self.title}:")
        for line in self.lines:
            write("  " + line)

    def raise_failures(self, path: Path) -> None:
        """Raise :class:`CheckFailed` if anything is beyond tolerance."""
        if self.failures:
            raise CheckFailed(f"{path} was not written: " + "; ".join(self.failures))


def random_image(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W, 3) ``uint8`` with patches of random colors and fine noise."""
    random = np.random.default_rng(seed)
    patches = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
    image = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return np.clip(image + random.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def relative_difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two arrays as a share of the largest expected value.

    Infinite where shapes differ or a number is not finite.
    """
    # NaN would pass as the smaller of two differences.
    if ours.shape != expected.shape or not (np.isfinite(ours) & np.isfinite(expected)).all():
        return float("inf")
    difference = np.abs(ours.astype(np.float64) - expected).max()
    return float(difference / max(np.abs(expected).max(), 1e-12))


# Functions that compare the results of a task, given pairs (expected, ours), one per image.


def compare_pyramids(pairs: Sequence[tuple[Pyramid, Pyramid]], comparison: Comparison) -> None:
    """Compare feature maps level by level."""
    worst = max(
        relative_difference(mine, level)
        for expected, ours in pairs
        for mine, level in zip(ours.levels, expected.levels, strict=True)
    )
    line = f"feature maps differ by {worst:.1e} of their largest value"
    comparison.add(line, worst <= RAW_TOLERANCE)


def compare_scores(
    pairs: Sequence[tuple[Classification, Classification]], comparison: Comparison
) -> None:
    """Compare the probabilities of all classes, and the best class."""
    worst = max(float(np.abs(ours.scores - expected.scores).max()) for expected, ours in pairs)
    comparison.add(f"probabilities within {worst:.1e}", worst <= MATCH_SCORE)
    # Two classes can have the same probability up to rounding.
    differ = sum(
        expected.scores[ours.label] < expected.scores.max() - MATCH_SCORE
        for expected, ours in pairs
    )
    comparison.add(f"{differ} of {len(pairs)} images have another class", differ == 0)


def compare_labels(
    pairs: Sequence[tuple[Segmentation, Segmentation]], comparison: Comparison
) -> None:
    """Count the pixels that have another class."""
    differ = sum(int((ours.labels != expected.labels).sum()) for expected, ours in pairs)
    total = sum(ours.labels.size for _, ours in pairs)
    line = f"{differ} of {total} pixels have another class"
    comparison.add(line, differ <= LABELS_DIFFER * total)


def compare_detections(
    pairs: Sequence[tuple[Any, Any]],
    comparison: Comparison,
) -> None:
    """Match objects, upright or rotated, one to one; compare boxes, scores and masks."""
    matched, total = 0, 0
    box, score = 0.0, 0.0
    mask: float | None = None
    for expected, ours in pairs:
        matches = match(expected, ours)
        matched += len(matches)
        total += max(len(expected.boxes), len(ours.boxes))
        if not matches:
            continue
        left, right = map(list, zip(*matches, strict=True))
        box = max(box, float(np.abs(expected.boxes[left, :4] - ours.boxes[right, :4]).max()))
        score = max(score, float(np.abs(expected.scores[left] - ours.scores[right]).max()))
        if getattr(ours, "instance_masks", None) is not None:
            differ = expected.masks()[left] != ours.masks()[right]
            mask = max(mask or 0, float(differ.mean((1, 2)).max()))
    if not total:
        comparison.add(
            "nothing was detected in these images, so only raw tensors were compared: "
            "give --images that show something",
            True,
        )
        return
    line = f"{matched} of {total} detections match: boxes within {box:.1e} px, scores {score:.1e}"
    if mask is not None:
        line += f", masks but for {mask:.1e} of the image"
    comparison.add(line, matched >= MATCHED * total and (mask or 0) <= LABELS_DIFFER)


def match(expected: Any, ours: Any) -> list[tuple[int, int]]:
    """Match the objects of two results of a detector.

    A pair has the same class, an IoU of at least :data:`MATCH_IOU`, and scores that differ by
    :data:`MATCH_SCORE` at most.

    Returns:
        Indices in ``expected`` and in ``ours`` of each pair; each object is in one pair at most.
    """
    free = np.ones(len(ours.boxes), bool)
    pairs = []
    others = _as_rotated(ours.boxes)
    for index, box in enumerate(_as_rotated(expected.boxes)):
        possible = np.flatnonzero(
            free
            & (ours.labels == expected.labels[index])
            & (np.abs(ours.scores - expected.scores[index]) <= MATCH_SCORE)
        )
        if not len(possible):
            continue
        overlap = rotated_iou(box, others[possible])
        best = int(overlap.argmax())
        if overlap[best] >= MATCH_IOU:
            free[possible[best]] = False
            pairs.append((index, int(possible[best])))
    return pairs


def _as_rotated(boxes: np.ndarray) -> np.ndarray:
    if boxes.shape[1] == 5:
        return boxes
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return np.concatenate([center, size, np.zeros_like(center[:, :1])], 1)
