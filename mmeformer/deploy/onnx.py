# SPDX-License-Identifier: Apache-2.0
"""Write ONNX files, and compare them with the model by running them in onnxruntime."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from mmeformer import runtime
from mmeformer.deploy import check
from mmeformer.deploy.graphs import Graph, build_graph
from mmeformer.deploy.loops import close_loop
from mmeformer.deploy.simplify import simplify
from mmeformer.images import as_image
from mmeformer.runtime.images import Prepared, normalize, prepare
from mmeformer.runtime.metadata import KEY, Metadata

OPSETS = (17, 20)
"""17 has LayerNormalization and half-pixel RoiAlign (16); 20 has Gelu too, else five nodes."""

OLDEST_RUNTIME = "1.15.0"
"""The oldest onnxruntime that files of opset 17 are tested with
(``tests/deploy/test_oldest_runtime.py``)."""

TRACED_SIZE = (64, 96)
"""Height and width of the example image of a graph for any size: small, and its sides differ."""

RANDOM_SIZE = (160, 224)
"""Height and width of the random images that such a graph is compared on, if it has no windows."""


def write(
    model: nn.Module,
    graph_class: Callable[..., Graph],
    metadata: Metadata,
    images: Sequence[Path],
    path: Path,
    opset: int = OPSETS[0],
) -> check.Comparison:
    """Write an ONNX file and compare it with the model.

    Args:
        model: as it was trained.
        graph_class: see :func:`mmeformer.deploy.graphs.graph_class`.
        metadata: kept in the file.
        images: real images to compare on, beside two random ones.
        path: of the file.
        opset: version of ONNX's operators, one of :data:`OPSETS`.

    Raises:
        CheckFailed: the graph has operators that are not ONNX's own.
    """
    graph = build_graph(graph_class, model, metadata, channels_last=True)
    trace(graph, metadata, path, opset)
    proto = onnx.load(str(path))
    close_loop(proto)
    proto = simplify(proto)
    if foreign := {node.domain for node in proto.graph.node} - {"", "ai.onnx"}:
        raise check.CheckFailed(f"the graph has operators of {sorted(foreign)}")
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, metadata.to_json()
    onnx.save(proto, str(path))
    with_raw = runtime.load(path, torch.get_num_threads())
    for output in list(proto.graph.output):
        if output.name in graph.raw_names:
            proto.graph.output.remove(output)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))
    finished = runtime.load(path, torch.get_num_threads())

    height, width = metadata.size or RANDOM_SIZE
    if metadata.size is None and graph.window is not None:
        # Several windows, the last of which are moved back to the border.
        height, width = graph.window[0] + 32, 2 * graph.window[1]
    randoms = [check.random_image(height, width, 0), check.random_image(width, height, 1)]
    comparison = check.Comparison(
        f"compared with PyTorch on {len(randoms)} random and {len(images)} real images"
    )
    _compare(model, graph_class, with_raw, finished, [*randoms, *images], comparison)
    return comparison


def trace(graph: Graph, metadata: Metadata, path: Path, opset: int = OPSETS[0]) -> None:
    """Write a graph to an ONNX file, without metadata."""
    inputs = example_inputs(graph, metadata)
    with torch.no_grad(), warnings.catch_warnings():
        # From comparisons of sizes in the libraries' Python (assertions, special cases for empty
        # input): the check afterwards shows whether one of them mattered.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # PyTorch's newer exporter cannot express graphs whose sizes depend on data (NMS).
        warnings.simplefilter("ignore", DeprecationWarning)
        # About scatter, which is well defined here: its indices are distinct.
        warnings.filterwarnings("ignore", message=".*ONNX.*", category=UserWarning)
        try:
            torch.onnx.export(
                graph,
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=list(inputs),
                output_names=[*graph.output_names, *graph.raw_names],
                dynamic_axes=_dynamic_axes(graph, metadata),
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """PyTorch's first sentence, without its request to report it, and what may help."""
    text = " ".join(str(error).split()).partition(" Please ")[0].partition(" [Caused by")[0]
    return (
        f"PyTorch cannot write this model to ONNX ({text.rstrip('.')}): a fixed --size may help; "
        "--part backbone takes the backbone of every model"
    )


def example_inputs(graph: Graph, metadata: Metadata) -> dict[str, Tensor]:
    """Inputs of the right shapes for an ONNX graph, by name."""
    height, width = metadata.size or TRACED_SIZE
    # Two images if any number is allowed: a batch of one may be broadcast by mistake.
    batch = metadata.batch or 2
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    if metadata.preprocessing_in_graph:
        image = (image * 255).permute(0, 2, 3, 1).contiguous().to(torch.uint8)
    others = _extra_inputs(graph, [(height, width)] * batch, (height, width))
    return {"image": image, **others}


