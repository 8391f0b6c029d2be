# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Lite files, written and run with LiteRT."""

import subprocess
import sys

import numpy as np
import pytest
from tiny import exported

from mmeformer import runtime
from mmeformer.deploy import check
from mmeformer.deploy.export import Request
from mmeformer.runtime import decoders
from mmeformer.runtime.images import prepare
from mmeformer.windows import crop


def litert(trained, picture, task, **request):
    """Export a tiny model; the file and the lines of its check."""
    pytest.importorskip("litert_torch", reason="LiteRT's converter is not installed")
    lines = []
    path = exported(trained(task), picture, "model.tflite", lines, target="tflite", **request)
    return path, lines


def test_segmentation(trained, picture):
    path, lines = litert(trained, picture, "segmentation", size=(64, 96), preprocessing=True)
    assert lines[0] == "compared with PyTorch on 1 random and 1 real images in LiteRT:"
    assert any("of the numbers of the file differ" in line for line in lines)
    predictor = runtime.load(path, threads=1)
    assert predictor.input_names == ["image"] and predictor.output_names == ["labels"]
    labels = predictor.predict(picture).labels
    assert labels.shape == (50, 90) and len(np.unique(labels)) > 1


@pytest.mark.slow
def test_weights_in_float16_take_half_of_the_space(trained, picture):
    sizes = []
    for half in (False, True):
        path, lines = litert(
            trained, picture, "detection", part="backbone", size=(64, 64), half=half
        )
        assert any("level3: the file differs by" in line for line in lines)
        sizes.append(path.stat().st_size)
    assert 0.45 < sizes[1] / sizes[0] < 0.75


@pytest.mark.slow
def test_rotated_boxes_are_those_of_the_onnx_file(trained, onnx_file, picture):
    path, _ = litert(trained, picture, "rotated", size=(64, 64), preprocessing=True)
    ours, theirs = (
        runtime.load(path),
        runtime.load(onnx_file("rotated", size=(64, 64), preprocessing=True)),
    )
    image = crop(check.random_image(64, 64, 0), (0, 0, 64, 64))
    comparison = check.Comparison("")
    pairs = [(theirs.predict(image), ours.predict(image))]
    check.compare_detections(pairs, comparison)
    assert not comparison.failures and len(pairs[0][0].boxes) >= 5


def test_candidates_of_levels_are_chosen_as_in_the_graph(onnx_file, trained):
    """The graph for LiteRT in PyTorch, decoded by the runtime, against the ONNX file."""
    import torch

    from mmeformer.deploy import models
    from mmeformer.deploy.graphs import graph_class

    small = trained("rotated")
    theirs = runtime.load(onnx_file("rotated", size=(64, 64), preprocessing=True))
    graph = graph_class("rotated", "tflite")(models.build_model(small.config, small.checkpoint))
    image = check.random_image(64, 64, 0)
    item = prepare(
        image,
        runtime.Metadata.from_json(
            theirs.metadata.to_json().replace(
                '"preprocessing_in_graph": true', '"preprocessing_in_graph": false'
            ),
            "x",
        ),
    )
    with torch.no_grad():
        outputs = graph.eval()(torch.from_numpy(item.data)[None])
    named = {name: value.numpy() for name, value in zip(graph.output_names, outputs, strict=True)}
    (ours,) = decoders.decode_rotated([item], named, theirs.metadata)
    comparison = check.Comparison("")
    check.compare_detections([(theirs.predict(image), ours)], comparison)
    assert not comparison.failures and len(ours.boxes) >= 5, comparison.lines


class TestBadInput:
    def test_requests(self):
        with pytest.raises(ValueError, match="TensorFlow Lite models have a fixed size"):
            Request("tflite")

    def test_selection_of_boxes(self, trained):
        from mmeformer.deploy import models
        from mmeformer.deploy.graphs import graph_class

        model = models.build_model(trained("detection").config)
        with pytest.raises(ValueError, match="no operators to select boxes.*MaskRCNN"):
            graph_class("detection", "tflite", model)

    def test_files(self, tmp_path, monkeypatch):
        path = tmp_path / "model.tflite"
        path.write_bytes(b"no model")
        with pytest.raises(ValueError, match="providers and options are of onnxruntime"):
            runtime.load(path, providers=["CPUExecutionProvider"])
        monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
        with pytest.raises(ValueError, match="pip install ai-edge-litert"):
            runtime.load(path)

    def test_damaged_files(self, tmp_path):
        pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
        path = tmp_path / "model.tflite"
        path.write_bytes(b"no model")
        with pytest.raises(ValueError, match="model.tflite: LiteRT cannot load it"):
            runtime.load(path)


PROGRAM = """
import sys
for name in ("torch", "torchvision", "mmengine", "mmcv", "mmseg"):
    sys.modules[name] = None
from mmeformer import runtime
print(runtime.load(sys.argv[1]).predict(sys.argv[2]).labels.sum())
"""


@pytest.mark.slow
def test_needs_neither_pytorch_nor_openmmlab(trained, picture):
    path, _ = litert(trained, picture, "segmentation", size=(64, 64))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, picture], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == runtime.load(path).predict(picture).labels.sum()
