# SPDX-License-Identifier: Apache-2.0
"""Quickstart of rotated detection; :mod:`mmeformer.quickstart` runs it."""

from mmeformer.quickstart import Quickstart
from mmeformer.synthetic.aerial import write_dota_dataset

QUICKSTART = Quickstart(
    config="rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_quickstart.py",
    generate=write_dota_dataset,
    goals={"dota/AP50": 0.5},
)
