# SPDX-License-Identifier: Apache-2.0
"""Rotated object detection: GFL head, ATSS assignment, rotated IoU and its loss.

The only part of the package that imports mmrotate. Importing it registers the modules, so configs
of rotated detectors say ``custom_imports = dict(imports=["mmeformer.rotated"])``.
"""

try:
    import mmrotate.models  # noqa: F401  (registers the coders and anchors the head builds on)
except ImportError as error:
    raise ImportError(
        "mmeformer.rotated needs mmrotate: pip install 'mmeformer[rot]'. Detection and "
        f"segmentation work without it. ({error})"
    ) from error

from .assigner import RotatedATSSAssigner
from .gfl_head import RotatedGFLHead
from .integral import RotatedIntegral
from .iou import rotated_iou
from .losses import RotatedIoULoss

__all__ = [
    "RotatedIntegral",
    "RotatedATSSAssigner",
    "RotatedGFLHead",
    "RotatedIoULoss",
    "rotated_iou",
]
