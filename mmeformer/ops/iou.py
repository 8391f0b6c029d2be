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
    dim = max(boxes1.dim(), boxes2.dim())
    boxes1, boxes2 = (boxes[(None,) * (dim - boxes.dim())] for boxes in (boxes1, boxes2))
    # Coordinates first, so that one operator takes both, or all corners, of all pairs.
    center1, size1, angle1 = boxes1.to(dtype).movedim(-1, 0).split([2, 2, 1])
    center2, size2, angle2 = boxes2.to(dtype).movedim(-1, 0).split([2, 2, 1])
    size1, size2 = size1.clamp(min=0), size2.clamp(min=0)

    # IoU does not change with the scale: bring the largest side into [1/2, 1), by a power of two so
    # that nothing is rounded.
    largest = torch.maximum(size1, size2).detach().amax(0).clamp(min=1e-6)
    scale = largest / torch.frexp(largest).mantissa
    size1, size2 = size1 / scale, size2 / scale
    # Boxes 4 sides apart along x or y cannot touch, so the clamp changes no IoU.
    offset = ((center2 - center1) / scale).clamp(-4, 4)

    # From here on: origin in the center of box 1, axes along the sides of box 2.
    center = (_axes(angle2) * offset).sum(1)
    half_w, half_h = (_axes(angle1 - angle2) * (size1 / 2)[:, None]).unbind(0)
    first, second = half_w + half_h, half_h - half_w
    corners = torch.stack([first, second, -first, -second])  # from x axis towards y axis
    reach = size2 / 2
    intersection = _area_inside(corners, center - reach, center + reach)

    (width1, height1), (width2, height2) = size1.unbind(), size2.unbind()
    area1, area2 = width1 * height1, width2 * height2
    # Rounding must not lead out of the possible range.
    intersection = torch.minimum(intersection.clamp(min=0), torch.minimum(area1, area2))
    union = area1 + area2 - intersection
    no_area = union <= _TINY
    return (intersection / union.masked_fill(no_area, 1)).masked_fill(no_area, 0)


def _axes(angle: Tensor) -> Tensor:
    """Unit vectors ``(2, 2, ...)`` along the width and the height of boxes, angle ``(1, ...)``."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, sin, -sin, cos]).unflatten(0, (2, 2))


def _area_inside(corners: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Signed area of a polygon inside an upright rectangle.

    Args:
        corners: ``(n, 2, ...)``, x and y, counter-clockwise (from the x axis towards the y axis)
            for a positive area.
        low, high: ``(2, ...)``, the rectangle, ``low <= high``.

    Returns:
        ``(...)``.
    """
    # The area does not change with the origin. The rectangle's point nearest to it keeps the terms
    # small, and leaves exactly 0 for a rectangle beside the polygon.
    nearest = torch.minimum(low.clamp(min=0), high).detach()
    low, high, corners = low - nearest, high - nearest, corners - nearest
    ends = torch.stack([corners, corners.roll(-1, 0)])  # (2, n, 2, ...): of every edge
    start, end = ends.unbind()
    width, height = (end - start).unbind(1)

    # The part of each edge between left and right. An edge beside them keeps its two x equal, so
    # its heights, far out on its line, do not count.
    x, y = ends.unbind(2)
    (left, bottom), (right, top) = low.unbind(), high.unbind()
    x_inside = _clamp(x, left, right)
    y = y + (x_inside - x) / _nonzero(width) * height
    x_from, x_to = x_inside.unbind()
    return ((x_from - x_to) * _mean_of_clamp(y, bottom, top)).sum(0)


def _mean_of_clamp(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean of ``clamp(y, low, high)`` while y runs between its two rows.

    It is the mean of the clamped ends, corrected by what the clamp cut off at each end, times the
    share of the path that lies between ``low`` and ``high``.
    """
    inside = _clamp(y, low, high)
    (start, end), (inside_start, inside_end) = y.unbind(), inside.unbind()
    share = (inside_end - inside_start) / _nonzero(end - start)
    return (inside.sum(0) + share * (y - inside).sum(0)) / 2


def _clamp(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp whose gradient is shared between value and bound where they are equal."""
    return torch.minimum(torch.maximum(value, low), high)


def _nonzero(length: Tensor) -> Tensor:
    """``length`` as a divisor: 1 where it is zero, as the dividend is then zero as well."""
    return length.masked_fill(length.abs() <= _TINY, 1)
