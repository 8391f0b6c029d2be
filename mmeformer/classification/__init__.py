# SPDX-License-Identifier: Apache-2.0
"""Image classification: additions to mmpretrain. Importing this package registers them."""

try:
    import mmpretrain  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mmeformer.classification needs mmpretrain: pip install 'mmeformer[classification]'. The "
        f"other tasks work without it. ({error})"
    ) from error

from mmeformer.classification.classifier import Classifier
from mmeformer.classification.datasets import ImageFolderDataset, ImageNetDataset
from mmeformer.classification.head import EfficientFormerHead
from mmeformer.classification.hooks import ClassNumCheckHook
from mmeformer.classification.visualizer import ClassificationVisualizer

__all__ = [
    "ClassNumCheckHook",
    "ClassificationVisualizer",
    "Classifier",
    "EfficientFormerHead",
    "ImageFolderDataset",
    "ImageNetDataset",
]
