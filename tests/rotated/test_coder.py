# SPDX-License-Identifier: Apache-2.0
"""The coder of rotated boxes encodes and decodes as mmrotate's."""

import pytest
import torch
from mmrotate.models.task_modules.coders import DeltaXYWHTRBBoxCoder as MMRotateCoder
from mmrotate.structures.bbox import RotatedBoxes

from mmeformer.rotated import DeltaXYWHTRBBoxCoder

SETTINGS = {
    "default": dict(),
    "of the configs": dict(angle_version="le135", proj_xy=True),
    "le90": dict(angle_version="le90", proj_xy=True, use_box_type=False),
    "normalized": dict(
        target_means=(0.1, 0, -0.1, 0.2, 0), target_stds=(0.1, 0.1, 0.2, 0.2, 0.5), proj_xy=True
    ),
    "with a factor": dict(norm_factor=2, angle_version="le90"),
    "with swapped edges": dict(edge_swap=True, angle_version="le135"),
    "with clamped centers": dict(add_ctr_clamp=True, ctr_clamp=3),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("limit", [None, (40, 60)])
def test_boxes_and_gradients_equal_those_of_mmrotate(setting, limit):
    anchors = torch.rand(30, 5) * torch.tensor([80, 80, 30, 30, 3.0]) + 1
    # Up to beyond the limit of sizes.
    deltas = 3 * torch.randn(30, 5)
    results = []
    for kind in (DeltaXYWHTRBBoxCoder, MMRotateCoder):
        offsets = deltas.clone().requires_grad_()
        boxes = kind(**SETTINGS[setting]).decode(RotatedBoxes(anchors), offsets, limit)
        tensor = boxes.tensor if isinstance(boxes, RotatedBoxes) else boxes
        tensor.square().sum().backward()
        results.append((type(boxes), tensor, offsets.grad))
    (ours, boxes, grads), (theirs, expected, expected_grads) = results
    assert ours is theirs
    assert torch.equal(boxes, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("setting", SETTINGS)
def test_offsets_equal_those_of_mmrotate(setting):
    scale = torch.tensor([80, 80, 30, 30, 6.0])
    anchors, boxes = (RotatedBoxes(torch.rand(30, 5) * scale + 1) for _ in range(2))
    ours, theirs = (
        kind(**SETTINGS[setting]).encode(anchors, boxes)
        for kind in (DeltaXYWHTRBBoxCoder, MMRotateCoder)
    )
    assert torch.equal(ours, theirs)


def test_no_boxes_and_several_boxes_per_anchor():
    for kind in (DeltaXYWHTRBBoxCoder, MMRotateCoder):
        coder = kind(use_box_type=False)
        assert coder.decode(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0, 5)
    anchors, deltas = torch.rand(4, 5) + 1, torch.randn(4, 10)
    ours, theirs = (k().decode(anchors, deltas) for k in (DeltaXYWHTRBBoxCoder, MMRotateCoder))
    assert torch.equal(ours, theirs)
