# SPDX-License-Identifier: Apache-2.0
"""ATSS on candidates against mmrotate's ATSS on all pairs."""

import math

import pytest
import torch
from mmengine.structures import InstanceData
from mmrotate.models.task_modules.assigners import RotatedATSSAssigner as MMRotateAssigner
from mmrotate.models.task_modules.prior_generators import FakeRotatedAnchorGenerator
from mmrotate.structures.bbox import RotatedBoxes

from mmeformer.rotated import assigner as assigner_module
from mmeformer.rotated.assigner import RotatedATSSAssigner

CALCULATOR = dict(type="mmrotate.RBboxOverlaps2D")


def grid_priors(size=256, strides=(8, 16, 32, 64, 128)):
    """Anchors of the head and their number per level."""
    generator = FakeRotatedAnchorGenerator(scales=[4], ratios=[1.0], strides=list(strides))
    levels = generator.grid_priors([(size // s, size // s) for s in strides], device="cpu")
    return RotatedBoxes(torch.cat([level.tensor for level in levels])), list(map(len, levels))


def random_boxes(count, size=256.0, low=2.0, high=200.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(count, 5, generator=generator)
    boxes = torch.empty(count, 5)
    boxes[:, :2] = unit[:, :2] * size
    boxes[:, 2:4] = low * (high / low) ** unit[:, 2:4]
    boxes[:, 4] = unit[:, 4] * math.pi - math.pi / 4
    return boxes


def instances(boxes):
    return InstanceData(bboxes=RotatedBoxes(boxes), labels=torch.arange(len(boxes)) % 15)


def assert_same(priors, levels, boxes, ignore=None, topk=9, ignore_iof_thr=-1):
    """Both assigners give the same result; returns it."""
    results = []
    for cls in (RotatedATSSAssigner, MMRotateAssigner):
        assigner = cls(topk=topk, iou_calculator=CALCULATOR, ignore_iof_thr=ignore_iof_thr)
        ignored = None if ignore is None else instances(ignore.clone())
        gts = instances(boxes.clone())
        results.append(assigner.assign(InstanceData(priors=priors), levels, gts, ignored))
    ours, theirs = results
    assert ours.num_gts == theirs.num_gts
    assert torch.equal(ours.gt_inds, theirs.gt_inds)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.max_overlaps, theirs.max_overlaps)
    return ours


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 7, 100])
def test_same_as_mmrotate_on_random_boxes(count, seed):
    boxes = random_boxes(count, seed=seed)
    result = assert_same(*grid_priors(), boxes)
    assert (result.gt_inds > 0).sum() >= min(count, 10) // 2


@pytest.mark.parametrize("low,high", [(0.01, 1), (2, 6), (150, 900)], ids=["dots", "tiny", "huge"])
def test_same_as_mmrotate_at_extreme_sizes(low, high):
    for seed in range(5):
        assert_same(*grid_priors(), random_boxes(60, low=low, high=high, seed=seed))


def test_same_as_mmrotate_on_elongated_dense_boxes():
    """A harbour: parallel, thin, closer than the stride of the finest level."""
    boxes = torch.zeros(80, 5)
    boxes[:, 0] = torch.linspace(20.3, 236.1, 80)
    boxes[:, 1] = 101.7
    boxes[:, 2], boxes[:, 3], boxes[:, 4] = 60.0, 5.0, 1.3
    result = assert_same(*grid_priors(), boxes)
    # Neighbours compete for the same priors.
    assert (result.gt_inds > 0).sum() > 40


def test_same_as_mmrotate_where_boxes_tie():
    """Identical boxes, and boxes centred on anchors: equal IoU and equal distances."""
    boxes = random_boxes(10, seed=3)
    centred = boxes.clone()
    centred[:, :2] = (boxes[:, :2] / 16).round() * 16
    assert_same(*grid_priors(), torch.cat([boxes, boxes.flip(0), centred, centred]))


def test_same_as_mmrotate_with_fewer_priors_than_topk():
    """256 px: 4 priors on the last level; 64 px: 1, and the level above as well."""
    for size in (256, 64):
        strides = (8, 16, 32, 64) if size == 64 else (8, 16, 32, 64, 128)
        priors, levels = grid_priors(size, strides)
        assert min(levels) < 9
        for seed in range(5):
            assert_same(priors, levels, random_boxes(20, size=size, seed=seed))
    priors, levels = grid_priors(128, (128,))
    result = assert_same(priors, levels, random_boxes(3, size=128.0, seed=0))
    assert (result.gt_inds == 0).all(), "one candidate has no standard deviation, so no positive"


def test_same_as_mmrotate_with_some_priors_outside():
    priors, levels = grid_priors()
    keep = torch.rand(len(priors), generator=torch.Generator().manual_seed(0)) < 0.6
    counts = [int(flags.sum()) for flags in keep.split(levels)]
    assert_same(priors[keep], counts, random_boxes(40, seed=1))
    # A level without any prior.
    keep[levels[0] : levels[0] + levels[1]] = False
    counts = [int(flags.sum()) for flags in keep.split(levels)]
    assert counts[1] == 0
    assert_same(priors[keep], counts, random_boxes(40, seed=1))


@pytest.mark.parametrize("topk", [1, 3, 20])
def test_same_as_mmrotate_for_other_numbers_of_candidates(topk):
    result = assert_same(*grid_priors(), random_boxes(50, seed=2), topk=topk)
    assert (result.gt_inds > 0).any()


def test_without_boxes_all_is_background():
    priors, levels = grid_priors()
    result = assert_same(priors, levels, torch.zeros(0, 5))
    assert (result.gt_inds == 0).all()
    assert (result.labels == -1).all()


def test_without_priors_nothing_is_assigned():
    result = assert_same(RotatedBoxes(torch.zeros(0, 5)), [0, 0], random_boxes(3))
    assert result.gt_inds.shape == (0,)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_same_as_mmrotate_with_ignored_boxes(threshold):
    priors, levels = grid_priors()
    for seed in range(5):
        ignore = random_boxes(6, low=30, high=150, seed=seed + 100)
        result = assert_same(
            priors, levels, random_boxes(30, seed=seed), ignore, ignore_iof_thr=threshold
        )
        assert (result.gt_inds == -1).any()
    # Also without any box to ignore, and with the threshold off.
    assert_same(priors, levels, random_boxes(5), torch.zeros(0, 5), ignore_iof_thr=threshold)
    result = assert_same(priors, levels, random_boxes(5), ignore, ignore_iof_thr=-1)
    assert (result.gt_inds >= 0).all()


@pytest.mark.parametrize(("low", "high"), [(6, 20), (30, 150)], ids=["small", "large"])
def test_difficult_objects_are_neither_object_nor_background(low, high):
    priors, levels = grid_priors()
    assigner = RotatedATSSAssigner()
    for seed in range(5):
        boxes, difficult = random_boxes(20, seed=seed), random_boxes(6, 256, low, high, seed + 50)
        alone = assigner.assign(InstanceData(priors=priors), levels, instances(boxes))
        result = assigner.assign(
            InstanceData(priors=priors), levels, instances(boxes), instances(difficult)
        )
        as_objects = assigner.assign(InstanceData(priors=priors), levels, instances(difficult))
        wanted = alone.gt_inds.clone()
        wanted[(alone.gt_inds == 0) & (as_objects.gt_inds > 0)] = -1
        assert (wanted == -1).sum() > 6
        assert torch.equal(result.gt_inds, wanted)
        assert torch.equal(result.labels, alone.labels), "real objects keep their priors"


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_difficult_objects_alone_in_an_image_are_ignored(threshold):
    priors, levels = grid_priors()
    difficult = instances(random_boxes(6, low=40, high=150))
    result = RotatedATSSAssigner(ignore_iof_thr=threshold).assign(
        InstanceData(priors=priors), levels, instances(torch.zeros(0, 5)), difficult
    )
    assert (result.gt_inds == -1).sum() > 6 and (result.gt_inds > 0).sum() == 0
    assert (result.labels == -1).all()


def test_chunks_do_not_change_the_result(monkeypatch):
    boxes = random_boxes(50, seed=4)
    expected = assert_same(*grid_priors(), boxes)
    # 1024 priors on the finest level: chunks of 3 boxes there, of one where even one is too many.
    for pairs in (3 * 1024, 10):
        monkeypatch.setattr(assigner_module, "_MAX_PAIRS", pairs)
        result = assert_same(*grid_priors(), boxes)
        assert torch.equal(result.gt_inds, expected.gt_inds)


def test_computes_the_iou_of_candidates_only(monkeypatch):
    priors, levels = grid_priors()
    assigner = RotatedATSSAssigner(topk=9)
    calculator, pairs = assigner.iou_calculator, []

    def counting(boxes1, boxes2, **kwargs):
        assert kwargs["is_aligned"]
        pairs.append(len(boxes1))
        return calculator(boxes1, boxes2, **kwargs)

    monkeypatch.setattr(assigner, "iou_calculator", counting)
    assigner.assign(InstanceData(priors=priors), levels, instances(random_boxes(30)))
    assert sum(pairs) == 30 * (9 + 9 + 9 + 9 + 4)


def test_wrong_number_of_priors_is_named():
    priors, levels = grid_priors()
    with pytest.raises(ValueError, match="adds up to .* but there are 1364 priors"):
        RotatedATSSAssigner().assign(
            InstanceData(priors=priors), levels[:-1], instances(random_boxes(2))
        )
