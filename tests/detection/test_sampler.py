# SPDX-License-Identifier: Apache-2.0
"""The random sampler: numbers of mmdet, and every subset equally likely."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.models.task_modules import samplers
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData

from mmeformer.detection import RandomSampler


def sample(sampler, gt_inds, num_gts, box_type=False):
    gt_inds = torch.as_tensor(gt_inds, dtype=torch.long).reshape(-1)
    number = len(gt_inds)
    gt_boxes = torch.rand(num_gts, 4)
    wrap = HorizontalBoxes if box_type else lambda tensor: tensor
    labels = torch.arange(num_gts)
    return sampler.sample(
        AssignResult(
            num_gts,
            gt_inds.clone(),
            torch.rand(number),
            torch.where(gt_inds > 0, gt_inds - 1, -1),
        ),
        InstanceData(priors=wrap(torch.rand(number, 4))),
        InstanceData(bboxes=wrap(gt_boxes), labels=labels),
    )


@given(
    st.lists(st.integers(-1, 3), max_size=30),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([-1, 0, 1, 2.5]),
    st.booleans(),
    st.booleans(),
)
def test_numbers_of_samples_equal_those_of_mmdet(gt_inds, num, fraction, limit, add, box_type):
    options = dict(num=num, pos_fraction=fraction, neg_pos_ub=limit, add_gt_as_proposals=add)
    ours, theirs = (
        sample(kind(**options), gt_inds, 3, box_type)
        for kind in (RandomSampler, samplers.RandomSampler)
    )
    assigned = torch.tensor([1, 2, 3] * add + gt_inds, dtype=torch.long)
    assert len(ours.pos_inds) == len(theirs.pos_inds)
    assert len(ours.neg_inds) == len(theirs.neg_inds)
    assert (assigned[ours.pos_inds] > 0).all() and (assigned[ours.neg_inds] == 0).all()
    for inds in (ours.pos_inds, ours.neg_inds):
        assert torch.equal(inds, inds.unique())
    assert torch.equal(ours.pos_assigned_gt_inds, assigned[ours.pos_inds] - 1)
    assert torch.equal(ours.pos_gt_labels, ours.pos_assigned_gt_inds)
    for name, value in vars(theirs).items():
        assert type(value) is type(getattr(ours, name)), name


def test_every_subset_is_equally_likely():
    """Two of four positives with two of four negatives: 6 x 6 pairs of subsets."""
    sampler = RandomSampler(num=4, pos_fraction=0.5, add_gt_as_proposals=False)
    draws = 3600
    counts = Counter()
    for _ in range(draws):
        result = sample(sampler, [1, 0, 1, -1, 0, 1, 0, 1, 0], 1)
        counts[(*result.pos_inds.tolist(), *result.neg_inds.tolist())] += 1
    assert len(counts) == 36
    expected = draws / 36
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    # 99.99th percentile with 35 degrees of freedom; the seed is fixed.
    assert chi_squared < 75


def test_samples_repeat_with_the_seed():
    sampler = RandomSampler(num=6, pos_fraction=0.5)
    gt_inds = torch.arange(100) % 3
    torch.manual_seed(3)
    first = sample(sampler, gt_inds, 2)
    torch.manual_seed(3)
    second = sample(sampler, gt_inds, 2)
    assert torch.equal(first.pos_inds, second.pos_inds)
    assert torch.equal(first.neg_inds, second.neg_inds)
