# SPDX-License-Identifier: Apache-2.0
"""Image classification: additions to mmpretrain. Importing this package registers them."""

from mmeformer.classification.head import EfficientFormerHead

__all__ = ["EfficientFormerHead"]
