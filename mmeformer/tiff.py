# SPDX-License-Identifier: Apache-2.0
"""Read TIFF files of any number of bands, at their full depth, with OpenCV.

OpenCV decodes all compressions, but refuses more than four bands and reads only the first of
several bands that are not marked as colors. Stored bytes do not depend on such marks: ``N``
interleaved bands of ``W`` columns are the same bytes as one band of ``N * W`` columns. So OpenCV
gets the same file with another directory that describes one wide band.

Tags and types: TIFF 6.0 (Adobe, 1992); BigTIFF: https://libtiff.gitlab.io/libtiff/specification/.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_BYTES, PLANAR = 273, 274, 277, 279, 284
PREDICTOR, TILE_WIDTH, TILE_OFFSETS, TILE_BYTES = 317, 322, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SIZES |= {16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_SHORT, _LONG8 = 3, 16

BLACK_IS_ZERO, RGB, CMYK, YCBCR = 1, 2, 5, 6
_CODED_COLORS = (3, CMYK, YCBCR, 8, 9, 10)
"""Palette, CMYK, YCbCr and CIE Lab: only OpenCV's own conversion makes colors of the numbers."""
_JPEG = (6, 7)
_SEPARATE = 2
_NATIVE = "<" if sys.byteorder == "little" else ">"
_HORIZONTAL, _FLOATING = 2, 3
_KINDS = {1: "u", 2: "i", 3: "f"}
# Decoded as unsigned or floating point numbers of that many bits, whatever they mean.
_CARRIERS = {8: 1, 16: 1, 32: 3, 64: 3}
DAMAGED = (struct.error, KeyError, IndexError, OverflowError, ZeroDivisionError)
"""Errors of reading a directory that is not right."""


