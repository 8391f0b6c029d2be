# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: additions to mmseg. Importing this package registers them."""

from mmeformer.segmentation.datasets import ADE20KDataset, SegmentationDataset
from mmeformer.segmentation.hooks import SegNumClassCheckHook

__all__ = ["ADE20KDataset", "SegNumClassCheckHook", "SegmentationDataset"]
