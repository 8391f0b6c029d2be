# SPDX-License-Identifier: Apache-2.0
"""Detection and instance segmentation: additions to mmdet. Importing this registers them."""

from mmeformer.colors import YOLOXHSVRandomAug
from mmeformer.detection.assigner import BboxOverlaps2D, MaxIoUAssigner
from mmeformer.detection.coco import CocoDataset
from mmeformer.detection.coder import DeltaXYWHBBoxCoder
from mmeformer.detection.lite_head import LiteGFLHead
from mmeformer.detection.lite_mask_head import LiteRTMDetInsHead
from mmeformer.detection.metric import CocoMetric
from mmeformer.detection.roi_heads import FCNMaskHead, Shared2FCBBoxHead, SingleRoIExtractor
from mmeformer.detection.rpn_head import RPNHead
from mmeformer.detection.sampler import RandomSampler
from mmeformer.detection.tta import InstanceTTAModel
from mmeformer.lite import LitePAFPN

__all__ = [
    "BboxOverlaps2D",
    "CocoDataset",
    "CocoMetric",
    "DeltaXYWHBBoxCoder",
    "FCNMaskHead",
    "InstanceTTAModel",
    "LiteGFLHead",
    "LitePAFPN",
    "LiteRTMDetInsHead",
    "MaxIoUAssigner",
    "RPNHead",
    "RandomSampler",
    "Shared2FCBBoxHead",
    "SingleRoIExtractor",
    "YOLOXHSVRandomAug",
]
