# SPDX-License-Identifier: Apache-2.0
"""Read and write image files: complete ones, of any depth and number of bands.

Every part of the project reads pixels with this module: checks, training, splitting, prediction
and the runtime. It needs only numpy and OpenCV.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmeformer.files import write_bytes
from mmeformer.tiff import ORIENTATION, Tiff

PERCENTILE = "percentile"
"""``stretch`` from the 2nd to the 98th percentile of each band of each image."""
PERCENTILES = (2, 98)
SAMPLED = 2**22
"""About this many pixels of a band are enough for its percentiles."""

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# In the coded pixels of a JPEG, 0xFF is followed by 0 or is one of the restart markers D0 to D7.
# (A literal first byte makes the search fast.)
_JPEG_MARKER = re.compile(rb"\xff\xff*([\x01-\xcf\xd8-\xfe])")
_JPEG_STOP = 0xD9
_JPEG_ALONE = (0x01, *range(0xD0, 0xD9))
"""Markers without a length."""

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""Suffixes of the files that are looked for in folders."""

DEFLATE = 1032
"""Bytes that one byte of a PNG file can stand for (zlib, "Maximum Compression Factor")."""

SIDEWAYS = (5, 6, 7, 8)
"""Orientations of TIFF and EXIF that exchange height and width."""

LOADER = "mmeformer.LoadImageFromFile"
"""The loading step of pipelines that has these settings."""


@dataclass(frozen=True)
class Reading:
    """How imagery of many bands or of more than 8 bits becomes three channels of 8 bits.

    Args:
        bands: numbers of the bands for red, green and blue, from 1 as in GDAL; or one for gray.
            None takes those that the file marks as colors; files without are an error.
        stretch: ``(low, high)``: values up to ``low`` become 0, from ``high`` on 255, and those
            between change evenly. ``"percentile"`` chooses both for each band of each image
            (:data:`PERCENTILES`), which changes the colors between images. None takes the upper 8
            of 16 bits; other numbers are an error.

    Pictures, that is gray or RGB images of 8 bits, stay as they are: the same settings serve raw
    imagery and the patches that were cut from it.

    Raises:
        ValueError: a setting is invalid.
    """

    bands: Sequence[int] | None = None
    stretch: Sequence[float] | str | None = None

    def __post_init__(self) -> None:
        if self.bands is not None:
            bands = tuple(self.bands) if isinstance(self.bands, Iterable) else (self.bands,)
            if len(bands) not in (1, 3) or not all(type(b) is int and b > 0 for b in bands):
                raise ValueError(
                    f"bands must be three numbers from 1, such as (3, 2, 1), or one, not {bands}"
                )
            object.__setattr__(self, "bands", bands)
        if self.stretch is None or self.stretch == PERCENTILE:
            return
        limits: Any = self.stretch
        if (
            isinstance(limits, str)
            or not isinstance(limits, Sequence)
            or len(limits) != 2
            or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in limits)
            or not limits[0] < limits[1]
        ):
            raise ValueError(
                f"stretch must be (low, high), such as (0, 4095), or {PERCENTILE!r}, not {limits!r}"
            )
        object.__setattr__(self, "stretch", (limits[0], limits[1]))

    @classmethod
    def of_config(cls, pipeline: Sequence[Mapping[str, Any]]) -> Reading:
        """The settings of the loading step in the config of a pipeline."""
        for step in pipeline:
            kind = step["type"]
            name = kind if isinstance(kind, str) else kind.__name__
            if name.rpartition(".")[2] == "LoadImageFromFile":
                return cls(step.get("bands"), step.get("stretch"))
        return cls()

    @classmethod
    def of_built(cls, steps: Sequence[Any]) -> Reading | None:
        """The settings of the loading step of a built pipeline.

        A pipeline that loads no image has the default; one with another loading step has None.
        """
        for step in steps:
            if isinstance(getattr(step, "reading", None), cls):
                return step.reading
            if type(step).__name__.startswith("LoadImage"):
                return None
        return cls()


PLAIN = Reading()


