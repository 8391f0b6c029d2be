# SPDX-License-Identifier: Apache-2.0
"""The two backbones; importing this package registers them."""

from mmeformer.backbones.efficientformer import EfficientFormer
from mmeformer.backbones.efficientformer_v2 import EfficientFormerV2

__all__ = ["EfficientFormer", "EfficientFormerV2"]
