# SPDX-License-Identifier: Apache-2.0
"""Assignments and overlaps equal those of mmdet, ties included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.models.task_modules import assigners
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData

from mmeformer.detection import BboxOverlaps2D, MaxIoUAssigner

# Few different values: overlaps tie often, boxes repeat, and some have no area.
corner = st.integers(0, 6)
box = st.tuples(corner, corner, corner, corner).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)
threshold = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7])


def boxes(largest):
    return st.lists(box, max_size=largest).map(
        lambda rows: torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    )


settings = st.fixed_dictionaries(
    dict(
        pos_iou_thr=threshold,
        neg_iou_thr=st.one_of(
            threshold, st.tuples(st.just(0.0), threshold), st.just((0.1, 0.5)), st.just(0)
        ),
        min_pos_iou=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
        gt_max_assign_all=st.booleans(),
        match_low_quality=st.booleans(),
        ignore_iof_thr=st.sampled_from([-1, 0.2, 0.5]),
        ignore_wrt_candidates=st.booleans(),
    )
)


def assert_same(ours, theirs):
    assert ours.num_gts == theirs.num_gts
    for name in ("gt_inds", "max_overlaps", "labels"):
        first, second = getattr(ours, name), getattr(theirs, name)
        assert first.dtype == second.dtype and torch.equal(first, second), name


@given(settings, boxes(12), boxes(5), boxes(3), st.booleans())
def test_assignments_equal_those_of_mmdet(options, priors, gts, ignored, box_type):
    wrap = HorizontalBoxes if box_type else lambda tensor: tensor
    instances = (
        InstanceData(priors=wrap(priors)),
        InstanceData(bboxes=wrap(gts), labels=torch.arange(len(gts)) % 3),
        InstanceData(bboxes=wrap(ignored)),
    )
    ours = MaxIoUAssigner(**options).assign(*instances)
    assert_same(ours, assigners.MaxIoUAssigner(**options).assign(*instances))
    ours = MaxIoUAssigner(**options).assign(*instances[:2])
    assert_same(ours, assigners.MaxIoUAssigner(**options).assign(*instances[:2]))


def test_low_quality_matches_overwrite_in_the_order_of_the_objects():
    """One prior is the best of both objects; a second one ties for the second object."""
    priors = InstanceData(priors=torch.tensor([[0, 0, 4, 4], [4, 0, 8, 4]]).float())
    gts = InstanceData(
        bboxes=torch.tensor([[0, 0, 4, 4], [2, 0, 6, 4]]).float(), labels=torch.tensor([5, 6])
    )
    options = dict(pos_iou_thr=0.9, neg_iou_thr=0.1, min_pos_iou=0.3)
    every = MaxIoUAssigner(**options).assign(priors, gts)
    assert every.gt_inds.tolist() == [2, 2] and every.labels.tolist() == [6, 6]
    first = MaxIoUAssigner(**options, gt_max_assign_all=False).assign(priors, gts)
    assert first.gt_inds.tolist() == [2, -1] and first.labels.tolist() == [6, -1]


def test_assignment_of_many_random_boxes_equals_that_of_mmdet():
    def random_boxes(number):
        start = torch.rand(number, 2) * 500
        return torch.cat([start, start + 1 + torch.rand(number, 2) * 100], 1)

    priors, gts = random_boxes(5000), random_boxes(300)
    instances = (
        InstanceData(priors=torch.cat([priors, gts])),
        InstanceData(bboxes=gts, labels=torch.randint(0, 80, (300,))),
    )
    options = dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3)
    ours = MaxIoUAssigner(**options).assign(*instances)
    assert (ours.gt_inds > 0).sum() >= 300 and (ours.gt_inds < 0).any()
    assert_same(ours, assigners.MaxIoUAssigner(**options).assign(*instances))


@given(boxes(6), boxes(6), st.sampled_from(["iou", "iof", "giou"]), st.booleans())
def test_overlaps_equal_those_of_mmdet(first, second, mode, scored):
    if scored:
        first = torch.cat([first, torch.ones(len(first), 1)], 1)
    ours = BboxOverlaps2D()(first, second, mode)
    assert torch.equal(ours, assigners.BboxOverlaps2D()(first, second, mode))


@pytest.mark.parametrize("dtype", ["fp16", None])
def test_other_overlaps_are_left_to_mmdet(dtype):
    pairs = torch.tensor([[0, 0, 4, 4], [1, 1, 3, 5]]).float()
    for aligned in (True, False):
        ours = BboxOverlaps2D(dtype=dtype)(pairs, pairs.flip(0), is_aligned=aligned)
        theirs = assigners.BboxOverlaps2D(dtype=dtype)(pairs, pairs.flip(0), is_aligned=aligned)
        assert torch.equal(ours, theirs)
