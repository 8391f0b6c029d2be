# SPDX-License-Identifier: Apache-2.0
"""Quickstart of detection; :mod:`mmeformer.quickstart` runs it."""

from mmeformer.quickstart import Quickstart
from mmeformer.synthetic.shapes import write_coco_dataset

QUICKSTART = Quickstart(
    config="detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py",
    generate=write_coco_dataset,
    goals={"coco/bbox_mAP_50": 0.6, "coco/segm_mAP_50": 0.6},
)

LIGHT_QUICKSTART = Quickstart(
    config="detection/gfl-lite_efficientformerv2-s0_pafpn_quickstart.py",
    generate=write_coco_dataset,
    goals={"coco/bbox_mAP_50": 0.8},
)
