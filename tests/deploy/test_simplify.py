# SPDX-License-Identifier: Apache-2.0
"""ONNX files contain nothing that is known beforehand, and only what others can read."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny import ARCH
from trained_like import trained_like

from mmeformer.backbones import EfficientFormerV2
from mmeformer.backbones.efficientformer_v2 import MapAttention
from mmeformer.deploy import onnx as onnx_export
from mmeformer.deploy.export import Request
from mmeformer.deploy.graphs import BackboneGraph, build_graph
from mmeformer.deploy.simplify import simplify
from mmeformer.runtime.metadata import KEY, Metadata
from mmeformer.variants import STRIDES

FIXED = [
    ("segmentation", dict(size=(64, 96), batch=2, preprocessing=True)),
    ("segmentation", dict(size=(32, 64), part="backbone", batch=3, preprocessing=True)),
    ("detection", dict(size=(64, 96), batch=2, preprocessing=False)),
    ("rotated", dict(size=(64, 64), preprocessing=True)),
]
ANY_SIZE = [
    ("segmentation", dict(size=None, preprocessing=False)),
    ("detection", dict(size=None, preprocessing=True)),
    ("rotated", dict(size=None, preprocessing=False)),
    ("detection", dict(size=None, part="backbone")),
]

READ_BY_ALL = set(
    """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Elu
    Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool Greater GreaterOrEqual HardSigmoid HardSwish Identity
    InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul
    Max MaxPool Mean Min Mod Mul Neg NonMaxSuppression NonZero Not Or Pad Pow PRelu
    QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize RoiAlign Round ScatterElements ScatterND
    Shape Sigmoid Sign Sin Size Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum
    Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)
"""Operators that the parsers of TensorRT 10.15 and OpenVINO 2025 both have.

Sources: onnx/onnx-tensorrt, ``docs/operators.md``; openvinotoolkit/openvino,
``src/frontends/onnx/docs/supported_ops.md``.
"""


def optimized_by_onnxruntime(path, folder) -> onnx.ModelProto:
    """The graph after onnxruntime's basic level: folded constants, no redundant nodes."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return onnx.load(str(folder / "optimized.onnx"))


@pytest.mark.parametrize("task, request_", FIXED + ANY_SIZE)
def test_graphs_have_only_operators_that_others_read(onnx_file, task, request_):
    proto = onnx.load(str(onnx_file(task, **request_)))
    assert {node.op_type for node in proto.graph.node} <= READ_BY_ALL
    assert [item.domain for item in proto.opset_import] == [""]
    assert [item.key for item in proto.metadata_props] == [KEY]
    limits = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    for node in proto.graph.node:
        # TensorRT has no more than 3840 candidates.
        if node.op_type == "TopK" and node.input[1] in limits:
            assert limits[node.input[1]].item() < 3840


@pytest.mark.parametrize("task, request_", FIXED)
def test_a_fixed_size_leaves_nothing_to_fold(onnx_file, tmp_path, task, request_):
    path = onnx_file(task, **request_)
    ours = onnx.load(str(path)).graph.node
    theirs = optimized_by_onnxruntime(path, tmp_path).graph.node
    # Reshapes of neighbors may be one.
    assert len(ours) <= 1.1 * len(theirs)
    if task == "segmentation":
        kinds = {node.op_type for node in ours}
        unwanted = {"Shape", "Range", "Constant", "Identity", "ConstantOfShape"}
        # Queries subsampled by two are part of their convolution.
        assert not kinds & (unwanted if "part" not in request_ else {*unwanted, "Slice"})


def backbone(size):
    model = EfficientFormerV2(arch=ARCH)
    metadata = Metadata(
        "backbone", "0", "tiny", (0.0,) * 3, (58.0,) * 3, True, size=size, batch=1, strides=STRIDES
    )
    return trained_like(model), metadata


def test_the_results_are_the_same_to_the_last_bit(tmp_path):
    model, metadata = backbone((96, 64))
    graph = build_graph(BackboneGraph, model, metadata, channels_last=True)
    onnx_export.trace(graph, metadata, tmp_path / "traced.onnx")
    traced = onnx.load(str(tmp_path / "traced.onnx"))
    short = simplify(copy.deepcopy(traced))
    assert len(short.graph.node) < 0.6 * len(traced.graph.node)
    image = np.random.default_rng(0).normal(size=(1, 3, 96, 64)).astype(np.float32)
    results = [
        onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"image": image})
        for proto in (traced, short)
    ]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_opset_20_has_gelu_as_one_node(tmp_path):
    model, metadata = backbone((64, 96))
    # The bias of the second talking head becomes part of its convolution, scaled for this size.
    for module in model.modules():
        if isinstance(module, MapAttention):
            module.head_bias_keys = 5
    image = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    kinds, results = [], []
    for opset in onnx_export.OPSETS:
        path = tmp_path / f"{opset}.onnx"
        onnx_export.write(model, BackboneGraph, metadata, [], path, opset).raise_failures(path)
        proto = onnx.load(str(path))
        assert [item.version for item in proto.opset_import] == [opset]
        kinds.append(Counter(node.op_type for node in proto.graph.node))
        assert not set(kinds[-1]) & {"ReduceSum", "Slice", "Split"}
        results.append(onnxruntime.InferenceSession(str(path)).run(None, {"image": image}))
    assert kinds[0]["Erf"] == kinds[1]["Gelu"] > 10 and not kinds[1]["Erf"]
    # Nothing scales: scales are part of layers.
    assert kinds[1]["Mul"] == 0
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(ours).max())


def test_the_opset_is_of_onnx():
    with pytest.raises(ValueError, match="--opset is for ONNX, not for TensorFlow Lite"):
        Request("tflite", size=(64, 64), opset=20)


@pytest.mark.parametrize("resize", ["displacement", "matrix"])
def test_biases_take_no_space(tmp_path, resize):
    model, metadata = backbone((448, 384))
    for module in model.modules():
        if hasattr(module, "table"):
            module.resize = resize
    path = tmp_path / "model.onnx"
    onnx_export.write(model, BackboneGraph, metadata, [], path).raise_failures(path)
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    # Of the smallest bias: 8 heads, 14 x 12 positions.
    bias = 4 * 8 * (14 * 12) ** 2
    extra = path.stat().st_size - parameters
    assert extra < 0.3 * bias if resize == "displacement" else extra > 2 * bias
