# SPDX-License-Identifier: Apache-2.0
"""Sizes of the pictures that results are drawn on."""

from __future__ import annotations

import cv2
import numpy as np

SMALLEST_PICTURE, LARGEST_PICTURE = 640, 4096
"""Limits of a picture's longer side, in pixels. Names do not fit into smaller pictures, and
matplotlib, which draws them, is slow long before its limit of 65,535."""


def at_picture_size(
    image: np.ndarray, smallest: int = SMALLEST_PICTURE, largest: int = LARGEST_PICTURE
) -> tuple[np.ndarray, float]:
    """Resize an image to the size at which it is drawn on.

    Args:
        image: ``(H, W, 3)``.
        smallest: longer side in pixels up to which small images are enlarged, by a whole number so
            that they stay sharp.
        largest: longer side in pixels to which large images are shrunk.

    Returns:
        The image ``(H', W', 3)`` and its scale.
    """
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = min(max(1, smallest // longer), largest / longer)
    if scale == 1:
        return image, 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(image, size, interpolation=method), scale
