# SPDX-License-Identifier: Apache-2.0
"""Our operators against results of mmcv's compiled ones, brute force, shapely and gradients."""

import copy
import importlib
import io
import math
import pickle

import numpy as np
import pytest
import torch
from ops.operator_cases import (
    AT_THRESHOLD,
    CASES,
    GOLDEN,
    TIES,
    features,
    labels,
    regions,
    scores,
    turned,
    turned_regions,
    uniform,
)
from rotated_boxes import outline, polygon_iou

from mmeformer.errors import UserError
from mmeformer.ops import rotated, rotated_roi_align, status, substitute

MODULES = (
    "nms",
    "box_iou_rotated",
    "roi_align",
    "roi_align_rotated",
    "diff_iou_rotated",
    "focal_loss",
    "deform_conv",
    "roi_pool",
)
# mmcv's CPU kernels differ here on purpose: see the tests named after them.
DIFFERENT = {"nms_rotated/at the threshold", "nms_rotated/labels"}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture
def ours(monkeypatch):
    """``mmcv.ops`` on our operators, whatever is installed."""
    for name in MODULES:
        module = importlib.import_module(f"mmcv.ops.{name}")
        monkeypatch.setattr(module, "ext_module", substitute)


def stored(golden, case):
    return {key.rpartition("/")[2]: golden[key] for key in golden if key.rpartition("/")[0] == case}


def differences(case, golden):
    """What of a case is not as stored: names with types and the largest difference."""
    found, expected = CASES[case](), stored(golden, case)
    if found.keys() != expected.keys():
        return sorted(found.keys() ^ expected.keys())
    # mmcv merges corners nearer than 1e-4 px and rounds areas in float32.
    tolerance = 1e-5 if case.startswith("box_iou") else 2e-6
    wrong = []
    for key, value in found.items():
        ours, theirs = value.numpy(), expected[key]
        same_type = key == "kept" or ours.dtype == theirs.dtype
        if ours.shape != theirs.shape or not same_type:
            wrong.append((key, ours.shape, ours.dtype, theirs.shape, theirs.dtype))
        elif not np.allclose(ours, theirs, rtol=0, atol=0 if key == "kept" else tolerance):
            wrong.append((key, np.abs(ours - theirs).max()))
    return wrong


def test_every_case_is_stored(golden):
    assert {key.rpartition("/")[0] for key in golden} == set(CASES)


@pytest.mark.parametrize("case", sorted(CASES.keys() - DIFFERENT - TIES.keys()))
def test_equals_the_compiled_operator(case, golden, ours):
    assert differences(case, golden) == []


@pytest.mark.skipif(status().operators != "compiled", reason="mmcv has no compiled operators here")
@pytest.mark.parametrize("case", sorted(CASES.keys() - TIES.keys()))
def test_what_is_stored_is_what_the_compiled_operators_return(case, golden):
    assert differences(case, golden) == []


# mmcv's sort leaves equal scores in any order, different on each machine.
@pytest.mark.parametrize("case", sorted(TIES))
def test_equal_scores_go_by_the_order_of_the_input(case, golden, ours):
    """Equality in the order of equal scores that mmcv's sort made.

    What stays is known in that order. What goes may follow behind: it goes in either place.
    """
    theirs = stored(golden, case)["kept"].astype(np.int64)
    boxes, values, threshold = TIES[case]
    operator = getattr(importlib.import_module("mmcv.ops"), case.partition("/")[0])
    place = torch.full((300,), 300)
    place[theirs] = torch.arange(len(theirs))
    order = torch.from_numpy(np.lexsort((place, -values)))
    assert not torch.equal(order, torch.arange(300)), "nothing to prove"
    kept = operator(boxes[order], values[order], threshold)[1]
    assert order[kept].tolist() == theirs.tolist()
    # The same boxes in the order given: the first of equal ones stays.
    kept = operator(boxes, values, threshold)[1]
    assert kept.tolist() == sorted(kept.tolist(), key=lambda index: (-values[index], index))


