# SPDX-License-Identifier: Apache-2.0
"""Rotated object detection: head, assigner, losses, data set, metric and prediction.

Only this package imports mmrotate. Importing it registers its modules, so configs of rotated
detectors have ``custom_imports = dict(imports=["mmeformer.rotated"])``.
"""

import warnings

try:
    import mmrotate.models  # noqa: F401  (registers the coders and anchors the head builds on)
except ImportError as error:
    raise ImportError(
        "mmeformer.rotated needs mmrotate: pip install 'mmeformer[rotated]'. Detection and "
        f"segmentation work without it. ({error})"
    ) from error

from mmeformer.colors import YOLOXHSVRandomAug
from mmeformer.lite import LitePAFPN
from mmeformer.ops.iou import rotated_iou

from .assigner import RotatedATSSAssigner
from .coder import DeltaXYWHTRBBoxCoder
from .dataset import DOTADataset
from .detections import from_instances, merge_patches, to_sample
from .dota import read_labels
from .gfl_head import RotatedGFLHead
from .inference import detect_large_image
from .integral import RotatedIntegral
from .lite_head import RotatedLiteGFLHead
from .losses import RotatedIoULoss
from .metric import DOTAMetric
from .visualizer import RotatedVisualizer
from .writers import to_json, write_dota_text, write_json, write_picture, write_task1

# mmrotate's RandomRotate asks for it each time: boxes may reach beyond the image.
warnings.filterwarnings("ignore", message="The `clip` function does nothing in `RotatedBoxes`")

__all__ = [
    "DOTADataset",
    "DOTAMetric",
    "DeltaXYWHTRBBoxCoder",
    "LitePAFPN",
    "RotatedATSSAssigner",
    "RotatedGFLHead",
    "RotatedIntegral",
    "RotatedIoULoss",
    "RotatedLiteGFLHead",
    "RotatedVisualizer",
    "YOLOXHSVRandomAug",
    "detect_large_image",
    "from_instances",
    "merge_patches",
    "read_labels",
    "rotated_iou",
    "to_json",
    "to_sample",
    "write_dota_text",
    "write_json",
    "write_picture",
    "write_task1",
]
