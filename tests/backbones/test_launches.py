# SPDX-License-Identifier: Apache-2.0
"""Operators that a training step of the backbones launches, and that none makes the host wait."""

import pytest
import torch
from helpers import build_backbone
from launches import Launches

from mmeformer.variants import VARIANTS

# What a step takes, and a little room for other versions of the libraries.
CEILINGS = {
    "efficientformerv2_s0": dict(forward=445, backward=605),
    "efficientformer_l1": dict(forward=255, backward=375),
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


@pytest.mark.parametrize("name", CEILINGS)
@pytest.mark.parametrize("training", [True, False])
def test_maps_between_blocks_stay_in_half_precision(name, training):
    backbone = build_backbone(VARIANTS[name], drop_path_rate=0.1, bias_grid=25).train(training)
    seen = set()
    for stage in backbone.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda _, inputs, out: seen.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        levels = backbone(torch.randn(2, 3, 96, 128))
    assert seen | {level.dtype for level in levels} == {torch.bfloat16}


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
