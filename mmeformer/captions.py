# SPDX-License-Identifier: Apache-2.0
"""Write lines of text into images, with OpenCV alone."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

SMALLEST = 0.5
"""Smallest size of the letters; 1 suits images of 640 pixels."""


def write_lines(image: NDArray[np.uint8], lines: Sequence[str]) -> None:
    """Write lines into the upper left corner, in place; the image is darkened behind them.

    Args:
        image: (H, W, 3). Letters grow with it; what does not fit is cut off.
        lines: of text. OpenCV's fonts have only the letters of ASCII; others become ``?``.
    """
    if not lines:
        return
    unit = max(max(image.shape[:2]) / 640, SMALLEST)
    height = int(26 * unit)
    depth = min(height * len(lines) + height // 2, image.shape[0])
    image[:depth] = (image[:depth] * 0.4).astype(np.uint8)
    thickness = max(1, round(1.5 * unit))
    for row, line in enumerate(lines, start=1):
        cv2.putText(
            image,
            line.encode("ascii", "replace").decode(),
            (int(8 * unit), height * row),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.65 * unit,
            (255, 255, 255),
            thickness,
            cv2.LINE_AA,
        )
