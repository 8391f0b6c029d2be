# SPDX-License-Identifier: Apache-2.0
"""Rotated IoU against shapely, finite differences and its own symmetries."""

import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeformer.ops.iou import rotated_iou

HALF_PI = math.pi / 2
# Found by a search over millions of pairs: without bounds the IoU comes out as -1e-8 and 1 + 2e-7.
ROUNDS_BELOW_ZERO = (
    [3.514103412628174, 9.62044620513916, 11.381837844848633, 0.15655279159545898, 2.60772347],
    [6.86918306350708, 9.62044620513916, 3.891862630844116, 0.15655279159545898, 0.2652028799],
)
ROUNDS_ABOVE_ONE = (
    [6.940234184265137, 2.975320339202881, 10.99225902557373, 3.581289052963257, 1.55830836],
    [6.940234184265137, 2.975320339202881, 3.581289052963257, 10.99225902557373, 3.12910461],
)


def shapely_iou(boxes1, boxes2):
    """IoU of aligned boxes ``(N, 5)`` from polygon areas in float64, 0 where both have no area."""
    boxes1, boxes2 = (np.array(boxes, dtype=np.float64) for boxes in (boxes1, boxes2))
    boxes2[:, :2] -= boxes1[:, :2]
    boxes1[:, :2] = 0
    polygons = []
    for boxes in (boxes1, boxes2):
        x, y, w, h, angle = boxes.T
        cos, sin = np.cos(angle), np.sin(angle)
        corners = [
            (x + i * w * cos - j * h * sin, y + i * w * sin + j * h * cos)
            for i, j in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))
        ]
        polygons.append(shapely.polygons(np.moveaxis(np.array(corners), 2, 0)))
    intersection = shapely.area(shapely.intersection(*polygons))
    union = shapely.area(polygons[0]) + shapely.area(polygons[1]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def random_pairs(count, low, high, seed):
    """Pairs whose overlap ranges from apart to nearly identical; sides ``low`` to ``high`` px."""
    rng = np.random.default_rng(seed)
    first = np.empty((count, 5))
    first[:, :2] = rng.uniform(-1e3, 1e3, (count, 2))
    first[:, 2:4] = np.exp(rng.uniform(np.log(low), np.log(high), (count, 2)))
    first[:, 4] = rng.uniform(-10, 10, count)
    second = first.copy()
    strength = 10 ** rng.uniform(-4, 0.3, (count, 1))
    second[:, :2] += strength * rng.normal(size=(count, 2)) * first[:, 2:4].max(1, keepdims=True)
    second[:, 2:4] *= np.exp(strength * rng.normal(size=(count, 2)))
    second[:, 2:4] = second[:, 2:4].clip(low, high)
    second[:, 4] += strength[:, 0] * rng.normal(size=count)
    return torch.tensor(first), torch.tensor(second)


def special_pairs():
    """Name, two boxes, expected IoU: every way in which two boxes can touch or degenerate."""
    base = [50.0, 30.0, 8.0, 4.0, 0.0]
    cases = [
        ("identical", base, base, 1.0),
        ("quarter turn, sides swapped", base, [50.0, 30.0, 4.0, 8.0, HALF_PI], 1.0),
        ("half turn", base, [50.0, 30.0, 8.0, 4.0, math.pi], 1.0),
        ("nested", base, [50.0, 30.0, 2.0, 1.0, 0.3], 2 / 32),
        ("nested, same centre line", base, [50.0, 30.0, 8.0, 2.0, 0.0], 0.5),
        ("nested in a corner", base, [48.0, 29.0, 4.0, 2.0, 0.0], 0.25),
        ("cross", base, [50.0, 30.0, 8.0, 4.0, HALF_PI], 16 / 48),
        ("shared edge outside", base, [58.0, 30.0, 8.0, 4.0, 0.0], 0.0),
        ("part of an edge shared outside", base, [50.0, 35.0, 2.0, 6.0, 0.0], 0.0),
        ("shared corner outside", base, [58.0, 34.0, 8.0, 4.0, 0.0], 0.0),
        ("half overlap, two edges on one line", base, [54.0, 30.0, 8.0, 4.0, 0.0], 1 / 3),
        ("corner on an edge", base, [54 + math.sqrt(2), 30.0, 2.0, 2.0, math.pi / 4], 0.0),
        ("corner in the centre", base, [50 + math.sqrt(0.5), 30.0, 1.0, 1.0, math.pi / 4], 1 / 32),
        ("diamond in a square", [0, 0, 2, 2, 0], [0, 0, 2**0.5, 2**0.5, math.pi / 4], 0.5),
        ("apart on the diagonal", base, [57.0, 36.0, 6.0, 0.5, -math.pi / 4], 0.0),
        ("far apart", base, [1e6, -1e6, 8.0, 4.0, 1.0], 0.0),
        ("very far apart", base, [1e30, 1e30, 8.0, 4.0, 1.0], 0.0),
        (
            "so far apart that the distance overflows",
            [-3e38, 3e38, 8, 4, 1],
            [3e38, 0, 8, 4, 1],
            0.0,
        ),
        ("turned by nearly nothing", base, [54.0, 30.0, 8.0, 4.0, 1e-38], 1 / 3),
        ("nearly a line, on itself", [1, 1, 8, 1e-38, 0], [1, 1, 8, 1e-38, 0], 0.0),
        ("nearly a point, on itself", [1, 1, 1e-40, 1e-40, 0], [1, 1, 1e-40, 1e-40, 0], 0.0),
        ("no width", base, [50.0, 30.0, 0.0, 4.0, 0.0], 0.0),
        ("no area on an edge", base, [54.0, 30.0, 0.0, 4.0, 0.0], 0.0),
        ("point", base, [50.0, 30.0, 0.0, 0.0, 0.7], 0.0),
        ("two identical points", [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], 0.0),
        ("two identical lines", [1, 1, 5, 0, 0.2], [1, 1, 5, 0, 0.2], 0.0),
        ("crossing lines", [1, 1, 5, 0, 0.2], [1, 1, 5, 0, 1.2], 0.0),
        ("negative width counts as none", base, [50.0, 30.0, -3.0, 4.0, 0.0], 0.0),
        ("smallest, identical", [9, 9, 1e-3, 1e-3, 1], [9, 9, 1e-3, 1e-3, 1], 1.0),
        ("largest, identical", [9, 9, 1e4, 1e4, 1], [9, 9, 1e4, 1e4, 1], 1.0),
        ("smallest in largest", [0, 0, 1e4, 1e4, 1], [3e3, 0, 1e-3, 1e-3, 1], 1e-14),
        ("thinnest, identical", [9, 9, 1e4, 1e-3, 1], [9, 9, 1e4, 1e-3, 1], 1.0),
        ("thinnest, crossing", [0, 0, 1e4, 1e-3, 0], [0, 0, 1e4, 1e-3, HALF_PI], 5e-8),
        ("far from the origin", [1e5, 1e5, 8, 4, 0], [1e5 + 4, 1e5, 8, 4, 0], 1 / 3),
        ("rounds below 0 in float32", *ROUNDS_BELOW_ZERO, 0.0),
        ("rounds above 1 in float32", *ROUNDS_ABOVE_ONE, 0.99999986963),
        ("many turns", base, [50.0, 30.0, 8.0, 4.0, 200 * math.pi], 1.0),
    ]
    return cases


SPECIAL = special_pairs()
SPECIAL_IDS = [case[0] for case in SPECIAL]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_shapely_on_random_pairs(dtype):
    ranges = ((2, 500), (1e-3, 1e4), (1e-3, 0.1), (1e2, 1e4))
    pairs = [random_pairs(2500, low, high, seed) for seed, (low, high) in enumerate(ranges)]
    boxes1, boxes2 = (torch.cat(boxes).to(dtype) for boxes in zip(*pairs, strict=True))
    expected = shapely_iou(boxes1, boxes2)
    # The pairs must cover the whole range for the comparison to mean anything.
    assert np.histogram(expected, bins=10, range=(0, 1))[0].min() > 200
    assert (expected == 0).sum() > 200
    iou = rotated_iou(boxes1, boxes2)
    assert iou.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-11
    np.testing.assert_allclose(iou.numpy(), expected, rtol=0, atol=tolerance)


def test_agrees_with_shapely_on_grid_aligned_pairs():
    """Small integer centres and sizes, right angles: most pairs share edges, corners or lines."""
    rng = np.random.default_rng(0)
    count = 10_000
    boxes1, boxes2 = (
        np.concatenate(
            [
                rng.integers(0, 4, (count, 2)),
                rng.integers(1, 5, (count, 2)),
                rng.integers(-2, 3, (count, 1)) * HALF_PI,
            ],
            axis=1,
        )
        for _ in range(2)
    )
    # Shared lines at any angle: turn both boxes and their centres alike.
    turn = rng.choice([0.0, 0.3, math.pi / 4, 2.0], count)
    for boxes in (boxes1, boxes2):
        cos, sin = np.cos(turn), np.sin(turn)
        x, y = boxes[:, 0].copy(), boxes[:, 1].copy()
        boxes[:, 0], boxes[:, 1] = x * cos - y * sin, x * sin + y * cos
        boxes[:, 4] += turn
    expected = shapely_iou(boxes1, boxes2)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        iou = rotated_iou(torch.tensor(boxes1, dtype=dtype), torch.tensor(boxes2, dtype=dtype))
        np.testing.assert_allclose(iou.numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SPECIAL, ids=SPECIAL_IDS)
def test_special_pairs_have_the_right_value_and_finite_gradients(case, dtype):
    _, first, second, expected = case
    for boxes1, boxes2 in ((first, second), (second, first)):
        boxes1 = torch.tensor([boxes1], dtype=dtype, requires_grad=True)
        boxes2 = torch.tensor([boxes2], dtype=dtype, requires_grad=True)
        iou = rotated_iou(boxes1, boxes2)
        # 200 pi and the like are rounded in float32 before they reach the function.
        assert iou.item() == pytest.approx(expected, abs=1e-4 if dtype == torch.float32 else 1e-9)
        assert 0 <= iou.item() <= 1
        iou.sum().backward()
        assert torch.isfinite(boxes1.grad).all(), boxes1.grad
        assert torch.isfinite(boxes2.grad).all(), boxes2.grad


@pytest.mark.parametrize("low,high", [(1e-3, 1e4), (1e-3, 1e-2), (1e3, 1e4), (5, 200)])
def test_gradients_are_finite_on_random_and_degenerate_pairs(low, high):
    boxes1, boxes2 = (boxes.float() for boxes in random_pairs(5000, low, high, seed=1))
    generator = torch.Generator().manual_seed(2)
    for boxes in (boxes1, boxes2):
        sides = boxes[:, 2:4]
        sides[torch.rand(sides.shape, generator=generator) < 0.2] = 0
    same_centre = torch.rand(len(boxes1), generator=generator) < 0.3
    boxes2[same_centre, :2] = boxes1[same_centre, :2]
    same_angle = torch.rand(len(boxes1), generator=generator) < 0.3
    boxes2[same_angle, 4] = boxes1[same_angle, 4]
    boxes1.requires_grad_()
    boxes2.requires_grad_()
    iou = rotated_iou(boxes1, boxes2)
    assert ((iou >= 0) & (iou <= 1)).all()
    iou.sum().backward()
    assert torch.isfinite(boxes1.grad).all()
    assert torch.isfinite(boxes2.grad).all()


def test_gradient_agrees_with_finite_differences():
    boxes1, boxes2 = random_pairs(400, 5, 100, seed=3)
    iou = rotated_iou(boxes1, boxes2)
    # Nearly identical pairs have kinks closer than the step of the differences.
    away = (iou > 1e-3) & (iou < 0.9)
    boxes1, boxes2 = boxes1[away][:100].requires_grad_(), boxes2[away][:100].requires_grad_()
    assert len(boxes1) == 100
    assert torch.autograd.gradcheck(rotated_iou, (boxes1, boxes2), eps=1e-6, atol=1e-6)


def test_gradient_in_float32_agrees_with_float64():
    boxes1, boxes2 = (boxes.float() for boxes in random_pairs(2000, 4, 500, seed=4))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = boxes1.to(dtype).detach().requires_grad_()
        rotated_iou(leaf, boxes2.to(dtype)).sum().backward()
        # Per box side, so that the numbers are comparable over sizes.
        gradients.append(
            leaf.grad.double() * torch.cat([boxes1[:, 2:4]] * 2 + [boxes1.new_ones(2000, 1)], 1)
        )
    single, double = gradients
    close = ((single - double).abs() <= 1e-3 * double.abs() + 1e-3).all(1)
    # Rounding moves a few pairs across a kink: there the two are different subgradients.
    assert close.float().mean() > 0.995


def test_gradient_descent_moves_a_box_onto_its_target():
    target = torch.tensor([[40.0, 60.0, 30.0, 10.0, 0.5]])
    box = torch.tensor([[45.0, 62.0, 20.0, 14.0, 0.2]], requires_grad=True)
    optimizer = torch.optim.Adam([box], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (1 - rotated_iou(box, target)).sum().backward()
        optimizer.step()
    assert rotated_iou(box, target).item() > 0.95


finite_boxes = st.tuples(
    st.floats(-1e3, 1e3, width=32),
    st.floats(-1e3, 1e3, width=32),
    st.floats(2**-10, 2**13, width=32),
    st.floats(2**-10, 2**13, width=32),
    st.floats(-7, 7, width=32),
)


@settings(max_examples=200)
@given(finite_boxes, finite_boxes)
def test_is_symmetric_and_matches_shapely(first, second):
    boxes1, boxes2 = torch.tensor([first]), torch.tensor([second])
    there, back = rotated_iou(boxes1, boxes2), rotated_iou(boxes2, boxes1)
    torch.testing.assert_close(there, back, rtol=0, atol=2e-6)
    np.testing.assert_allclose(there, shapely_iou(boxes1, boxes2), rtol=0, atol=1e-4)


@settings(max_examples=200)
@given(finite_boxes, st.floats(0, 1), st.integers(-3, 3))
def test_equivalent_descriptions_give_the_same_iou(box, shift, turns):
    x, y, w, h, angle = box
    other = [x + shift * w, y, h, w, angle + shift]
    description = [x, y, w, h, angle + turns * math.pi]
    swapped = [x, y, h, w, angle + HALF_PI + turns * math.pi]
    boxes = torch.tensor([box, description, swapped], dtype=torch.float64)
    iou = rotated_iou(boxes, torch.tensor([other], dtype=torch.float64))
    torch.testing.assert_close(iou[1:], iou[:1].expand(2), rtol=0, atol=1e-8)
    # The gradient of centre and angle does not depend on the description either.
    self_iou = rotated_iou(boxes[:1], boxes)
    torch.testing.assert_close(self_iou, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-7)


def test_identical_boxes_have_no_gradient():
    """At the optimum the symmetric subgradient is zero, so a perfect box stays where it is."""
    boxes = random_pairs(200, 1e-3, 1e4, seed=5)[0].float()
    leaf = boxes.clone().requires_grad_()
    rotated_iou(leaf, boxes).sum().backward()
    # In units of one box side (centre, size), of a radian and of the aspect ratio (angle).
    relative = leaf.grad[:, :4] * torch.cat([boxes[:, 2:4]] * 2, 1)
    assert relative.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    boxes1, boxes2 = (boxes.to(dtype) for boxes in random_pairs(50, 5, 100, seed=6))
    boxes1.requires_grad_()
    iou = rotated_iou(boxes1, boxes2)
    assert iou.dtype == torch.float32
    torch.testing.assert_close(iou, rotated_iou(boxes1.float(), boxes2.float()))
    iou.sum().backward()
    assert boxes1.grad.dtype == dtype
    assert torch.isfinite(boxes1.grad).all()


def test_autocast_does_not_change_the_result():
    boxes1, boxes2 = (boxes.float() for boxes in random_pairs(50, 5, 100, seed=7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        iou = rotated_iou(boxes1, boxes2)
    assert iou.dtype == torch.float32
    assert torch.equal(iou, rotated_iou(boxes1, boxes2))


def test_broadcasts_to_all_pairs_and_accepts_no_boxes():
    boxes1, boxes2 = random_pairs(6, 5, 100, seed=8)
    matrix = rotated_iou(boxes1[:, None], boxes2[None, :4])
    assert matrix.shape == (6, 4)
    for i in range(6):
        for j in range(4):
            expected = rotated_iou(boxes1[i : i + 1], boxes2[j : j + 1])[0]
            assert matrix[i, j] == pytest.approx(expected.item(), abs=1e-12)
    empty = boxes1[:0].requires_grad_()
    iou = rotated_iou(empty, boxes2[:0])
    assert iou.shape == (0,)
    iou.sum().backward()
    assert empty.grad.shape == (0, 5)


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"boxes2 must have 5 numbers.*\(3, 4\)"):
        rotated_iou(torch.rand(3, 5), torch.rand(3, 4))


def test_leading_dimensions_of_any_number_broadcast():
    torch.manual_seed(0)
    one, many = torch.rand(5, dtype=torch.double), torch.rand(2, 3, 5, dtype=torch.double)
    expected = rotated_iou(one.expand(2, 3, 5), many)
    torch.testing.assert_close(rotated_iou(one, many), expected)
    torch.testing.assert_close(rotated_iou(many, one), rotated_iou(many, one.expand(2, 3, 5)))