def test_a_rotated_box_exactly_at_the_threshold_stays(golden, ours):
    name = "nms_rotated/at the threshold"
    kept = CASES[name]()["kept"].tolist()
    assert kept == [0, 1, 2, 3, 4], "as mmcv's CUDA kernel, and NMS of upright boxes on any device"
    assert stored(golden, name)["kept"].tolist() == [0, 2, 4], "mmcv's CPU kernel removes it"
    iou = rotated.box_iou(AT_THRESHOLD[:1], AT_THRESHOLD[1:2])
    assert iou.item() == 0.5


def test_rotated_boxes_of_different_labels_do_not_suppress_each_other(golden, ours):
    name = "nms_rotated/labels"
    kept = CASES[name]()["kept"].tolist()
    boxes, values, label = turned("n", 300), scores("n", 300), labels("n", 300)
    alone = []
    for value in label.unique():
        (indices,) = torch.where(label == value)
        order = indices[values[indices].argsort(descending=True)]
        alone += order[rotated.nms(boxes[order], 0.1)].tolist()
    assert sorted(kept) == sorted(alone)
    assert kept == sorted(kept, key=lambda index: -values[index])
    # mmcv's CPU kernel ignores labels, its CUDA kernel does not.
    order = values.argsort(descending=True)
    everything = order[rotated.nms(boxes[order], 0.1)]
    assert stored(golden, name)["kept"].tolist() == everything.tolist() != kept


# --- rotated boxes --------------------------------------------------------------------------------


def greedy(iou, threshold):
    """Indices that greedy suppression leaves, box by box; ``iou`` (N, N), the best box first."""
    kept = []
    for box in range(len(iou)):
        if all(iou[better, box] <= threshold for better in kept):
            kept.append(box)
    return kept


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_rotated_nms_is_greedy_suppression_by_polygon_areas(threshold, block, monkeypatch):
    monkeypatch.setitem(rotated._BLOCK, "cpu", block)
    boxes = turned("polygons", 120, 150).double()
    iou = polygon_iou(boxes.numpy(), boxes.numpy())
    assert abs(iou - threshold).min() > 1e-6
    assert rotated.nms(boxes, threshold).tolist() == greedy(iou, threshold)


def test_rotated_nms_of_a_chain_where_each_box_meets_the_next():
    count = 301
    boxes = torch.zeros(count, 5)
    boxes[:, 0] = torch.arange(count) * 5.0
    boxes[:, 2:4] = 8
    assert rotated.nms(boxes, 0.1).tolist() == list(range(0, count, 2))


