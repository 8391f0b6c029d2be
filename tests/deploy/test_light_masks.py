# SPDX-License-Identifier: Apache-2.0
"""Exports of the light detector with masks, against mmdet's own masks."""

import copy

import numpy as np
import onnx
import pytest
import torch
from tiny import LIGHT_MASKS, exported, small_trained

from mmeformer import runtime
from mmeformer.commands import profile
from mmeformer.deploy import check, models, samples
from mmeformer.deploy.graphs import graph_class
from mmeformer.detection.dynamic_masks import located, with_positions
from mmeformer.runtime import decoders
from mmeformer.runtime.images import normalize, prepare
from mmeformer.runtime.masks import bilinear, dynamic_masks


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """The light detector with masks, small, with spread scores and masks."""
    return small_trained(tmp_path_factory.mktemp("light"), "detection", LIGHT_MASKS)


@pytest.fixture
def small(light):
    return light.copy()


def made(light, picture, folder, **request):
    """(file, lines of its check)."""
    lines: list[str] = []
    return exported(light.copy(), picture, lines=lines, folder=folder, **request), lines


@pytest.fixture(scope="module")
def inside(light, picture, tmp_path_factory):
    """NMS in the file, for any size."""
    return made(light, picture, tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="module")
def outside(light, picture, tmp_path_factory):
    """NMS in the runtime, for two images of one size."""
    request = dict(size=(64, 96), batch=2, preprocessing=True, nms=False)
    return made(light, picture, tmp_path_factory.mktemp("outside"), **request)


@pytest.fixture(scope="module")
def theirs(light):
    """mmdet's prediction on an image, prepared by the runtime for a file."""
    model = models.build_model(copy.deepcopy(light.config), light.checkpoint)

    def predict(image, metadata):
        item = prepare(image, metadata)
        if metadata.preprocessing_in_graph:
            model_input = np.zeros((3, *item.data.shape[:2]), np.float32)
            height, width = item.size
            resized = item.data[:height, :width]
            model_input[:, :height, :width] = normalize(resized, metadata)
        else:
            model_input = item.data
        height, width = item.size
        metainfo = dict(
            img_shape=item.size,
            ori_shape=item.original,
            scale_factor=(width / item.original[1], height / item.original[0]),
        )
        with torch.no_grad():
            batch = torch.from_numpy(model_input)[None]
            return samples.predict_detections(model, batch, metainfo)

    return predict


# Smaller, larger, long, and of the size itself.
SIZES = ((48, 64), (75, 100), (200, 90), (64, 64))


@pytest.mark.parametrize("name", ["inside", pytest.param("outside", marks=pytest.mark.slow)])
def test_masks_are_those_of_mmdet(theirs, name, request):
    path, lines = request.getfixturevalue(name)
    assert any("detections match" in line and "masks" in line for line in lines), lines
    predictor = runtime.load(path)
    visible, worst = 0, 1.0
    for seed, size in enumerate(SIZES):
        image = check.random_image(*size, seed)
        expected, found = theirs(image, predictor.metadata), predictor.predict(image)
        pairs = check.match(expected, found)
        assert len(pairs) == len(expected.boxes) == len(found.boxes) >= 5
        for left, right in pairs:
            one, other = expected.masks()[left], found.masks()[right]
            union = (one | other).sum()
            if 0 < one.mean() < 1:
                visible += 1
            if union:
                worst = min(worst, float((one & other).sum() / union))
    assert visible >= 40 and worst >= 0.99


def test_outputs(inside):
    names = runtime.load(inside[0]).output_names
    assert names == ["boxes", "scores", "labels", "image_index", "mask_logits"]


@pytest.mark.slow
def test_outputs_before_nms(outside):
    shapes = {value.name: value.shape for value in runtime.load(outside[0]).session.get_outputs()}
    assert shapes["mask_features"] == [2, 10, 8, 12] and shapes["kernels1"] == [2, 24, 169]


def test_an_image_without_objects(inside, tmp_path):
    path = tmp_path / "strict.onnx"
    model = onnx.load(str(inside[0]))
    (nms,) = (node for node in model.graph.node if node.op_type == "NonMaxSuppression")
    for value in model.graph.initializer:
        if value.name == nms.input[4]:
            value.CopyFrom(onnx.numpy_helper.from_array(np.array([2], np.float32), value.name))
    onnx.save(model, str(path))
    found = runtime.load(path).predict(check.random_image(64, 64, 0))
    assert len(found) == 0 and found.masks().shape == (0, 64, 64)


def test_candidates_of_one_input_are_chosen_by_the_runtime(small, inside):
    """The graph for LiteRT and CoreML in PyTorch, decoded by the runtime, against the ONNX file."""
    file = runtime.load(inside[0])
    model = models.build_model(small.config, small.checkpoint)
    graph = graph_class("detection", "tflite", model)(model).eval()
    image = check.random_image(50, 60, 0)
    item = prepare(image, file.metadata)
    with torch.no_grad():
        outputs = graph(torch.from_numpy(item.data)[None])
    named = {name: value.numpy() for name, value in zip(graph.output_names, outputs, strict=True)}
    (ours,) = decoders.decode_detections([item], named, file.metadata)
    comparison = check.Comparison("")
    check.compare_detections([(file.predict(image), ours)], comparison)
    assert not comparison.failures and len(ours.boxes) >= 5, comparison.lines


@pytest.mark.parametrize("hidden, prototypes", [(8, 8), (4, 6)])
def test_dynamic_masks_are_those_of_mmdet(small, hidden, prototypes):
    small.config.model.bbox_head.update(dyconv_channels=hidden, num_prototypes=prototypes)
    head = models.build_model(small.config).bbox_head
    torch.manual_seed(0)
    kernels = torch.randn(5, head.num_gen_params)
    features = torch.randn(prototypes, 6, 9)
    points = torch.tensor([[0.0, 0], [16, 32], [64, 40], [8, 8], [32, 0]])
    strides = torch.tensor([8.0, 16, 32, 8, 32])[:, None]
    expected = head._mask_predict_by_feat_single(
        features, kernels, torch.cat([points, strides, strides], 1)
    )
    rows = located(head, kernels, points, strides)
    found = dynamic_masks(rows.numpy(), with_positions(features[None], (8, 8))[0].numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("new, old", [(64, 8), (48, 64), (75, 64), (5, 1)])
def test_bilinear_is_that_of_pytorch(new, old):
    values = torch.randn(1, 3, old, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(values, size=new, mode="linear")[0]
    np.testing.assert_allclose(values[0].numpy() @ bilinear(new, old).T, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(test_cfg=dict(mask_thr_binary=-1)), "mask_thr_binary is -1"),
        (dict(bbox_head=dict(num_dyconvs=2)), "num_dyconvs is 2"),
    ],
)
def test_settings_that_no_graph_has(small, change, message):
    small.config.merge_from_dict(dict(model=change))
    model = models.build_model(small.config)
    with pytest.raises(ValueError, match=f"{message}.*--part backbone"):
        graph_class("detection", "onnx", model)(model)


def test_profile_counts_the_whole_detector(small, tmp_path, capsys):
    path = tmp_path / "light.py"
    small.config.dump(str(path))
    measuring = ["--size", "64", "64", "--modes", "folded", "--rounds", "2"]
    assert profile.main([str(path), *measuring]) == 0
    table = capsys.readouterr().out
    assert "neck" in table and "bbox_head" in table
