# SPDX-License-Identifier: Apache-2.0
import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import build_backbone, needs_coremltools
from mmengine.config import Config
from tiny import EXPORTS, exported, small_config
from torch import nn
from trained_like import trained_like

from mmeformer import runtime
from mmeformer.commands.export import main
from mmeformer.deploy import check, export, graphs, models
from mmeformer.deploy import onnx as onnx_export
from mmeformer.deploy.export import Request
from mmeformer.deploy.graphs import BackboneGraph
from mmeformer.errors import CheckpointError, UserError
from mmeformer.runtime.metadata import Metadata
from mmeformer.variants import STRIDES, VARIANTS


@pytest.mark.parametrize("task, request_", EXPORTS)
def test_exports_pass_their_check(exports, task, request_):
    path, lines = exports(task, **request_)
    assert lines[0] == "compared with PyTorch on 2 random and 1 real images:"
    if task in ("detection", "rotated") and "part" not in request_:
        (found,) = [line for line in lines if "detections match" in line]
        assert int(found.split()[0]) >= 10, found
    if request_["size"] is None or request_.get("batch", 1) > 1:
        assert any("the same results in a batch as alone" in line for line in lines)

    proto = onnx.load(str(path))
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert not [output.name for output in proto.graph.output if output.name.startswith("raw")]
    kinds = {node.op_type for node in proto.graph.node}
    assert not kinds & {"BatchNormalization", "Dropout"}
    # A graph for any size computes its biases from the offsets (others: test_simplify.py).
    assert "Range" in kinds or request_["size"] is not None
    sidecar = Metadata.from_json(path.with_suffix(".json").read_text(), path)
    assert runtime.load(path).metadata == sidecar
    assert sidecar.size == request_["size"]
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "model.json"}


def export_backbone(variant, tmp_path, size, broken=False):
    """Write the ONNX file of a variant's backbone as if it had been trained; the check's lines."""
    backbone = trained_like(build_backbone(variant))
    if broken:
        with torch.no_grad():
            list(backbone.stages[-1].parameters())[-1].fill_(torch.nan)
    metadata = Metadata(
        "backbone",
        "0",
        variant.name,
        (0.0,) * 3,
        (58.0,) * 3,
        True,
        size=size,
        batch=size and 1,
        strides=STRIDES,
    )
    path = tmp_path / "a.onnx"
    comparison = onnx_export.write(backbone, BackboneGraph, metadata, [], path)
    comparison.raise_failures(path)
    return comparison.lines


@pytest.mark.parametrize("size", [None, (64, 96)])
def test_all_variants(any_variant, tmp_path, size):
    lines = export_backbone(any_variant, tmp_path, size)
    assert sum("differs by" in line for line in lines) == 4


def test_outputs_of_any_size_keep_their_meaning(onnx_file):
    """One image, three sizes of output: each is the resize of the same logits."""
    path = onnx_file("segmentation", size=None, preprocessing=False)
    session = onnxruntime.InferenceSession(str(path))
    image = np.random.default_rng(0).normal(size=(1, 3, 70, 45)).astype(np.float32)
    for size in ((70, 45), (33, 97), (1, 1)):
        (labels,) = session.run(None, {"image": image, "output_size": np.array(size)})
        assert labels.shape == (1, *size) and labels.dtype == np.uint8


@pytest.mark.parametrize("task", ["detection", "rotated"])
def test_nothing_found_is_an_empty_answer(trained, picture, task):
    small = trained(task)
    settings = small.config.model.test_cfg
    (settings.rcnn if task == "detection" else settings).score_thr = 1.1
    lines = []
    result = runtime.load(exported(small, picture, lines=lines, size=None)).predict(picture)
    assert any(line.strip().startswith("nothing was detected") for line in lines)
    assert result.boxes.shape == (0, 4 if task == "detection" else 5)
    if task == "detection":
        assert result.masks().shape == (0, 50, 90)
    else:
        assert result.corners().shape == (0, 4, 2)


def test_faster_rcnn_has_no_masks(trained, picture, tmp_path):
    small = trained("detection")
    config = small.config
    for part in ("mask_roi_extractor", "mask_head"):
        config.model.roi_head.pop(part)
    config.model.type = "FasterRCNN"
    model = models.build_model(copy.deepcopy(config))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "faster.pth")
    path = export.export(
        config,
        str(tmp_path / "faster.pth"),
        tmp_path / "faster.onnx",
        Request("onnx", size=(64, 64)),
        images=[picture],
        report=lambda line: None,
    )
    result = runtime.load(path).predict(picture)
    assert result.instance_masks is None
    with pytest.raises(ValueError, match="without masks"):
        result.masks()