def test_overlaps_are_those_of_polygons(monkeypatch):
    boxes1, boxes2 = turned("first", 40, 120).double(), turned("second", 30, 120).double()
    expected = polygon_iou(boxes1.numpy(), boxes2.numpy())
    area1, area2 = boxes1[:, 2:4].prod(1)[:, None], boxes2[:, 2:4].prod(1)
    intersection = torch.from_numpy(expected) * (area1 + area2) / (1 + torch.from_numpy(expected))
    for pairs in (1, 100, 1 << 22):
        monkeypatch.setattr(rotated, "_PAIRS", pairs)
        monkeypatch.setitem(rotated._IOU_PAIRS, "cpu", max(pairs // 10, 1))
        iou = rotated.box_iou(boxes1, boxes2)
        iof = rotated.box_iou(boxes1, boxes2, "iof")
        np.testing.assert_allclose(iou.numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(iof.numpy(), (intersection / area1).numpy(), atol=1e-9)


def test_precision_of_rotated_boxes_follows_the_input():
    boxes = turned("types", 50)
    exact = rotated.box_iou(boxes.double(), boxes.double())
    assert exact.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        iou = rotated.box_iou(boxes.to(dtype), boxes.to(dtype))
        again = boxes.to(dtype).double()
        assert iou.dtype == torch.float32
        torch.testing.assert_close(iou.double(), rotated.box_iou(again, again), rtol=0, atol=1e-5)


def test_boxes_that_are_not_finite_suppress_nothing():
    boxes = turned("finite", 4)
    for value in (math.nan, math.inf):
        wrong = boxes.clone()
        wrong[::2, 0] = value
        assert rotated.nms(wrong, 0.9).tolist() == [0, 1, 2, 3]


# --- RoIAlign -------------------------------------------------------------------------------------


def sample(plane, y, x):
    """Bilinear value at a point of an (H, W) map; nothing more than one place outside."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    y, x = (y if top < height - 1 else top), (x if left < width - 1 else left)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
    lower = plane[bottom, left] * (1 - dx) + plane[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def roi_align_by_loops(maps, rois, size, scale, samples):
    """RoIAlign as in Mask R-CNN, half a place shifted, every sample by itself."""
    result = np.zeros((len(rois), maps.shape[1], size, size))
    for number, (image, *corners) in enumerate(rois):
        left, top, right, bottom = (value * scale - 0.5 for value in corners)
        bin_h, bin_w = (bottom - top) / size, (right - left) / size
        count_y, count_x = samples or math.ceil(bin_h), samples or math.ceil(bin_w)
        for channel, row, column in np.ndindex(result.shape[1:]):
            values = [
                sample(
                    maps[int(image), channel],
                    top + (row + (i + 0.5) / count_y) * bin_h,
                    left + (column + (j + 0.5) / count_x) * bin_w,
                )
                for i in range(count_y)
                for j in range(count_x)
            ]
            result[number, channel, row, column] = sum(values) / max(len(values), 1)
    return result


@pytest.mark.parametrize("samples", [0, 2])
def test_roi_align_is_the_mean_of_bilinear_samples(samples, ours):
    from mmcv.ops import roi_align

    maps, rois = features("loops").double(), regions("loops").double()
    expected = roi_align_by_loops(maps.numpy(), rois.numpy(), 3, 0.25, samples)
    output = roi_align(maps, rois, 3, 0.25, samples, "avg", True)
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-12)


def test_gradient_of_roi_align(ours):
    from mmcv.ops import roi_align

    maps = features("check").double().requires_grad_()
    rois = regions("check").double()
    assert torch.autograd.gradcheck(
        lambda maps: roi_align(maps, rois, 3, 0.25, 0, "avg", True), maps
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_in_half_types_places_regions_exactly(dtype, ours):
    from mmcv.ops import roi_align

    maps, rois = features("half").to(dtype).requires_grad_(), regions("half")
    output = roi_align(maps, rois, 3, 0.25, 0, "avg", True)
    output.sum().backward()
    exact = maps.detach().float().requires_grad_()
    expected = roi_align(exact, rois, 3, 0.25, 0, "avg", True)
    expected.sum().backward()
    assert output.dtype == maps.grad.dtype == dtype
    assert torch.equal(output, expected.to(dtype))
    # The sum's gradient is 1 everywhere, which half types hold.
    assert torch.equal(maps.grad, exact.grad.to(dtype))


def test_roi_align_under_autocast(ours):
    from mmcv.ops import RoIAlign

    layer = RoIAlign(3, spatial_scale=0.25)
    convolution = torch.nn.Conv2d(2, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(convolution(features("autocast")), regions("autocast"))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert convolution.weight.grad.isfinite().all()


def test_roi_align_takes_maps_in_any_memory_format(ours):
    from mmcv.ops import roi_align

    maps, rois = features("format"), regions("format")
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = maps.clone(memory_format=memory_format).requires_grad_()
        output = roi_align(leaf, rois, 3, 0.25, 0, "avg", True)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_roi_align_by_maxima_is_refused(ours):
    from mmcv.ops import roi_align

    with pytest.raises(NotImplementedError, match="pool_mode='max'.*install-compiled"):
        roi_align(features("max"), regions("max"), 3, 0.25, 0, "max", True)


# --- RoIAlign of rotated regions ------------------------------------------------------------------


def roi_align_rotated_by_loops(maps, rois, size, scale, samples, aligned, clockwise):
    """Every sample by itself: in a region around the origin, then turned and moved."""
    result = np.zeros((len(rois), maps.shape[1], *size))
    for number, (image, x, y, width, height, angle) in enumerate(rois):
        x, y = (value * scale - 0.5 * aligned for value in (x, y))
        width, height = (value * scale for value in (width, height))
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        turn = complex(math.cos(angle), math.sin(angle) * (1 if clockwise else -1))
        bin_h, bin_w = height / size[0], width / size[1]
        count_y, count_x = samples or math.ceil(bin_h), samples or math.ceil(bin_w)
        for channel, row, column in np.ndindex(result.shape[1:]):
            values = []
            for i, j in np.ndindex(count_y, count_x):
                down = (row + (i + 0.5) / count_y) * bin_h - height / 2
                right = (column + (j + 0.5) / count_x) * bin_w - width / 2
                # Multiplied by a number of length 1, a point turns; y is the imaginary part.
                point = complex(right, down) * turn + complex(x, y)
                values.append(sample(maps[int(image), channel], point.imag, point.real))
            result[number, channel, row, column] = sum(values) / max(len(values), 1)
    return result


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("clockwise", [True, False])
def test_rotated_roi_align_is_the_mean_of_bilinear_samples(samples, aligned, clockwise, ours):
    from mmcv.ops import RoIAlignRotated

    maps, rois = features("loops").double(), turned_regions("loops").double()
    setting = (2, 3), 0.25, samples, aligned, clockwise
    expected = roi_align_rotated_by_loops(maps.numpy(), rois.numpy(), *setting)
    output = RoIAlignRotated(*setting)(maps, rois)
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("clockwise", [True, False])
def test_rotated_roi_align_at_angle_0_is_roi_align(samples, clockwise, ours):
    from mmcv.ops import roi_align, roi_align_rotated

    rois = turned_regions("upright", 20).double()
    rois[:, 5] = 0
    image, center, size = rois[:, :5].split([1, 2, 2], 1)
    upright = torch.cat([image, center - size / 2, center + size / 2], 1)
    results = []
    for operator, regional, last in (
        (roi_align, upright, ("avg", True)),
        (roi_align_rotated, rois, (True, clockwise)),
    ):
        maps = features("upright").double().requires_grad_()
        output = operator(maps, regional, (2, 3), 0.25, samples, *last)
        output.square().sum().backward()
        results.append((output.detach(), maps.grad))
    torch.testing.assert_close(*results)


def test_rotated_roi_align_after_a_quarter_turn(ours):
    from mmcv.ops import roi_align_rotated

    maps = features("quarter")
    rois = torch.tensor([[0.0, 30, 20, 24, 12, 0], [1, 40, 26, 16, 20, 0]])
    upright = roi_align_rotated(maps, rois, 4, 0.25, 2, True, True)
    turned = rois[:, [0, 1, 2, 4, 3, 5]] + torch.tensor([0, 0, 0, 0, 0, math.pi / 2])
    # From the x axis, to the right, to the y axis, downwards: what was the left side is on top.
    output = roi_align_rotated(maps, turned, 4, 0.25, 2, True, True)
    torch.testing.assert_close(output, upright.rot90(1, (2, 3)))
    output = roi_align_rotated(maps, turned, 4, 0.25, 2, True, False)
    torch.testing.assert_close(output, upright.rot90(-1, (2, 3)))


@pytest.mark.parametrize("samples", [0, 2])
def test_gradient_of_rotated_roi_align(samples, ours):
    from mmcv.ops import roi_align_rotated

    maps = features("check")[:, :1, :4, :5].double().requires_grad_()
    rois = turned_regions("check", 3).double()
    assert torch.autograd.gradcheck(
        lambda maps: roi_align_rotated(maps, rois, 2, 0.1, samples, True, True), maps
    )


@pytest.mark.parametrize("parts", [1, 10])
def test_rotated_roi_align_in_parts(parts, ours, monkeypatch):
    from mmcv.ops import roi_align_rotated

    def both():
        maps = features("parts").double().requires_grad_()
        output = roi_align_rotated(maps, turned_regions("parts").double(), 3, 0.25)
        output.square().sum().backward()
        return output.detach(), maps.grad

    expected = both()
    monkeypatch.setattr(rotated_roi_align, "_SAMPLES", parts)
    torch.testing.assert_close(both(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotated_roi_align_in_half_types_places_regions_exactly(dtype, ours):
    from mmcv.ops import roi_align_rotated

    maps, rois = features("half").to(dtype).requires_grad_(), turned_regions("half")
    output = roi_align_rotated(maps, rois, 3, 0.25)
    output.sum().backward()
    exact = maps.detach().float().requires_grad_()
    expected = roi_align_rotated(exact, rois, 3, 0.25)
    expected.sum().backward()
    assert output.dtype == maps.grad.dtype == dtype
    assert torch.equal(output, expected.to(dtype))
    assert torch.equal(maps.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("samples", [0, 2])
def test_rotated_regions_that_are_not_finite_are_0(samples, ours):
    from mmcv.ops import roi_align_rotated

    rois = turned_regions("finite", 12).repeat_interleave(2, 0)
    rois[torch.arange(0, 20, 2), torch.arange(10) % 5 + 1] = torch.tensor([math.nan, math.inf] * 5)
    maps = features("finite").requires_grad_()
    output = roi_align_rotated(maps, rois, 3, 0.25, samples)
    wrong = ~rois.isfinite().all(1)
    assert wrong.sum() == 10 and (output[wrong] == 0).all()
    assert torch.equal(output[~wrong], roi_align_rotated(maps, rois[~wrong], 3, 0.25, samples))
    output.sum().backward()
    assert maps.grad.isfinite().all()


def test_rotated_regions_of_sides_below_0(ours):
    """mmcv's CPU kernel refuses them; its CUDA kernel turns the region over, or finds no sample."""
    from mmcv.ops import roi_align_rotated

    maps = features("negative")
    roi = torch.tensor([[0.0, 30, 20, 24, 12, 0.3]])
    other = roi * torch.tensor([1, 1, 1, -1, 1, 1])
    output = roi_align_rotated(maps, other, 3, 0.25, 2)
    torch.testing.assert_close(output, roi_align_rotated(maps, roi, 3, 0.25, 2).flip(3))
    assert (roi_align_rotated(maps, other, 3, 0.25, 0) == 0).all()


def test_rotated_roi_align_takes_maps_in_any_memory_format(ours):
    from mmcv.ops import roi_align_rotated

    maps, rois = features("format"), turned_regions("format")
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = maps.clone(memory_format=memory_format).requires_grad_()
        output = roi_align_rotated(leaf, rois, 3, 0.25)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_rotated_regions_of_an_image_that_is_not_there(ours):
    from mmcv.ops import roi_align_rotated

    with pytest.raises(RuntimeError):
        roi_align_rotated(features("batch"), torch.tensor([[2.0, 8, 8, 8, 8, 0]]), 3, 0.25)


# --- differentiable IoU of rotated boxes ----------------------------------------------------------


def diff_iou(boxes1, boxes2):
    from mmcv.ops import diff_iou_rotated_2d

    return diff_iou_rotated_2d(boxes1[None], boxes2[None])[0]


def pairs(name, count=60):
    """Pairs of boxes (count, 5) in float64, most of which overlap."""
    return turned(f"{name}/first", count, 60).double(), turned(f"{name}/second", count, 60).double()


def test_differentiable_iou_is_that_of_polygons(ours):
    boxes1, boxes2 = pairs("shapely")
    for first, second in (
        (boxes1, boxes2),
        # Sides on one line, corners in one place, one box in the other, the same box.
        (boxes1.round(), torch.cat([boxes1[:, :4].round() + 4, boxes1[:, 4:].round()], 1)),
        (boxes1, boxes1 * torch.tensor([1, 1, 0.5, 0.5, 1])),
        (boxes1, boxes1),
    ):
        expected = []
        for one, other in zip(first.numpy(), second.numpy(), strict=True):
            common = outline(one).intersection(outline(other)).area
            expected.append(common / (outline(one).area + outline(other).area - common))
        np.testing.assert_allclose(diff_iou(first, second).numpy(), expected, atol=1e-8)


def test_gradient_of_differentiable_iou(ours):
    boxes1, boxes2 = (boxes.requires_grad_() for boxes in pairs("differences"))
    assert torch.autograd.gradcheck(diff_iou, (boxes1, boxes2), eps=1e-6, atol=1e-5)
    gradient = torch.autograd.grad(diff_iou(boxes1, boxes2).sum(), boxes1)[0]
    assert (gradient != 0).any(1).sum() >= 30, "says nothing"


def test_differentiable_iou_of_nearly_the_same_boxes(ours):
    """All 8 corners lie in the other box, and sides cross next to them: more than 9 candidates."""
    boxes, _ = pairs("nearly")
    for distance in (1e-4, 1e-5, 1e-6, 1e-7):
        noise = uniform("nearly", 60, 5, low=-distance, high=distance).double()
        near = (boxes + noise).requires_grad_()
        iou = diff_iou(near, boxes)
        iou.sum().backward()
        torch.testing.assert_close(iou, torch.ones_like(iou), rtol=0, atol=1e-3)
        assert near.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differentiable_iou_of_degenerate_pairs_is_finite(dtype, ours):
    box = torch.tensor([50.0, 30, 8, 4, 0.3], dtype=dtype)
    others = torch.tensor(
        [
            [50.0, 30, 8, 4, 0.3],  # the same
            [50, 30, 4, 8, 0.3 + math.pi / 2],  # the same, described otherwise
            [90, 30, 8, 4, 0.3],  # apart
            [50, 30, 0, 4, 0.3],
            [50, 30, 8, 0, 0.3],
            [50, 30, 0, 0, 0.3],
            [0, 0, 0, 0, 0],
            [50, 30, 1e4, 1e-3, 0],
        ],
        dtype=dtype,
    )
    boxes1, boxes2 = box.repeat(len(others), 1).requires_grad_(), others.requires_grad_()
    iou = diff_iou(boxes1, boxes2)
    iou.sum().backward()
    assert boxes1.grad.isfinite().all() and boxes2.grad.isfinite().all()
    assert ((iou >= 0) & (iou <= 1 + 1e-6)).all()
    # mmcv adds 1e-8 to divisors.
    assert (iou[2:7] < 1e-6).all() and (boxes2.grad[2] == 0).all()


def test_differentiable_iou_of_two_boxes_without_area_is_not_a_number(ours):
    """mmcv divides by the union itself; ours (``mmeformer.ops.iou``) is 0 there."""
    point = torch.tensor([[5.0, 5, 0, 0, 0]])
    assert diff_iou(point, point).isnan().all()


def test_differentiable_iou_of_groups_of_boxes(ours):
    from mmcv.ops import diff_iou_rotated_2d

    boxes1, boxes2 = pairs("groups")
    expected = diff_iou(boxes1, boxes2)
    boxes1, boxes2 = boxes1.view(3, 20, 5), boxes2.view(3, 20, 5)
    torch.testing.assert_close(diff_iou_rotated_2d(boxes1, boxes2).flatten(), expected)


def test_differentiable_iou_of_solids(ours):
    from mmcv.ops import diff_iou_rotated_3d

    boxes1, boxes2 = pairs("solids")
    # All 2 px high, the second ones half a box higher.
    height, low = torch.full((60, 1), 2.0), torch.zeros(60, 1)
    solid1, solid2 = (
        torch.cat([boxes[:, :2], z, boxes[:, 2:4], height, boxes[:, 4:]], 1)
        for boxes, z in ((boxes1, low), (boxes2, low + 1))
    )
    area = boxes1[:, 2:4].prod(1) + boxes2[:, 2:4].prod(1)
    iou = diff_iou(boxes1, boxes2)
    common = iou * area / (1 + iou)
    solid = diff_iou_rotated_3d(solid1[None], solid2[None])[0]
    torch.testing.assert_close(solid, common / (2 * area - common))


# --- focal loss -----------------------------------------------------------------------------------


def focal_case(classes=4, count=20):
    logits = (torch.rand(count, classes, dtype=torch.float64) - 0.5) * 12
    return logits, torch.arange(count) % (classes + 1)


@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.0, 0.5), (1.5, 0.75)])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_is_its_equation(gamma, alpha, weighted, ours):
    from mmcv.ops import sigmoid_focal_loss

    logits, target = focal_case()
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    loss = sigmoid_focal_loss(logits, target, gamma, alpha, weight, "none")
    for (row, column), value in np.ndenumerate(loss.numpy()):
        p = 1 / (1 + math.exp(-logits[row, column]))
        if target[row] == column:
            expected = -alpha * (1 - p) ** gamma * math.log(p)
        else:
            expected = -(1 - alpha) * p**gamma * math.log(1 - p)
        if weighted and target[row] < 4:
            expected *= weight[target[row]].item()
        assert value == pytest.approx(expected, rel=1e-9)
    for reduction, expected in (("sum", loss.sum()), ("mean", loss.sum() / len(loss))):
        reduced = sigmoid_focal_loss(logits, target, gamma, alpha, weight, reduction)
        torch.testing.assert_close(reduced, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradient_of_focal_loss(weighted, reduction, ours):
    from mmcv.ops import sigmoid_focal_loss

    logits, target = focal_case()
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, target, 2.0, 0.25, weight, reduction),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_focal_loss_of_certain_logits(dtype, ours):
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.tensor([[-80.0, 80.0], [80.0, -80.0]], dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 2])
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    loss.sum().backward()
    assert loss.dtype == logits.grad.dtype == dtype
    # Wrong with certainty costs the logit itself and pulls with full force.
    expected = torch.tensor([[20.0, 60.0], [60.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.75], [0.75, 0.0]], dtype=dtype))


