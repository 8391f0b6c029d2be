# SPDX-License-Identifier: Apache-2.0
"""Conversion to CoreML, and what can be checked of it away from Apple's systems."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import coremltools
import torch
from coremltools.converters.mil.mil.types import builtin_to_string

from mmeformer.deploy.check import (
    LABELS_DIFFER,
    RAW_TOLERANCE,
    Findings,
    relative_difference,
)
from mmeformer.deploy.graphs import Graph
from mmeformer.runtime.metadata import KEY, Metadata

TARGET = coremltools.target.iOS16


def convert(
    graph: Graph, example: torch.Tensor, metadata: Metadata, half: bool
) -> coremltools.models.MLModel:
    """A CoreML model of a graph.

    Args:
        graph: in eval mode.
        example: its ``image`` input.
        metadata: kept in the model. With preprocessing in the graph the input is an image of three
            channels in the order blue, green, red; else an array of float32.
        half: compute and store weights in float16.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # See the ONNX export: the comparison below shows whether one of them mattered.
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
def compare_folded(
    graph: Graph, reference: Graph, examples: Sequence[torch.Tensor], findings: Findings
) -> None:
    """Compare what is to be converted with the model.

    Args:
        graph: the folded graph.
        reference: the same graph of the model as it was trained.
        examples: ``image`` inputs.
        findings: receives the largest difference of each output and raw tensor.
    """
    names = reference.output_names + reference.raw_names
    largest = dict.fromkeys(names, 0.0)
    for example in examples:
        for name, ours, value in zip(names, graph(example), reference(example), strict=True):
            if value.is_floating_point():
                difference = relative_difference(ours.numpy(), value.numpy())
            else:
                difference = float((ours != value).float().mean())
            largest[name] = max(largest[name], difference)
    for name, value in zip(names, reference(examples[0]), strict=True):
        title = name.removeprefix("raw_")
        if value.is_floating_point():
            line = (
                f"{title}: the folded program differs by {largest[name]:.1e} of its largest value"
            )
            findings.add(line, largest[name] <= RAW_TOLERANCE)
        else:
            line = f"{title}: {largest[name]:.1e} of its numbers differ"
            findings.add(line, largest[name] <= LABELS_DIFFER)


@torch.no_grad()
def check_package(
    path: Path,
    package: coremltools.models.MLModel,
    graph: Graph,
    example: torch.Tensor,
    half: bool,
    findings: Findings,
) -> None:
    """Check a saved package as far as it goes without running it.

    Args:
        path: of the package.
        package: as converted.
        graph: what was converted.
        example: an ``image`` input.
        half: whether float16 was asked for.
        findings: receives what was found.
    """
    expected = dict(zip(graph.output_names, graph(example), strict=True))
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    inputs = [item.name for item in spec.description.input]
    findings.add(f"the file loads; inputs {inputs}", inputs == ["image"])
    for output in spec.description.output:
        shape = tuple(output.type.multiArrayType.shape)
        wanted = tuple(expected[output.name].shape) if output.name in expected else None
        findings.add(f"output {output.name} {shape}, in PyTorch {wanted}", shape == wanted)
    found = {output.name for output in spec.description.output}
    findings.add(f"{len(found)} of {len(expected)} outputs", found == set(expected))

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
    findings.add(f"{count} operators of {kinds} kinds; custom ones: {len(custom)}", not custom)
    types = Counter(
        builtin_to_string(value.dtype)
        for operation in operations
        if operation.op_type != "cast"
        for value in operation.outputs
    )
    floats = {name: number for name, number in types.items() if name.startswith("fp")}
    wanted = "fp16" if half else "fp32"
    findings.add(f"types of the tensors between them: {floats}", set(floats) == {wanted})
    # Attention biases and the like are no parameters, so there may be more, but never fewer.
    weights = sum(item.stat().st_size for item in path.rglob("weight.bin"))
    parameters = sum(value.numel() for value in graph.parameters()) * (2 if half else 4)
    findings.add(
        f"{weights / 1e6:.1f} MB of weights in the file, {parameters / 1e6:.1f} MB of parameters",
        weights >= 0.95 * parameters,
    )
