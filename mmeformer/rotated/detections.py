# SPDX-License-Identifier: Apache-2.0
"""Convert rotated detections from and to mmdet's data samples, and merge those of patches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes

from mmeformer.results import RotatedDetections
from mmeformer.rotated.patches import parse_patch_name

MERGE_IOU = 0.1
"""Of two boxes with a larger IoU, merging windows removes the one with the lower score. Same as in
the published recipe's NMS and in mmrotate's merging."""


def from_instances(instances: Mapping) -> RotatedDetections:
    """Detections from ``pred_instances`` of an mmdet data sample (or of its ``to_dict()``).

    Raises:
        ValueError: the boxes are not rotated boxes.
    """
    boxes = get_box_tensor(instances["bboxes"]).detach().cpu().float().numpy()
    check_rotated(boxes)
    return RotatedDetections(
        boxes,
        instances["scores"].detach().cpu().float().numpy(),
        instances["labels"].detach().cpu().long().numpy(),
    )


def to_sample(detections: RotatedDetections, **metainfo) -> DetDataSample:
    """Data sample with ``detections`` as ``pred_instances``, as mmdet's own tools expect it."""
    instances = InstanceData(
        bboxes=RotatedBoxes(torch.from_numpy(detections.boxes)),
        scores=torch.from_numpy(detections.scores),
        labels=torch.from_numpy(detections.labels),
    )
    return DetDataSample(metainfo=metainfo, pred_instances=instances)


def check_rotated(boxes: np.ndarray) -> None:
    """Check that boxes have five numbers.

    Raises:
        ValueError: they do not.
    """
    if boxes.shape[-1] != 5:
        raise ValueError(
            f"boxes have {boxes.shape[-1]} numbers instead of 5 (center, size, angle); convert "
            "them to the type 'rbox', in the pipeline with ConvertBoxType"
        )


def merge_patches(
    patches: Iterable[tuple[str, RotatedDetections]], iou_thr: float = MERGE_IOU
) -> dict[str, RotatedDetections]:
    """Merge the detections of patches into those of whole images.

    Args:
        patches: pairs of a patch's name, ``NAME__SIZE__X___Y``, and its detections.
        iou_thr: see :func:`mmeformer.rotated_boxes.rotated_nms`.

    Returns:
        Per image name, in the order of their first patch, boxes in pixels of the image.

    Raises:
        ValueError: a name is not that of a patch.
    """
    found = defaultdict(list)
    for name, detections in patches:
        patch = parse_patch_name(name)
        found[patch.image].append(detections.moved(patch.x, patch.y))
    return {
        image: RotatedDetections.concatenate(parts).suppressed(iou_thr)
        for image, parts in found.items()
    }