def test_focal_loss_of_no_row(ours):
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.zeros(0, 4, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 4)


def test_mmdets_focal_loss_on_a_gpu_equals_that_on_a_cpu(ours):
    focal = pytest.importorskip("mmdet.models.losses.focal_loss")
    logits, target = focal_case()
    results = []
    for loss in (focal.sigmoid_focal_loss, focal.py_sigmoid_focal_loss):
        leaf = logits.clone().requires_grad_()
        one_hot = torch.nn.functional.one_hot(target, 5)[:, :4]
        value = loss(leaf, target if loss is focal.sigmoid_focal_loss else one_hot, avg_factor=3.0)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


# --- everything else ------------------------------------------------------------------------------


def test_other_operators_exist_and_say_how_to_compile_them(ours):
    from mmcv.ops import DeformConv2d, RoIPool

    layer = DeformConv2d(2, 2, 3)
    with pytest.raises(UserError, match="deform_conv_forward.*no model of mmeformer"):
        layer(torch.zeros(1, 2, 8, 8), torch.zeros(1, 18, 6, 6))
    with pytest.raises(NotImplementedError, match="roi_pool_forward.*--no-build-isolation"):
        RoIPool(3)(features("pool"), regions("pool"))
    with pytest.raises(NotImplementedError, match="softmax_focal_loss_forward"):
        substitute.softmax_focal_loss_forward()
    with pytest.raises(AttributeError):
        getattr(substitute, "_nothing")  # noqa: B009


def test_operators_and_layers_can_be_copied_and_pickled(ours):
    from mmcv.ops import RoIAlign, nms_rotated

    for function in (substitute.nms, substitute.deform_conv_forward, nms_rotated):
        assert pickle.loads(pickle.dumps(function)) is function
    layer = RoIAlign(3, spatial_scale=0.25)
    expected = layer(features("pickle"), regions("pickle"))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(features("pickle"), regions("pickle")), expected)
    buffer = io.BytesIO()
    torch.save(layer, buffer)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_run_in_deterministic_mode(device, ours, deterministic):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    from mmcv.ops import (
        box_iou_rotated,
        nms,
        nms_rotated,
        roi_align,
        roi_align_rotated,
        sigmoid_focal_loss,
    )

    boxes, values = turned("strict", 300).to(device), scores("strict", 300).to(device)
    rois, turned_rois = regions("strict").to(device), turned_regions("strict").to(device)
    results = []
    for _ in range(2):
        maps = features("strict").to(device).requires_grad_()
        regional = roi_align(maps, rois, 3, 0.25, 0, "avg", True)
        regional.square().sum().backward()
        turned_maps = features("strict").to(device).requires_grad_()
        turned_regional = roi_align_rotated(turned_maps, turned_rois, 3, 0.25)
        turned_regional.square().sum().backward()
        predicted = boxes.clone().requires_grad_()
        iou = diff_iou(predicted, boxes.roll(1, 0))
        iou.sum().backward()
        logits = boxes.detach().clone().requires_grad_()
        loss = sigmoid_focal_loss(logits, labels("strict", 300).to(device))
        loss.backward()
        results.append(
            [
                nms(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]], 1), values, 0.5)[1],
                nms_rotated(boxes, values, 0.1)[1],
                box_iou_rotated(boxes, boxes),
                regional.detach(),
                maps.grad,
                turned_regional.detach(),
                turned_maps.grad,
                iou.detach(),
                predicted.grad,
                loss.detach(),
                logits.grad,
            ]
        )
    assert all(map(torch.equal, *results))


