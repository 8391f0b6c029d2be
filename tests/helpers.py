# SPDX-License-Identifier: Apache-2.0
"""What several test modules call."""

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.variants import Variant


def build_backbone(variant: Variant, **kwargs):
    """A backbone of a row of ``variants.py``."""
    cls = EfficientFormer if variant.family == "v1" else EfficientFormerV2
    return cls(variant.arch, **kwargs)