def _extra_inputs(
    graph: Graph, image_sizes: list[tuple[int, int]], output_size: tuple[int, int]
) -> dict[str, Tensor]:
    values = {
        "image_size": torch.tensor(image_sizes, dtype=torch.float32),
        "output_size": torch.tensor(output_size),
    }
    return {name: values[name] for name in graph.extra_inputs}


def _dynamic_axes(graph: Graph, metadata: Metadata) -> dict[str, dict[int, str]]:
    axes = graph.output_axes(any_size=metadata.size is None)
    if metadata.size is None:
        rows, columns = (1, 2) if metadata.preprocessing_in_graph else (2, 3)
        axes["image"] = {0: "batch", rows: "height", columns: "width"}
        if "image_size" in graph.extra_inputs:
            axes["image_size"] = {0: "batch"}
        for name in graph.raw_names:
            axes[name] = {0: "batch", 2: f"{name}_height", 3: f"{name}_width"}
    return axes


def _compare(
    model: nn.Module,
    graph_class: Callable[..., Graph],
    with_raw: runtime.Predictor,
    finished: runtime.Predictor,
    images: Sequence[np.ndarray | Path],
    comparison: check.Comparison,
) -> None:
    """Compare raw tensors and results with those of the model as it was trained."""
    # Both get the image as it is: the network is compared, not the cutting into windows.
    whole = replace(finished.metadata, patch_size=0, cut_above=None)
    finished = runtime.Predictor(finished.session, whole)
    metadata = finished.metadata
    reference = graph_class(copy.deepcopy(model)).eval()
    raw = reference.raw_names or reference.output_names
    largest = dict.fromkeys(raw, 0.0)
    pairs = []
    for image in images:
        image = as_image(image, metadata.reading)
        item = prepare(image, metadata)
        batch = _network_input(item, metadata)
        ours = with_raw.run([item])
        with torch.no_grad():
            outputs = reference(
                batch, *_extra_inputs(reference, [item.size], item.original).values()
            )
            result = reference.predict(model, batch, _metainfo(item, batch))
        names = (*reference.output_names, *reference.raw_names)
        expected = dict(zip(names, outputs, strict=True))
        for name in raw:
            difference = check.relative_difference(ours[name][:1], expected[name].numpy())
            largest[name] = max(largest[name], difference)
        if result is not None:
            pairs.append((result, finished.predict(image)))
    for name, difference in largest.items():
        comparison.add(
            f"{name.removeprefix('raw_')}: differs by {difference:.1e} of its largest value",
            difference <= check.RAW_TOLERANCE,
        )
    if pairs:
        reference.compare(pairs, comparison)
    if metadata.batch != 1 and len(images) > 1:
        # The last image is a real one, if there are any: it shows objects.
        same = _same_in_a_batch(finished, as_image(images[-1], metadata.reading), reference.compare)
        comparison.add(
            "images give the same results in a batch as alone"
            if same
            else "an image gives another result in a batch than alone",
            same,
        )


def _network_input(item: Prepared, metadata: Metadata) -> Tensor:
    """A prepared image as the (1, 3, H, W) of a model in PyTorch, normalized."""
    if not metadata.preprocessing_in_graph:
        return torch.from_numpy(item.data)[None]
    data = np.zeros((3, *item.data.shape[:2]), np.float32)
    height, width = item.size
    data[:, :height, :width] = normalize(item.data[:height, :width], metadata)
    return torch.from_numpy(data)[None]


def _metainfo(item: Prepared, batch: Tensor) -> dict[str, Any]:
    height, width = item.size
    return dict(
        img_shape=item.size,
        ori_shape=item.original,
        pad_shape=tuple(batch.shape[-2:]),
        batch_input_shape=tuple(batch.shape[-2:]),
        scale_factor=(width / item.original[1], height / item.original[0]),
    )


def _same_in_a_batch(
    predictor: runtime.Predictor,
    image: np.ndarray,
    compare: Callable[[Sequence[tuple], check.Comparison], None],
) -> bool:
    """Whether an image and its mirror image give the same results in a batch as alone."""
    together = [image, np.ascontiguousarray(image[:, ::-1])]
    for pair in zip(
        map(predictor.predict, together), predictor.predict_batch(together), strict=True
    ):
        comparison = check.Comparison()
        compare([pair], comparison)
        if comparison.failures:
            return False
    return True
