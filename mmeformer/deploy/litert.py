# SPDX-License-Identifier: Apache-2.0
"""Write TensorFlow Lite files, and check them by running them in LiteRT."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import litert_torch
from ai_edge_quantizer import quantizer
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.qtyping import (
    ComputePrecision,
    OpQuantizationConfig,
    QuantGranularity,
    TensorDataType,
    TensorQuantizationConfig,
    TFLOperationName,
)
from ai_edge_quantizer.utils.tfl_flatbuffer_utils import (
    TFL_OP_CODE_TO_NAME,
    get_op_scope,
    read_model,
)
from torch import Tensor, nn

from mmeformer.deploy.check import LABELS_DIFFER, RAW_TOLERANCE, Comparison
from mmeformer.deploy.graphs import Graph, build_graph, compare_session, examples
from mmeformer.runtime.litert import SIGNATURE, LiteRtSession
from mmeformer.runtime.metadata import Metadata

HALF_TOLERANCE = 1e-2
"""Largest difference of an output with weights in float16, as a share of its largest value, and
largest share of labels that differ."""


class _Named(nn.Module):
    """A graph whose inputs and outputs keep their names in the file."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        # The name `graph` is torch.fx's own.
        self.source = graph

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.source.output_names, self.source(image), strict=True))


def write(
    model: nn.Module,
    graph_class: Callable[..., Graph],
    metadata: Metadata,
    images: Sequence[Path],
    path: Path,
    half: bool,
) -> Comparison:
    """Write a file and compare it with the model, number by number.

    Args:
        model: as it was trained.
        graph_class: see :func:`mmeformer.deploy.graphs.graph_class`.
        metadata: of a fixed size and batch; kept beside the file.
        images: real images to compare on, beside random ones.
        path: of the file.
        half: store weights in float16; LiteRT computes in float32 on a processor.
    """
    graph = build_graph(graph_class, model, metadata, channels_last=True)
    graph.raw_names = ()
    reference = graph_class(copy.deepcopy(model), graph.normalize).eval()
    reference.raw_names = ()
    inputs = examples(metadata, [])
    with _quiet():
        litert_torch.convert(_Named(graph).eval(), sample_kwargs={"image": inputs[0]}).export(
            str(path)
        )
        if half:
            halve_weights(path)
    tolerance = (HALF_TOLERANCE, HALF_TOLERANCE) if half else (RAW_TOLERANCE, LABELS_DIFFER)
    return compare_session(LiteRtSession(path), reference, metadata, images, "LiteRT", *tolerance)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without the reports of progress of LiteRT's tools."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


_WEIGHTS = (
    TFLOperationName.CONV_2D,
    TFLOperationName.DEPTHWISE_CONV_2D,
    TFLOperationName.CONV_2D_TRANSPOSE,
    TFLOperationName.FULLY_CONNECTED,
)
"""Operators with weights."""

_WEIGHTS_IN_8_BITS = TensorQuantizationConfig(
    num_bits=8, symmetric=True, granularity=QuantGranularity.CHANNELWISE
)

_QUANTIZED = (
    *_WEIGHTS,
    TFLOperationName.BATCH_MATMUL,
    TFLOperationName.SOFTMAX,
    TFLOperationName.GELU,
    TFLOperationName.ADD,
    TFLOperationName.AVERAGE_POOL_2D,
)


_FIRST = "first layer"


def halve_weights(path: Path) -> None:
    """Store the weights of a float32 file in float16, in place."""
    change = quantizer.Quantizer(str(path))
    config = OpQuantizationConfig(
        weight_tensor_config=TensorQuantizationConfig(num_bits=16, dtype=TensorDataType.FLOAT),
        compute_precision=ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    for operation in _WEIGHTS:
        change.update_quantization_recipe(
            ".*", operation, config, algorithm_key=AlgorithmName.FLOAT_CASTING
        )
    path.write_bytes(bytes(change.quantize().quantized_model))


def operator_groups(path: Path, weights_only: bool = False) -> dict[str, list[str]]:
    """Operators of a file that can be quantized, as ``KIND SCOPE``, by group.

    The first convolution and the talking heads are groups of their own. Other layers with weights
    are in groups by their place in the model, depthwise ones apart; operators without weights are
    in groups by kind. A scope is what the quantizer's patterns match: the names of an operator's
    outputs.
    """
    model = read_model(str(path))
    kinds = _WEIGHTS if weights_only else _QUANTIZED
    groups: dict[str, list[str]] = {}
    for subgraph in model.subgraphs:
        for item in subgraph.operators:
            kind = TFL_OP_CODE_TO_NAME.get(model.operatorCodes[item.opcodeIndex].builtinCode)
            if kind not in kinds:
                continue
            scope = get_op_scope(item, subgraph.tensors)
            if kind not in _WEIGHTS:
                group = kind.value
            elif _FIRST not in groups:
                group = _FIRST
            else:
                group = _place(scope)
                if kind == TFLOperationName.DEPTHWISE_CONV_2D:
                    group += ", depthwise"
            groups.setdefault(group, []).append(f"{kind.value} {scope}")
    return groups


def _place(scope: str) -> str:
    """Part of the model that a layer belongs to, by the path of its module."""
    if "TalkingHead" in scope:
        return "talking heads"
    stage = re.search(r"\.(?:Stem_stem|Stage_(\d+))[/;]", scope)
    if stage:
        return "stem" if stage[1] is None else f"stage {int(stage[1]) + 1}"
    part = re.search(r"Graph_source/(?:[\w.]+_model/)?[\w.]+\.[A-Za-z0-9]+_(\w+)[/;]", scope)
    return part[1] if part else "other layers"


def _choose(
    change: quantizer.Quantizer, operators: Sequence[str], config: OpQuantizationConfig
) -> None:
    """Let a quantizer change these operators, named as by :func:`operator_groups`."""
    for operator in operators:
        kind, scope = operator.split(" ", 1)
        change.update_quantization_recipe(f"^{re.escape(scope)}$", TFLOperationName(kind), config)


def write_dynamic(
    source: Path, out: Path, operators: Sequence[str], feeds: Iterator[dict[str, Any]]
) -> None:
    """Write a file with the weights of these operators in 8 bits; no ranges are measured.

    LiteRT finds the range of each activation when it runs, and computes in 8 bits.
    """
    change = quantizer.Quantizer(str(source))
    config = OpQuantizationConfig(
        weight_tensor_config=_WEIGHTS_IN_8_BITS, compute_precision=ComputePrecision.INTEGER
    )
    _choose(change, operators, config)
    with _quiet():
        out.write_bytes(bytes(change.quantize().quantized_model))


def write_int8(
    source: Path, out: Path, operators: Sequence[str], feeds: Iterator[dict[str, Any]]
) -> None:
    """Write a file in which these operators are quantized; inputs and outputs stay."""
    change = quantizer.Quantizer(str(source))
    config = OpQuantizationConfig(
        activation_tensor_config=TensorQuantizationConfig(num_bits=8, symmetric=False),
        weight_tensor_config=_WEIGHTS_IN_8_BITS,
        compute_precision=ComputePrecision.INTEGER,
    )
    _choose(change, operators, config)
    with _quiet():
        # An iterator would be used up when it is counted.
        ranges = change.calibrate({SIGNATURE: list(feeds)})
        out.write_bytes(bytes(change.quantize(ranges).quantized_model))
