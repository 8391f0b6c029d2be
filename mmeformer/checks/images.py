# SPDX-License-Identifier: Apache-2.0
"""Whether image files are whole, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
from PIL import Image

from mmeformer.checks.findings import ERROR, WARNING, Finding

# EXIF: the picture is stored lying on its side. OpenCV turns it when it is read.
ORIENTATION_TAG = 274
SIDEWAYS = (5, 6, 7, 8)
# What Pillow raises for files that are cut off, no pictures, or larger than it will read.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
EMPTY = "is empty; copy it again"
CUT_OFF = "is cut off; copy it again"


@dataclass(frozen=True)
class ImageFile:
    """What the header of an image file says.

    Args:
        height, width: in pixels, as OpenCV reads it (turned as its EXIF orientation says).
        mode: Pillow's name of the kind of pixels, such as ``RGB``, ``L`` or ``I;16``.
    """

    height: int
    width: int
    mode: str


def is_local(path: str) -> bool:
    """Whether a path lies on this machine's disks, and not behind an address."""
    return "://" not in str(path)


def quick_fault(path: str) -> str | None:
    """Why a local image cannot be whole, or None; reads a few bytes at both ends.

    OpenCV decodes files that are cut off: the rest of the picture is grey. JPEG and PNG files say
    where they end, which tells such a file without decoding it. Other formats pass here.
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
    # Some cameras and editors write more after the end: then the whole file has to be looked at.
    if start == PNG_START and not end.endswith(PNG_END):
        return None if PNG_END in Path(path).read_bytes() else CUT_OFF
    if start.startswith(JPEG_START) and not end.endswith(JPEG_END):
        return _pillow_fault(path)
    return None


def decode_fault(path: str) -> str | None:
    """Why a local image cannot be decoded, or None; decodes it as training does."""
    if fault := quick_fault(path) or _pillow_fault(path):
        return fault
    try:
        if cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is None:
            return "cannot be decoded by OpenCV; save it again as PNG or JPEG"
    except cv2.error as error:
        return f"cannot be decoded by OpenCV ({error.err}); save it again as PNG or JPEG"
    return None


def read_header(path: str) -> ImageFile:
    """Size and kind of a local image.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: it is no image, or too
            large (:data:`UNREADABLE`).
    """
    with Image.open(path) as image:
        width, height = image.size
        if image.getexif().get(ORIENTATION_TAG) in SIDEWAYS:
            width, height = height, width
        return ImageFile(height, width, image.mode)


def in_threads(function, items: Sequence) -> list:
    """``[function(item) for item in items]``, several at a time; for work on files."""
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool:
        return list(pool.map(function, items))


def find_missing(paths: Sequence[str]) -> list[Finding]:
    """Name local images that do not exist; lists their folders, which is quick on any disk."""
    there: dict[str, set[str]] = {}
    findings = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in there[folder]:
            findings.append(
                Finding(ERROR, "missing image", path, "does not exist; add it or take it out")
            )
    return findings


def check_image(path: str, size: tuple[int, int] | None = None, decode: bool = False):
    """The :class:`Finding` about an image that exists, or None.

    Args:
        path: a local file.
        size: (height, width) in pixels that the labels say it has.
        decode: read all of it, not only its ends and its header.
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
            f"{size[0]} px; correct width and height, or take the image that was labelled",
        )
    if header.mode.startswith(("I", "F")):
        return Finding(
            WARNING,
            "deep image",
            path,
            f"has more than 8 bits per channel ({header.mode}); it is read as 8 bits, of 16 the "
            "upper ones, so that dark scales become black. Convert it with a scale of your choice",
        )
    return None


def _pillow_fault(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except UNREADABLE as error:
        reason = "is no image" if "identify image" in str(error) else f"is damaged ({error})"
        return f"{reason}; copy it again"
    return None
