# SPDX-License-Identifier: Apache-2.0
"""Values, reductions and gradients of the rotated IoU loss."""

import math

import pytest
import torch
from mmengine.registry import MODELS as ROOT

import mmeformer.rotated  # noqa: F401
from mmeformer.rotated.losses import RotatedIoULoss

# IoU 1, 1/3 (half overlap), 1/8 (nested), 0.
TARGET = torch.tensor([[50.0, 30, 8, 4, 0.3]]).repeat(4, 1)
PRED = torch.tensor(
    [
        [50, 30, 4, 8, 0.3 + math.pi / 2],
        [50 + 4 * math.cos(0.3), 30 + 4 * math.sin(0.3), 8, 4, 0.3],
        [50, 30, 2, 2, 0.3],
        [90, 30, 8, 4, 1.0],
    ]
)
IOU = torch.tensor([1, 1 / 3, 1 / 8, 0])


@pytest.mark.parametrize(
    "mode,expected",
    [
        ("linear", 1 - IOU.clamp(min=1e-6)),
        ("square", 1 - IOU.clamp(min=1e-6) ** 2),
        ("log", -IOU.clamp(min=1e-6).log()),
    ],
)
def test_modes(mode, expected):
    loss = RotatedIoULoss(mode=mode, reduction="none")(PRED, TARGET)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_eps_is_the_smallest_iou_that_counts():
    loss = RotatedIoULoss(eps=0.2, reduction="none")(PRED, TARGET)
    torch.testing.assert_close(loss[2:], torch.full((2,), -math.log(0.2)))


def test_weights_and_reductions():
    none = RotatedIoULoss(reduction="none")(PRED, TARGET)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5])
    torch.testing.assert_close(RotatedIoULoss()(PRED, TARGET), none.mean())
    torch.testing.assert_close(RotatedIoULoss(reduction="sum")(PRED, TARGET), none.sum())
    torch.testing.assert_close(
        RotatedIoULoss()(PRED, TARGET, reduction_override="none"), none, rtol=0, atol=0
    )
    expected = 3 * (none * weight).sum() / 7
    loss = RotatedIoULoss(loss_weight=3)
    torch.testing.assert_close(loss(PRED, TARGET, weight, avg_factor=7), expected)
    torch.testing.assert_close(loss(PRED, TARGET, weight, avg_factor=torch.tensor(7.0)), expected)
    rows = weight[:, None].expand(-1, 5)
    torch.testing.assert_close(loss(PRED, TARGET, rows, avg_factor=7), expected)


@pytest.mark.parametrize("mode", ["linear", "square", "log"])
def test_gradients_are_finite_at_degenerate_pairs(mode):
    pred = torch.cat(
        [
            PRED,
            TARGET[:1],  # identical
            torch.tensor([[58.0, 30, 8, 4, 0]]),
            torch.tensor([[50.0, 30, 0, 0, 0]]),
            torch.tensor([[50.0, 30, 1e4, 1e-3, 0]]),
        ]
    ).requires_grad_()
    target = torch.cat([TARGET[:1].expand(7, 5), torch.zeros(1, 5)])
    loss = RotatedIoULoss(mode=mode)(pred, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(pred.grad).all()
    # Neither the perfect box nor one apart from its target is pushed anywhere.
    assert pred.grad[4].abs().max() < 1e-4
    assert (pred.grad[3] == 0).all()
    # A box inside its target is told to grow, one shifted along it to come back.
    assert (pred.grad[2, 2:4] < 0).all()
    assert pred.grad[1, 0] > 0


def test_no_boxes_give_a_zero_that_can_be_trained_on():
    source = torch.zeros(3, 5, requires_grad=True)
    loss = RotatedIoULoss()(source[:0], torch.zeros(0, 5), torch.zeros(0), avg_factor=1)
    assert loss.item() == 0
    loss.backward()
    assert (source.grad == 0).all()


def test_runs_in_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RotatedIoULoss()(PRED, TARGET)
    assert torch.equal(loss, RotatedIoULoss()(PRED, TARGET))
    half = RotatedIoULoss()(PRED.bfloat16().requires_grad_(), TARGET)
    assert half.dtype == torch.float32


def test_is_registered_beside_mmrotates_own():
    loss = ROOT.build(dict(type="mmeformer.RotatedIoULoss", mode="linear"))
    assert type(loss) is RotatedIoULoss
    assert type(ROOT.build(dict(type="mmrotate.RotatedIoULoss"))) is not RotatedIoULoss


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be one of .* got 'cubic'"):
        RotatedIoULoss(mode="cubic")
