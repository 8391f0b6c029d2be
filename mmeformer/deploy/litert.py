# SPDX-License-Identifier: Apache-2.0
"""Write TensorFlow Lite files, and check them by running them in LiteRT."""

from __future__ import annotations

import contextlib
import copy
import io
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
from ai_edge_quantizer.utils.tfl_flatbuffer_utils import TFL_OP_CODE_TO_NAME, read_model
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


def operator_groups(path: Path) -> dict[str, list[str]]:
    """Kinds of operators of a file that can be quantized, each a group of its own."""
    model = read_model(str(path))
    kinds = {
        TFL_OP_CODE_TO_NAME.get(code.builtinCode)
        for code in model.operatorCodes
        if code.builtinCode in TFL_OP_CODE_TO_NAME
    }
    return {kind.value: [kind.value] for kind in _QUANTIZED if kind in kinds}


def dynamic_method(path: Path) -> tuple[dict[str, list[str]], Callable[..., None]]:
    """Groups of operators with weights, and :func:`write_dynamic`; see ``quantize``."""
    kinds = [kind.value for kind in _WEIGHTS]
    groups = {name: group for name, group in operator_groups(path).items() if name in kinds}
    return groups, write_dynamic


def write_dynamic(
    source: Path, out: Path, kinds: Sequence[str], feeds: Iterator[dict[str, Any]]
) -> None:
    """Write a file with the weights of these kinds in 8 bits; no ranges are measured.

    LiteRT finds the range of each activation when it runs, and computes in 8 bits.
    """
    change = quantizer.Quantizer(str(source))
    config = OpQuantizationConfig(
        weight_tensor_config=_WEIGHTS_IN_8_BITS, compute_precision=ComputePrecision.INTEGER
    )
    for kind in kinds:
        change.update_quantization_recipe(".*", TFLOperationName(kind), config)
    with _quiet():
        out.write_bytes(bytes(change.quantize().quantized_model))


def write_int8(
    source: Path, out: Path, kinds: Sequence[str], feeds: Iterator[dict[str, Any]]
) -> None:
    """Write a file whose operators of these kinds are quantized; inputs and outputs stay."""
    change = quantizer.Quantizer(str(source))
    config = OpQuantizationConfig(
        activation_tensor_config=TensorQuantizationConfig(num_bits=8, symmetric=False),
        weight_tensor_config=_WEIGHTS_IN_8_BITS,
        compute_precision=ComputePrecision.INTEGER,
    )
    for kind in kinds:
        change.update_quantization_recipe(".*", TFLOperationName(kind), config)
    with _quiet():
        # An iterator would be used up when it is counted.
        ranges = change.calibrate({SIGNATURE: list(feeds)})
        out.write_bytes(bytes(change.quantize(ranges).quantized_model))
