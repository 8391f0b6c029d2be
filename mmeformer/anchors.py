# SPDX-License-Identifier: Apache-2.0
"""Anchors and constants on the device without a wait of the host; generators are mmdet's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["AnchorCache", "denormalize", "level_sizes", "normalize", "valid_indices", "valid_sizes"]

Sizes = list[tuple[int, int]]
"""Height and width per level."""


class AnchorCache:
    """Anchors of all levels, kept until the sizes of the levels change.

    Args:
        generator: gives ``grid_priors``.
    """

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self._key: Any = None
        self._anchors: list[Any] = []

    def __call__(self, sizes: Sizes, device: torch.device) -> list[Any]:
        """Anchors of every level in float32, also under autocast; read only.

        Args:
            sizes: height and width per level.
            device: where the anchors are.
        """
        key = (tuple(map(tuple, sizes)), device)
        if key != self._key:
            # mmdet copies these to the device at every call, and the host waits for that.
            base = self.generator.base_anchors
            # Tensors of inference mode would not do for a later training step.
            with torch.inference_mode(False):
                self.generator.base_anchors = [anchors.to(device) for anchors in base]
                self._anchors = self.generator.grid_priors(sizes, device=device)
            self._key = key
        return self._anchors


def level_sizes(maps: Sequence[Tensor]) -> Sizes:
    """Height and width of every level (B, C, H_i, W_i)."""
    return [(level.shape[-2], level.shape[-1]) for level in maps]


def valid_sizes(generator: Any, sizes: Sizes, pad_shape: tuple[int, ...]) -> Sizes:
    """Rows and columns per level whose anchors count for an image that the batch padded further.

    Args:
        generator: has ``strides``, (x, y) per level.
        sizes: height and width per level.
        pad_shape: height and width of the image in pixels, with its own padding only.
    """
    return [
        (
            min(math.ceil(pad_shape[0] / stride[1]), height),
            min(math.ceil(pad_shape[1] / stride[0]), width),
        )
        for stride, (height, width) in zip(generator.strides, sizes, strict=True)
    ]


def valid_indices(generator: Any, sizes: Sizes, valid: Sizes, device: torch.device) -> Tensor:
    """Indices of the valid anchors among those of all levels; see :func:`valid_sizes`."""
    indices, start = [], 0
    for (height, width), (rows, columns), count in zip(
        sizes, valid, generator.num_base_priors, strict=True
    ):
        level = torch.arange(start, start + height * width * count, device=device)
        indices.append(level.view(height, width, count)[:rows, :columns].flatten())
        start += height * width * count
    return torch.cat(indices)


def device_row(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers (N,) in type and on the device of ``like``; ``torch.tensor`` copies them."""
    return torch.cat([like.new_full((1,), value) for value in values])


def normalize(offsets: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """Offsets (..., N) less their means (N), divided by their deviations (N)."""
    if any(means):
        offsets = offsets - device_row(means, offsets)
    if any(std != 1 for std in stds):
        offsets = offsets / device_row(stds, offsets)
    return offsets


def denormalize(offsets: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """The inverse of :func:`normalize`."""
    if any(std != 1 for std in stds):
        offsets = offsets * device_row(stds, offsets)
    if any(means):
        offsets = offsets + device_row(means, offsets)
    return offsets
