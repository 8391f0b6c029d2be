# SPDX-License-Identifier: Apache-2.0
"""8 bits: which layers, what it costs, and that too large a cost is refused."""

import re
from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest

from mmeformer import runtime
from mmeformer.commands.export import main
from mmeformer.deploy import quantize
from mmeformer.deploy.export import Request
from mmeformer.deploy.quantize import layer_groups
from mmeformer.synthetic.masks import write_mask_dataset

FIXED = dict(size=(64, 96), batch=2, preprocessing=True)


@pytest.fixture(scope="module")
def labeled(trained, onnx_file, tmp_path_factory):
    """A config, its checkpoint, and test data on which the model in float32 is right: a metric of
    100 that falls with every label that changes."""
    small = trained("segmentation")
    folder = tmp_path_factory.mktemp("labeled")
    root = write_mask_dataset(folder / "data", train=1, val=3, size=96)
    dataset = small.config.test_dataloader.dataset
    dataset.data_root = str(root) + "/"
    predictor = runtime.load(onnx_file("segmentation", **FIXED))
    images = sorted((root / dataset.data_prefix.img_path).glob("*"))
    for image in images:
        path = root / dataset.data_prefix.seg_map_path / (image.stem + ".png")
        assert path.is_file()
        cv2.imwrite(str(path), predictor.predict(image).labels)
    small.config.dump(str(folder / "config.py"))
    return folder / "config.py", small.checkpoint, images


def export(labeled, out, calibration, max_drop):
    config, checkpoint, images = labeled
    arguments = [config, checkpoint, "--to", "onnx", "--out", out, "--images", images[0]]
    arguments += ["--size", 64, 96, "--batch", 2, "--with-preprocessing", "--int8", *calibration]
    return main([str(argument) for argument in [*arguments, "--max-drop", max_drop]])


def test_groups_of_layers(onnx_file):
    for task, request in (("segmentation", FIXED), ("detection", dict(size=(64, 96), batch=2))):
        proto = onnx.load(str(onnx_file(task, **{"preprocessing": False, **request})))
        groups = layer_groups(proto)
        parts = {"first layer", "last layers", "talking heads", "attention products", "stage 3"}
        assert parts | {"stage 4, depthwise", "neck"} <= set(groups)
        names = [name for group in groups.values() for name in group]
        assert len(names) == len(set(names))
        kinds = {node.name: node.op_type for node in proto.graph.node}
        assert {kinds[name] for name in groups["attention products"]} == {"MatMul"}
        assert len(groups["first layer"]) == 1
        # Two blocks with two heads each, in both stages with attention.
        assert len(groups["talking heads"]) == 4
        assert kinds[groups["first layer"][0]] == "Conv"


@pytest.mark.slow
def test_a_file_in_8_bits_is_measured(labeled, onnx_file, tmp_path, capsys, quiet_logging):
    out = tmp_path / "small.onnx"
    assert export(labeled, out, [labeled[2][0].parent], 60) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("8 bits: effect") :].splitlines()
    proto = onnx.load(str(out))
    quantized = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) > 10
    zeros = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    assert {zeros[node.input[2]].dtype.name for node in quantized} == {"uint8"}
    (result,) = [line for line in table if line.startswith("all that are in 8 bits")]
    drop = float(result.split()[-3])
    assert 0 < drop <= 60
    (small,) = [line for line in table if line.startswith("8 bits: mIoU")]
    assert f"mIoU {100 - drop:.2f}, {out.stat().st_size / 1e6:.1f} MB" in small
    (plain,) = [line for line in table if line.startswith("float32:")]
    float32 = onnx_file("segmentation", **FIXED)
    assert f"mIoU 100.00, {float32.stat().st_size / 1e6:.1f} MB" in plain
    assert out.stat().st_size < 0.6 * float32.stat().st_size
    predictor = runtime.load(out)
    assert replace(predictor.metadata, config="") == replace(
        runtime.load(float32).metadata, config=""
    )
    ours, theirs = (runtime.load(file).predict(labeled[2][0]).labels for file in (out, float32))
    assert 0.7 < (ours == theirs).mean() < 1


