# SPDX-License-Identifier: Apache-2.0
"""Conversion of the objects in mmdet's data samples, upright or rotated, to numpy and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from mmeformer.runtime import Detections, RotatedDetections


def predict_instances(model: Any, image: Tensor, metainfo: dict[str, Any]) -> InstanceData:
    """Predict with a detector's own ``predict``; arguments as in ``Graph.predict``."""
    (sample,) = model.predict(image, [DetDataSample(metainfo=metainfo)], rescale=True)
    return sample.pred_instances


@dataclass(frozen=True)
class _WholeMasks(Detections):
    """Detections with masks (N, H, W) of the size of the image, as mmdet predicts them."""

    whole: np.ndarray | None = None

    def masks(self) -> np.ndarray:
        assert self.whole is not None
        return self.whole


def predict_detections(model: Any, image: Tensor, metainfo: dict[str, Any]) -> Detections:
    """Predict upright boxes, and masks if the model has them; arguments as above."""
    found = predict_instances(model, image, metainfo)
    masks = found.masks.numpy() if "masks" in found else None
    return _WholeMasks(*arrays(found), metainfo["ori_shape"], whole=masks)


def arrays(found: InstanceData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (N, 4 or 5), scores (N,) and labels (N,) of predicted instances."""
    return get_box_tensor(found.bboxes).numpy(), found.scores.numpy(), found.labels.numpy()


def set_instances(sample: DetDataSample, result: Detections | RotatedDetections) -> None:
    """Put a result into a data sample, as the detector in PyTorch does.

    Boxes of the ground truth become plain tensors, as metrics expect.
    """
    found = InstanceData(
        bboxes=torch.from_numpy(result.boxes),
        scores=torch.from_numpy(result.scores),
        labels=torch.from_numpy(result.labels),
    )
    if isinstance(result, Detections) and result.instance_masks is not None:
        found.masks = torch.from_numpy(result.masks())
    sample.pred_instances = found
    truth = sample.get("gt_instances")
    if truth is not None and isinstance(truth.get("bboxes"), BaseBoxes):
        truth.bboxes = truth.bboxes.tensor
