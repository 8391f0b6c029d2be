# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch files, computed by XNNPACK."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ARCH, exported
from torch import nn
from trained_like import trained_like

from mmeformer import runtime
from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.deploy import check
from mmeformer.deploy.export import Request
from mmeformer.deploy.graphs import BackboneGraph
from mmeformer.runtime.metadata import Metadata
from mmeformer.variants import STRIDES
from mmeformer.windows import crop

SIZE = (64, 96)


@pytest.fixture(scope="module")
def target():
    """The module under test."""
    pytest.importorskip("executorch", reason="ExecuTorch is not installed")
    from mmeformer.deploy import executorch

    return executorch


def executorch_file(trained, picture, task, **request):
    """Export a tiny model; the file and the lines of its check."""
    lines = []
    path = exported(trained(task), picture, "model.pte", lines, target="executorch", **request)
    return path, lines


def backbone(kind):
    metadata = Metadata(
        "backbone", "0", "tiny", (0.0,) * 3, (58.0,) * 3, True, size=SIZE, batch=1, strides=STRIDES
    )
    return trained_like(kind(arch=ARCH)).eval(), metadata


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


class TestForms:
    """Operators in the forms for XNNPACK give the numbers of PyTorch's."""

    def test_norms(self, target):
        torch.manual_seed(0)
        tokens, maps = 3 + torch.randn(2, 5, 24), 3 + torch.randn(2, 24, 5, 7)
        norms = nn.LayerNorm(24), nn.GroupNorm(1, 24), nn.GroupNorm(6, 24)
        for norm in norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        ours = [target.TokenNorm(norms[0])(tokens), *(target.MapNorm(n)(maps) for n in norms[1:])]
        for found, norm, x in zip(ours, norms, (tokens, maps, maps), strict=True):
            expected = norm(x)
            assert found.shape == expected.shape
            close(found, expected)

    def test_operators(self, target):
        aten, forms = torch.ops.aten, target.EQUAL_FORMS
        x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)
        close(forms[aten.softmax.int](x, -1), x.softmax(-1))
        assert forms[aten.softmax.int](x, 1) is NotImplemented
        close(forms[aten.matmul.default](x, y), x @ y)
        assert forms[aten.matmul.default](x, y[0]) is NotImplemented
        upsample = forms[aten.upsample_nearest2d.vec]
        assert torch.equal(upsample(x, (8, 15), None), F.interpolate(x, size=(8, 15)))
        assert torch.equal(upsample(x, None, (2.0, 2.0)), F.interpolate(x, scale_factor=2.0))
        assert upsample(x, (7, 15), None) is NotImplemented
        parts = forms[aten.split_with_sizes.default](x, [1, 3], 2)
        for ours, expected in zip(parts, x.split([1, 3], 2), strict=True):
            assert torch.equal(ours, expected)
        for axes in ((1, 2), (-2, -1)):
            close(forms[aten.mean.dim](x, axes), x.mean(axes))
        assert forms[aten.mean.dim](x, (1,)) is NotImplemented


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EfficientFormer, EfficientFormerV2])
def test_xnnpack_computes_the_whole_backbone(target, tmp_path, kind):
    model, metadata = backbone(kind)
    path = tmp_path / "model.pte"
    comparison = target.write(model, BackboneGraph, metadata, [], path)
    comparison.raise_failures(path)
    assert comparison.lines[-1].endswith("operators in XNNPACK, in 1 parts")
    predictor = runtime.load(path, threads=1)
    assert predictor.metadata == metadata
    image = check.random_image(*SIZE, 1)
    with torch.no_grad():
        expected = model(torch.from_numpy(next(predictor.inputs(image))["image"]))
    for level, theirs in zip(predictor.predict(image).levels, expected, strict=True):
        assert check.relative_difference(level, theirs[0].numpy()) < 1e-5


def test_segmentation(target, trained, picture):
    path, lines = executorch_file(
        trained, picture, "segmentation", size=(64, 96), preprocessing=True
    )
    assert lines[0] == "compared with PyTorch on 1 random and 1 real images in ExecuTorch:"
    (counts,) = [line for line in lines if "operators in XNNPACK" in line]
    # All between the normalization of the image and the choice of the class.
    assert "1 aten_argmax_default" in counts
    assert not any(name in counts for name in ("conv", "cat", "expand", "softmax", "upsample"))
    predictor = runtime.load(path, threads=1)
    assert predictor.input_names == ["image"] and predictor.output_names == ["labels"]
    labels = predictor.predict(picture).labels
    assert labels.shape == (50, 90) and len(np.unique(labels)) > 1


@pytest.mark.slow
def test_classification(target, trained, picture, onnx_file):
    path, _ = executorch_file(trained, picture, "classification", size=(64, 64))
    theirs = runtime.load(onnx_file("classification", size=(64, 64)))
    ours = runtime.load(path).predict(picture).scores
    np.testing.assert_allclose(ours, theirs.predict(picture).scores, atol=1e-5)


@pytest.mark.slow
def test_rotated_boxes_are_those_of_the_onnx_file(target, trained, onnx_file, picture):
    path, _ = executorch_file(trained, picture, "rotated", size=(64, 64), preprocessing=True)
    theirs = runtime.load(onnx_file("rotated", size=(64, 64), preprocessing=True))
    image = crop(check.random_image(64, 64, 0), (0, 0, 64, 64))
    comparison = check.Comparison("")
    pairs = [(theirs.predict(image), runtime.load(path).predict(image))]
    check.compare_detections(pairs, comparison)
    assert not comparison.failures and len(pairs[0][0].boxes) >= 5


class TestBadInput:
    def test_requests(self):
        with pytest.raises(ValueError, match="ExecuTorch models have a fixed size"):
            Request("executorch")
        with pytest.raises(ValueError, match="ExecuTorch files are float32"):
            Request("executorch", size=SIZE, half=True)

    def test_files(self, tmp_path, monkeypatch):
        path = tmp_path / "model.pte"
        path.write_bytes(b"no model")
        with pytest.raises(ValueError, match="providers and options are of onnxruntime"):
            runtime.load(path, providers=["CPUExecutionProvider"])
        monkeypatch.setitem(sys.modules, "executorch.runtime", None)
        with pytest.raises(ValueError, match="pip install executorch"):
            runtime.load(path)

    def test_damaged_files(self, target, tmp_path):
        path = tmp_path / "model.pte"
        path.write_bytes(b"no model")
        with pytest.raises(ValueError, match="model.pte: ExecuTorch cannot load it"):
            runtime.load(path)
