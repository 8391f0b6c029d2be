# SPDX-License-Identifier: Apache-2.0
"""Read and write complete image files; incomplete ones are an error."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mmeformer.files import write_bytes


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read an image as ``(H, W, 3)`` uint8, blue, green, red.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be decoded, is incomplete, or is too large for OpenCV (2^30 pixels).
    """
    return decode_image(Path(path).read_bytes(), path)


def decode_image(data: bytes, name: str | Path) -> NDArray[np.uint8]:
    """Decode the content of an image file; see :func:`read_image`.

    Args:
        data: the content.
        name: of the file, for messages.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error as error:
        raise ValueError(
            f"{name} cannot be read by OpenCV, whose limits are 2^20 pixels per side and 2^30 in "
            f"total (see its OPENCV_IO_MAX_IMAGE_PIXELS): {error}"
        ) from error
    # A truncated JPEG is decoded without an error, gray where data is missing.
    is_whole = not data.startswith(b"\xff\xd8") or b"\xff\xd9" in data[-65536:]
    if image is None or not is_whole:
        raise ValueError(
            f"{name} cannot be read as an image: it is damaged, incomplete or of an unknown format"
        )
    return np.asarray(image, np.uint8)


def write_image(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write an image in the format of the file's suffix; an existing file is replaced.

    Args:
        image: ``(H, W, 3)`` uint8, blue, green, red.

    Raises:
        ValueError: no image format has this suffix.
    """
    path = Path(path)
    if not cv2.haveImageWriter(f"a{path.suffix}"):
        raise ValueError(f"{path}: no image format has this suffix; use .png or .jpg")
    write_bytes(path, cv2.imencode(path.suffix, image)[1].tobytes())
