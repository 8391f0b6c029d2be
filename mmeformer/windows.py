# SPDX-License-Identifier: Apache-2.0
"""Cut images that are too large for a model into overlapping windows.

A window is ``(x0, y0, x1, y1)`` in whole pixels of the image, with x1 and y1 exclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Window = tuple[int, int, int, int]
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

FILL = (104, 116, 124)
"""Color (blue, green, red) of padding: ImageNet's mean, which becomes 0 after normalization, like
the padding of a batch."""

LARGE = 8.0
"""How many times longer than a window, and than the largest image of the training, an image must be
to be cut by a model of photographs. Their objects have any size in pixels, so photographs are
resized as in training; only images that are far larger than photographs keep their size."""


def windows(width: int, height: int, size: int, overlap: int) -> list[Window]:
    """Square windows that cover an image, row by row.

    Neighbors share ``overlap`` pixels. The last window of a row or column is moved back to end at
    the border, so that it is as large as the others. An object whose width and height are at most
    ``overlap`` lies completely inside at least one window.

    Args:
        width, height: of the image, pixels.
        size: side of a window, pixels. If the image is smaller, so is the window.
        overlap: pixels, less than ``size``.

    Returns:
        The windows.

    Raises:
        ValueError: a size is below 1, or the overlap is negative or not less than ``size``.
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
    """Cut a window out of an image.

    Args:
        image: ``(H, W, 3)`` uint8, blue, green, red.
        window: within the image.
        size: pad a smaller window to this side at the right and at the bottom with :data:`FILL`;
            None leaves it as it is.

    Returns:
        A view of the image, or, if padded, a new array ``(size, size, 3)``.
    """
    x0, y0, x1, y1 = window
    inside = image[y0:y1, x0:x1]
    if size is None or inside.shape[:2] == (size, size):
        return inside
    padded = np.empty((size, size, 3), image.dtype)
    padded[:] = FILL
    padded[: y1 - y0, : x1 - x0] = inside
    return padded


def as_patch(image: np.ndarray, size: int) -> np.ndarray:
    """Pad an image whose longer side is less than that of a patch, at the right and the bottom.

    Resizing to a longer side would enlarge it. Other images stay as they are.

    Args:
        image: ``(H, W, 3)`` uint8, blue, green, red.
        size: side of the patches in pixels.
    """
    height, width = image.shape[:2]
    return image if max(height, width) >= size else crop(image, (0, 0, width, height), size)


def cores(places: Sequence[Window]) -> list[Window]:
    """Rectangles that cover an image without overlap, one within each of its windows.

    Each of two neighbors gets half of their overlap, so every pixel belongs to the window in which
    it is farthest from the border.

    Args:
        places: as :func:`windows` gives them.
    """
    columns = _shares({(x0, x1) for x0, _, x1, _ in places})
    rows = _shares({(y0, y1) for _, y0, _, y1 in places})
    found = []
    for x0, y0, _, _ in places:
        (left, right), (top, bottom) = columns[x0], rows[y0]
        found.append((left, top, right, bottom))
    return found


def _shares(spans: set[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Divide overlapping spans of one direction: start of a span -> its own part."""
    ordered = sorted(spans)
    middles = [
        (end + start) // 2 for (_, end), (start, _) in zip(ordered, ordered[1:], strict=False)
    ]
    edges = [ordered[0][0], *middles, ordered[-1][1]]
    return {
        start: (low, high)
        for (start, _), low, high in zip(ordered, edges[:-1], edges[1:], strict=True)
    }


def predict_windows(
    image: np.ndarray,
    places: Sequence[Window],
    predict: Callable[[list[np.ndarray]], Sequence[Result]],
    batch_size: int,
    pad_to: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Run a model over the windows of an image, with only one batch in memory at a time.

    Args:
        image: ``(H, W, 3)``.
        places: the windows.
        predict: gets the crops of one batch and returns one result for each.
        batch_size: windows per call; the last call may get fewer.
        pad_to: side that smaller windows are padded to, see :func:`crop`.
        progress: called after each window with the numbers of finished and of all windows.

    Yields:
        The result of each window, in the order of ``places``.

    Raises:
        ValueError: ``batch_size`` is below 1, or ``predict`` returned another number of results.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    done = 0
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        results = predict([crop(image, window, pad_to) for window in batch])
        for _, result in zip(batch, results, strict=True):
            yield result
            done += 1
            if progress is not None:
                progress(done, len(places))