def test_a_file_that_costs_too_much_is_refused(
    labeled, tmp_path, monkeypatch, capsys, quiet_logging
):
    def one_group(proto):  # each takes an evaluation
        return {"all layers": [name for names in layer_groups(proto).values() for name in names]}

    monkeypatch.setattr(quantize, "layer_groups", one_group)
    black = tmp_path / "black.png"
    cv2.imwrite(str(black), np.zeros((64, 96, 3), np.uint8))
    out = tmp_path / "small.onnx"
    assert export(labeled, out, [black], 0.01) == 1
    error = capsys.readouterr().err
    assert f"{out} was not written, the file is {tmp_path / 'small.refused.onnx'}" in error
    assert "points in 8 bits, more than --max-drop 0.01" in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"black.png", "small.refused.onnx"}
    assert runtime.load(tmp_path / "small.refused.onnx").metadata.size == (64, 96)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_tensorflow_lite_in_8_bits(labeled, tmp_path, capsys, quiet_logging, dynamic):
    """Layers are chosen by their place; what has no weights, only with measured ranges."""
    pytest.importorskip("litert_torch", reason="LiteRT's converter is not installed")
    config, checkpoint, images = labeled
    out = tmp_path / "small.tflite"
    arguments = [config, checkpoint, "--to", "tflite", "--out", out, "--images", images[0]]
    arguments += ["--size", 64, 96, "--with-preprocessing", "--max-drop", 60]
    arguments += ["--int8-dynamic"] if dynamic else ["--int8", *images]
    assert main([str(argument) for argument in arguments]) == 0
    table = capsys.readouterr().out
    numbers = {
        match[1]: int(match[2])
        for match in re.finditer(r"^(\S.*?) {2,}(\d+) +-?[\d.]+ +[\d.]+ +[\d.]+", table, re.M)
    }
    assert numbers["first layer"] == 1 and numbers["stage 3"] > numbers["stage 1"] > 1
    assert {"stem", "talking heads", "stage 4, depthwise", "neck"} <= set(numbers)
    assert ("BATCH_MATMUL" in numbers) == (not dynamic)
    (plain,) = [line for line in table.splitlines() if line.startswith("float32")]
    megabytes = float(re.search(r"([\d.]+) MB", plain)[1])
    assert out.stat().st_size < 0.7e6 * megabytes
    labels = runtime.load(out).predict(images[0]).labels
    assert labels.shape == cv2.imread(str(images[0])).shape[:2] and len(np.unique(labels)) > 1


def test_an_old_onnxruntime_is_named(labeled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("onnxruntime.__version__", "1.18.1")
    assert export(labeled, tmp_path / "model.onnx", labeled[2], 1) == 1
    assert "--int8 needs onnxruntime 1.19 or newer, and 1.18.1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(target="onnx", size=(64, 64)), "--int8-dynamic is for TensorFlow Lite: onnxruntime"),
        (dict(target="tflite", size=(64, 64), half=True), "--int8-dynamic stands alone"),
        (dict(target="tflite", size=(64, 64), part="backbone"), "backbone alone has no metric"),
    ],
)
def test_requests_without_calibration(request_, message):
    with pytest.raises(ValueError, match=message):
        Request(int8_dynamic=True, **request_)


@pytest.mark.parametrize(
    "request_, message",
    [
        (
            dict(target="coreml", size=(64, 64)),
            "--int8 is for ONNX and TensorFlow Lite",
        ),
        (dict(target="tflite", size=(64, 64), half=True), "without --fp16"),
        (dict(target="onnx", part="backbone"), "the backbone alone has no metric"),
        (dict(target="onnx", max_drop=-1.0), "--max-drop must not be negative, but is -1"),
    ],
)
def test_requests(tmp_path, request_, message):
    with pytest.raises(ValueError, match=message):
        Request(int8=(tmp_path / "image.png",), **request_)
