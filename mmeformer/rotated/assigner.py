# SPDX-License-Identifier: Apache-2.0
"""ATSS assignment for rotated boxes; computes the IoU of candidates only."""

from collections.abc import Sequence

import torch
from mmdet.models.task_modules.assigners import AssignResult, BaseAssigner
from mmdet.structures.bbox import cat_boxes
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes
from torch import Tensor

from mmeformer.registry import TASK_UTILS

__all__ = ["RotatedATSSAssigner"]

# "No IoU" and "never a candidate", as in mmdet's and mmrotate's assigners.
_INF = 100_000_000
# Largest number of center distances in memory, in float32: 16 MiB fit into a CPU's cache, and 128
# MiB keep the number of launches small on a GPU.
_MAX_PAIRS = 2**22
_GPU_MAX_PAIRS = 2**25


@TASK_UTILS.register_module()
class RotatedATSSAssigner(BaseAssigner):
    """Adaptive training sample selection for rotated priors and boxes.

    For each box, the ``topk`` priors of every level with the nearest centers are candidates. A
    candidate is positive if its center is inside the box and its IoU with the box is at least the
    mean plus the standard deviation over the box's candidates. A prior that is positive for several
    boxes goes to the box with the highest IoU.

    Without boxes to ignore, the result equals that of ``mmrotate.RotatedATSSAssigner``, which
    computes the IoU of all priors with all boxes, image by image. This class computes it for
    candidates only (45 per box with five levels), for all images at once, and center distances for
    some boxes at a time. The host never waits for the device.

    Memory and operators for anchors of 1024 px, on a GPU without compiled operators: 170 MiB and
    166 for 1,000 boxes, 390 MiB and 217 for 5,000 (``benchmarks/rotated_assigner.py --gpu``).

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
        gt_inds, overlaps = self.assign_batch(
            pred_instances.priors, num_level_priors, [gt_instances], [gt_instances_ignore]
        )
        labels = torch.full_like(gt_inds[0], -1)
        if len(gt_instances):
            own = gt_instances.labels[gt_inds[0].clamp(min=1) - 1]
            labels = torch.where(gt_inds[0] > 0, own, labels)
        return AssignResult(len(gt_instances), gt_inds[0], overlaps[0], labels=labels)

    def assign_batch(
        self,
        priors: RotatedBoxes,
        num_level_priors: list[int],
        batch_gt_instances: list[InstanceData],
        batch_gt_instances_ignore: Sequence[InstanceData | None],
    ) -> tuple[Tensor, Tensor]:
        """Assign a box, the background or nothing to each prior of each image.

        Args:
            priors: (P, 5), level by level, the same for all B images.
            num_level_priors: number of priors per level; the sum is P.
            batch_gt_instances: per image ``bboxes`` (G_i, 5).
            batch_gt_instances_ignore: per image ``bboxes`` to ignore, or None.

        Returns:
            ``gt_inds`` (B, P): 1-based index among the boxes of all images, 0 for background, -1
            for ignored; ``max_overlaps`` (B, P): IoU with that box, -1e8 if there is none, and 0 if
            there are no boxes at all.

        Raises:
            ValueError: ``num_level_priors`` does not add up to the number of priors.
        """
        if sum(num_level_priors) != len(priors):
            raise ValueError(
                f"num_level_priors {num_level_priors} adds up to {sum(num_level_priors)}, "
                f"but there are {len(priors)} priors"
            )
        boxes = [instances.bboxes for instances in batch_gt_instances]
        difficult = [
            priors[:0] if instances is None else instances.bboxes
            for instances in batch_gt_instances_ignore
        ]
        ignored = None
        if self.ignore_iof_thr is not None and self.ignore_iof_thr > 0 and any(map(len, difficult)):
            ignored = self._ignored_priors(priors, difficult)
        gt_inds, overlaps = self._match(priors, num_level_priors, boxes, ignored)
        if self.ignore_iof_thr is None and any(map(len, difficult)):
            others, _ = self._match(priors, num_level_priors, difficult, None)
            gt_inds = torch.where((gt_inds == 0) & (others > 0), -1, gt_inds)
        return gt_inds, overlaps

    def _match(
        self,
        priors: RotatedBoxes,
        num_level_priors: list[int],
        batch_boxes: list[RotatedBoxes],
        ignored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`assign_batch`; ``ignored`` (B, P) are the priors that are ignored, if any."""
        device, shape = priors.tensor.device, (len(batch_boxes), len(priors))
        gt_inds = torch.zeros(shape, dtype=torch.long, device=device)
        if ignored is not None:
            gt_inds = gt_inds - ignored.long()
        boxes, images = cat_boxes(batch_boxes), _images(batch_boxes)
        if len(boxes) == 0 or len(priors) == 0:
            return gt_inds, priors.tensor.new_zeros(shape)

        far = None if ignored is None else ignored[images]
        prior_inds = self._candidates(priors.centers, boxes.centers, num_level_priors, far)
        box_inds = torch.arange(len(boxes), device=device).expand_as(prior_inds)
        candidates, owners = priors[prior_inds.flatten()], boxes[box_inds.flatten()]
        overlaps = self.iou_calculator(candidates, owners, is_aligned=True).view_as(prior_inds)
        positive = overlaps >= overlaps.mean(0) + overlaps.std(0)
        inside = owners.find_inside_points(candidates.centers, is_aligned=True, eps=0.01)
        positive = positive & inside.view_as(positive)

        # Each prior goes to the box with the highest IoU, or to the first of several.
        places = (images * len(priors) + prior_inds).flatten()
        overlaps = torch.where(positive, overlaps, -_INF).flatten()
        max_overlaps = overlaps.new_full((gt_inds.numel(),), -_INF)
        max_overlaps.scatter_reduce_(0, places, overlaps, "amax")
        best = positive.flatten() & (overlaps == max_overlaps[places])
        claims = torch.where(best, box_inds.flatten(), len(boxes))
        winner = torch.full_like(gt_inds.flatten(), len(boxes))
        winner = winner.scatter_reduce_(0, places, claims, "amin").view(shape)
        gt_inds = torch.where(winner < len(boxes), winner + 1, gt_inds)
        return gt_inds, max_overlaps.view(shape)

    def _candidates(
        self,
        prior_centers: Tensor,
        box_centers: Tensor,
        num_level_priors: list[int],
        far: Tensor | None,
    ) -> Tensor:
        """Indices (K, G) of the ``topk`` nearest priors of every level for each box.

        ``far`` (G, P): priors that are never near to the box.
        """
        largest = _MAX_PAIRS if prior_centers.device.type == "cpu" else _GPU_MAX_PAIRS
        rows = max(1, largest // len(prior_centers))
        x, y = prior_centers.unbind(1)
        candidates = []
        for start in range(0, len(box_centers), rows):
            chunk = box_centers[start : start + rows]
            # In place: these are the largest tensors of the assignment.
            distances = (chunk[:, :1] - x).square_()
            distances.add_((chunk[:, 1:] - y).square_()).sqrt_()
            if far is not None:
                distances.masked_fill_(far[start : start + rows], _INF)
            nearest, first = [], 0
            for level in distances.split(num_level_priors, 1):
                count = level.shape[1]
                index = level.topk(min(self.topk, count), largest=False).indices
                nearest.append(index + first)
                first += count
            candidates.append(torch.cat(nearest, 1))
        return torch.cat(candidates).T

    def _ignored_priors(self, priors: RotatedBoxes, batch_boxes: list[RotatedBoxes]) -> Tensor:
        """Mask (B, P) of the priors inside boxes to ignore."""
        boxes, images = cat_boxes(batch_boxes).tensor, _images(batch_boxes)
        mask = torch.zeros(
            len(batch_boxes), len(priors), dtype=torch.bool, device=priors.tensor.device
        )
        radii = priors.tensor[:, 2:4].norm(dim=1) / 2
        reach = boxes[:, 2:4].norm(dim=1) / 2
        rows = max(1, _MAX_PAIRS // max(1, len(priors)))
        for start in range(0, len(boxes), rows):
            chunk = slice(start, start + rows)
            # Skip distant priors, whose circumscribed circle does not reach that of the box.
            distances = (boxes[chunk, None, :2] - priors.centers).norm(dim=2)
            near, prior = (distances <= reach[chunk, None] + radii).nonzero().unbind(1)
            near = near + start
            iof = self.iou_calculator(priors[prior], boxes[near], mode="iof", is_aligned=True)
            inside = (iof.flatten() > self.ignore_iof_thr).nonzero().squeeze(1)
            mask[images[near[inside]], prior[inside]] = True
        return mask


def _images(batch_boxes: list[RotatedBoxes]) -> Tensor:
    """Index of the image (N,) of every box."""
    return torch.cat(
        [
            torch.full((len(boxes),), i, device=boxes.tensor.device)
            for i, boxes in enumerate(batch_boxes)
        ]
    )
