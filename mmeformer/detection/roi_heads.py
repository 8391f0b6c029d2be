# SPDX-License-Identifier: Apache-2.0
"""The second stage: features, boxes and masks of regions, with few waits of the host."""

import torch
from mmcv.ops import roi_align
from mmdet.models.losses import accuracy
from mmdet.models.roi_heads import bbox_heads, mask_heads, roi_extractors
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures.bbox import get_box_tensor
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.modules.utils import _pair

from mmeformer.detection.masks import PackedMasks
from mmeformer.registry import MODELS

__all__ = ["FCNMaskHead", "Shared2FCBBoxHead", "SingleRoIExtractor"]


@MODELS.register_module()
class SingleRoIExtractor(roi_extractors.SingleRoIExtractor):
    """``mmdet.SingleRoIExtractor`` that sorts regions by level, for which the host waits once.

    Features are the same. Regions stay float32 under autocast, where mmdet rounds them to the type
    of the maps: by up to 4 px of 1,000 in bfloat16.

    Source: Lin et al., "Feature Pyramid Networks", CVPR 2017, equation 1.
    """

    def forward(
        self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Pool every region from its level.

        Args:
            feats: levels (B, C, H_i, W_i).
            rois: (N, 5): index of the image, then left, top, right, bottom in pixels of the image.
            roi_scale_factor: factor of the sizes of the regions.

        Returns:
            (N, C, height, width), in the type of ``feats``.
        """
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        order = levels.argsort(stable=True)
        counts = (levels[:, None] == torch.arange(len(feats), device=levels.device)).sum(0)
        pooled = [
            # An empty slice keeps a level without regions in the graph of gradients.
            layer(_at_least_float32(feat), own) if len(own) else self._none(feat, layer)
            for feat, layer, own in zip(
                feats, self.roi_layers, rois[order].split(counts.tolist()), strict=True
            )
        ]
        sorted_feats = torch.cat(pooled)
        unsorted = torch.zeros_like(sorted_feats).index_copy(0, order, sorted_feats)
        return unsorted.to(feats[0].dtype)

    def _none(self, feat: Tensor, layer: torch.nn.Module) -> Tensor:
        return _at_least_float32(feat[:0]).reshape(0, feat.shape[1], *_pair(layer.output_size))


def _at_least_float32(tensor: Tensor) -> Tensor:
    # float16 and bfloat16 cannot place a region to a pixel in a large map.
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@MODELS.register_module()
class Shared2FCBBoxHead(bbox_heads.Shared2FCBBoxHead):
    """``mmdet.Shared2FCBBoxHead`` whose loss knows from the samples which regions are positive.

    Losses are the same. mmdet asks the device for the number of samples and, four times, for the
    positives among them. Here the host never waits.

    Source: Girshick, "Fast R-CNN", ICCV 2015, section 2.3.
    """

    def loss_and_target(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        sampling_results: list[SamplingResult],
        rcnn_train_cfg: ConfigDict,
        concat: bool = True,
        reduction_override: str | None = None,
    ) -> dict:
        """Compute the losses of all samples of a batch.

        Args:
            cls_score: logits (N, classes + 1); per image the positives, then the negatives.
            bbox_pred: offsets (N, classes * 4), or (N, 4) with ``reg_class_agnostic``.
            rois: (N, 5).
            sampling_results: samples per image.
            rcnn_train_cfg: ``pos_weight``: weight of positives in the loss of the class, 1 if it
                is not positive.
            concat: must be true.
            reduction_override: replaces the reductions of the losses.

        Returns:
            ``loss_bbox``: ``loss_cls``, ``loss_bbox`` and ``acc`` in percent; ``bbox_targets``:
            the labels (N,), in a tuple.
        """
        assert concat
        labels, positive, start = [], [], 0
        for result in sampling_results:
            num_pos, num_neg = len(result.pos_inds), len(result.neg_inds)
            background = result.pos_gt_labels.new_full((num_neg,), self.num_classes)
            labels += [result.pos_gt_labels, background]
            positive.append(torch.arange(start, start + num_pos, device=cls_score.device))
            start += num_pos + num_neg
        classes, rows = torch.cat(labels), torch.cat(positive)
        average = dict(avg_factor=max(start, 1), reduction_override=reduction_override)

        weights = cls_score.new_ones(start, dtype=torch.float32)
        if rcnn_train_cfg.pos_weight > 0:
            weights[rows] = rcnn_train_cfg.pos_weight
        loss_cls = self.loss_cls(cls_score, classes, weights, **average)
        # Some losses are several terms, with an accuracy of their own.
        losses = dict(loss_cls) if isinstance(loss_cls, dict) else dict(loss_cls=loss_cls)
        if self.custom_activation:
            losses.update(self.loss_cls.get_accuracy(cls_score, classes))
        else:
            losses["acc"] = accuracy(cls_score, classes)

        priors = torch.cat([get_box_tensor(result.pos_priors) for result in sampling_results])
        targets = torch.cat([get_box_tensor(result.pos_gt_bboxes) for result in sampling_results])
        deltas = bbox_pred.view(len(bbox_pred), -1, self.bbox_coder.encode_size)
        deltas = deltas[rows, 0 if self.reg_class_agnostic else classes[rows]]
        if self.reg_decoded_bbox:
            deltas = get_box_tensor(self.bbox_coder.decode(priors, deltas))
        else:
            targets = self.bbox_coder.encode(priors, targets)
        losses["loss_bbox"] = self.loss_bbox(deltas, targets, **average)
        return dict(loss_bbox=losses, bbox_targets=(classes,))


@MODELS.register_module()
class FCNMaskHead(mask_heads.FCNMaskHead):
    """``mmdet.FCNMaskHead`` whose targets stay on the device.

    Targets are the same. mmdet copies regions and targets to the host and back, and makes a
    float copy of the whole mask of the image for every region; here one per object is enough.

    Source: He et al., "Mask R-CNN", ICCV 2017, section 3.
    """

    def get_targets(
        self,
        sampling_results: list[SamplingResult],
        batch_gt_instances: list[InstanceData],
        rcnn_train_cfg: ConfigDict,
    ) -> Tensor:
        """Cut the targets of all positives of a batch out of the masks of their objects.

        Args:
            sampling_results: samples per image.
            batch_gt_instances: per image ``masks``. Polygons are left to mmdet.
            rcnn_train_cfg: ``mask_size``; ``soft_mask_target``: keep shares of pixels.

        Returns:
            (P, mask_size, mask_size) in [0, 1].
        """
        if not all(isinstance(gts.masks, BitmapMasks) for gts in batch_gt_instances):
            return super().get_targets(sampling_results, batch_gt_instances, rcnn_train_cfg)
        size = _pair(rcnn_train_cfg.mask_size)
        targets = torch.cat(
            [
                _crop(gts.masks, result, size)
                for result, gts in zip(sampling_results, batch_gt_instances, strict=True)
            ]
        )
        if rcnn_train_cfg.get("soft_mask_target", False):
            return targets
        return (targets >= 0.5).float()


def _crop(masks: BitmapMasks, result: SamplingResult, size: tuple[int, int]) -> Tensor:
    """Mean of the mask of its object (P, height, width) in every cell of every positive region."""
    boxes = get_box_tensor(result.pos_priors).float()
    if len(boxes) == 0:
        return boxes.new_zeros(0, *size)
    boxes = torch.stack(
        [
            boxes[:, 0::2].clamp(0, masks.width),
            boxes[:, 1::2].clamp(0, masks.height),
        ],
        -1,
    ).flatten(1)
    if isinstance(masks, PackedMasks):
        whole = masks.to_tensor(torch.uint8, boxes.device)
    else:
        whole = torch.from_numpy(masks.masks).to(boxes.device, non_blocking=True)
    index = result.pos_assigned_gt_inds
    if len(whole) > len(boxes):
        whole, index = whole[index], torch.arange(len(boxes), device=boxes.device)
    rois = torch.cat([index[:, None].to(boxes), boxes], 1)
    return roi_align(whole[:, None].to(boxes), rois, size, 1.0, 0, "avg", True).squeeze(1)
