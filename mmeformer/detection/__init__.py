# SPDX-License-Identifier: Apache-2.0
"""What detection needs beyond mmdet; importing this package registers it and needs mmdet."""

from mmeformer.detection.coco import CocoDataset
from mmeformer.detection.tta import InstanceTTAModel

__all__ = ["CocoDataset", "InstanceTTAModel"]
