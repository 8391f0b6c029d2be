# SPDX-License-Identifier: Apache-2.0
"""Masks arrive from other processes as they were, and take a bit per pixel on the way."""

from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures.mask import BitmapMasks, encode_mask_results
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from mmeformer.detection import CocoMetric, FCNMaskHead
from mmeformer.detection.masks import PackedMasks

SIZES = [(0, 5, 9), (1, 1, 1), (3, 6, 8), (2, 7, 13), (10, 40, 63)]


def random_masks(number: int, height: int, width: int) -> BitmapMasks:
    pixels = np.random.default_rng(width).integers(0, 2, (number, height, width), dtype=np.uint8)
    return BitmapMasks(pixels, height, width)


def as_it_is(batch: list) -> list:
    return batch


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_the_same(size):
    plain = random_masks(*size)
    packed = PackedMasks.of(plain)
    assert len(packed) == len(plain) and packed.masks.dtype == np.uint8
    np.testing.assert_array_equal(packed.masks, plain.masks)
    assert torch.equal(packed.to_tensor(torch.bool, "cpu"), plain.to_tensor(torch.bool, "cpu"))
    np.testing.assert_array_equal(packed.areas, plain.areas)
    larger = (size[1] + 3, size[2] + 11)
    np.testing.assert_array_equal(packed.pad(larger).masks, plain.pad(larger).masks)
    np.testing.assert_array_equal(packed.pad(larger, 1).masks, plain.pad(larger, 1).masks)
    np.testing.assert_array_equal(packed.pad(larger).flip().masks, plain.pad(larger).flip().masks)
    if size[0]:
        np.testing.assert_array_equal(packed[[0]].masks, plain[[0]].masks)


def test_workers_send_them():
    sent = [random_masks(*size) for size in SIZES]
    sent.append(BitmapMasks(np.full((1, 2, 3), 7, np.uint8), 2, 3))  # not zeros and ones
    loader = DataLoader(sent, batch_size=2, num_workers=1, collate_fn=as_it_is)
    received = [masks for batch in loader for masks in batch]
    assert [type(masks) for masks in received] == [PackedMasks] * len(SIZES) + [BitmapMasks]
    for masks, before in zip(received, sent, strict=True):
        np.testing.assert_array_equal(masks.masks, before.masks)
        assert (masks.height, masks.width) == (before.height, before.width)


def test_the_pipe_between_processes_gets_no_pixels():
    masks = BitmapMasks(np.ones((10, 800, 1344), np.uint8), 800, 1344)
    assert len(ForkingPickler.dumps(masks)) < 2_000


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("number", [2, 12])
def test_mask_targets_are_the_same(soft, number):
    torch.manual_seed(0)
    plain = random_masks(number, 40, 61)
    corners = torch.rand(7, 4) * torch.tensor([30, 20, 30, 20])
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], 1)
    sampled = SamplingResult(
        torch.arange(7),
        torch.arange(0),
        boxes,
        boxes[:number],
        type("Assigned", (), dict(gt_inds=torch.randint(1, 3, (7,)), labels=torch.zeros(7)))(),
        torch.zeros(7, dtype=torch.uint8),
    )
    head = FCNMaskHead(num_convs=1, in_channels=4, conv_out_channels=4, num_classes=2)
    config = ConfigDict(mask_size=14, soft_mask_target=soft)
    targets = [
        head.get_targets([sampled], [InstanceData(masks=masks)], config)
        for masks in (plain.pad((64, 64)), PackedMasks.of(plain).pad((64, 64)))
    ]
    assert targets[0].shape == (7, 14, 14) and targets[0].any()
    assert torch.equal(*targets)


class OnDevice(torch.Tensor):
    """Notes the shapes that are copied to the host."""

    copied: list = []

    def cpu(self):
        self.copied.append(tuple(self.shape))
        return super().cpu().as_subclass(torch.Tensor)


def test_the_metric_copies_predicted_masks_one_by_one():
    pixels = random_masks(3, 40, 63).masks.astype(bool)
    masks = torch.from_numpy(pixels).as_subclass(OnDevice)
    instances = dict(bboxes=torch.rand(3, 4), scores=torch.rand(3), labels=torch.zeros(3).long())
    sample = dict(img_id=1, ori_shape=(40, 63), instances=[])
    metric = CocoMetric(metric="segm")
    metric.process({}, [{**sample, "pred_instances": {**instances, "masks": masks}}])
    assert OnDevice.copied == 3 * [(40, 63)]
    assert metric.results[0][1]["masks"] == encode_mask_results(pixels)
