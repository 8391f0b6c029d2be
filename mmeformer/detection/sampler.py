# SPDX-License-Identifier: Apache-2.0
"""Random choice of positive and negative boxes for the losses."""

import torch
from mmdet.models.task_modules import samplers
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures.bbox import BaseBoxes, cat_boxes
from mmengine.structures import InstanceData
from torch import Tensor

from mmeformer.registry import TASK_UTILS

__all__ = ["RandomSampler"]


@TASK_UTILS.register_module()
class RandomSampler(samplers.RandomSampler):
    """``mmdet.RandomSampler`` for which the host waits once: for the two numbers of samples.

    The numbers of positives and negatives are mmdet's, and every subset of these sizes is equally
    likely. The random numbers are others: one permutation of all boxes, drawn on their device,
    where mmdet draws up to two shorter ones on the CPU. So one seed gives other samples than
    mmdet's class, and other ones on a GPU than on a CPU.

    Args:
        num: number of samples.
        pos_fraction: largest share of positives among them.
        neg_pos_ub: largest number of negatives per positive; negative: no limit.
        add_gt_as_proposals: whether the objects are among the boxes to choose from.
    """

    def sample(
        self,
        assign_result: AssignResult,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        **kwargs,
    ) -> SamplingResult:
        """Choose positive and negative boxes of one image; see mmdet's ``BaseSampler.sample``."""
        priors, gt_bboxes = pred_instances.priors, gt_instances.bboxes
        is_gt = torch.zeros(len(priors), dtype=torch.uint8, device=priors.device)
        if self.add_gt_as_proposals and len(gt_bboxes) > 0:
            as_priors = gt_bboxes
            if isinstance(gt_bboxes, BaseBoxes) and isinstance(priors, BaseBoxes):
                as_priors = gt_bboxes.convert_to(type(priors))
            priors = cat_boxes([as_priors, priors])
            assign_result.add_gt_(gt_instances.labels)
            is_gt = torch.cat([is_gt.new_ones(len(gt_bboxes)), is_gt])

        gt_inds = assign_result.gt_inds
        order = torch.randperm(len(gt_inds), device=gt_inds.device)
        positive = _first(gt_inds > 0, order, int(self.num * self.pos_fraction))
        num_pos = positive.sum()
        room = self.num - num_pos
        if self.neg_pos_ub >= 0:
            limit = (self.neg_pos_ub * num_pos.clamp(min=1).double()).long()
            room = torch.minimum(room, limit)
        negative = _first(gt_inds == 0, order, room)
        counts = torch.stack([num_pos, negative.sum()]).tolist()
        pos_inds, neg_inds = map(_indices, (positive, negative), counts)
        return SamplingResult(pos_inds, neg_inds, priors, gt_bboxes, assign_result, is_gt)


def _first(mask: Tensor, order: Tensor, count: int | Tensor) -> Tensor:
    """``mask`` (N,) of which only the first ``count`` in ``order`` remain true."""
    in_order = mask[order]
    in_order = in_order & (in_order.cumsum(0) <= count)
    return torch.empty_like(mask).scatter_(0, order, in_order)


def _indices(mask: Tensor, count: int) -> Tensor:
    """Where ``mask`` is true: ``nonzero`` of which the host knows the size beforehand."""
    slots = torch.where(mask, mask.cumsum(0) - 1, count)
    found = slots.new_empty(count + 1)
    return found.scatter_(0, slots, torch.arange(len(mask), device=mask.device))[:count]
