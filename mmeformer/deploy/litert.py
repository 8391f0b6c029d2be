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
import numpy as np
import torch
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

from mmeformer.deploy.check import LABELS_DIFFER, RAW_TOLERANCE, Comparison, random_image
from mmeformer.deploy.graphs import Graph, build_graph, compare_graphs
from mmeformer.images import as_image
from mmeformer.runtime.images import prepare
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
    assert metadata.size is not None and metadata.batch is not None
    randoms = [random_image(*metadata.size, seed) for seed in range(metadata.batch)]
    batches = [randoms, *([image] * metadata.batch for image in images)]
    examples = [
        torch.from_numpy(
            np.stack([prepare(as_image(i, metadata.reading), metadata).data for i in batch])
        )
        for batch in batches
    ]
    with _quiet():
        litert_torch.convert(_Named(graph).eval(), sample_kwargs={"image": examples[0]}).export(
            str(path)
        )
        if half:
            halve_weights(path)
    session = LiteRtSession(path)
    order = [[value.name for value in session.get_outputs()].index(n) for n in graph.output_names]

    def run(image: Tensor) -> list[Tensor]:
        found = session.run(None, {"image": image.numpy()})
        return [torch.from_numpy(found[index]) for index in order]

    comparison = Comparison(
        f"compared with PyTorch on {metadata.batch} random and {len(images)} real images in LiteRT"
    )
    tolerance, labels_differ = (
        (HALF_TOLERANCE, HALF_TOLERANCE) if half else (RAW_TOLERANCE, LABELS_DIFFER)
    )
    compare_graphs(run, reference, examples, comparison, "the file", tolerance, labels_differ)
    return comparison


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


def write_int8(
    source: Path, out: Path, kinds: Sequence[str], feeds: Iterator[dict[str, Any]]
) -> None:
    """Write a file whose operators of these kinds are quantized; inputs and outputs stay."""
    change = quantizer.Quantizer(str(source))
    activation = TensorQuantizationConfig(num_bits=8, symmetric=False)
    weight = TensorQuantizationConfig(
        num_bits=8, symmetric=True, granularity=QuantGranularity.CHANNELWISE
    )
    for kind in kinds:
        operation = TFLOperationName(kind)
        config = OpQuantizationConfig(
            activation_tensor_config=activation,
            weight_tensor_config=weight if operation in _WEIGHTS else None,
            compute_precision=ComputePrecision.INTEGER,
        )
        change.update_quantization_recipe(".*", operation, config)
    with _quiet():
        ranges = change.calibrate({SIGNATURE: feeds})
        out.write_bytes(bytes(change.quantize(ranges).quantized_model))
