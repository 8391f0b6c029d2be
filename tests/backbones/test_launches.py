# SPDX-License-Identifier: Apache-2.0
"""Operators that a training step of the backbones launches, and that none makes the host wait."""

import pytest
import torch
from helpers import build_backbone
from launches import Launches

from mmeformer.variants import VARIANTS

# What a step takes, and a little room for other versions of the libraries.
CEILINGS = {
    "efficientformerv2_s0": dict(forward=370, backward=530),
    "efficientformer_l1": dict(forward=220, backward=340),
}


@pytest.mark.parametrize("name, ceilings", CEILINGS.items(), ids=list(CEILINGS))
def test_a_training_step_stays_below_its_ceilings(name, ceilings):
    backbone = build_backbone(VARIANTS[name], drop_path_rate=0.0, bias_grid=25).train()
    image = torch.randn(2, 3, 96, 128)
    backbone(image)  # index tensors are made once per size
    with Launches() as forward:
        levels = backbone(image)
    with Launches() as backward:
        sum(level.sum() for level in levels).backward()
    assert not forward.waits and not backward.waits
    assert forward.operators.total() <= ceilings["forward"], forward.operators
    assert backward.operators.total() <= ceilings["backward"], backward.operators


def test_the_counter_of_batches_serves_a_cumulative_average_only():
    from mmeformer.layers.blocks import BatchNorm

    image = torch.randn(4, 3, 5, 5)
    for momentum, count in ((0.1, 0), (None, 2)):
        ours, plain = BatchNorm(3, momentum=momentum), torch.nn.BatchNorm2d(3, momentum=momentum)
        for _ in range(2):
            torch.testing.assert_close(ours(image), plain(image))
        torch.testing.assert_close(ours.running_var, plain.running_var)
        torch.testing.assert_close(ours.eval()(image), plain.eval()(image))
        assert ours.num_batches_tracked == count
