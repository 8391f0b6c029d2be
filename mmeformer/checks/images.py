# SPDX-License-Identifier: Apache-2.0
"""Check that image files are complete, and read their headers."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmeformer.bars import counted
from mmeformer.checks.findings import ERROR, WARNING, Finding
from mmeformer.images import (
    JPEG_END,
    JPEG_START,
    LOADER,
    PLAIN,
    PNG_END,
    PNG_START,
    SIDEWAYS,
    TIFF_STARTS,
    Layout,
    Reading,
    dark_fault,
    decode_fully,
    is_whole,
    largest_value,
    read_layout,
)
from mmeformer.tiff import ORIENTATION

# Pillow's errors for files that are truncated, not images, or too large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

EMPTY = "is empty; copy it again"
TRUNCATED = "is truncated; copy it again"

DEEP_SAMPLES = 20
"""Images of 16 bits whose values are read to tell how many of the bits are used."""


@dataclass(frozen=True)
class ImageFile:
    """Header of an image file.

    Args:
        height, width: in pixels, as OpenCV reads it (after the EXIF rotation).
        layout: bands and depth of a TIFF or PNG file; other formats have pictures of 8 bits.
    """

    height: int
    width: int
    layout: Layout | None


def is_local(path: str) -> bool:
    """Whether a path is a local file and not a URL."""
    return "://" not in str(path)


def quick_fault(path: str) -> str | None:
    """The reason why a local image is unusable, or None; reads a few bytes at both ends.

    OpenCV decodes truncated files and leaves the rest of the image gray. JPEG and PNG files have an
    end marker, so that truncation shows without decoding. Other formats pass.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            # Reading /dev/zero never ends, and opening a pipe waits for who writes to it.
            return "is a folder, a device or a pipe, not a file"
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
    # Some cameras and editors write more data after the end: then read the whole file.
    for first, last in ((PNG_START, PNG_END), (JPEG_START, JPEG_END)):
        if start.startswith(first) and not end.endswith(last):
            return None if is_whole(Path(path).read_bytes()) else TRUNCATED
    return None


def decode_fault(path: str) -> str | None:
    """The reason why a local image cannot be decoded, or None; decodes it as in training."""
    if fault := quick_fault(path):
        return fault
    try:
        layout = read_layout(path)
    except ValueError as error:
        return f"is damaged ({error}); copy it again"
    # Pillow finds more kinds of damage, but does not read all bands and depths.
    if (layout is None or layout.plain) and (fault := _pillow_fault(path)):
        return fault
    try:
        decode_fully(path)
    except ValueError as error:
        text = str(error).removeprefix(f"{path} ")
        return f"cannot be decoded ({text}); save it again as PNG, JPEG or TIFF"
    return None


def read_header(path: str) -> ImageFile:
    """Read the size and pixel format of a local image.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: the file is not an
            image, or is too large (:data:`UNREADABLE`).
    """
    layout = read_layout(path)
    with open(path, "rb") as file:
        # Pillow does not open all of them.
        if layout is not None and file.read(4).startswith(TIFF_STARTS):
            return ImageFile(layout.height, layout.width, layout)
    with Image.open(path) as image:
        width, height = image.size
        # OpenCV rotates it back when it reads the image.
        exif = _png_exif(path) if image.format == "PNG" else image.getexif()
        if exif.get(ORIENTATION) in SIDEWAYS:
            width, height = height, width
        return ImageFile(height, width, layout)


def _png_exif(path: str) -> Image.Exif:
    """EXIF of a PNG file, wherever its chunk is; Pillow decodes all pixels to look for it."""
    exif = Image.Exif()
    with open(path, "rb") as file:
        file.seek(len(PNG_START))
        # Length and name come before the content of a chunk, a checksum after it.
        while len(head := file.read(8)) == 8 and not head.endswith(b"IEND"):
            length = int.from_bytes(head[:4], "big")
            if head.endswith(b"eXIf"):
                exif.load(file.read(length))
                break
            file.seek(length + 4, os.SEEK_CUR)
    return exif


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


def in_threads(function, items: Sequence, text: str = "files read") -> list:
    """``[function(item) for item in items]`` in several threads; for file access.

    Args:
        function: of an item.
        items: such as paths.
        text: of :func:`mmeformer.bars.counted`.
    """
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool:
        found = pool.map(function, items)
        return [next(found) for _ in counted(items, text)]


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
    reading: Reading | None = PLAIN,
) -> list[Finding]:
    """Check existing images; see :func:`check_image`.

    Args:
        paths: local files.
        sizes: (height, width) in pixels by path, as the labels give it.
        decode: decode the images in full.
        reading: settings of the loading step; None if it is not :data:`mmeformer.images.LOADER`.
    """

    def check(path: str) -> Finding | None:
        return check_image(path, None if sizes is None else sizes[path], decode, reading)

    findings = [
        finding for finding in in_threads(check, paths, "images checked") if finding is not None
    ]
    if reading is None or reading.stretch is None:
        bad = {finding.path for finding in findings}
        findings += check_depth([path for path in paths if path not in bad])
    return findings


def check_image(
    path: str,
    size: tuple[int, int] | None = None,
    decode: bool = False,
    reading: Reading | None = PLAIN,
) -> Finding | None:
    """Check an existing image; returns the first problem, or None.

    Args:
        path: a local file.
        size: (height, width) in pixels, as the labels give it.
        decode: decode the image in full instead of reading its header and both ends.
        reading: see :func:`check_images`.
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
    if (fault := layout_fault(header.layout, reading)) is not None:
        return Finding(ERROR, "bands or depth", path, fault)
    return None


def layout_fault(layout: Layout | None, reading: Reading | None) -> str | None:
    """Why the loading step cannot read an image with this header, and what to set; or None.

    Args:
        layout: of a TIFF or PNG file; None for other formats.
        reading: see :func:`check_images`.
    """
    if layout is None:
        return None
    if fault := layout.fault(reading or PLAIN):
        return fault
    # OpenCV takes the upper 8 of 16 bits, but the first band of three that are not marked.
    if reading is None and layout.colors == 3 and not layout.plain and not layout.is_marked:
        return f"has three bands that are not marked as colors; load it with type={LOADER!r}"
    return None


def check_depth(paths: Sequence[str]) -> list[Finding]:
    """A finding if images have 16 bits: an error if the upper 8 are nearly unused."""

    def is_deep(path: str) -> bool:
        layout = read_layout(path)
        return layout is not None and layout.bits > 8

    deep = [path for path, found in zip(paths, in_threads(is_deep, paths), strict=True) if found]
    if not deep:
        return []
    try:
        sample = deep[:: max(1, len(deep) // DEEP_SAMPLES)][:DEEP_SAMPLES]
        fault = dark_fault(max(in_threads(largest_value, sample)))
    except ValueError:
        # A damaged file; training and --full name it.
        return []
    if fault is None:
        text = f"has 16 bits, as {len(deep)} of {len(paths)} images; the upper 8 are read"
        return [Finding(WARNING, "deep image", deep[0], text)]
    text = f"{fault}. The same holds for all {len(sample)} images of 16 bits that were looked at"
    return [Finding(ERROR, "deep image", deep[0], text)]


def _pillow_fault(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except UNREADABLE as error:
        reason = "is not an image" if "identify image" in str(error) else f"is damaged ({error})"
        return f"{reason}; copy it again"
    return None
