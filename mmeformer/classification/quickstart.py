# SPDX-License-Identifier: Apache-2.0
"""Quickstart of classification; :mod:`mmeformer.quickstart` runs it."""

from mmeformer.quickstart import Quickstart
from mmeformer.synthetic.photographs import write_photograph_dataset

QUICKSTART = Quickstart(
    config="classification/efficientformerv2-s0_quickstart.py",
    generate=write_photograph_dataset,
    goals={"accuracy/top1": 90.0},  # percent
)
