# SPDX-License-Identifier: Apache-2.0
"""OpenVINO reads the ONNX files, and its results are those of onnxruntime."""

import sys

import cv2
import pytest
from tiny import EXPORTS

from mmeformer import runtime
from mmeformer.deploy import check
from mmeformer.runtime import openvino


@pytest.mark.parametrize("task, request_", EXPORTS[:-1])
def test_results_are_those_of_onnxruntime(onnx_file, picture, task, request_):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    path = onnx_file(task, **request_)
    theirs, ours = runtime.load(path), openvino.load(path, threads=1)
    images = [cv2.imread(str(picture)), check.random_image(50, 70, 3)]
    pairs = list(zip(theirs.predict_batch(images), ours.predict_batch(images), strict=True))
    comparison = check.Comparison("")
    if request_.get("part"):
        check.compare_pyramids(pairs, comparison)
    elif task == "segmentation":
        check.compare_labels(pairs, comparison)
    else:
        check.compare_detections(pairs, comparison)
        assert sum(len(found.boxes) for found, _ in pairs) >= 10
    assert not comparison.failures, comparison.lines


def test_what_is_missing_is_named(onnx_file, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gone.onnx does not exist"):
        openvino.load(tmp_path / "gone.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match="pip install openvino"):
        openvino.load(onnx_file("segmentation", size=None, preprocessing=False))
