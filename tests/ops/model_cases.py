# SPDX-License-Identifier: Apache-2.0
"""Predictions of small models whose weights follow from their names."""

import tempfile
from pathlib import Path

import numpy as np
import tiny
import torch
from golden_weights import image, weight
from mmdet.structures.bbox import get_box_tensor
from mmengine.registry import MODELS, init_default_scope

# No score is too low, so that suppression has much to do.
TEST_CFG = {
    "detection": dict(
        rpn=dict(nms_pre=300, max_per_img=100, nms=dict(type="nms", iou_threshold=0.7)),
        rcnn=dict(
            score_thr=0.0,
            nms=dict(type="nms", iou_threshold=0.5),
            max_per_img=30,
            mask_thr_binary=0.5,
        ),
    ),
    "rotated": dict(
        nms_pre=300,
        min_bbox_size=0,
        score_thr=0.0,
        nms=dict(type="nms_rotated", iou_threshold=0.1),
        max_per_img=100,
    ),
}


def predict(task: str) -> dict[str, np.ndarray]:
    """Boxes, scores, labels and, packed to bits, masks that a model of ``task`` predicts."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny.TASKS[task](Path(folder))
    init_default_scope("mmdet")
    config.model.test_cfg = TEST_CFG[task]
    model = MODELS.build(config.model).eval()
    model.load_state_dict({key: tame(key, value) for key, value in model.state_dict().items()})
    pixels = (image(128, 128)[0] * 40 + 128).clamp(0, 255)
    data = dict(inputs=[pixels], data_samples=[sample(task)])
    with torch.no_grad():
        found = model.test_step(data)[0].pred_instances
    result = {
        "boxes": get_box_tensor(found.bboxes).numpy(),
        "scores": found.scores.numpy(),
        "labels": found.labels.numpy(),
    }
    if task == "detection":
        result["masks"] = np.packbits(found.masks.numpy())
    return result


def tame(key: str, value: torch.Tensor) -> torch.Tensor:
    """The weight of a name; small where boxes would leave their anchors or scores all be 1."""
    if not value.is_floating_point():
        return value
    small = any(name in key for name in ("rpn_reg", "rpn_cls", "fc_reg"))
    return weight(key, value.shape) * (0.02 if small else 1)


def sample(task: str):
    from mmdet.structures import DetDataSample

    shape = dict(img_shape=(128, 128), ori_shape=(128, 128), pad_shape=(128, 128), img_id=0)
    return DetDataSample(
        metainfo=dict(shape, scale_factor=(1.0, 1.0), batch_input_shape=(128, 128))
    )
