# SPDX-License-Identifier: Apache-2.0
"""Draw results into images with OpenCV alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmeformer.results import (
    BEST,
    NAME_PIXELS,
    Classification,
    Detections,
    RotatedDetections,
    Segmentation,
)

Array = NDArray[Any]
OPACITY = 0.5
"""Of masks and label maps."""


def draw(
    image: Array, result: Any, classes: Sequence[str], palette: Sequence[Sequence[int]] = ()
) -> Array:
    """Draw a result into a copy of an image.

    Args:
        image: (H, W, 3) uint8, blue, green, red.
        result: of this image, one of :mod:`mmeformer.results`.
        classes: names, by label.
        palette: (red, green, blue) per class; empty chooses colors.

    Returns:
        (H, W, 3) uint8, blue, green, red.

    Raises:
        TypeError: there is no drawing of this kind of result.
    """
    colors = np.asarray(palette, np.uint8).reshape(-1, 3)[:, ::-1]
    if len(colors) != len(classes):
        hues = (np.arange(len(classes)) * 137.508 / 2 % 180).astype(np.uint8)
        hsv = np.stack([hues, np.full_like(hues, 200), np.full_like(hues, 230)], axis=-1)
        colors = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2BGR)[0]
    picture: Array = np.ascontiguousarray(image).copy()
    _draw(result, picture, classes, colors)
    return picture


@singledispatch
def _draw(result: Any, picture: Array, classes: Sequence[str], colors: Array) -> None:
    raise TypeError(f"there is no drawing of {type(result).__name__}")


@_draw.register
def _(result: Detections, picture: Array, classes: Sequence[str], colors: Array) -> None:
    # The lowest scores first: the others are drawn over them.
    order = np.argsort(result.scores, kind="stable")
    for index in order if result.instance_masks is not None else ():
        mask: Array = np.zeros(picture.shape[:2], bool)
        result.instance_masks[index].paste(mask)  # type: ignore[index]
        _blend(picture, mask, colors[result.labels[index]])
    left, top, right, bottom = result.boxes.T
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=-1)
    _outline(picture, corners.reshape(-1, 4, 2), result, order, classes, colors)


@_draw.register
def _(result: RotatedDetections, picture: Array, classes: Sequence[str], colors: Array) -> None:
    order = np.argsort(result.scores, kind="stable")
    _outline(picture, result.corners(), result, order, classes, colors)


@_draw.register
def _(result: Segmentation, picture: Array, classes: Sequence[str], colors: Array) -> None:
    for label in np.unique(result.labels):
        _blend(picture, result.labels == label, colors[label])


@_draw.register
def _(result: Classification, picture: Array, classes: Sequence[str], colors: Array) -> None:
    scale = max(0.4, max(picture.shape[:2]) / 1000)
    for row, label in enumerate(result.shown(BEST), start=1):
        text, place = f"{result.scores[label]:.3f} {classes[label]}", (4, int(30 * scale * row))
        for ink, thickness in ((0, 3), (255, 1)):
            font = cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(picture, text, place, font, scale, (ink,) * 3, thickness, cv2.LINE_AA)


def _blend(picture: Array, mask: Array, color: Array) -> None:
    picture[mask] = np.rint(picture[mask] * (1 - OPACITY) + color * OPACITY).astype(np.uint8)


def _outline(
    picture: Array,
    corners: Array,
    result: Detections | RotatedDetections,
    order: Array,
    classes: Sequence[str],
    colors: Array,
) -> None:
    """Draw polygons (N, 4, 2) with their names and scores."""
    height, width = picture.shape[:2]
    thickness = max(1, round(max(height, width) / 600))
    scale = max(0.35, max(height, width) / 2000)
    named = len(result) * NAME_PIXELS <= height * width or len(result) <= 5
    for index in order:
        color = tuple(map(int, colors[result.labels[index]]))
        polygon = np.rint(corners[index]).astype(np.int32)
        cv2.polylines(picture, [polygon], True, color, thickness, cv2.LINE_AA)
        if not named:
            continue
        text = f"{classes[result.labels[index]]} {result.scores[index]:.2f}"
        (wide, high), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        x = int(np.clip(polygon[:, 0].min(), 0, max(width - wide, 0)))
        y = int(np.clip(polygon[:, 1].min(), high + below, height))
        cv2.rectangle(picture, (x, y - high - below), (x + wide, y), color, cv2.FILLED)
        ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
        place = (x, y - below // 2 - 1)
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA)