@dataclass(frozen=True)
class Layout:
    """Size, bands and depth of an image file, from its header.

    Args:
        height, width: in pixels, as the image is shown.
        bands: number of bands.
        bits: per number.
        kind: of the numbers: ``u`` unsigned, ``i`` signed, ``f`` floating point.
        colors: number of bands that make a picture (3 or 1), or None if that is unknown.
        alpha: whether the last band is opacity.
        plain: whether OpenCV's own conversion to a color image does it right.
        is_marked: whether the file says which bands are colors.
    """

    height: int
    width: int
    bands: int
    bits: int
    kind: str
    colors: int | None
    alpha: bool = False
    plain: bool = True
    is_marked: bool = True

    @property
    def is_picture(self) -> bool:
        """Whether this is a gray or RGB image of 8 bits."""
        return self.kind == "u" and self.bits <= 8 and self.colors == self.bands - self.alpha

    def fault(self, reading: Reading = PLAIN) -> str | None:
        """Why an image cannot be read with these settings, and what to set; or None."""
        if self.is_picture:
            return None
        if reading.bands is None and self.colors is None:
            return (
                f"has {self.bands} bands, and none are marked as colors; choose three: bands=(3, "
                f"2, 1) for red, green and blue in {LOADER}, or --bands 3 2 1 of mmeformer "
                "split-dota"
            )
        if reading.bands is not None and max(reading.bands) > self.bands:
            return f"has only {self.bands} bands, but bands={reading.bands} were chosen"
        if reading.stretch is None and not (self.kind == "u" and self.bits <= 16):
            kind = {"u": "unsigned", "i": "signed", "f": "floating point"}[self.kind]
            return f"has {kind} numbers of {self.bits} bits; {set_stretch('0, 1000')}"
        return None


def set_stretch(example: str) -> str:
    """Advice for an image whose depth needs a setting."""
    return (
        f"say which values become black and white: stretch=({example}) in {LOADER}, or "
        f"--stretch {example.replace(',', '')} of mmeformer split-dota"
    )


def dark_fault(largest: float) -> str | None:
    """Why the upper 8 of 16 bits are nearly black, given the largest value of an image; or None."""
    if largest >= 2**15:
        return None
    white = 2 ** max(int(largest).bit_length(), 8) - 1
    return (
        f"has 16 bits, but values up to {largest:g} only, so that its upper 8 bits are nearly "
        f"black; {set_stretch(f'0, {white}')}"
    )


def read_layout(path: str | Path) -> Layout | None:
    """Read the header of a TIFF or PNG file; None for other formats, which OpenCV reads as 8 bits.

    Raises:
        OSError: the file cannot be read.
        ValueError: the header is damaged.
    """
    if not Path(path).is_file():
        # Opening a pipe waits for who writes to it.
        raise FileNotFoundError(f"{path} is missing, or a folder, a device or a pipe")
    with open(path, "rb") as file:
        start = file.read(33)
        if not start.startswith((*TIFF_STARTS, PNG_START)):
            return None
        if start.startswith(PNG_START):
            return _layout(start)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _layout(data)


def _layout(data: Any) -> Layout | None:
    start = bytes(data[:33])
    if start.startswith(TIFF_STARTS):
        tiff = Tiff(data)
        height, width = tiff.height, tiff.width
        if tiff.orientation in SIDEWAYS:
            height, width = width, height
        if tiff.has_coded_colors:
            return Layout(height, width, 3, 8, "u", 3)
        bits, kind = tiff.bits or 8, tiff.kind or "u"
        marks = dict(alpha=tiff.alpha, plain=tiff.is_plain, is_marked=tiff.is_marked)
        return Layout(height, width, tiff.bands, bits, kind, tiff.colors, **marks)
    if start.startswith(PNG_START) and len(start) == 33:
        width, height, bits, color = struct.unpack(">IIBB", start[16:26])
        # Bit 1: colors (with bit 0 from a palette); bit 2: opacity.
        colors = 3 if color & 2 else 1
        return Layout(height, width, colors, bits, "u", colors, plain=bits <= 8)
    return None


def read_image(
    path: str | Path,
    reading: Reading = PLAIN,
    on_dark: Callable[[str], None] | None = None,
) -> NDArray[np.uint8]:
    """Read an image as ``(H, W, 3)`` uint8, blue, green, red.

    Args:
        path: the file.
        reading: of imagery.
        on_dark: called with a text if the image is nearly black without a ``stretch``; None warns
            once per process.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be decoded, is incomplete, is too large for OpenCV (2^30 pixels), or
            needs other settings.
    """
    return decode_image(Path(path).read_bytes(), path, reading, on_dark)


