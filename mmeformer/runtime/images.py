# SPDX-License-Identifier: Apache-2.0
"""Prepare images for the network, with the same steps as OpenMMLab's test pipelines."""

from __future__ import annotations

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
    height, width = _network_size(original, metadata)
    image = _resize(image, height, width)
    if metadata.multiple > 1:
        height, width = (_round_up(side, metadata.multiple) for side in (height, width))
        image = _resize(image, height, width)
    full = metadata.size or tuple(_round_up(side, metadata.pad_divisor) for side in (height, width))
    if metadata.preprocessing_in_graph:
        data = np.zeros((*full, 3), np.uint8)
        data[:height, :width] = image
    else:
        data = np.zeros((3, *full), np.float32)
        data[:, :height, :width] = normalize(image, metadata)
    return Prepared(data, (height, width), original)


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


def _round_up(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor
