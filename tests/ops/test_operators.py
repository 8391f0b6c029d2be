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
)
from rotated_boxes import polygon_iou

from mmeformer.errors import UserError
from mmeformer.ops import rotated, status, substitute

# mmcv's CPU kernels differ here on purpose: see the tests named after them.
DIFFERENT = {"nms_rotated/at the threshold", "nms_rotated/labels"}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture
def ours(monkeypatch):
    """``mmcv.ops`` on our operators, whatever is installed."""
    for name in ("nms", "box_iou_rotated", "roi_align", "focal_loss", "deform_conv", "roi_pool"):
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
    from mmcv.ops import box_iou_rotated, nms, nms_rotated, roi_align, sigmoid_focal_loss

    boxes, values = turned("strict", 300).to(device), scores("strict", 300).to(device)
    rois = regions("strict").to(device)
    results = []
    for _ in range(2):
        maps = features("strict").to(device).requires_grad_()
        regional = roi_align(maps, rois, 3, 0.25, 0, "avg", True)
        regional.square().sum().backward()
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
                loss.detach(),
                logits.grad,
            ]
        )
    assert all(map(torch.equal, *results))


def test_compiled_by_torch(ours):
    from mmcv.ops import nms, nms_rotated, roi_align

    def everything(maps, rois, boxes, values):
        regional = roi_align(maps, rois, 3, 0.25, 2, "avg", True)
        return regional, nms_rotated(boxes, values, 0.1)[1], nms(rois[:, 1:], rois[:, 1], 0.5)[1]

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


def test_roi_align_with_gradient_compiled_by_torch(ours):
    from mmcv.ops import RoIAlign

    layer, rois = RoIAlign(3, spatial_scale=0.25, sampling_ratio=2), regions("compile")
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
