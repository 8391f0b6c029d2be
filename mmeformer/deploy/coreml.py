# SPDX-License-Identifier: Apache-2.0
"""Write CoreML packages, and check them as far as that is possible without Apple's systems."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import torch
from coremltools.converters.mil import Builder, register_torch_op
from coremltools.converters.mil.mil.types import builtin_to_string
from torch import nn

from mmeformer.deploy.check import Comparison
from mmeformer.deploy.graphs import Graph, build_graph, compare_graphs, examples
from mmeformer.runtime.metadata import KEY, Metadata

TARGET = coremltools.target.iOS16


@register_torch_op(torch_alias=["int"], override=True)
def _int(context: Any, node: Any) -> None:
    """Convert PyTorch's ``int`` of a tensor with one element.

    coremltools 9.0 calls Python's ``int`` on an array of shape (1,), an error since numpy 2.4.
    """
    x = context[node.inputs[0]]
    if x.val is not None:
        result = Builder.const(val=int(np.asarray(x.val).item()), name=node.name)
    else:
        scalar = Builder.squeeze(x=x, name=f"{node.name}_item") if len(x.shape) else x
        result = Builder.cast(x=scalar, dtype="int32", name=node.name)
    context.add(result, node.name)


def write(
    model: nn.Module,
    graph_class: Callable[..., Graph],
    metadata: Metadata,
    images: Sequence[Path],
    path: Path,
    half: bool,
) -> Comparison:
    """Write a CoreML package and check it.

    CoreML runs on Apple's systems only. Elsewhere the folded program is compared with the model
    before coremltools converts it, on random and real images; in the package, inputs, outputs,
    operators and weights are checked.

    Args:
        model: as it was trained.
        graph_class: see :func:`mmeformer.deploy.graphs.graph_class`.
        metadata: kept in the package; of a fixed size and batch.
        images: real images to compare on, beside random ones.
        path: of the package, a folder.
        half: compute and store weights in float16.
    """
    graph = build_graph(graph_class, model, metadata, channels_last=False)
    reference = graph_class(copy.deepcopy(model), graph.normalize).eval()
    inputs = [_planes(example) for example in examples(metadata, images)]
    comparison = Comparison("CoreML runs on Apple's systems alone; what was checked here")
    compare_graphs(graph, reference, inputs, comparison, "the folded program")
    graph.raw_names = ()
    package = convert(graph, inputs[0], metadata, half)
    package.save(str(path))
    check_package(path, package, graph, inputs[0], half, comparison)
    version = coremltools.__version__
    comparison.add(f"not checked: its answers (coremltools {version} predicts on macOS only)", True)
    return comparison


def _planes(example: torch.Tensor) -> torch.Tensor:
    """An input as the (B, 3, H, W) of a graph whose channels come first."""
    return example.permute(0, 3, 1, 2).float() if example.dtype == torch.uint8 else example


def convert(
    graph: Graph, example: torch.Tensor, metadata: Metadata, half: bool
) -> coremltools.models.MLModel:
    """Convert a graph to a CoreML model.

    Args:
        graph: in eval mode.
        example: its ``image`` input.
        metadata: kept in the model. With preprocessing in the graph the input is an image of three
            channels in the order blue, green, red; else an array of float32.
        half: compute and store weights in float16.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # As for the ONNX export: the comparison shows whether a warning mattered.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(graph, example, check_trace=False)
    if metadata.preprocessing_in_graph:
        kind = coremltools.ImageType(
            name="image", shape=example.shape, color_layout=coremltools.colorlayout.BGR
        )
    else:
        kind = coremltools.TensorType(name="image", shape=example.shape)
    precision = coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32
    package = coremltools.convert(
        traced,
        convert_to="mlprogram",
        inputs=[kind],
        outputs=[coremltools.TensorType(name=name) for name in graph.output_names],
        minimum_deployment_target=TARGET,
        compute_precision=precision,
        skip_model_load=True,
    )
    package.user_defined_metadata[KEY] = metadata.to_json()
    return package


@torch.no_grad()
def check_package(
    path: Path,
    package: coremltools.models.MLModel,
    graph: Graph,
    example: torch.Tensor,
    half: bool,
    comparison: Comparison,
) -> None:
    """Check a saved package without running it.

    Args:
        path: of the package.
        package: as converted.
        graph: that was converted.
        example: an ``image`` input.
        half: whether it must be in float16.
        comparison: receives the results.
    """
    expected = dict(zip(graph.output_names, graph(example), strict=True))
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    inputs = [item.name for item in spec.description.input]
    comparison.add(f"the file loads; inputs {inputs}", inputs == ["image"])
    for output in spec.description.output:
        shape = tuple(output.type.multiArrayType.shape)
        wanted = tuple(expected[output.name].shape) if output.name in expected else None
        comparison.add(f"output {output.name} {shape}, in PyTorch {wanted}", shape == wanted)
    found = {output.name for output in spec.description.output}
    comparison.add(f"{len(found)} of {len(expected)} outputs", found == set(expected))

    program = package._mil_program
    operations = [
        operation
        for function in program.functions.values()
        for operation in function.operations
        if operation.op_type != "const"
    ]
    operators = Counter(operation.op_type for operation in operations)
    custom = [name for name in operators if "custom" in name]
    count, kinds = sum(operators.values()), len(operators)
    comparison.add(f"{count} operators of {kinds} kinds; custom ones: {len(custom)}", not custom)
    types = Counter(
        builtin_to_string(value.dtype)
        for operation in operations
        if operation.op_type != "cast"
        for value in operation.outputs
    )
    floats = {name: number for name, number in types.items() if name.startswith("fp")}
    precision = {"fp16" if half else "fp32"}
    comparison.add(f"types of the tensors between them: {floats}", set(floats) == precision)
    # Buffers such as attention biases are in the file too, so there may be more, but never fewer.
    weights = sum(item.stat().st_size for item in path.rglob("weight.bin"))
    parameters = sum(value.numel() for value in graph.parameters()) * (2 if half else 4)
    comparison.add(
        f"{weights / 1e6:.1f} MB of weights in the file, {parameters / 1e6:.1f} MB of parameters",
        weights >= 0.95 * parameters,
    )