@pytest.mark.parametrize(
    ("target", "fix"),
    [
        ("coreml", "needs coremltools.*: (pip install 'mmeformer.deploy.'|use Python 3.13)"),
        ("tflite", "needs litert_torch, which is not installed: pip install 'mmeformer.litert.'"),
        ("executorch", "needs executorch, .*: pip install 'mmeformer.executorch.'"),
    ],
)
def test_missing_package_of_a_target(tmp_path, monkeypatch, target, fix):
    """It is said before the model is built; a module that is not there has no parent either."""

    def find_spec(name):
        if "." in name:
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(export, "find_spec", find_spec)
    out = tmp_path / f"model{export.SUFFIXES[target]}"
    config = Config(dict(default_scope="mmseg"))
    with pytest.raises(UserError, match=fix):
        export.export(config, "none.pth", out, Request(target, size=(64, 64)))


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_a_wrong_export_is_found_and_not_written(trained, picture, tmp_path, monkeypatch, target):
    if target == "coreml":
        needs_coremltools()
    name = "model" + export.SUFFIXES[target]
    right = graphs.fold

    def wrong(*args):
        folded = right(*args)
        with torch.no_grad():
            folded.backbone.stem.conv1.conv.bias += 0.01
        return folded

    monkeypatch.setattr(graphs, "fold", wrong)
    small = trained("segmentation")
    with pytest.raises(check.CheckFailed, match=f"{name} was not written: .*logits"):
        export.export(
            small.config,
            small.checkpoint,
            tmp_path / name,
            Request(target, size=(64, 64)),
            images=[picture],
            report=lambda line: None,
        )
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_are_found(tmp_path):
    """A broken checkpoint gives the same NaN in PyTorch and in onnxruntime."""
    with pytest.raises(check.CheckFailed, match="level3: differs by inf"):
        export_backbone(VARIANTS["efficientformerv2_s0"], tmp_path, (64, 64), broken=True)


def test_matching_sees_what_differs():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 40.0]], np.float32)
    scores, labels = np.array([0.9, 0.8, 0.7]), np.array([0, 1, 2])

    def found(boxes, scores, labels):
        return runtime.Detections(boxes, scores, labels, (50, 50))

    same = found(boxes, scores, labels)
    assert check.match(same, found(boxes[::-1], scores[::-1], labels[::-1])) == [
        (0, 2),
        (1, 1),
        (2, 0),
    ]
    assert len(check.match(same, found(boxes + 1, scores, labels))) == 0
    assert len(check.match(same, found(boxes, scores - 0.01, labels))) == 0
    assert len(check.match(same, found(boxes, scores, labels[[0, 2, 1]]))) == 1
    twice = found(boxes[[0, 0]], scores[[0, 0]], labels[[0, 0]])
    assert len(check.match(twice, same)) == 1


