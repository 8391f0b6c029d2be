# SPDX-License-Identifier: Apache-2.0
"""Quickstart of segmentation; :mod:`mmeformer.quickstart` runs it."""

from mmeformer.quickstart import Quickstart
from mmeformer.synthetic.masks import write_mask_dataset

QUICKSTART = Quickstart(
    config="segmentation/semantic-fpn_efficientformerv2-s0_quickstart.py",
    generate=write_mask_dataset,
    goals={"mIoU": 60.0},  # percent, as mmseg reports it
)