def test_compiled_by_torch(ours):
    from mmcv.ops import nms, nms_rotated, roi_align, roi_align_rotated

    def everything(maps, rois, boxes, values):
        regional = roi_align(maps, rois, 3, 0.25, 2, "avg", True)
        turned_regional = roi_align_rotated(maps, turned_regions("compile"), 3, 0.25)
        kept = nms_rotated(boxes, values, 0.1)[1], nms(rois[:, 1:], rois[:, 1], 0.5)[1]
        return regional, turned_regional, diff_iou(boxes, boxes.roll(1, 0)), *kept

    arguments = (
        features("compile"),
        regions("compile"),
        turned("compile", 60),
        scores("compile", 60),
    )
    expected = everything(*arguments)
    torch._dynamo.reset()
    found = torch.compile(everything, backend="aot_eager")(*arguments)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("turn", [False, True])
def test_roi_align_with_gradient_compiled_by_torch(turn, ours):
    from mmcv.ops import RoIAlign, RoIAlignRotated

    rois = turned_regions("compile") if turn else regions("compile")
    layer = (RoIAlignRotated if turn else RoIAlign)(3, spatial_scale=0.25, sampling_ratio=2)
    torch._dynamo.reset()
    grads = []
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        maps = features("compile").requires_grad_()
        function(maps, rois).square().sum().backward()
        grads.append(maps.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dynamo", [False, True])
def test_roi_align_exported_to_onnx(dynamo, ours, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    from mmcv.ops import RoIAlign

    layer = RoIAlign(3, spatial_scale=0.25, sampling_ratio=2)
    maps, rois = features("onnx"), regions("onnx")
    path = tmp_path / "roi_align.onnx"
    # The graph that mmcv writes for the older exporter is one of opset 12.
    torch.onnx.export(
        layer,
        (maps, rois),
        path,
        input_names=["maps", "rois"],
        opset_version=18 if dynamo else 12,
        dynamo=dynamo,
    )
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {"maps": maps.numpy(), "rois": rois.numpy()})
    np.testing.assert_allclose(found, layer(maps, rois).numpy(), atol=1e-5)
