# SPDX-License-Identifier: Apache-2.0
"""IoU and NMS of rotated boxes in plain PyTorch, on any device.

Boxes are rows of center x, center y, width, height in pixels and angle in radians. The IoU is
computed only for pairs whose upright rectangles meet (:func:`mmeformer.ops.iou.rotated_iou`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmeformer.ops.iou import rotated_iou

__all__ = ["box_iou", "nms"]

# Pairs whose rectangles are compared at once; bounds memory.
_PAIRS = 1 << 22
# Pairs whose IoU is computed at once: few fit into a CPU cache, a GPU needs many.
_IOU_PAIRS = {"cpu": 1 << 13}
_GPU_IOU_PAIRS = 1 << 20
# Boxes among which NMS compares all pairs. Small blocks save comparisons with removed boxes, large
# blocks save rounds.
_BLOCK = {"cpu": 1024}
_GPU_BLOCK = 2048


# The number of pairs and rounds depends on the data, which would break a graph of torch.compile.
@torch.compiler.disable
def box_iou(boxes1: Tensor, boxes2: Tensor, mode: str = "iou", aligned: bool = False) -> Tensor:
    """IoU, or intersection over the first box's area, without a gradient.

    Args:
        boxes1: ``(N, 5)``; further columns are ignored.
        boxes2: ``(M, 5)``; aligned ``(N, 5)``.
        mode: ``"iou"``, or ``"iof"`` for intersection over the area of ``boxes1``.
        aligned: compare row by row instead of each with each.

    Returns:
        ``(N, M)``, aligned ``(N,)``, in [0, 1]; float64 if an input is, else float32. It is 0 where
        a box has no area.
    """
    boxes1, boxes2 = _prepare(boxes1), _prepare(boxes2)
    if aligned:
        return _overlap(boxes1, boxes2, mode)
    result = boxes1.new_zeros(
        len(boxes1), len(boxes2), dtype=torch.promote_types(boxes1.dtype, boxes2.dtype)
    )
    rows = max(1, _PAIRS // max(1, len(boxes2)))
    bounds2 = _bounds(boxes2)
    for start in range(0, len(boxes1), rows):
        chunk = boxes1[start : start + rows]
        first, second = _meet(_bounds(chunk), bounds2).nonzero(as_tuple=True)
        result[first + start, second] = _overlap(chunk[first], boxes2[second], mode)
    return result


@torch.compiler.disable
def nms(boxes: Tensor, iou_threshold: float, labels: Tensor | None = None) -> Tensor:
    """Greedy non-maximum suppression of boxes that are sorted by their scores, the best first.

    A box is removed if its IoU with a better one that stays is larger than the threshold. At
    exactly the threshold it stays, as in mmcv's CUDA kernel and torchvision's NMS; mmcv's CPU
    kernel removes it.

    Args:
        boxes: ``(N, 5)``; further columns are ignored.
        iou_threshold: see above.
        labels: ``(N,)``; boxes of different labels do not suppress each other.

    Returns:
        ``(K,)`` int64, indices of the boxes that stay, in order.
    """
    boxes = _prepare(boxes)
    bounds = _bounds(boxes)
    size = _BLOCK.get(boxes.device.type, _GPU_BLOCK)

    def suppressed(first: Tensor, second: Tensor, later: bool) -> tuple[Tensor, Tensor]:
        """Positions in ``first`` and ``second`` (indices of boxes) of pairs above the threshold."""
        meet = _meet(bounds[first], bounds[second])
        if labels is not None:
            meet &= labels[first, None] == labels[second]
        i, j = (meet.triu(1) if later else meet).nonzero(as_tuple=True)
        over = _overlap(boxes[first[i]], boxes[second[j]], "iou") > iou_threshold
        return i[over], j[over]

    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left):
        block, left = left[:size], left[size:]
        best = block[_greedy(*suppressed(block, block, later=True), len(block))]
        kept.append(best)
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[suppressed(best, left, later=False)[1]] = False
        left = left[stays]
    return torch.cat(kept) if kept else left


def _greedy(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Mask ``(count,)`` of the boxes that stay if each box in turn, unless removed, removes others.

    All boxes stay at first. In each round, the boxes that stayed in the previous round remove
    others. A round settles at least one more box; in practice a few rounds settle all.

    Args:
        first: ``(P,)``, index of the box that removes.
        second: ``(P,)``, index of the box that is removed, larger than ``first``.
        count: number of boxes.
    """
    keep = torch.ones(count, dtype=torch.bool, device=first.device)
    while True:
        stays = torch.ones_like(keep)
        stays[second[keep[first]]] = False
        if torch.equal(stays, keep):
            return keep
        keep = stays


def _prepare(boxes: Tensor) -> Tensor:
    """The five numbers of each box, in float64 if they are, else float32: half is too coarse."""
    boxes = boxes.detach()[:, :5]
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def _bounds(boxes: Tensor) -> Tensor:
    """Upright rectangles ``(N, 4)``: left, low, right, high."""
    x, y, width, height, angle = boxes.unbind(1)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    reach_x, reach_y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
    return torch.stack([x - reach_x, y - reach_y, x + reach_x, y + reach_y], 1)


def _meet(bounds1: Tensor, bounds2: Tensor) -> Tensor:
    """Matrix ``(N, M)`` of the rectangles that overlap or touch."""
    (left1, low1, right1, high1), (left2, low2, right2, high2) = bounds1.T, bounds2.T
    meet = left1[:, None] <= right2
    # In place, as nothing else is as large.
    meet &= left2 <= right1[:, None]
    meet &= low1[:, None] <= high2
    meet &= low2 <= high1[:, None]
    return meet


def _overlap(boxes1: Tensor, boxes2: Tensor, mode: str) -> Tensor:
    """IoU or intersection over the first area of aligned boxes ``(N, 5)``: ``(N,)``."""
    size = _IOU_PAIRS.get(boxes1.device.type, _GPU_IOU_PAIRS)
    chunks = zip(boxes1.split(size), boxes2.split(size), strict=True)
    iou = torch.cat([rotated_iou(*chunk) for chunk in chunks])
    if mode == "iou":
        return iou
    area1, area2 = (boxes[:, 2:4].clamp(min=0).prod(1) for boxes in (boxes1, boxes2))
    intersection = iou * (area1 + area2) / (1 + iou)
    return torch.where(area1 > 0, intersection / area1, 0).clamp(max=1)
