# SPDX-License-Identifier: Apache-2.0
"""Assignment of objects to anchors and proposals by IoU, at once for all objects."""

import torch
from mmdet.models.task_modules import assigners
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from mmeformer.registry import TASK_UTILS

__all__ = ["BboxOverlaps2D", "MaxIoUAssigner"]

_EPS = 1e-6
_OVERLAPS = dict(type="mmeformer.BboxOverlaps2D")


@TASK_UTILS.register_module()
class BboxOverlaps2D(assigners.BboxOverlaps2D):
    """``mmdet.BboxOverlaps2D`` without a copy from the host, for which the host would wait."""

    def __call__(self, bboxes1, bboxes2, mode: str = "iou", is_aligned: bool = False) -> Tensor:
        """Compute the overlaps of all pairs.

        Args:
            bboxes1: (M, 4), or (M, 5) with a score: left, top, right, bottom.
            bboxes2: (N, 4) or (N, 5).
            mode: ``"iou"``, or ``"iof"``: share of the area of ``bboxes1``. mmdet's class computes
                other modes, ``is_aligned`` and ``dtype="fp16"``.
            is_aligned: see mmdet's class.

        Returns:
            (M, N).
        """
        if mode not in ("iou", "iof") or is_aligned or self.dtype == "fp16":
            return super().__call__(bboxes1, bboxes2, mode, is_aligned)
        first = get_box_tensor(bboxes1)[:, :4]
        second = get_box_tensor(bboxes2)[:, :4]
        if len(first) == 0 or len(second) == 0:
            return first.new_empty(len(first), len(second))
        left1, top1, right1, bottom1 = first[:, None].unbind(-1)
        left2, top2, right2, bottom2 = second.unbind(-1)
        # In place: these matrices are the largest tensors of an assignment.
        overlap = torch.minimum(right1, right2).sub_(torch.maximum(left1, left2)).clamp_(min=0)
        height = torch.minimum(bottom1, bottom2).sub_(torch.maximum(top1, top2)).clamp_(min=0)
        overlap.mul_(height)
        area1 = (right1 - left1) * (bottom1 - top1)
        area2 = (right2 - left2) * (bottom2 - top2)
        union = area1 + area2 - overlap if mode == "iou" else area1
        return overlap.div_(union.clamp(min=_EPS))


@TASK_UTILS.register_module()
class MaxIoUAssigner(assigners.MaxIoUAssigner):
    """``mmdet.MaxIoUAssigner`` without its loop over the objects.

    Assignments are the same, ties included. mmdet asks the device for a number per object to match
    low-quality anchors; here one maximum over all objects does it, and the host never waits.

    Source: Ren et al., "Faster R-CNN", NeurIPS 2015, section 3.1.2;
    mmdet/models/task_modules/assigners/max_iou_assigner.py in mmdet 3.x.

    Args:
        iou_calculator: overlaps of boxes; by default those of :class:`BboxOverlaps2D`.
        **kwargs: see mmdet's class.
    """

    def __init__(self, *args, iou_calculator: dict = _OVERLAPS, **kwargs) -> None:
        super().__init__(*args, iou_calculator=iou_calculator, **kwargs)

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Assign an object, the background or nothing to each box.

        Args:
            overlaps: IoU (G, N) of objects and boxes; -1 for boxes to ignore.
            gt_labels: (G,).

        Returns:
            ``gt_inds`` (N,): 1-based index of the object, 0 for background, -1 for neither;
            ``max_overlaps`` (N,): highest IoU with any object; ``labels`` (N,): class of the
            object, -1 if there is none.
        """
        num_gts, num_boxes = overlaps.shape
        if num_gts == 0 or num_boxes == 0:
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        max_overlaps, best_gt = overlaps.max(0)
        gt_inds = torch.where(self._is_negative(max_overlaps), 0, -1)
        gt_inds = torch.where(max_overlaps >= self.pos_iou_thr, best_gt + 1, gt_inds)
        if self.match_low_quality:
            last = self._low_quality_matches(overlaps)
            gt_inds = torch.where(last > 0, last, gt_inds)
        labels = torch.where(gt_inds > 0, gt_labels[gt_inds.clamp(min=1) - 1], -1)
        return AssignResult(num_gts, gt_inds, max_overlaps, labels=labels)

    def _is_negative(self, max_overlaps: Tensor) -> Tensor:
        if isinstance(self.neg_iou_thr, tuple):
            low, high = self.neg_iou_thr
        elif isinstance(self.neg_iou_thr, float):
            low, high = 0, self.neg_iou_thr
        else:
            # mmdet takes no other number, not even an integer, for a threshold.
            return torch.zeros_like(max_overlaps, dtype=torch.bool)
        return (max_overlaps >= low) & (max_overlaps < high)

    def _low_quality_matches(self, overlaps: Tensor) -> Tensor:
        """The last object (N,), counted from 1, whose best box this is; 0 if it is no object's."""
        num_gts, num_boxes = overlaps.shape
        best, best_box = overlaps.max(1)
        numbers = torch.arange(1, num_gts + 1, device=overlaps.device)
        numbers = torch.where(best >= self.min_pos_iou, numbers, 0)
        if self.gt_max_assign_all:
            is_best = overlaps == best[:, None]
            return torch.where(is_best, numbers.int()[:, None], 0).amax(0).long()
        return numbers.new_zeros(num_boxes).scatter_reduce_(0, best_box, numbers, "amax")
