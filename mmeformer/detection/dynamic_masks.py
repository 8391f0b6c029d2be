# SPDX-License-Identifier: Apache-2.0
"""Masks of RTMDet-Ins in graphs: small 1x1 convolutions whose weights each object brings along.

Source: mmdet's ``RTMDetInsHead._mask_predict_by_feat_single``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmeformer.deploy.graphs import cell_shifts

REACH = 8
"""Relative positions are in units of so many strides of the object's level."""


def with_positions(features: Tensor, stride: tuple[int, int]) -> Tensor:
    """Put x and y of each cell, in pixels, before the channels (B, C, H, W) of a map."""
    size = features.shape[-2:]
    positions = cell_shifts(size, stride, features).T.reshape(1, 2, *size)
    return torch.cat([positions.expand(features.shape[0], -1, -1, -1), features], 1)


def located(head: Any, kernels: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Weights for positions in the image, from weights for positions relative to a location.

    The first layer sees ``(point - position) / (REACH * stride)``. The point goes into its bias, so
    that all objects of an image share one input.

    Args:
        head: an ``RTMDetInsHead``.
        kernels: (..., num_gen_params), weights of all layers, then biases of all layers.
        points: (..., 2), x and y of the location in pixels.
        strides: (..., 1), of its level.

    Returns:
        The same as ``kernels``, for inputs as :func:`with_positions` gives.
    """
    first, count = head.weight_nums[0], sum(head.weight_nums)
    channels = head.dyconv_channels
    rows = kernels[..., :first].reshape(*kernels.shape[:-1], channels, -1)
    slopes = rows[..., :2] / (REACH * strides[..., None])
    bias = kernels[..., count : count + channels] + (slopes * points[..., None, :]).sum(-1)
    rows = torch.cat([-slopes, rows[..., 2:]], -1).flatten(-2)
    others = kernels[..., first:count], bias, kernels[..., count + channels :]
    return torch.cat([rows, *others], -1)


def mask_logits(head: Any, kernels: Tensor, features: Tensor) -> Tensor:
    """Mask logits (N, H, W) of objects.

    Args:
        head: an ``RTMDetInsHead``.
        kernels: (N, num_gen_params), of :func:`located`.
        features: (N, 2 + num_prototypes, H, W), of :func:`with_positions`, of each one's image.
    """
    x = features.flatten(2)
    parts = kernels.split([*head.weight_nums, *head.bias_nums], 1)
    layers = len(head.weight_nums)
    for index, (weight, bias) in enumerate(zip(parts[:layers], parts[layers:], strict=True)):
        outputs = head.bias_nums[index]
        inputs = head.weight_nums[index] // outputs
        x = weight.reshape(-1, outputs, inputs) @ x + bias[..., None]
        if index < layers - 1:
            x = x.relu()
    return x.reshape(-1, *features.shape[2:])
