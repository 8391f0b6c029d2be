# SPDX-License-Identifier: Apache-2.0
"""Expectations of the box distributions and the bins of their targets."""

import math

import pytest
import torch
from mmdet.models.losses import DistributionFocalLoss

from mmeformer.rotated.integral import RotatedIntegral


def test_one_hot_distributions_give_the_points():
    integral = RotatedIntegral(reg_max=8)
    for k in range(9):
        logits = torch.full((1, 5, 9), -100.0)
        logits[..., k] = 100.0
        deltas = integral(logits.reshape(1, 45))
        step = -2 + k * 0.5
        expected = torch.tensor([[step, step, step, step, -5 + k * 7 / 8]])
        torch.testing.assert_close(deltas, expected)


def test_coordinates_are_blocks_of_channels_and_the_mean_is_weighted():
    integral = RotatedIntegral(reg_max=2, delta_range=(-1, 3), angle_range=(0, 10))
    probabilities = torch.tensor(
        [[0.5, 0.5, 0], [0, 0.25, 0.75], [1, 0, 0], [0, 0, 1], [0.2, 0.2, 0.6]]
    )
    logits = probabilities.clamp(min=1e-20).log().reshape(1, 15)
    torch.testing.assert_close(integral(logits), torch.tensor([[0.0, 2.5, -1.0, 3.0, 7.0]]))


def test_equal_logits_give_the_middle_of_the_ranges():
    deltas = RotatedIntegral()(torch.zeros(3, 45))
    torch.testing.assert_close(deltas, torch.tensor([[0.0, 0.0, 0.0, 0.0, -1.5]]).expand(3, 5))


@pytest.mark.parametrize("reg_max", [1, 8, 16])
def test_bins_invert_the_points(reg_max):
    integral = RotatedIntegral(reg_max=reg_max, delta_range=(-1, 1.5), angle_range=(-4, 2))
    generator = torch.Generator().manual_seed(0)
    low = torch.tensor([-1, -1, -1, -1, -4.0])
    high = torch.tensor([1.5, 1.5, 1.5, 1.5, 2.0])
    deltas = low + torch.rand(50, 5, generator=generator) * 0.98 * (high - low)
    bins = integral.to_bins(deltas)
    # The distribution over the two neighbours that the focal loss asks for has its mean there.
    left = bins.floor()
    target = torch.zeros(50, 5, reg_max + 1)
    target.scatter_(2, left.long()[..., None], (left + 1 - bins)[..., None])
    target.scatter_(2, left.long()[..., None] + 1, (bins - left)[..., None])
    decoded = integral(target.clamp(min=1e-20).log().flatten(1))
    # The upper end is cut by a hundredth of an interval.
    slack = 0.0101 * (high - low).max().item() / reg_max
    torch.testing.assert_close(decoded, deltas, rtol=0, atol=slack)


def test_bins_of_far_targets_stay_in_the_range_of_the_focal_loss():
    integral = RotatedIntegral()
    far = torch.tensor([[-1e9, 1e9, -math.inf, math.inf, 2.0], [2.0, -2.0, 2.5, -2.5, -5.0]])
    bins = integral.to_bins(far)
    assert torch.isfinite(bins).all()
    assert (bins >= 0).all() and (bins < 8).all()
    loss = DistributionFocalLoss()(torch.randn(10, 9), bins.flatten())
    assert torch.isfinite(loss)


def test_angle_beyond_the_range_is_taken_half_a_turn_further():
    """le135 reaches to 3/4 pi, the points only to 2: 2.3 is the same direction as 2.3 - pi."""
    integral = RotatedIntegral()
    deltas = torch.tensor([[0, 0, 0, 0, 2.3], [0, 0, 0, 0, 2.3 - math.pi]])
    bins = integral.to_bins(deltas)
    torch.testing.assert_close(bins[0], bins[1])
    assert bins[0, 4] == pytest.approx((2.3 - math.pi + 5) / 7 * 8, abs=1e-4)
    above = RotatedIntegral(angle_range=(0, 3)).to_bins(torch.tensor([[0.0, 0, 0, 0, -0.5]]))
    assert above[0, 4] == pytest.approx((math.pi - 0.5) / 3 * 8, abs=1e-4)


def test_autocast_does_not_change_the_result():
    integral, logits = RotatedIntegral(), torch.randn(20, 45)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        deltas = integral(logits)
    assert torch.equal(deltas, integral(logits))


def test_checkpoints_hold_no_constants():
    assert RotatedIntegral().state_dict() == {}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(reg_max=0), "reg_max must be at least 1"),
        (dict(delta_range=(2, -2)), "delta_range must increase, got 2 to -2"),
        (dict(angle_range=(1, 1)), "angle_range must increase"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RotatedIntegral(**arguments)
