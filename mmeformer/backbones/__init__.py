# SPDX-License-Identifier: Apache-2.0
"""The two backbones; importing this package registers them."""

from mmeformer.backbones.efficientformer import EfficientFormer
from mmeformer.backbones.efficientformer_v2 import EfficientFormerV2
from mmeformer.checkpoints import safe_load

# Whoever builds one of our models is about to load a file that somebody else made, perhaps by
# tools that are not ours (mmdet's init_detector). mmengine would unpickle it without restriction.
safe_load.install()

__all__ = ["EfficientFormer", "EfficientFormerV2"]
