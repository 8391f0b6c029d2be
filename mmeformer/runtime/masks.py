# SPDX-License-Identifier: Apache-2.0
"""Masks of the light detector: logits on a map of the whole input, and pixels of the image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmeformer.results import Mask

Array = NDArray[Any]


def dynamic_masks(kernels: Array, features: Array) -> Array:
    """Mask logits (N, H, W): three 1x1 convolutions with weights of each object's own.

    Source: RTMDet-Ins (arXiv 2212.07784, section 3.4).

    Args:
        kernels: (N, P), weights of all layers, then biases of all layers.
        features: (C, H, W), the input of all objects; the first two are x and y in pixels.
    """
    count, numbers = kernels.shape
    channels = features.shape[0]
    # P = C D + D D + D weights and D + D + 1 biases.
    hidden = round((math.sqrt((channels + 3) ** 2 + 4 * (numbers - 1)) - channels - 3) / 2)
    shapes = ((hidden, channels), (hidden, hidden), (1, hidden))
    sizes = [*(rows * columns for rows, columns in shapes), hidden, hidden, 1]
    parts = np.split(kernels, np.cumsum(sizes)[:-1], 1)
    x = features.reshape(1, channels, -1)
    for index, shape in enumerate(shapes):
        x = parts[index].reshape(count, *shape) @ x + parts[3 + index][..., None]
        if index < 2:
            x = np.maximum(x, 0)
    return x.reshape(count, *features.shape[1:])


def masks_of_maps(
    logits: Array,
    threshold: float,
    full: tuple[int, int],
    size: tuple[int, int],
    original: tuple[int, int],
) -> tuple[Mask, ...]:
    """Masks of the pixels whose probability exceeds a threshold.

    The map is resized to the network's input, that to the image, both bilinearly. Source: mmdet's
    ``RTMDetInsHead._bbox_mask_post_process``.

    Args:
        logits: (N, H, W), of the whole input.
        threshold: probability, between 0 and 1.
        full: (height, width) of the network's input.
        size: (height, width) of the image in the input; the rest is padding.
        original: (height, width) of the image itself.
    """
    limit = math.log(threshold / (1 - threshold))
    down, across = (
        # Written as in mmdet, whose rounding error can add a row.
        bilinear(math.ceil(full[axis] * (1 / (size[axis] / original[axis]))), full[axis])[
            : original[axis]
        ]
        @ bilinear(full[axis], logits.shape[1 + axis])
        for axis in (0, 1)
    )
    return tuple(_mask(map, limit, down, across) for map in logits)


def bilinear(new: int, old: int) -> Array:
    """Weights (new, old) of linear interpolation, as PyTorch's ``interpolate`` has them."""
    centers = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    weights: Array = np.maximum(1 - np.abs(centers[:, None] - np.arange(old)), 0)
    return weights.astype(np.float32)


def _mask(logits: Array, limit: float, down: Array, across: Array) -> Mask:
    """The mask of one map; ``down`` (rows, H) and ``across`` (columns, W) interpolate it."""
    inside = logits > limit
    # Only near cells above the limit can pixels be.
    rows, columns = (
        np.flatnonzero(weights[:, inside.any(axis)].any(1))
        for weights, axis in ((down, 1), (across, 0))
    )
    if not len(rows) or not len(columns):
        return Mask(0, 0, 0, 0, b"")
    top, left = int(rows[0]), int(columns[0])
    pixels = down[top : rows[-1] + 1] @ logits @ across[left : columns[-1] + 1].T > limit
    return Mask.from_array(pixels, left, top)
