# SPDX-License-Identifier: Apache-2.0
"""Check that image files are complete, and read their headers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
from PIL import Image

from mmeformer.checks.findings import ERROR, WARNING, Finding

# EXIF: the image is stored rotated by 90 degrees. OpenCV rotates it back when reading.
ORIENTATION_TAG = 274
SIDEWAYS = (5, 6, 7, 8)
# Pillow's errors for files that are truncated, not images, or too large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
EMPTY = "is empty; copy it again"
TRUNCATED = "is truncated; copy it again"


@dataclass(frozen=True)
class ImageFile:
    """Header of an image file.

    Args:
        height, width: in pixels, as OpenCV reads it (after the EXIF rotation).
        mode: Pillow's name of the pixel format, such as ``RGB``, ``L`` or ``I;16``.
    """

    height: int
    width: int
    mode: str


def is_local(path: str) -> bool:
    """Whether a path is a local file and not a URL."""
    return "://" not in str(path)


def quick_fault(path: str) -> str | None:
    """The reason why a local image is unusable, or None; reads a few bytes at both ends.

    OpenCV decodes truncated files and leaves the rest of the image gray. JPEG and PNG files have an
    end marker, so that truncation shows without decoding. Other formats pass.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if not start:
                return EMPTY
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16))
            end = file.read()
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    # Some cameras and editors write more data after the end marker: then read the whole file.
    if start == PNG_START and not end.endswith(PNG_END):
        return None if PNG_END in Path(path).read_bytes() else TRUNCATED
    if start.startswith(JPEG_START) and not end.endswith(JPEG_END):
        return _pillow_fault(path)
    return None


def decode_fault(path: str) -> str | None:
    """The reason why a local image cannot be decoded, or None; decodes it as in training."""
    if fault := quick_fault(path) or _pillow_fault(path):
        return fault
    try:
        if cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is None:
            return "cannot be decoded by OpenCV; save it again as PNG or JPEG"
    except cv2.error as error:
        return f"cannot be decoded by OpenCV ({error.err}); save it again as PNG or JPEG"
    return None


def read_header(path: str) -> ImageFile:
    """Read the size and pixel format of a local image.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: the file is not an
            image, or is too large (:data:`UNREADABLE`).
    """
    with Image.open(path) as image:
        width, height = image.size
        if image.getexif().get(ORIENTATION_TAG) in SIDEWAYS:
            width, height = height, width
        return ImageFile(height, width, image.mode)


def sample_sides(paths: Sequence[str], limit: int) -> list[int]:
    """Longer sides in pixels of up to ``limit`` images, spread evenly over all; skips bad files."""
    step = max(1, len(paths) // limit)

    def side(path: str) -> int | None:
        try:
            header = read_header(path)
        except UNREADABLE:
            return None
        return max(header.height, header.width)

    sides = in_threads(side, [path for path in paths[::step][:limit] if is_local(path)])
    return [side for side in sides if side is not None]


def in_threads(function, items: Sequence) -> list:
    """``[function(item) for item in items]`` in several threads; for file access."""
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool:
        return list(pool.map(function, items))


def find_missing(paths: Sequence[str]) -> list[Finding]:
    """Find local images that do not exist.

    Lists folders instead of testing each file, which is faster on network disks.
    """
    existing: dict[str, set[str]] = {}
    findings = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in existing:
            existing[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in existing[folder]:
            findings.append(
                Finding(ERROR, "missing image", path, "does not exist; add it or remove its entry")
            )
    return findings


def check_images(
    paths: Sequence[str],
    sizes: Mapping[str, tuple[int, int]] | None = None,
    decode: bool = False,
) -> list[Finding]:
    """Check existing images; see :func:`check_image`.

    Args:
        paths: local files.
        sizes: (height, width) in pixels by path, as the labels give it.
        decode: decode the images in full.
    """

    def check(path: str) -> Finding | None:
        return check_image(path, None if sizes is None else sizes[path], decode)

    return [finding for finding in in_threads(check, paths) if finding is not None]


def check_image(
    path: str, size: tuple[int, int] | None = None, decode: bool = False
) -> Finding | None:
    """Check an existing image; returns the first problem, or None.

    Args:
        path: a local file.
        size: (height, width) in pixels, as the labels give it.
        decode: decode the image in full instead of reading its header and both ends.
    """
    if fault := decode_fault(path) if decode else quick_fault(path):
        return Finding(ERROR, "unreadable image", path, fault)
    try:
        header = read_header(path)
    except UNREADABLE as error:
        return Finding(ERROR, "unreadable image", path, f"cannot be read ({error}); copy it again")
    if size is not None and size != (header.height, header.width):
        return Finding(
            ERROR,
            "wrong size",
            path,
            f"is {header.width} x {header.height} px, but its labels are for {size[1]} x "
            f"{size[0]} px; correct width and height, or use the image that was labeled",
        )
    if header.mode.startswith(("I", "F")):
        return Finding(
            WARNING,
            "deep image",
            path,
            f"has more than 8 bits per channel ({header.mode}); it is read as 8 bits (of 16 bits "
            "the upper 8), so that dark images become black. Convert it to 8 bits yourself",
        )
    return None


def _pillow_fault(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except UNREADABLE as error:
        reason = "is not an image" if "identify image" in str(error) else f"is damaged ({error})"
        return f"{reason}; copy it again"
    return None
