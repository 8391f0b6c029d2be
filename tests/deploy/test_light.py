# SPDX-License-Identifier: Apache-2.0
"""Exports of the light detector: NMS in the file and in the runtime, against PyTorch."""

import cv2
import numpy as np
import pytest
import torch
from tiny import LIGHT, exported, small_trained

from mmeformer import runtime
from mmeformer.commands import profile
from mmeformer.deploy import check, models, website
from mmeformer.deploy.export import Request
from mmeformer.deploy.graphs import graph_class
from mmeformer.runtime import decoders
from mmeformer.runtime.images import prepare


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """The light detector, small, with spread scores."""
    return small_trained(tmp_path_factory.mktemp("light"), "detection", LIGHT)


@pytest.fixture
def small(light):
    return light.copy()


@pytest.fixture(scope="module")
def files(light, picture, tmp_path_factory):
    """Files of any size, NMS inside and outside, with the lines of their checks."""
    made = {}
    for name, nms in (("inside", True), ("outside", False)):
        lines: list[str] = []
        folder = tmp_path_factory.mktemp(name)
        path = exported(light.copy(), picture, lines=lines, folder=folder, nms=nms)
        made[name] = (runtime.load(path), lines, path)
    return made


@pytest.mark.parametrize("name", ["inside", "outside"])
def test_files_of_any_size_predict_as_pytorch(files, picture, name):
    predictor, lines, _ = files[name]
    assert any("detections match" in line for line in lines), lines
    found = predictor.predict(picture)
    assert len(found.boxes) >= 5 and found.instance_masks is None
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("nms", [True, False])
def test_files_of_one_size_predict_as_pytorch(small, picture, tmp_path, nms):
    lines: list[str] = []
    request = dict(size=(64, 96), batch=2, preprocessing=True, nms=nms)
    path = exported(small, picture, lines=lines, folder=tmp_path, **request)
    assert any("detections match" in line for line in lines), lines
    assert len(runtime.load(path).predict(picture).boxes) >= 5


def test_nms_outside_gives_what_nms_inside_gives(files):
    inside, outside = files["inside"][0], files["outside"][0]
    assert "boxes" in {output.name for output in inside.session.get_outputs()}
    assert {output.name for output in outside.session.get_outputs()} == {
        f"{kind}{level}" for kind in ("scores", "boxes") for level in range(3)
    }
    pictures = [check.random_image(64, 64, seed) for seed in range(3)]
    for image, expected in zip(pictures, inside.predict_batch(pictures), strict=True):
        found = outside.predict(image)
        assert len(expected.boxes) == len(found.boxes) >= 5
        np.testing.assert_array_equal(expected.labels, found.labels)
        np.testing.assert_allclose(expected.boxes, found.boxes, atol=1e-3)
        np.testing.assert_allclose(expected.scores, found.scores, atol=1e-5)


def test_candidates_of_one_input_are_chosen_by_the_runtime(small, files):
    """The graph for LiteRT and CoreML in PyTorch, decoded by the runtime, against the ONNX file."""
    theirs = files["inside"][0]
    model = models.build_model(small.config, small.checkpoint)
    graph = graph_class("detection", "tflite", model)(model).eval()
    assert graph.extra_inputs == ()
    image = check.random_image(50, 60, 0)
    item = prepare(image, theirs.metadata)
    with torch.no_grad():
        outputs = graph(torch.from_numpy(item.data)[None])
    named = {name: value.numpy() for name, value in zip(graph.output_names, outputs, strict=True)}
    (ours,) = decoders.decode_detections([item], named, theirs.metadata)
    comparison = check.Comparison("")
    check.compare_detections([(theirs.predict(image), ours)], comparison)
    assert not comparison.failures and len(ours.boxes) >= 5, comparison.lines


def test_profile_counts_the_whole_detector(small, tmp_path, capsys):
    path = tmp_path / "light.py"
    small.config.dump(str(path))
    assert (
        profile.main([str(path), "--size", "64", "64", "--modes", "folded", "--rounds", "2"]) == 0
    )
    table = capsys.readouterr().out
    assert "neck" in table and "bbox_head" in table


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(nms=dict(type="soft_nms", iou_threshold=0.5)), "not a plain nms"),
        (dict(min_bbox_size=4), "min_bbox_size is 4"),
        (dict(max_per_img=-1), "max_per_img is -1"),
    ],
)
def test_settings_that_no_graph_has(small, change, message):
    small.config.model.test_cfg.update(change)
    model = models.build_model(small.config)
    with pytest.raises(ValueError, match=f"{message}.*--part backbone"):
        graph_class("detection", "onnx", model)(model)


def test_nms_outside_needs_nms():
    with pytest.raises(ValueError, match="other files have no NMS"):
        Request("tflite", size=(64, 64), nms=False)
    with pytest.raises(ValueError, match="segmentation do no NMS"):
        graph_class("segmentation", "onnx", nms=False)


def test_boxes_are_in_pixels_of_the_picture(files):
    image = cv2.resize(check.random_image(64, 64, 1), (200, 30))
    boxes = files["outside"][0].predict(image).boxes
    assert len(boxes) and (boxes >= 0).all() and (boxes <= [200, 30, 200, 30]).all()


def test_the_web_page_wants_nms_inside(files, tmp_path):
    path = files["outside"][2]
    with pytest.raises(ValueError, match="before NMS.*--nms inside"):
        website.build(path, tmp_path / "page")
    assert not (tmp_path / "page").exists()
