# SPDX-License-Identifier: Apache-2.0
"""Differentiable IoU of rotated boxes in plain PyTorch.

The area of the intersection of a polygon P with the upright rectangle ``[l, r] x [b, t]`` is, by
Green's theorem, one integral along the edges of P alone::

    area = - sum over the edges of P, counter-clockwise, of
             integral of clamp(y, b, t) d clamp(x, l, r)

Both clamps are continuous, so the area needs no search for corners, no sorting and no rule for
coincident edges or shared corners. The edges of the rectangle never appear, hence nothing is
counted twice. In the axes of one box the other one is P, and each of its four edges has a closed
form.
"""

import torch
from torch import Tensor

__all__ = ["rotated_iou"]

# Lengths and areas below this, where 1 is the larger side of the pair (squared), count as zero. It
# keeps every division bounded, and it is far below the rounding of float32.
_TINY = 1e-12


def rotated_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of pairs of rotated boxes, differentiable with respect to both.

    Value and gradient are finite for all finite boxes. The gradient is a subgradient where the IoU
    has a kink (an edge or a corner on the other box's border), and a symmetric one where numbers
    tie exactly: two identical boxes get zero. It is zero for boxes apart from each other. A pair of
    boxes without area has IoU 0.

    Args:
        boxes1: ``(..., 5)``: center x, center y, width, height in pixels (negative sizes count as
            0) and angle in radians, from the x axis towards the y axis; any range of angles.
        boxes2: ``(..., 5)``, aligned with ``boxes1``. The leading dimensions broadcast:
            ``rotated_iou(a[:, None], b[None])`` is the matrix of all pairs.

    Returns:
        ``(...)`` in [0, 1], computed in float64 if one of the inputs is float64, else in float32,
        also under autocast.

    Raises:
        ValueError: the last dimension is not 5.
    """
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if boxes.shape[-1:] != (5,):
            raise ValueError(
                f"{name} must have 5 numbers per box (cx, cy, w, h, angle), got shape "
                f"{tuple(boxes.shape)}"
            )
    float64 = torch.float64 in (boxes1.dtype, boxes2.dtype)
    dtype = torch.float64 if float64 else torch.float32
    x1, y1, w1, h1, angle1 = boxes1.to(dtype).unbind(-1)
    x2, y2, w2, h2, angle2 = boxes2.to(dtype).unbind(-1)
    w1, h1, w2, h2 = (size.clamp(min=0) for size in (w1, h1, w2, h2))

    # IoU does not change with the scale: bring the largest side into [1/2, 1), by a power of two so
    # that nothing is rounded.
    largest = torch.maximum(torch.maximum(w1, h1), torch.maximum(w2, h2)).detach()
    exponent = torch.frexp(largest.clamp(min=1e-6)).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    w1, h1, w2, h2 = w1 / scale, h1 / scale, w2 / scale, h2 / scale
    # Boxes 4 sides apart along x or y cannot touch, so the clamp changes no IoU.
    dx = ((x2 - x1) / scale).clamp(-4, 4)
    dy = ((y2 - y1) / scale).clamp(-4, 4)

    # From here on: origin in the center of box 1, axes along the sides of box 2.
    cos2, sin2 = angle2.cos(), angle2.sin()
    x2, y2 = dx * cos2 + dy * sin2, dy * cos2 - dx * sin2
    cos1, sin1 = (angle1 - angle2).cos(), (angle1 - angle2).sin()
    half_w = torch.stack([w1 * cos1, w1 * sin1], -1) / 2
    half_h = torch.stack([-h1 * sin1, h1 * cos1], -1) / 2
    corners = torch.stack(
        [half_w + half_h, half_h - half_w, -half_w - half_h, half_w - half_h], -2
    )  # (..., 4, 2), from x axis towards y axis
    intersection = _area_inside(corners, x2 - w2 / 2, x2 + w2 / 2, y2 - h2 / 2, y2 + h2 / 2)

    area1, area2 = w1 * h1, w2 * h2
    # Rounding must not lead out of the possible range.
    intersection = torch.minimum(intersection.clamp(min=0), torch.minimum(area1, area2))
    union = area1 + area2 - intersection
    has_area = union > _TINY
    return torch.where(has_area, intersection / torch.where(has_area, union, 1), 0)


def _area_inside(corners: Tensor, left: Tensor, right: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Signed area of a polygon inside an upright rectangle.

    Args:
        corners: ``(..., n, 2)``, counter-clockwise (from the x axis towards the y axis) for a
            positive area.
        left, right, low, high: ``(...)``, the rectangle, ``left <= right`` and ``low <= high``.

    Returns:
        ``(...)``.
    """
    left, right, low, high = (bound[..., None] for bound in (left, right, low, high))
    # Around a closed polygon any height may be subtracted. The rectangle's height nearest to the
    # origin keeps the terms small, and leaves exactly 0 for a rectangle above or below the polygon.
    nearest = _clamp(torch.zeros_like(low), low, high).detach()
    low, high = low - nearest, high - nearest
    x_start, y_start = corners[..., 0], corners[..., 1] - nearest
    x_end, y_end = x_start.roll(-1, -1), y_start.roll(-1, -1)

    # The part of each edge between left and right. An edge beside them keeps x_from = x_to, so its
    # heights, far out on its line, do not count.
    x_from, x_to = _clamp(x_start, left, right), _clamp(x_end, left, right)
    span = _nonzero(x_end - x_start)
    y_from = y_start + (x_from - x_start) / span * (y_end - y_start)
    y_to = y_end + (x_to - x_end) / span * (y_end - y_start)

    height = _mean_of_clamp(y_from, y_to, low, high)
    return -((x_to - x_from) * height).sum(-1)


def _mean_of_clamp(start: Tensor, end: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean of ``clamp(y, low, high)`` while y runs from ``start`` to ``end``.

    It is the mean of the clamped ends, corrected by what the clamp cut off at each end, times the
    share of the path that lies between ``low`` and ``high``.
    """
    from_, to = _clamp(start, low, high), _clamp(end, low, high)
    share = (to - from_) / _nonzero(end - start)
    return ((from_ + to) + share * ((start - from_) + (end - to))) / 2


def _clamp(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp whose gradient is shared between value and bound where they are equal."""
    return torch.minimum(torch.maximum(value, low), high)


def _nonzero(length: Tensor) -> Tensor:
    """``length`` as a divisor: 1 where it is zero, as the dividend is then zero as well."""
    return torch.where(length.abs() > _TINY, length, 1)
