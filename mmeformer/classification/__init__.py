# SPDX-License-Identifier: Apache-2.0
"""Image classification: additions to mmpretrain. Importing this package registers them."""

from mmeformer.classification.classifier import Classifier
from mmeformer.classification.head import EfficientFormerHead

__all__ = ["Classifier", "EfficientFormerHead"]
