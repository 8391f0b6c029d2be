# SPDX-License-Identifier: Apache-2.0
"""Suppression and merging, against mmcv and against loops over shapely polygons."""

import time

import numpy as np
import pytest
import torch
from mmcv.ops import nms_rotated
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes
from rotated_boxes import outline, polygon_iou, random_detections

from mmeformer.results import RotatedDetections
from mmeformer.rotated import from_instances, merge_patches
from mmeformer.rotated_boxes import overlapping_pairs, rotated_nms


def test_pairs_are_all_that_overlap_with_their_iou():
    generator = np.random.default_rng(0)
    first, second = (random_detections(generator, 80, side=60) for _ in range(2))
    row, column, iou = overlapping_pairs(first.boxes, first.labels, second.boxes, second.labels)
    dense = np.zeros((80, 80))
    dense[row, column] = iou
    expected = polygon_iou(first.boxes, second.boxes)
    expected[first.labels[:, None] != second.labels[None]] = 0
    np.testing.assert_allclose(dense, expected, atol=1e-5)
    assert (expected > 0).sum() > 100


@pytest.mark.parametrize("iou_thr", [0.1, 0.5])
def test_suppression_is_that_of_mmcv(iou_thr):
    generator = np.random.default_rng(1)
    found = random_detections(generator, 700, side=200)
    boxes, scores = found.boxes, found.scores
    kept = nms_rotated(torch.from_numpy(boxes), torch.from_numpy(scores), iou_thr)[1]
    found = rotated_nms(boxes, scores, np.zeros(700, int), iou_thr)
    assert 20 < len(found) < 650
    np.testing.assert_array_equal(found, kept.numpy())


def test_suppression_in_several_steps_and_by_class(monkeypatch):
    generator = np.random.default_rng(2)
    found = random_detections(generator, 300, side=100)
    boxes, scores, labels = found.boxes, found.scores, found.labels
    whole = rotated_nms(boxes, scores, labels, 0.2)
    by_class = []
    for label in range(3):
        mine = np.flatnonzero(labels == label)
        by_class.append(mine[rotated_nms(boxes[mine], scores[mine], labels[mine], 0.2)])
    assert sorted(whole) == sorted(np.concatenate(by_class))
    assert (np.diff(scores[whole]) <= 0).all()
    monkeypatch.setattr("mmeformer.rotated_boxes._PAIRS", 7)
    np.testing.assert_array_equal(rotated_nms(boxes, scores, labels, 0.2), whole)


def test_equal_scores_keep_the_first_and_nothing_stays_nothing():
    boxes = np.array([[5, 5, 4, 2, 0.3]] * 3)
    np.testing.assert_array_equal(rotated_nms(boxes, np.ones(3), np.array([0, 1, 0]), 0.5), [0, 1])
    empty = RotatedDetections.concatenate([])
    found = empty.suppressed(0.1)
    assert [a.shape for a in (found.boxes, found.scores, found.labels)] == [(0, 5), (0,), (0,)]


def test_many_boxes_take_seconds():
    generator = np.random.default_rng(3)
    detections = random_detections(generator, 20_000, side=6000)
    start = time.process_time()
    kept = detections.suppressed(0.1)
    assert time.process_time() - start < 10
    assert 5000 < len(kept.scores) < 20_000


def test_merged_patches_are_the_whole_image():
    generator = np.random.default_rng(4)
    whole = random_detections(generator, 60, side=200).suppressed(0.1)
    patches = []
    for name in ("P__1", "Q"):
        for x, y in ((0, 0), (76, 0), (0, 76), (76, 76)):
            inside = [
                row
                for row, box in enumerate(whole.boxes)
                if (outline(box).bounds[0] >= x and outline(box).bounds[1] >= y)
                and (outline(box).bounds[2] <= x + 124 and outline(box).bounds[3] <= y + 124)
            ]
            patches.append((f"{name}__124__{x}___{y}", whole.take(inside).moved(-x, -y)))
    merged = merge_patches(patches)
    assert list(merged) == ["P__1", "Q"]
    seen = [
        row
        for row in range(len(whole.scores))
        if any(np.isclose(whole.scores[row], found.scores).any() for _, found in patches)
    ]
    assert len(seen) > 20
    for found in merged.values():
        np.testing.assert_allclose(found.scores, whole.scores[seen])
        np.testing.assert_allclose(found.boxes, whole.boxes[seen], atol=1e-4)
        np.testing.assert_array_equal(found.labels, whole.labels[seen])


def test_only_patches_can_be_merged():
    with pytest.raises(ValueError, match="'P0001' is not the name of a patch"):
        merge_patches([("P0001", RotatedDetections.concatenate([]))])


def test_instances_are_taken_and_upright_boxes_refused():
    instances = InstanceData(
        bboxes=RotatedBoxes(torch.rand(3, 5)), scores=torch.rand(3), labels=torch.arange(3)
    )
    found = from_instances(instances)
    assert found.boxes.shape == (3, 5) and found.labels.tolist() == [0, 1, 2]
    instances.bboxes = HorizontalBoxes(torch.rand(3, 4))
    with pytest.raises(ValueError, match="boxes have 4 numbers instead of 5"):
        from_instances(instances)