class Tiff:
    """The first image of a TIFF file.

    Args:
        data: the file: bytes, or a memory map, of which only the directory is read.

    Raises:
        ValueError: not a TIFF file, or its directory is damaged.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        try:
            self._read()
            for tag in (COMPRESSION, PLANAR, PREDICTOR, TILE_WIDTH):
                self._one(tag, 1)
        except DAMAGED as error:
            raise ValueError(f"the directory of the TIFF file is damaged ({error!r})") from None

    def _read(self) -> None:
        start = bytes(self.data[:16])
        self.order = {b"II": "<", b"MM": ">"}[start[:2]]
        self.big = {42: False, 43: True}[struct.unpack(self.order + "H", start[2:4])[0]]
        self._offset = self.order + ("Q" if self.big else "I")
        self._room = 8 if self.big else 4
        place = struct.unpack(self._offset, start[8:16] if self.big else start[4:8])[0]
        length, entry = (8, 20) if self.big else (2, 12)
        count = struct.unpack(
            self.order + ("Q" if self.big else "H"), self.data[place : place + length]
        )[0]
        self.entries: dict[int, tuple[int, int, bytes]] = {}
        """Tag -> type, number of values, and the values or their place in the file."""
        for index in range(min(count, 4096)):
            begin = place + length + index * entry
            raw = bytes(self.data[begin : begin + entry])
            tag, kind = struct.unpack(self.order + "HH", raw[:4])
            size = struct.unpack(self._offset, raw[4 : 4 + self._room])[0]
            self.entries[tag] = kind, size, raw[4 + self._room :]
        self.width, self.height = (self._one(tag) for tag in (WIDTH, HEIGHT))
        self.bands = self._one(SAMPLES, 1)
        bits = set(self._values(BITS) or [1])
        self.bits = bits.pop() if len(bits) == 1 else 0
        self.kind = _KINDS.get(self._one(SAMPLE_FORMAT, 1), "")
        self.photometric = self._one(PHOTOMETRIC, BLACK_IS_ZERO)
        self.orientation = self._one(ORIENTATION, 1)
        # 1 and 2 are opacity; 0 is not specified.
        extra = self._values(EXTRA_SAMPLES)
        self.alpha = bool(extra) and extra[-1] in (1, 2)
        if not (self.width > 0 and self.height > 0 and self.bands > 0):
            raise KeyError("size")

    def _values(self, tag: int) -> list[int]:
        if tag not in self.entries:
            return []
        kind, count, raw = self.entries[tag]
        length = count * _SIZES[kind]
        if length > self._room:
            place = struct.unpack(self._offset, raw)[0]
            raw = self.data[place : place + length]
        return list(struct.unpack(f"{self.order}{count}{_INTEGERS[kind]}", raw[:length]))

    def _one(self, tag: int, default: int | None = None) -> int:
        values = self._values(tag)
        if not values:
            if default is None:
                raise KeyError(tag)
            return default
        return values[0]

    @property
    def has_coded_colors(self) -> bool:
        """Whether only OpenCV's own conversion makes colors of the numbers."""
        is_jpeg = self._one(COMPRESSION, 1) in _JPEG
        return self.photometric in _CODED_COLORS or (is_jpeg and self.bands <= 3)

    @property
    def colors(self) -> int | None:
        """Number of bands that make a picture: 3 of RGB, 1 of gray; None if that is unknown.

        Three bands count as RGB, marked or not.
        """
        if self.photometric == RGB and self.bands >= 3:
            return 3
        others = self.bands - self.alpha
        return others if others in (1, 3) else None

    @property
    def is_plain(self) -> bool:
        """Whether OpenCV's own conversion to a color image does it right."""
        if self.has_coded_colors or self.bits not in _CARRIERS:
            return True
        return self.is_marked and self.bits == 8 and self.kind == "u"

    @property
    def is_marked(self) -> bool:
        """Whether all bands but opacity are marked as gray or RGB."""
        others = self.bands - self.alpha
        return others == 1 or (others == 3 and self.photometric == RGB)

    def read(self, bands: list[int]) -> NDArray[Any]:
        """Decode some bands, numbered from 0: (H, W, len(bands)), as they are stored.

        Raises:
            ValueError: OpenCV cannot decode them, or the directory is damaged.
        """
        try:
            return self._read_bands(bands)
        except DAMAGED as error:
            raise ValueError(f"the directory of the TIFF file is damaged ({error!r})") from None

    def _read_bands(self, bands: list[int]) -> NDArray[Any]:
        if self.bits not in _CARRIERS or not self.kind or self.has_coded_colors:
            raise ValueError(
                f"bands of {self.bits or 'several numbers of'} bits in compression "
                f"{self._one(COMPRESSION, 1)} of TIFF cannot be read"
            )
        dtype = np.dtype(f"{self.kind}{self.bits // 8}")
        if self._one(PLANAR, 1) == _SEPARATE and self.bands > 1:
            planes = [self._restore(self._decode_plane(band)[..., None], dtype) for band in bands]
            return np.concatenate(planes, 2)
        image = self._decode(self._directory(self.bands))
        wide = image.reshape(self.height, -1, self.bands)
        return self._restore(wide, dtype)[..., bands]

    def _decode_plane(self, band: int) -> NDArray[Any]:
        changes = self._directory(1)
        for tag in (STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES):
            if values := self._values(tag):
                share = len(values) // self.bands
                changes[tag] = values[band * share : (band + 1) * share]
        return self._decode(changes)

    def _directory(self, bands: int) -> dict[int, list[int]]:
        """Entries that describe interleaved bands as one; an empty list removes an entry."""
        tile = self._one(TILE_WIDTH, 1)
        # Tiles are stored in full; a predictor can need what lies beyond the image.
        width = -(-self.width // tile) * tile
        changes = {
            WIDTH: [width * bands],
            BITS: [self.bits],
            SAMPLES: [1],
            SAMPLE_FORMAT: [_CARRIERS[self.bits]],
            PHOTOMETRIC: [BLACK_IS_ZERO],
            PLANAR: [1],
            PREDICTOR: [],
            EXTRA_SAMPLES: [],
            ORIENTATION: [],
        }
        if TILE_WIDTH in self.entries:
            changes[TILE_WIDTH] = [tile * bands]
        return changes

    def _decode(self, changes: dict[int, list[int]]) -> NDArray[Any]:
        image = cv2.imdecode(np.frombuffer(self._with(changes), np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None or image.ndim != 2 or image.dtype.itemsize * 8 != self.bits:
            compression = self._one(COMPRESSION, 1)
            raise ValueError(f"OpenCV cannot decode it; its compression of TIFF is {compression}")
        return image

    def _with(self, changes: dict[int, list[int]]) -> bytes:
        """The file with other entries; unchanged ones point to where their values are."""
        entries = {tag: entry for tag, entry in self.entries.items() if tag not in changes}
        body = bytearray(self.data)
        for tag, values in changes.items():
            kind = _LONG8 if self.big else 4
            raw = struct.pack(f"{self._offset[0]}{len(values)}{_INTEGERS[kind]}", *values)
            if tag in (BITS, SAMPLES, SAMPLE_FORMAT, PHOTOMETRIC, PLANAR):
                kind, raw = _SHORT, struct.pack(f"{self.order}{len(values)}H", *values)
            if len(raw) > self._room:
                body += bytes(-len(body) % 8)
                place, body = len(body), body + raw
                raw = struct.pack(self._offset, place)
            if values:
                entries[tag] = kind, len(values), raw.ljust(self._room, b"\0")
        body += bytes(-len(body) % 8)
        place = len(body)
        body += struct.pack(self.order + ("Q" if self.big else "H"), len(entries))
        for tag, (kind, count, raw) in sorted(entries.items()):
            body += struct.pack(f"{self.order}HH{self._offset[1]}", tag, kind, count) + raw
        body += struct.pack(self._offset, 0)
        begin = 8 if self.big else 4
        body[begin : begin + self._room] = struct.pack(self._offset, place)
        return bytes(body)

    def _restore(self, image: NDArray[Any], dtype: np.dtype) -> NDArray[Any]:
        """Undo the predictor and cut off the padding of tiles: (H, W, bands) of ``dtype``.

        Predictors store differences of neighbors, within each row of a tile or of the image.
        """
        predictor, width = self._one(PREDICTOR, 1), self._one(TILE_WIDTH, self.width)
        if predictor == _FLOATING:
            if self.order != _NATIVE:
                image = image.byteswap()
            for start in range(0, image.shape[1], width):
                image[:, start : start + width] = _join_bytes(image[:, start : start + width])
        image = image.view(dtype)
        if predictor == _HORIZONTAL:
            for start in range(0, image.shape[1], width):
                columns = image[:, start : start + width]
                np.cumsum(columns, axis=1, dtype=dtype, out=columns)
        return image[:, : self.width]


def _join_bytes(rows: NDArray[Any]) -> NDArray[Any]:
    """Floating point predictor (Adobe, "TIFF Technical Note 3", 2005) of (H, W, bands).

    A row has the first bytes of all numbers, then their second bytes and so on, the most
    significant first, as differences of neighboring pixels.
    """
    height, width, bands = rows.shape
    size = rows.dtype.itemsize
    coded = np.ascontiguousarray(rows).view(np.uint8).reshape(height, size * width, bands)
    planes = np.cumsum(coded, axis=1, dtype=np.uint8).reshape(height, size, width, bands)
    joined = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return joined.view(rows.dtype.newbyteorder(">"))[..., 0].astype(rows.dtype)
