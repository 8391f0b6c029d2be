# SPDX-License-Identifier: Apache-2.0
"""Exported files see images in the same windows as the checkpoint."""

from itertools import product

import numpy as np
import onnx
import pytest
import torch
from tiny import exported

from mmeformer import runtime
from mmeformer.inference import load_predictor
from mmeformer.segmentation.graph import _Windows


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23, 40])
def test_windows_along_an_axis(length):
    """Against a loop over the windows of mmseg's ``slide_inference``."""
    for window, stride in product((5, 8, 9), (1, 2, 3, 5)):
        ours = _Windows(length, window, stride)
        count = max(length - window + stride - 1, 0) // stride + 1
        side = min(window, length)
        values = torch.rand(2, 3, 4, length)
        parts = torch.rand(2 * count, 3, 4, side)
        cut = ours.cut(values).view(2, count, 3, 4, side)
        total, found = torch.zeros(2, 3, 4, length), torch.zeros(length)
        for index, part in enumerate(parts.view(2, count, 3, 4, side).unbind(1)):
            end = min(index * stride + window, length)
            start = max(end - window, 0)
            assert torch.equal(cut[:, index], values[..., start:end])
            total[..., start:end] += part
            found[start:end] += 1
        torch.testing.assert_close(ours.join(parts), total / found)


@pytest.mark.parametrize("size", [None, (96, 160)])
def test_segmentors_that_test_in_windows(trained, picture, tmp_path, size):
    """The check compares with mmseg's own ``slide`` mode, on several windows."""
    small = trained("segmentation")
    small.config.model.test_cfg = dict(mode="slide", crop_size=(64, 96), stride=(43, 64))
    lines = []
    path = exported(small, picture, lines=lines, folder=tmp_path, size=size)
    (line,) = [line for line in lines if "pixels have another class" in line]
    assert int(line.split()[2]) > 2 * 96 * 160 - 1
    proto = onnx.load(str(path))
    kinds = {node.op_type for node in proto.graph.node}
    assert not kinds & {"If", "Loop", "ScatterElements", "ScatterND", "Where"}
    file, checkpoint = runtime.load(path), load_predictor(small.config, small.checkpoint)
    for image in map(noise, *zip(*([(96, 160)] if size else [(50, 37), (97, 300)]), strict=True)):
        (expected,) = checkpoint.predict_images([image])
        assert len(np.unique(expected.labels)) > 1
        assert (file.predict(image).labels != expected.labels).mean() < 1e-3
