# SPDX-License-Identifier: Apache-2.0
"""Overlapping windows of images too large to be handled at once; for every task.

A window is ``(x0, y0, x1, y1)`` in whole pixels of the image, with x1 and y1 exclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Window = tuple[int, int, int, int]
Result = TypeVar("Result")

FILL = (104, 116, 124)
"""Colour (blue, green, red) beyond the border of an image: ImageNet's mean, which models see as 0
once the image is normalised, like the padding of a batch."""


def windows(width: int, height: int, size: int, overlap: int) -> list[Window]:
    """Square windows that cover an image, row by row.

    Neighbours share ``overlap`` pixels; the last ones of a row and of a column are moved back to
    end at the border, so that no window is smaller than need be. A thing whose width and height are
    at most ``overlap`` lies whole in at least one window.

    Args:
        width, height: of the image, pixels.
        size: side of a window, pixels. Where the image is smaller, so is the window.
        overlap: pixels, less than ``size``.

    Raises:
        ValueError: a size below 1, or an overlap that is negative or not less than ``size``.
    """
    if width < 1 or height < 1 or size < 1:
        raise ValueError(
            f"an image of {width} x {height} pixels cannot be cut into windows of {size}"
        )
    if not 0 <= overlap < size:
        raise ValueError(f"overlap {overlap} must be at least 0 and less than the size {size}")
    return [
        (x, y, min(x + size, width), min(y + size, height))
        for y in _starts(height, size, overlap)
        for x in _starts(width, size, overlap)
    ]


def _starts(length: int, size: int, overlap: int) -> list[int]:
    last = max(length - size, 0)
    return [*range(0, last, size - overlap), last]


def crop(image: np.ndarray, window: Window, size: int | None = None) -> np.ndarray:
    """The part of an image in a window.

    Args:
        image: ``(H, W, 3)`` uint8, blue, green, red.
        window: within the image.
        size: a smaller window is filled up to this side at the right and at the bottom with
            :data:`FILL`; None leaves it as it is.

    Returns:
        A view of the image, or, if filled up, a new array ``(size, size, 3)``.
    """
    x0, y0, x1, y1 = window
    part = image[y0:y1, x0:x1]
    if size is None or part.shape[:2] == (size, size):
        return part
    filled = np.empty((size, size, 3), image.dtype)
    filled[:] = FILL
    filled[: y1 - y0, : x1 - x0] = part
    return filled


def predict_windows(
    image: np.ndarray,
    places: Sequence[Window],
    predict: Callable[[list[np.ndarray]], Sequence[Result]],
    batch_size: int,
    fill_to: int | None = None,
) -> Iterator[tuple[Window, Result]]:
    """Run a model over windows in batches; no more than one batch of them is held at a time.

    Args:
        image: ``(H, W, 3)``.
        places: the windows.
        predict: gets the crops of one batch and returns one result for each.
        batch_size: windows per call; the last call may get fewer.
        fill_to: side that smaller windows are filled up to, see :func:`crop`.

    Yields:
        Each window with its result, in the order of ``places``.

    Raises:
        ValueError: ``batch_size`` is below 1, or ``predict`` returned another number of results.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        results = predict([crop(image, window, fill_to) for window in batch])
        yield from zip(batch, results, strict=True)
