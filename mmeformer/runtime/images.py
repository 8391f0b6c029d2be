# SPDX-License-Identifier: Apache-2.0
"""Prepare images for the network, with the same steps as OpenMMLab's test pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmeformer.runtime.metadata import Metadata


@dataclass(frozen=True)
class Prepared:
    """An image as input of the network.

    Args:
        data: (3, H, W) ``float32``, normalized; or (H, W, 3) ``uint8`` for a graph that normalizes.
        size: (height, width) in ``data`` that the image covers; the rest is padding.
        original: (height, width) of the image itself.
    """

    data: NDArray[Any]
    size: tuple[int, int]
    original: tuple[int, int]


def prepare(image: NDArray[Any], metadata: Metadata) -> Prepared:
    """Resize, normalize and pad an image (H, W, 3) as described by ``metadata``."""
    original = (image.shape[0], image.shape[1])
    if metadata.shorter_side is not None and metadata.crop is not None:
        image = _center(image, metadata.shorter_side, metadata.crop)
    else:
        image = _resize(image, *_network_size(original, metadata))
    height, width = _to_multiples(image.shape[:2], metadata)
    image = _resize(image, height, width)
    full = _padded((height, width), metadata)
    if metadata.preprocessing_in_graph:
        data = np.zeros((*full, 3), np.uint8)
        data[:height, :width] = image
    else:
        data = np.zeros((3, *full), np.float32)
        data[:, :height, :width] = normalize(image, metadata)
    return Prepared(data, (height, width), original)


def input_size(original: tuple[int, int], metadata: Metadata) -> tuple[int, int]:
    """(height, width) of the network's input, with padding, for an image of ``original`` size."""
    size = metadata.crop or _network_size(original, metadata)
    return _padded(_to_multiples(size, metadata), metadata)


def _to_multiples(size: Sequence[int], metadata: Metadata) -> tuple[int, int]:
    height, width = (_round_up(side, metadata.multiple) for side in size)
    return height, width


def _padded(size: tuple[int, int], metadata: Metadata) -> tuple[int, int]:
    if metadata.size is not None:
        return metadata.size
    height, width = (_round_up(side, metadata.pad_divisor) for side in size)
    return height, width


def normalize(image: NDArray[Any], metadata: Metadata) -> NDArray[Any]:
    """(H, W, 3) ``uint8`` in BGR -> (3, H, W) ``float32``, (image - mean) / std."""
    channels = image[..., ::-1] if metadata.bgr_to_rgb else image
    mean, std = (
        np.array(values, np.float32)[:, None, None] for values in (metadata.mean, metadata.std)
    )
    normalized: NDArray[Any] = (channels.transpose(2, 0, 1).astype(np.float32) - mean) / std
    return normalized


def _network_size(original: tuple[int, int], metadata: Metadata) -> tuple[int, int]:
    """(height, width) to resize to, without padding."""
    if metadata.size is not None and metadata.export.stretches:
        return metadata.size
    height, width = original
    if metadata.scale is None:
        factor = 1.0
    elif metadata.keep_ratio:
        factor = min(
            max(metadata.scale) / max(height, width), min(metadata.scale) / min(height, width)
        )
    else:
        return metadata.size or metadata.scale[::-1]
    if metadata.size is not None:
        factor = min(factor, metadata.size[0] / height, metadata.size[1] / width)
    height, width = (max(int(side * float(factor) + 0.5), 1) for side in original)
    if metadata.size is not None:
        # Rounding may go one pixel beyond.
        return min(height, metadata.size[0]), min(width, metadata.size[1])
    return height, width


def _resize(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _center(image: NDArray[Any], side: int, crop: tuple[int, int]) -> NDArray[Any]:
    """Resize the shorter side, then cut out the center; as mmpretrain's ResizeEdge, CenterCrop."""
    height, width = image.shape[:2]
    if width < height:
        height, width = int(side * height / width), side
    else:
        height, width = side, int(side * width / height)
    image = resize_bicubic(image, height, width)
    top, left = (round((full - part) / 2) for full, part in zip((height, width), crop, strict=True))
    return image[top : top + crop[0], left : left + crop[1]]


PRECISION = 22
"""Bits after the point of Pillow's weights for images of 8 bits."""


def resize_bicubic(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Resize (H, W, C) ``uint8`` with Pillow's bicubic filter.

    Unlike OpenCV's, this filter grows with the step between pixels, so that shrinking averages. In
    each direction the pixels are Pillow's own. The width comes first, as in Pillow before 13, which
    chooses the order: both round in between, so their pixels may differ by that rounding.
    Source: Pillow, ``src/libImaging/Resample.c``.
    """
    image = _resample(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return np.ascontiguousarray(_resample(image, height))


def _resample(image: NDArray[Any], length: int) -> NDArray[Any]:
    """Resize the first axis of ``uint8`` to ``length``."""
    full = image.shape[0]
    if full == length:
        return image
    scale = full / length
    stretch = max(scale, 1.0)
    centers = (np.arange(length) + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), full)
    places = first[:, None] + np.arange((last - first).max())
    distance = np.abs((places - centers[:, None] + 0.5) / stretch)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights[places >= last[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    # Rounded half away from zero.
    numbers = np.trunc(weights * 2**PRECISION + np.copysign(0.5, weights)).astype(np.int32)
    places = np.minimum(places, full - 1)
    total = np.full((length, *image.shape[1:]), 1 << (PRECISION - 1), np.int32)
    for tap in range(places.shape[1]):
        total += image[places[:, tap]].astype(np.int32) * numbers[:, tap, None, None]
    resized: NDArray[Any] = np.clip(total >> PRECISION, 0, 255).astype(np.uint8)
    return resized


def _round_up(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor
