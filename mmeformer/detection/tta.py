# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation for instance segmentation; mmdet's is for boxes only."""

from __future__ import annotations

import torch
from mmcv.ops import batched_nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmeformer.registry import MODELS

_FLIP_DIMS = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """mmdet's ``DetTTAModel`` (scales and flips, merged by NMS) with masks.

    Each box keeps the mask of its view, flipped back. ``tta_cfg`` has ``nms`` and ``max_per_img``,
    as in mmdet.
    """

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        instances = [sample.pred_instances for sample in data_samples]
        if "masks" not in instances[0]:
            return super()._merge_single_sample(data_samples)
        boxes, scores = self.merge_aug_bboxes(
            [item.bboxes for item in instances],
            [item.scores for item in instances],
            [sample.metainfo for sample in data_samples],
        )
        labels = torch.cat([item.labels for item in instances])
        masks = torch.cat(
            [
                _flip_back(item.masks, sample)
                for item, sample in zip(instances, data_samples, strict=True)
            ]
        )
        merged = InstanceData()
        if len(boxes):
            boxes_with_scores, keep = batched_nms(boxes, scores, labels, self.tta_cfg["nms"])
            keep = keep[: self.tta_cfg["max_per_img"]]
            # Soft NMS changes the scores, so take them from its output.
            boxes_with_scores = boxes_with_scores[: len(keep)]
            boxes, scores = boxes_with_scores[:, :4], boxes_with_scores[:, 4]
            labels, masks = labels[keep], masks[keep]
        merged.bboxes, merged.scores, merged.labels, merged.masks = boxes, scores, labels, masks
        result = data_samples[0]
        result.pred_instances = merged
        return result


def _flip_back(masks: Tensor, sample: DetDataSample) -> Tensor:
    """Masks (N, H, W) of a view, flipped back to the orientation of the image."""
    if not sample.metainfo.get("flip", False):
        return masks
    return masks.flip(_FLIP_DIMS[sample.metainfo["flip_direction"]])
