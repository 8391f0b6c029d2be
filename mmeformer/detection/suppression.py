# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression of upright boxes as an operator of graphs."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor


class NonMaxSuppression(torch.autograd.Function):
    """ONNX's operator ``NonMaxSuppression``, for one class per image."""

    @staticmethod
    def forward(ctx, boxes, scores, limit, iou_threshold, score_threshold):
        """(B, N, 4), (B, 1, N) -> (M, 3) ``int64``: image, 0, box; per image, the best first."""
        selected = []
        for index, (own_boxes, own_scores) in enumerate(zip(boxes, scores[:, 0], strict=True)):
            above = (own_scores > score_threshold).nonzero()[:, 0]
            kept = torchvision.ops.nms(own_boxes[above], own_scores[above], iou_threshold)
            kept = above[kept[:limit]]
            image = torch.full_like(kept, index)
            selected.append(torch.stack([image, torch.zeros_like(kept), kept], 1))
        return torch.cat(selected)

    @staticmethod
    def symbolic(g, boxes, scores, limit, iou_threshold, score_threshold):
        """The node of the exported graph."""
        constants = (
            torch.tensor([limit]),
            torch.tensor([iou_threshold], dtype=torch.float32),
            torch.tensor([score_threshold], dtype=torch.float32),
        )
        values = [g.op("Constant", value_t=value) for value in constants]
        return g.op("NonMaxSuppression", boxes, scores, *values)


def suppress(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    score_threshold: float,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within each group of boxes of each image.

    Groups are moved apart by an offset, as in mmcv's ``batched_nms``.

    Args:
        boxes: (B, N, 4).
        scores: (B, N).
        groups: (N,), level or class; or (B, N), each image's own.
        iou_threshold: of two boxes that overlap more, the worse one is removed.
        score_threshold: boxes with this score or a lower one are left out.
        limit: largest number of boxes per image.

    Returns:
        Image (M,) and index in the image (M,) of the kept boxes: per image, the best first.
    """
    offset = groups.to(boxes) * (boxes.flatten(1).amax(1, keepdim=True) + 1)
    moved = boxes + offset[..., None]
    selected = NonMaxSuppression.apply(
        moved, scores[:, None], limit, iou_threshold, score_threshold
    )
    return selected[:, 0], selected[:, 2]


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Clip ``boxes`` (..., 4) to images of ``size`` (..., 2): height, width."""
    limit = size.flip(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit], -1))
