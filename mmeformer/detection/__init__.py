# SPDX-License-Identifier: Apache-2.0
"""Detection and instance segmentation: additions to mmdet. Importing this registers them."""

from mmeformer.detection.coco import CocoDataset
from mmeformer.detection.metric import CocoMetric
from mmeformer.detection.tta import InstanceTTAModel

__all__ = ["CocoDataset", "CocoMetric", "InstanceTTAModel"]