class TestBadInput:
    @pytest.mark.parametrize(
        "request_, message",
        [
            (dict(target="coreml"), "CoreML models have a fixed size"),
            (dict(target="onnx", half=True, size=(64, 64)), "--fp16 is for CoreML"),
            (
                dict(target="coreml", size=(64, 64), batch=2, preprocessing=True),
                "CoreML takes one image at a time",
            ),
            (dict(target="onnx", size=(64, 8)), "at least 32 px"),
            (dict(target="onnx", size=(64, 64), batch=0), "--batch must be at least 1"),
        ],
    )
    def test_requests(self, request_, message):
        with pytest.raises(ValueError, match=message):
            Request(**request_)

    def run(self, small, out, request=None, **kwargs):
        request = request or Request("onnx", size=(64, 64))
        return export.export(
            small.config, small.checkpoint, out, request, report=lambda line: None, **kwargs
        )

    def test_existing_files_stay(self, trained, tmp_path):
        out = tmp_path / "model.onnx"
        out.write_text("mine")
        with pytest.raises(FileExistsError, match="model.onnx exists.*--force"):
            self.run(trained("segmentation"), out)
        assert out.read_text() == "mine"
        with pytest.raises(FileExistsError, match="other.json"):
            (tmp_path / "other.json").touch()
            self.run(trained("segmentation"), tmp_path / "other.onnx")

    def test_names(self, trained, tmp_path):
        small = trained("segmentation")
        with pytest.raises(ValueError, match="must end in .onnx"):
            self.run(small, tmp_path / "model.pt")
        with pytest.raises(FileNotFoundError, match="gone.jpg"):
            self.run(small, tmp_path / "model.onnx", images=["gone.jpg"])

    def test_checkpoint_of_another_model(self, trained, tmp_path):
        small, other = trained("segmentation"), trained("detection")
        with pytest.raises(CheckpointError, match="tensors are missing .*this config"):
            models.build_model(small.config, other.checkpoint)
        with pytest.raises(FileNotFoundError, match="gone.pth"):
            models.build_model(trained("segmentation").config, "gone.pth")

    def test_operators_that_onnx_has_not(self, trained, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise torch.onnx.OnnxExporterError("No operator x. Please feel free to request it")

        monkeypatch.setattr(torch.onnx, "export", refuse)
        with pytest.raises(ValueError, match=r"ONNX \(No operator x\): a fixed --size may help"):
            self.run(trained("segmentation"), tmp_path / "model.onnx")

    def test_windows_with_gaps(self, trained, tmp_path):
        small = trained("segmentation")
        small.config.model.test_cfg = dict(mode="slide", crop_size=(64, 64), stride=(65, 64))
        with pytest.raises(ValueError, match="stride .* must be at least 1 and at most crop_size"):
            self.run(small, tmp_path / "model.onnx")

    def test_unknown_pipeline_steps(self, trained, tmp_path):
        small = trained("segmentation")
        small.config.test_dataloader.dataset.pipeline.insert(1, dict(type="CLAHE"))
        with pytest.raises(ValueError, match="step CLAHE of the test pipeline"):
            self.run(small, tmp_path / "model.onnx")

    def test_coreml_has_no_mask_rcnn(self, trained, tmp_path):
        needs_coremltools()
        request = Request("coreml", size=(64, 64))
        with pytest.raises(ValueError, match="no operators to select boxes"):
            self.run(trained("detection"), tmp_path / "model.mlpackage", request)

    def test_unsupported_detectors(self):
        from mmeformer.detection.graph import DetectionGraph

        config = small_config("detection")
        config.model.test_cfg.rcnn.nms = dict(type="soft_nms", iou_threshold=0.5)
        with pytest.raises(ValueError, match="rcnn.nms is not a plain nms.*--part backbone"):
            DetectionGraph(models.build_model(config))
        with pytest.raises(ValueError, match="Conv2d is neither a two-stage detector"):
            DetectionGraph(nn.Conv2d(3, 3, 1))


def test_command_line(trained, picture, tmp_path, capsys, quiet_logging):
    small = trained("segmentation")
    config = tmp_path / "config.py"
    small.config.dump(str(config))
    out = tmp_path / "model.onnx"
    arguments = [str(config), small.checkpoint, "--to", "onnx", "--size", "64", "64"]
    arguments += ["--out", str(out), "--images", str(picture)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pixels have another class" in printed and f"wrote {out}" in printed
    assert json.loads((tmp_path / "model.json").read_text())["task"] == "segmentation"
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "exists" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "task, request_",
    [
        ("segmentation", dict(half=True, preprocessing=True)),
        pytest.param("rotated", dict(), marks=pytest.mark.slow),
        pytest.param("detection", dict(part="backbone", half=True), marks=pytest.mark.slow),
    ],
)
def test_coreml(trained, picture, task, request_):
    coremltools = needs_coremltools()
    lines = []
    path = exported(
        trained(task),
        picture,
        "model.mlpackage",
        lines,
        target="coreml",
        size=(64, 64),
        **request_,
    )
    assert any("custom ones: 0" in line for line in lines)
    (types,) = [line for line in lines if "types of the tensors" in line]
    assert ("'fp16'" in types) == request_.get("half", False) != ("'fp32'" in types)
    raw = {"segmentation": "logits", "rotated": "deltas0", "detection": "level3"}[task]
    assert any(f"{raw}: the folded program differs by" in line for line in lines)
    assert any("not checked: its answers" in line for line in lines)
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    (image,) = spec.description.input
    assert image.type.WhichOneof("Type") == (
        "imageType" if request_.get("preprocessing") else "multiArrayType"
    )
    assert json.loads(spec.description.metadata.userDefined["mmeformer"])["size"] == [64, 64]
