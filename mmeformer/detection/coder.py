# SPDX-License-Identifier: Apache-2.0
"""Boxes as offsets from anchors."""

import math

import torch
from mmdet.models.task_modules import coders
from mmdet.structures.bbox import HorizontalBoxes, get_box_tensor
from torch import Tensor

from mmeformer.anchors import denormalize, normalize
from mmeformer.registry import TASK_UTILS

__all__ = ["DeltaXYWHBBoxCoder"]


@TASK_UTILS.register_module()
class DeltaXYWHBBoxCoder(coders.DeltaXYWHBBoxCoder):
    """``mmdet.DeltaXYWHBBoxCoder`` that copies no means and deviations to the device.

    mmdet does so at every call, and the host waits for each copy. Values are the same.

    Source: Girshick et al., "Rich feature hierarchies", CVPR 2014, appendix C.
    """

    def encode(self, bboxes, gt_bboxes) -> Tensor:
        """Offsets (N, 4) from boxes ``bboxes`` (N, 4) to ``gt_bboxes`` (N, 4)."""
        anchors, boxes = get_box_tensor(bboxes).float(), get_box_tensor(gt_bboxes).float()
        anchor_centers, anchor_sizes = _center_and_size(anchors)
        centers, sizes = _center_and_size(boxes)
        shifts = (centers - anchor_centers) / anchor_sizes
        deltas = torch.cat([shifts, (sizes / anchor_sizes).log()], -1)
        return normalize(deltas, self.means, self.stds)

    def decode(self, bboxes, pred_bboxes, max_shape=None, wh_ratio_clip=16 / 1000):
        """Boxes (N, C * 4) from offsets (N, C * 4) and boxes (N, 4).

        Args:
            bboxes: (N, 4): left, top, right, bottom.
            pred_bboxes: (N, C * 4), for example one box per class.
            max_shape: height and width of the image that the boxes are clipped to; None: no limit.
            wh_ratio_clip: largest factor of a size, as its inverse.

        Returns:
            (N, C * 4), or ``HorizontalBoxes`` if the coder has ``use_box_type``.
        """
        if pred_bboxes.ndim != 2 or self.add_ctr_clamp or torch.onnx.is_in_onnx_export():
            return super().decode(bboxes, pred_bboxes, max_shape, wh_ratio_clip)
        deltas = pred_bboxes.reshape(len(pred_bboxes), pred_bboxes.shape[1] // 4, 4)
        deltas = denormalize(deltas, self.means, self.stds)
        anchor_centers, anchor_sizes = _center_and_size(get_box_tensor(bboxes)[:, None])
        limit = abs(math.log(wh_ratio_clip))
        centers = anchor_centers + anchor_sizes * deltas[..., :2]
        reach = anchor_sizes * deltas[..., 2:].clamp(-limit, limit).exp() * 0.5
        boxes = torch.cat([centers - reach, centers + reach], -1)
        if self.clip_border and max_shape is not None:
            boxes[..., 0::2].clamp_(0, max_shape[1])
            boxes[..., 1::2].clamp_(0, max_shape[0])
        boxes = boxes.flatten(1)
        return HorizontalBoxes(boxes) if self.use_box_type else boxes


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    start, end = boxes[..., :2], boxes[..., 2:]
    return (start + end) * 0.5, end - start
