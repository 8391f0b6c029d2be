# SPDX-License-Identifier: Apache-2.0
"""What the predictors return: plain numpy arrays, in pixels of the image that was given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pyramid:
    """Feature maps of a backbone: ``levels``, each (C_i, H_i, W_i) ``float32``, finest first."""

    levels: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel: ``labels`` (H, W), as many as the image has."""

    labels: np.ndarray

    def colours(self, palette) -> np.ndarray:
        """(H, W, 3) ``uint8`` in RGB, with ``palette`` (classes, 3)."""
        return np.asarray(palette, np.uint8)[self.labels]


@dataclass(frozen=True)
class Detections:
    """Objects of an image, the best first.

    Args:
        boxes: (N, 4) ``float32``: left, top, right and lower edge.
        scores: (N,) from 0 to 1.
        labels: (N,) index of the class.
        mask_scores: (N, S, S) probability of the object on a grid over its box, or None where the
            model has no masks. :meth:`masks` brings them to the size of the image.
        image_size: (height, width) of the image.
        mask_threshold: least probability of a mask's pixel.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    mask_scores: np.ndarray | None
    image_size: tuple[int, int]
    mask_threshold: float | None

    def masks(self) -> np.ndarray:
        """(N, H, W) ``bool``: the pixels of every object.

        Raises:
            ValueError: the model has no masks.
        """
        if self.mask_scores is None:
            raise ValueError("this model predicts boxes without masks")
        masks = np.zeros((len(self.boxes), *self.image_size), bool)
        for mask, scores, box in zip(masks, self.mask_scores, self.boxes, strict=True):
            paste_mask(mask, scores, box, self.mask_threshold)
        return masks


def paste_mask(image: np.ndarray, scores: np.ndarray, box: np.ndarray, threshold: float) -> None:
    """Set in ``image`` (H, W) ``bool`` the pixels where a mask reaches the threshold.

    The grid ``scores`` (S, S) covers ``box`` (left, top, right, lower edge); between its places
    probabilities are bilinear, and outside of it they are 0. Source: mmdet's ``FCNMaskHead``.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    height, width = image.shape
    rows = slice(max(int(np.floor(top)) - 1, 0), min(int(np.ceil(bottom)) + 1, height))
    columns = slice(max(int(np.floor(left)) - 1, 0), min(int(np.ceil(right)) + 1, width))
    if rows.start >= rows.stop or columns.start >= columns.stop or right <= left or bottom <= top:
        return
    # The box is upright: interpolation is one small matrix per direction.
    vertical = _interpolation(rows, top, bottom, scores.shape[0])
    horizontal = _interpolation(columns, left, right, scores.shape[1])
    image[rows, columns] = vertical @ scores @ horizontal.T >= threshold


def _interpolation(pixels: slice, start: float, stop: float, places: int) -> np.ndarray:
    """Weights (pixels, places) of the places between ``start`` and ``stop`` for pixel centres."""
    centres = np.arange(pixels.start, pixels.stop, dtype=np.float32) + 0.5
    position = (centres - start) / (stop - start) * places - 0.5
    distance = np.abs(position[:, None] - np.arange(places))
    return np.maximum(1 - distance, 0).astype(np.float32)


@dataclass(frozen=True)
class RotatedDetections:
    """Rotated objects of an image, the best first.

    Args:
        boxes: (N, 5) ``float32``: centre x and y, width, height, and angle in radians from the x
            axis towards the y axis (le135: from -pi/4 to 3/4 pi).
        scores: (N,) from 0 to 1.
        labels: (N,) index of the class.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def corners(self) -> np.ndarray:
        """(N, 4, 2): x and y of the corners, in turn around the box."""
        centre, angle = self.boxes[:, None, :2], self.boxes[:, 4]
        along = np.stack([np.cos(angle), np.sin(angle)], -1) * self.boxes[:, 2, None] / 2
        across = np.stack([-np.sin(angle), np.cos(angle)], -1) * self.boxes[:, 3, None] / 2
        offsets = [-along - across, along - across, along + across, across - along]
        return centre + np.stack(offsets, 1)
