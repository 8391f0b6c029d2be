# SPDX-License-Identifier: Apache-2.0
"""Annotated images of every task, as a data loader gives them, with random objects."""

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from mmrotate.structures.bbox import RotatedBoxes
from mmseg.structures import SegDataSample


def random_sample(task: str, objects: int, side: int, seed: int = 0):
    """The annotations of one square image of ``side`` px, with ``objects`` of three classes.

    Segmentation has one of four classes per pixel instead.
    """
    generator = torch.Generator().manual_seed(seed)
    meta = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (side, side))
    meta["scale_factor"] = (1.0, 1.0)
    if task == "segmentation":
        found = SegDataSample(metainfo=meta)
        labels = torch.randint(0, 4, (1, side, side), generator=generator)
        found.gt_sem_seg = PixelData(data=labels)
        return found
    unit = torch.rand(objects, 5, generator=generator)
    labels = torch.randint(0, 3, (objects,), generator=generator)
    start, size = unit[:, :2] * side * 0.47, unit[:, 2:4] * side * 0.47 + 5
    found = DetDataSample(metainfo=meta)
    if task == "rotated":
        boxes = RotatedBoxes(torch.cat([start + 20, size, unit[:, 4:]], 1))
        found.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    else:
        boxes = torch.cat([start, start + size], 1)
        masks = np.zeros((objects, side, side), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        masks = BitmapMasks(masks, side, side)
        found.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=masks)
    found.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
    return found
