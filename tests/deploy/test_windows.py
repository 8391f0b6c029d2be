# SPDX-License-Identifier: Apache-2.0
"""Exported files see images in the same windows as the checkpoint."""

import re
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import pytest
import torch
from tiny import exported

from mmeformer import load, runtime
from mmeformer.deploy import check
from mmeformer.deploy.quantize import quantize
from mmeformer.inference import load_predictor
from mmeformer.runtime import openvino
from mmeformer.runtime.metadata import Metadata
from mmeformer.runtime.parts import size_warning, window_side
from mmeformer.segmentation.graph import _Windows


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23, 40])
def test_windows_along_an_axis(length):
    """Against a loop over the windows of mmseg's ``slide_inference``."""
    for window, stride in product((5, 8, 9), (1, 2, 3, 5)):
        ours = _Windows(length, window, stride)
        starts, found = [], torch.zeros(length)
        for index in range(max(length - window + stride - 1, 0) // stride + 1):
            end = min(index * stride + window, length)
            starts.append(max(end - window, 0))
            found[starts[-1] : end] += 1
        assert [ours.start(index) for index in range(ours.count)] == starts
        assert ours.side == min(window, length) and torch.equal(ours.found(), found)


@pytest.mark.parametrize("size", [None, (96, 160)])
def test_segmentors_that_test_in_windows(trained, picture, tmp_path, size):
    """The check compares with mmseg's own ``slide`` mode, on several windows."""
    small = trained("segmentation")
    small.config.model.test_cfg = dict(mode="slide", crop_size=(64, 96), stride=(43, 64))
    lines = []
    path = exported(small, picture, lines=lines, folder=tmp_path, size=size)
    (line,) = [line for line in lines if "pixels have another class" in line]
    assert int(line.split()[2]) > 2 * 96 * 160 - 1
    nodes = onnx.load(str(path)).graph.node
    assert not {node.op_type for node in nodes} & {"If", "ScatterElements", "ScatterND", "Where"}
    # One window at a time: memory for all of a large image would be that of its network.
    loops = [node.attribute[0].g.node for node in nodes if node.op_type == "Loop"]
    convolutions = [sum(node.op_type == "Conv" for node in part) for part in (nodes, *loops)]
    assert len(loops) == (size is None) and sum(map(bool, convolutions)) == 1
    if not size:
        with pytest.raises(ValueError, match="give --size instead of --dynamic"):
            quantize(path, tmp_path / "8.onnx", small.config, None, [picture], 1.0, print)
    file, checkpoint = runtime.load(path), load_predictor(small.config, small.checkpoint)
    for image in map(noise, *zip(*([(96, 160)] if size else [(50, 37), (97, 300)]), strict=True)):
        (expected,) = checkpoint.predict_images([image])
        assert len(np.unique(expected.labels)) > 1
        assert (file.predict(image).labels != expected.labels).mean() < 1e-3


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_large_images_are_cut_as_by_the_checkpoint(trained, onnx_file, task):
    """The score threshold holds before the merging: joined boxes have no part below it."""
    thr = 0.5 if task == "detection" else None
    preprocessing = task == "detection"
    model = load(onnx_file(task, size=None, preprocessing=preprocessing), score_thr=thr)
    file = model.backend.predictor
    file.metadata = replace(file.metadata, cut_above=100, window=64)
    small, image = trained(task), noise(80, 150)
    checkpoint = load_predictor(small.config, small.checkpoint, score_thr=thr)
    expected, ours = checkpoint.predict_windows(image, 64, 16), model(image).result
    whole = checkpoint.predict_windows(image, 150, 0)
    if task == "segmentation":
        assert (ours.labels != expected.labels).mean() < 1e-3
        assert (whole.labels != expected.labels).mean() > 0.01
    else:
        assert len(check.match(expected, ours)) == len(ours) == len(expected) > 3
        assert len(check.match(expected, whole)) < len(expected)
    assert len(list(file.inputs(image))) == 6


PATCHES = Metadata(
    *("rotated", "0", "config", (0.0,) * 3, (1.0,) * 3, True),
    **dict(scale=(64, 64), pad_divisor=32, patch_size=64),
)


def test_an_image_as_long_as_a_patch_is_whole_where_the_file_has_room():
    low = replace(PATCHES, size=(48, 64))
    assert window_side((48, 64), low) is None
    assert window_side((64, 48), low) == window_side((48, 65), low) == 48
    assert window_side((64, 48), PATCHES) is None


@pytest.mark.parametrize(
    ("image", "changes", "text"),
    [
        # Padded to 64 rows by both.
        ((48, 64), {}, None),
        ((30, 64), {}, r"64 x 30 px: .* 64 x 32 px, so results differ; .* --size 32 64"),
        ((64, 64), {}, None),
        ((20, 30), {}, None),
        ((200, 90), {}, None),
        ((64, 64), dict(size=(32, 64)), "sees 64 x 32 px"),
        ((30, 64), dict(size=None), None),
        ((50, 37), dict(task="segmentation", scale=None, patch_size=0, pad_divisor=1), "37 x 50"),
        ((64, 64), dict(task="segmentation", scale=None, patch_size=0, pad_divisor=1), None),
        ((50, 37), dict(task="backbone", scale=None, patch_size=0), None),
    ],
)
def test_a_file_of_one_size_names_what_it_sees_otherwise(image, changes, text):
    metadata = replace(PATCHES, **{"size": (64, 64), **changes})
    found = size_warning(image, metadata)
    if text is None:
        assert found is None
    else:
        assert re.search(text, found or ""), found


def test_the_size_is_named_once(onnx_file):
    predictor = runtime.load(onnx_file("rotated", size=(64, 64), preprocessing=True))
    with pytest.warns(UserWarning, match="64 x 30 px: this file sees 64 x 64 px") as told:
        predictor.predict_batch([noise(64, 64), noise(30, 64), noise(20, 64)])
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(noise(30, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "package"),
    [
        ("executorch", "model.pte", "executorch.runtime"),
        ("tflite", "model.tflite", "litert_torch"),
        ("onnx", "model.onnx", "openvino"),
    ],
)
def test_other_runtimes_see_the_windows(trained, picture, tmp_path, target, name, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    small = trained("segmentation")
    small.config.model.test_cfg = dict(mode="slide", crop_size=(64, 96), stride=(43, 64))
    size = (96, 160) if target != "onnx" else None
    path = exported(small, picture, name=name, folder=tmp_path, target=target, size=size)
    file = openvino.load(path) if target == "onnx" else runtime.load(path)
    image = noise(96, 160)
    (expected,) = load_predictor(small.config, small.checkpoint).predict_images([image])
    assert (file.predict(image).labels != expected.labels).mean() < 1e-3