def decode_image(
    data: bytes,
    name: str | Path,
    reading: Reading = PLAIN,
    on_dark: Callable[[str], None] | None = None,
) -> NDArray[np.uint8]:
    """Decode the content of an image file; see :func:`read_image`.

    Args:
        data: the content.
        name: of the file, for messages.
        reading, on_dark: see :func:`read_image`.
    """
    image = _decode(data, name, reading)
    if image.dtype == np.uint8:
        return np.asarray(image, np.uint8)
    if reading.stretch is not None:
        return _stretched(image, reading.stretch)
    if image.dtype != np.uint16:
        raise ValueError(f"{name} has numbers of {image.dtype}; {set_stretch('0, 1')}")
    if (fault := dark_fault(image.max())) is not None:
        (on_dark or _warn_once)(f"{name} {fault}")
    return (image >> 8).astype(np.uint8)


def decode_fully(path: str | Path) -> None:
    """Decode all bands of an image.

    Raises:
        OSError, ValueError: they cannot be decoded.
    """
    data = Path(path).read_bytes()
    layout = _layout(data)
    if layout is not None and not layout.plain and data.startswith(TIFF_STARTS):
        Tiff(data).read(list(range(layout.bands)))
    else:
        _decode(data, path, PLAIN)


TOO_THIN = "is too thin: a side would be resized to 0 px"


def is_too_thin(error: Exception) -> bool:
    """Whether a pipeline failed as it resized a side to 0; OpenCV does not say so."""
    return isinstance(error, cv2.error) and "inv_scale" in str(error)


def largest_value(path: str | Path, reading: Reading = PLAIN) -> float:
    """The largest number of an image, at its full depth; see :func:`read_image`."""
    return float(_decode(Path(path).read_bytes(), path, reading).max())


def is_whole(data: bytes) -> bool:
    """Whether the content of a JPEG or PNG file reaches its end; other formats pass.

    OpenCV decodes a truncated JPEG without an error, gray where data is missing. There may be more
    data after the end, and the preview of a truncated JPEG has an end of its own; so this follows
    the markers of the image itself (ITU-T T.81, annex B).
    """
    if data.startswith(PNG_START):
        return data.endswith(PNG_END) or PNG_END in data
    if not data.startswith(JPEG_START) or data.endswith(JPEG_END):
        return True
    place, size = 2, len(data)
    while (found := _JPEG_MARKER.search(data, place)) is not None:
        marker, place = found[1][0], found.end()
        if marker == _JPEG_STOP:
            return True
        if marker in _JPEG_ALONE:
            continue
        if place + 2 > size:
            return False
        place += int.from_bytes(data[place : place + 2], "big")
    return False


def _decode(data: bytes, name: str | Path, reading: Reading) -> NDArray[Any]:
    """(H, W, 3) at the full depth, blue, green, red."""
    damaged = ValueError(
        f"{name} cannot be read as an image: it is damaged, incomplete or of an unknown format"
    )
    try:
        layout = _layout(data)
    except ValueError:
        raise damaged from None
    if layout is not None and (fault := layout.fault(reading)) is not None:
        raise ValueError(f"{name} {fault}")
    if not data or not is_whole(data):
        raise damaged
    if (
        layout is not None
        and data.startswith(PNG_START)
        and layout.height * layout.width * layout.bands * layout.bits > 8 * DEFLATE * len(data)
    ):
        raise ValueError(
            f"{name} claims to have {layout.width} x {layout.height} pixels, more than its "
            f"{len(data)} bytes can hold: it is damaged"
        )
    try:
        if layout is not None and not layout.plain and data.startswith(TIFF_STARTS):
            return _read_bands(Tiff(data), layout, reading)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        raise ValueError(
            f"{name} cannot be read by OpenCV, whose limits are 2^20 pixels per side and 2^30 in "
            f"total (see its OPENCV_IO_MAX_IMAGE_PIXELS): {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{damaged} ({error})") from error
    if image is None:
        raise damaged
    if layout is not None and not layout.plain and reading.bands is not None:
        # A PNG file of 16 bits. OpenCV has red last.
        image = image[..., [3 - min(band, layout.bands) for band in _three(reading.bands)][::-1]]
    return image


