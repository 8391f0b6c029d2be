# SPDX-License-Identifier: Apache-2.0
"""ATSS assignment for rotated boxes; computes the IoU of candidates only."""

import torch
from mmdet.models.task_modules.assigners import AssignResult, BaseAssigner
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes
from torch import Tensor

from mmeformer.registry import TASK_UTILS

__all__ = ["RotatedATSSAssigner"]

# "No IoU" and "never a candidate", as in mmdet's and mmrotate's assigners.
_INF = 100_000_000
# Largest number of center distances in memory: 16 MiB in float32.
_MAX_PAIRS = 2**22


@TASK_UTILS.register_module()
class RotatedATSSAssigner(BaseAssigner):
    """Adaptive training sample selection for rotated priors and boxes.

    For each box, the ``topk`` priors of every level with the nearest centers are candidates. A
    candidate is positive if its center is inside the box and its IoU with the box is at least the
    mean plus the standard deviation over the box's candidates. A prior that is positive for several
    boxes goes to the box with the highest IoU.

    Without boxes to ignore, the result equals that of ``mmrotate.RotatedATSSAssigner``, which
    computes the IoU of all priors with all boxes. This class computes it for candidates only (45
    per box with five levels) and center distances for a few boxes at a time, so that memory does
    not grow with the product of priors and boxes.

    Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via
    Adaptive Training Sample Selection", CVPR 2020, algorithm 1;
    mmrotate/models/task_modules/assigners/rotated_atss_assigner.py in mmrotate 1.x.

    Args:
        topk: candidates per level and box.
        iou_calculator: config of the IoU calculator; called with ``is_aligned=True``, and with
            ``mode="iof"`` for boxes to ignore. None means mmrotate's.
        ignore_iof_thr: which priors are ignored, neither positive nor negative, because of boxes to
            ignore (difficult objects). None: those that would be positive for such a box and are
            not positive for another, whatever its size. A number, as in mmrotate: those with more
            than this share of their area inside such a box, unless their level has so few priors
            that they become positive anyway; small objects then become background. With 0 or less,
            no prior is ignored.
    """

    def __init__(
        self,
        topk: int = 9,
        iou_calculator: dict | None = None,
        ignore_iof_thr: float | None = None,
    ) -> None:
        self.topk = topk
        self.iou_calculator = TASK_UTILS.build(
            iou_calculator or dict(type="mmrotate.RBboxOverlaps2D")
        )
        self.ignore_iof_thr = ignore_iof_thr

    def assign(
        self,
        pred_instances: InstanceData,
        num_level_priors: list[int],
        gt_instances: InstanceData,
        gt_instances_ignore: InstanceData | None = None,
    ) -> AssignResult:
        """Assign a box, the background or nothing to each prior of one image.

        Args:
            pred_instances: ``priors``: RotatedBoxes (P, 5) in pixels and radians, level by level.
            num_level_priors: number of priors per level; the sum is P.
            gt_instances: ``bboxes``: RotatedBoxes (G, 5); ``labels``: (G,).
            gt_instances_ignore: ``bboxes``: RotatedBoxes to ignore.

        Returns:
            ``gt_inds`` (P,): 1-based index of the box, 0 for background, -1 for ignored;
            ``max_overlaps`` (P,): IoU with that box, -1e8 if there is none; ``labels`` (P,): class
            of that box, -1 if there is none.

        Raises:
            ValueError: ``num_level_priors`` does not add up to the number of priors.
        """
        priors, boxes = pred_instances.priors, gt_instances.bboxes
        num_priors, num_boxes = len(priors), len(boxes)
        if sum(num_level_priors) != num_priors:
            raise ValueError(
                f"num_level_priors {num_level_priors} adds up to {sum(num_level_priors)}, "
                f"but there are {num_priors} priors"
            )
        if self.ignore_iof_thr is None and gt_instances_ignore is not None:
            result = self.assign(pred_instances, num_level_priors, gt_instances)
            boxes = gt_instances_ignore.bboxes
            if len(boxes):
                labels = boxes.tensor.new_zeros(len(boxes), dtype=torch.long)
                difficult = InstanceData(bboxes=boxes, labels=labels)
                other = self.assign(pred_instances, num_level_priors, difficult)
                result.gt_inds[(result.gt_inds == 0) & (other.gt_inds > 0)] = -1
            return result
        device = priors.tensor.device
        gt_inds = torch.zeros(num_priors, dtype=torch.long, device=device)
        labels = torch.full_like(gt_inds, -1)
        ignored = self._ignored_priors(priors, gt_instances_ignore)
        gt_inds[ignored] = -1
        if num_boxes == 0 or num_priors == 0:
            overlaps = priors.tensor.new_zeros(num_priors)
            return AssignResult(num_boxes, gt_inds, overlaps, labels=labels)

        prior_inds = self._candidates(priors.centers, boxes.centers, num_level_priors, ignored)
        box_inds = torch.arange(num_boxes, device=device).expand_as(prior_inds)
        flat_priors, flat_boxes = prior_inds.flatten(), box_inds.flatten()
        candidates = boxes[flat_boxes]
        overlaps = self.iou_calculator(priors[flat_priors], candidates, is_aligned=True)
        overlaps = overlaps.view_as(prior_inds)
        positive = overlaps >= overlaps.mean(0) + overlaps.std(0)
        centers = priors.centers[flat_priors]
        inside = candidates.find_inside_points(centers, is_aligned=True, eps=0.01)
        positive &= inside.view_as(positive)

        # Each prior goes to the box with the highest IoU, or to the first of several.
        prior_inds, box_inds = prior_inds[positive], box_inds[positive]
        overlaps = overlaps[positive]
        max_overlaps = overlaps.new_full((num_priors,), -_INF)
        max_overlaps.scatter_reduce_(0, prior_inds, overlaps, "amax")
        best = overlaps == max_overlaps[prior_inds]
        winner = torch.full_like(gt_inds, num_boxes)
        winner.scatter_reduce_(0, prior_inds[best], box_inds[best], "amin")
        assigned = winner < num_boxes
        gt_inds[assigned] = winner[assigned] + 1
        labels[assigned] = gt_instances.labels[winner[assigned]]
        return AssignResult(num_boxes, gt_inds, max_overlaps, labels=labels)

    def _candidates(
        self,
        prior_centers: Tensor,
        box_centers: Tensor,
        num_level_priors: list[int],
        ignored: Tensor,
    ) -> Tensor:
        """Indices (K, G) of the ``topk`` nearest priors of every level for each box."""
        candidates = []
        start = 0
        for count in num_level_priors:
            x, y = prior_centers[start : start + count].unbind(1)
            far = ignored[start : start + count]
            nearest = []
            for chunk in box_centers.split(max(1, _MAX_PAIRS // max(1, count))):
                # In place: these are the largest tensors of the assignment.
                distances = (chunk[:, :1] - x).square_()
                distances.add_((chunk[:, 1:] - y).square_()).sqrt_()
                distances[:, far] = _INF
                nearest.append(distances.topk(min(self.topk, count), largest=False).indices)
            candidates.append(torch.cat(nearest).T + start)
            start += count
        return torch.cat(candidates)

    def _ignored_priors(self, priors: RotatedBoxes, ignore: InstanceData | None) -> Tensor:
        """Mask (P,) of the priors inside boxes to ignore."""
        mask = torch.zeros(len(priors), dtype=torch.bool, device=priors.tensor.device)
        if ignore is None or self.ignore_iof_thr is None or self.ignore_iof_thr <= 0:
            return mask
        boxes, centers = ignore.bboxes.tensor, priors.centers
        radii = priors.tensor[:, 2:4].norm(dim=1) / 2
        for box in boxes:
            # Skip distant priors, whose circumscribed circle does not reach that of the box.
            reach = radii + box[2:4].norm() / 2
            near = ((centers - box[:2]).norm(dim=1) <= reach).nonzero().squeeze(1)
            iof = self.iou_calculator(
                priors[near], box.expand(len(near), 5), mode="iof", is_aligned=True
            )
            mask[near] |= iof.flatten() > self.ignore_iof_thr
        return mask
