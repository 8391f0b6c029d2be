# SPDX-License-Identifier: Apache-2.0
"""Read videos frame by frame, and tell finished files from truncated ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from mmeformer.checks.images import quick_fault

LEAST_SHARE = 0.9
"""A video with less than this share of the frames that its header announces counts as truncated, if
the header counts and does not estimate them."""
ESTIMATED = (".mpeg", ".mpg")
"""Formats whose header has neither a number of frames nor a duration."""
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


class Video:
    """Frames of a video, read one at a time.

    Args:
        path: of the video.

    Attributes:
        fps: frames per second.
        expected: number of frames that the header announces, a hint; 0 if it does not tell.

    Raises:
        ValueError: it cannot be opened as a video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if fault := quick_fault(str(path)):
            raise ValueError(f"{path} {fault}")
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise ValueError(self._unreadable)
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < float("inf") else 25.0
        # Without a duration in the header, OpenCV computes some huge or negative number.
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.expected = int(count) if 0 < count < 2**31 else 0

    @property
    def _unreadable(self) -> str:
        return f"{self.path} cannot be read as a video: it is damaged or not a video"

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames, ``(H, W, 3)`` uint8, blue, green, red.

        Raises:
            ValueError: there is no frame; or, after the last one, many frames are missing.
        """
        count = 0
        while True:
            found, frame = self._capture.read()
            if not found:
                break
            count += 1
            yield frame
        if not count:
            raise ValueError(self._unreadable)
        if count < LEAST_SHARE * self.expected and is_unfinished(self.path):
            raise ValueError(
                f"{self.path} is truncated or damaged: only {count} of {self.expected} frames "
                "could be read"
            )


def is_unfinished(path: Path) -> bool:
    """Whether a video with fewer frames than its header announces was cut off.

    Matroska and WebM only have a duration, that of the longest track, from which OpenCV computes
    the number of frames; so do fragments of MP4. What counts there is whether the file reaches the
    end of its outermost elements. A live recording does not say where it ends.
    """
    with open(path, "rb") as file:
        start = file.read(12)
        file.seek(0)
        if start.startswith(_EBML):
            return _segment_end(file) > path.stat().st_size
        if start[4:8] == b"ftyp":
            is_cut, is_fragmented = _boxes(file, path.stat().st_size)
            return is_cut or not is_fragmented
    return path.suffix.lower() not in ESTIMATED


def _boxes(file: BinaryIO, size: int) -> tuple[bool, bool]:
    """Whether the boxes of an MP4 file go beyond its end, and whether it has fragments.

    Source: ISO/IEC 14496-12, 4.2: length (4 bytes; 0: to the end; 1: in 8 more bytes) and type.
    """
    place, is_fragmented = 0, False
    while place < size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        is_fragmented |= head[4:8] == b"moof"
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            break
        if length < 8 or place + length > size:
            return True, is_fragmented
        place += length
    return False, is_fragmented


def _segment_end(file: BinaryIO) -> int:
    """Where the segment of a Matroska file ends; 0 if it does not say so.

    Source: RFC 8794: an element has an id and a length of 1 to 8 bytes; leading zeros of the first
    byte tell how many. A length of ones only is unknown.
    """
    for wanted in (_EBML, _SEGMENT):
        if file.read(4) != wanted:
            return 0
        first = file.read(1)
        more = 8 - first[0].bit_length() if first else 8
        if more > 7:
            return 0
        raw = first + file.read(more)
        ones = (1 << 7 * (more + 1)) - 1
        length = int.from_bytes(raw, "big") & ones
        if wanted == _SEGMENT:
            return 0 if length == ones else file.tell() + length
        file.seek(length, os.SEEK_CUR)
    return 0