def _three(bands: Sequence[int]) -> list[int]:
    return list(bands) * (3 // len(bands))


def _read_bands(tiff: Tiff, layout: Layout, reading: Reading) -> NDArray[Any]:
    bands: Sequence[int] = range(1, (layout.colors or 1) + 1)
    if reading.bands is not None and not layout.is_picture:
        bands = reading.bands
    image = tiff.read([band - 1 for band in _three(bands)])
    return np.ascontiguousarray(upright(image, tiff.orientation)[..., ::-1])


def upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn and flip an image (H, W, C) as tag 274 of TIFF and EXIF says."""
    if orientation in SIDEWAYS:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


def _stretched(image: NDArray[Any], stretch: Sequence[float] | str) -> NDArray[np.uint8]:
    """Scale each channel of (H, W, 3) to 0 to 255; numbers that are not finite become 0 or 255."""
    result = np.empty(image.shape, np.uint8)
    for channel in range(image.shape[2]):
        band = image[..., channel].astype(np.float32)
        low, high = _percentiles(band) if isinstance(stretch, str) else stretch
        band = (band - np.float32(low)) * np.float32(255 / (high - low))
        result[..., channel] = np.rint(np.nan_to_num(band, nan=0).clip(0, 255))
    return result


def _percentiles(band: NDArray[np.float32]) -> tuple[float, float]:
    step = max(1, math.isqrt(band.size // SAMPLED))
    sample = band[::step, ::step]
    sample = sample[np.isfinite(sample)]
    low, high = map(float, np.percentile(sample, PERCENTILES)) if sample.size else (0.0, 1.0)
    return (low, high) if low < high else (low, low + 1)


_warned = False


def _warn_once(text: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{text} (said once)", stacklevel=4)


Image = Any
"""A path, the content of a file (``bytes``), a binary file object, a Pillow image, or an array of
``uint8``: (H, W) or (H, W, 1) gray, (H, W, 3) BGR or (H, W, 4) BGRA."""


def as_image(image: Image, reading: Reading = PLAIN) -> NDArray[Any]:
    """Make an array (H, W, 3) of ``uint8`` in BGR; opacity is left out.

    Args:
        image: file or array.
        reading: of imagery in files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image.
        TypeError: none of the kinds of :data:`Image`.
    """
    if isinstance(image, np.ndarray):
        return _three_channels(image)
    if isinstance(image, (str, Path)):
        return read_image(image, reading)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), "the image", reading)
    if callable(getattr(image, "getbands", None)):
        return _from_pillow(image)
    if callable(getattr(image, "read", None)):
        content = image.read()
        if isinstance(content, bytes):
            return decode_image(content, getattr(image, "name", "the file object"), reading)
        raise TypeError("a file object must be opened in binary mode, as by open(path, 'rb')")
    raise TypeError(
        "an image is a path, bytes, a binary file object, a Pillow image or an array of uint8, not "
        f"{type(image).__name__}"
    )


def _three_channels(image: NDArray[Any]) -> NDArray[Any]:
    channels = 1 if image.ndim == 2 else image.shape[-1]
    if (
        image.ndim not in (2, 3)
        or channels not in (1, 3, 4)
        or image.dtype != np.uint8
        or not image.size
    ):
        raise ValueError(
            "an image array must be (H, W), (H, W, 1), (H, W, 3) in BGR or (H, W, 4) in BGRA, of "
            f"uint8, but is {image.shape} of {image.dtype}"
        )
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., :3]


def _from_pillow(image: Any) -> NDArray[Any]:
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"the Pillow image has the mode {image.mode}, more than 8 bits per channel; convert it "
            "to RGB yourself, scaled as in training"
        )
    pixels = np.asarray(image.convert("RGB"))[..., ::-1]
    # As OpenCV does when it reads a file.
    turned = upright(pixels, image.getexif().get(ORIENTATION, 1))
    return np.ascontiguousarray(turned)


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
