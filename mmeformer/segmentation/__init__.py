# SPDX-License-Identifier: Apache-2.0
"""What segmentation needs beyond mmseg; importing this package registers it and needs mmseg."""

from mmeformer.segmentation.datasets import ADE20KDataset, SegmentationDataset
from mmeformer.segmentation.hooks import SegNumClassCheckHook

__all__ = ["ADE20KDataset", "SegNumClassCheckHook", "SegmentationDataset"]
