# SPDX-License-Identifier: Apache-2.0
"""Batches of random images and objects for measurements of whole training steps."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData


def random_batch(task: str, images: int, size: tuple[int, int], objects: int, classes: int) -> dict:
    """A batch as a data loader gives it: uint8 images on the CPU (pinned) and their annotations.

    Args:
        task: ``detection`` (with masks), ``segmentation`` or ``rotated``.
        images: number of images.
        size: (H, W) in pixels.
        objects: per image; segmentation has a class per pixel.
        classes: number of classes.
    """
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    inputs, samples = [], []
    for _ in range(images):
        image = torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8))
        inputs.append(image.pin_memory() if torch.cuda.is_available() else image)
        samples.append(_sample(task, size, objects, classes, generator))
    return dict(inputs=inputs, data_samples=samples)


def _sample(task, size, objects, classes, generator):
    meta = dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
    )
    if task == "segmentation":
        from mmseg.structures import SegDataSample

        sample = SegDataSample(metainfo=meta)
        # Regions, as in real label maps.
        coarse = torch.randint(0, classes, (1, size[0] // 16, size[1] // 16), generator=generator)
        labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
        sample.gt_sem_seg = PixelData(data=labels)
        return sample
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = size
    side = torch.rand(objects, 2, generator=generator) * 0.25 + 0.03
    center = torch.rand(objects, 2, generator=generator) * (1 - side) + side / 2
    scale = torch.tensor([width, height], dtype=torch.float32)
    labels = torch.randint(0, classes, (objects,), generator=generator)
    sample = DetDataSample(metainfo=meta)
    if task == "rotated":
        from mmrotate.structures.bbox import RotatedBoxes

        angle = torch.rand(objects, 1, generator=generator) * 3.1 - 0.78
        boxes = RotatedBoxes(torch.cat([center * scale, side * scale, angle], 1))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    else:
        boxes = torch.cat([(center - side / 2) * scale, (center + side / 2) * scale], 1)
        masks = np.zeros((objects, height, width), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top : bottom + 1, left : right + 1] = 1
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=labels, masks=BitmapMasks(masks, height, width)
        )
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
    return sample
