# SPDX-License-Identifier: Apache-2.0
"""Rotated boxes as offsets from anchors."""

import math

import torch
from mmdet.structures.bbox import get_box_tensor
from mmrotate.models.task_modules import coders
from mmrotate.structures.bbox import RotatedBoxes
from mmrotate.structures.bbox.transforms import norm_angle
from torch import Tensor

from mmeformer.anchors import denormalize, normalize
from mmeformer.registry import TASK_UTILS

__all__ = ["DeltaXYWHTRBBoxCoder"]


@TASK_UTILS.register_module()
class DeltaXYWHTRBBoxCoder(coders.DeltaXYWHTRBBoxCoder):
    """``mmrotate.DeltaXYWHTRBBoxCoder`` in half as many operators.

    It also copies no means and deviations to the device, for which the host would wait. Offsets and
    boxes are the same. ``norm_factor``, ``edge_swap``, ``add_ctr_clamp`` and several boxes per
    anchor are left to mmrotate.
    """

    @property
    def _is_plain(self) -> bool:
        return not (self.norm_factor or self.edge_swap or self.add_ctr_clamp)

    def encode(self, bboxes: RotatedBoxes, gt_bboxes: RotatedBoxes) -> Tensor:
        """Offsets (N, 5) from anchors (N, 5) to boxes (N, 5); the inverse of :meth:`decode`."""
        if not self._is_plain:
            return super().encode(bboxes, gt_bboxes)
        boxes = gt_bboxes.regularize_boxes(self.angle_version).float()
        centers, sizes, angles = bboxes.tensor.float().split([2, 2, 1], 1)
        gt_centers, gt_sizes, gt_angles = boxes.split([2, 2, 1], 1)
        shifts = gt_centers - centers
        if self.proj_xy:
            (x, y), cos, sin = shifts.split(1, 1), angles.cos(), angles.sin()
            shifts = torch.cat([cos * x + sin * y, cos * y - sin * x], 1)
        turns = norm_angle(gt_angles - angles, self.angle_version)
        deltas = torch.cat([shifts / sizes, (gt_sizes / sizes).log(), turns], 1)
        return normalize(deltas, self.means, self.stds)

    def decode(self, bboxes, pred_bboxes, max_shape=None, wh_ratio_clip=16 / 1000):
        """Boxes (N, 5) from offsets (N, 5) and anchors (N, 5).

        Args:
            bboxes: anchors: center x, center y, width, height in pixels, angle in radians.
            pred_bboxes: offsets of the center, in sides of the anchor along its axes (with
                ``proj_xy``) or the image's; logarithms of the ratios of sizes; angle.
            max_shape: height and width of the image that centers are clipped to; None: no limit.
            wh_ratio_clip: largest ratio of sizes, as its inverse.

        Returns:
            (N, 5), or ``RotatedBoxes`` if the coder has ``use_box_type``.
        """
        if not self._is_plain or pred_bboxes.ndim != 2 or pred_bboxes.shape[1] != 5:
            return super().decode(bboxes, pred_bboxes, max_shape, wh_ratio_clip)
        deltas = denormalize(pred_bboxes, self.means, self.stds)
        centers, sizes, angles = get_box_tensor(bboxes).split([2, 2, 1], 1)
        shifts, ratios, turns = deltas.split([2, 2, 1], 1)
        shifts = shifts * sizes
        if self.proj_xy:
            (x, y), cos, sin = shifts.split(1, 1), angles.cos(), angles.sin()
            shifts = torch.cat([x * cos - y * sin, x * sin + y * cos], 1)
        limit = abs(math.log(wh_ratio_clip))
        centers = shifts + centers
        if max_shape is not None:
            height, width = max_shape[:2]
            x, y = centers.split(1, 1)
            centers = torch.cat([x.clamp(0, width - 1), y.clamp(0, height - 1)], 1)
        sizes = sizes * ratios.clamp(-limit, limit).exp()
        boxes = torch.cat([centers, sizes, norm_angle(angles + turns, self.angle_version)], 1)
        return RotatedBoxes(boxes) if self.use_box_type else boxes
