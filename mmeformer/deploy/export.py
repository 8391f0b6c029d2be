# SPDX-License-Identifier: Apache-2.0
"""Export models to ONNX and CoreML; nothing is written that was not checked."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from mmeformer.deploy import check, models
from mmeformer.deploy.biases import GraphBias, replace_biases
from mmeformer.deploy.fold import fold
from mmeformer.deploy.graphs import BackboneGraph, Graph, Normalise
from mmeformer.deploy.substitutes import substitute_for_graph
from mmeformer.runtime.images import Prepared, as_image, prepare
from mmeformer.runtime.metadata import KEY, Metadata

OPSET = 17
"""Has LayerNormalization (17) and half-pixel RoiAlign (16); needs onnxruntime 1.13 or newer."""

SUFFIXES = {"onnx": ".onnx", "coreml": ".mlpackage"}
TRACED_SIZE = (64, 96)
"""Of the example image when any size will do: small, and no side taken for the other."""

REAL_IMAGES = 4


@dataclass(frozen=True)
class Request:
    """What to export.

    Args:
        target: ``"onnx"`` or ``"coreml"``.
        part: ``"model"``, or ``"backbone"`` for the bare backbone.
        size: (H, W) in pixels of all inputs; None for any size (ONNX only).
        batch: images per run. Without ``size``, any number.
        preprocessing: the graph takes images as they are read, and normalises them.
        half: CoreML in float16.

    Raises:
        ValueError: a combination that does not exist.
    """

    target: str
    part: str = "model"
    size: tuple[int, int] | None = None
    batch: int = 1
    preprocessing: bool = False
    half: bool = False

    def __post_init__(self) -> None:
        if self.target not in SUFFIXES or self.part not in ("model", "backbone"):
            raise ValueError(f"cannot export the {self.part} to {self.target}")
        if self.size is not None and min(self.size) < 32:
            raise ValueError(f"--size {self.size}: both sides must be at least 32 px")
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, but is {self.batch}")
        if self.target == "coreml" and self.size is None:
            raise ValueError("CoreML models have a fixed size: give --size instead of --dynamic")
        if self.target == "coreml" and self.preprocessing and self.batch > 1:
            raise ValueError("CoreML takes one image at a time: --batch is for arrays of numbers")
        if self.target == "onnx" and self.half:
            raise ValueError("--fp16 is for CoreML; ONNX files are float32")


def export(
    config: Config,
    checkpoint: str,
    out: str | Path,
    request: Request,
    *,
    images: Sequence[str | Path] = (),
    force: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Export a trained model, check it, and write it with its metadata.

    Beside ``model.onnx`` comes ``model.json``: the metadata, which is inside the file as well.

    Args:
        config: of the model.
        checkpoint: of the model.
        out: file to write (a folder, for CoreML).
        request: what to export.
        images: real images for the check, beside random ones; none takes the first of the config's
            test data, if they are there.
        force: replace what exists.
        report: receives each line of the check.

    Returns:
        ``out``.

    Raises:
        ValueError: the model, or what is asked, cannot be exported.
        FileNotFoundError: a file does not exist.
        FileExistsError: ``out`` or its JSON file exists.
        CheckFailed: the exported model answers differently; nothing is written.
    """
    out = Path(out)
    if out.suffix != SUFFIXES[request.target]:
        raise ValueError(f"--out {out}: the name must end in {SUFFIXES[request.target]}")
    sidecar = out.with_suffix(".json")
    for path in (out, sidecar):
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; use another name, or --force to replace it")
    for image in images:
        if not Path(image).is_file():
            raise FileNotFoundError(f"image {image} does not exist")

    model = models.build_model(config, checkpoint)
    metadata = models.describe(
        config,
        model,
        part=request.part,
        size=request.size,
        batch=None if request.size is None else request.batch,
        preprocessing_in_graph=request.preprocessing,
    )
    if not images:
        images = list(models.sample_images(config, REAL_IMAGES))
        if not images:
            report("no images of the test data here: checking on random ones alone")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename on one disk.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        draft = Path(folder, out.name)
        write = write_onnx if request.target == "onnx" else write_coreml
        metadata = write(model, metadata, draft, request, list(images), report)
        if out.is_dir():
            shutil.rmtree(out)
        draft.replace(out)
        draft.with_suffix(".json").write_text(metadata.to_json() + "\n")
        draft.with_suffix(".json").replace(sidecar)
    return out


def graph_maker(metadata: Metadata, request: Request) -> Callable[..., Graph]:
    """The graph class of a task: call it with a model and, if wanted, ``normalise``."""
    if metadata.task == "backbone":
        return lambda model, **kwargs: BackboneGraph(models.find_backbone(model), **kwargs)
    if metadata.task == "segmentation":
        from mmeformer.segmentation.graph import SegmentationGraph

        return partial(SegmentationGraph, any_output_size=request.target == "onnx")
    if metadata.task == "rotated":
        from mmeformer.rotated.graph import RotatedGraph, RotatedRawGraph

        return RotatedGraph if request.target == "onnx" else RotatedRawGraph
    if request.target == "coreml":
        raise ValueError(
            "CoreML has no operators to choose boxes and masks: export Mask R-CNN to ONNX, or its "
            "--part backbone to CoreML"
        )
    from mmeformer.detection.graph import DetectionGraph

    return DetectionGraph


def build_graph(
    model: nn.Module, metadata: Metadata, make_graph: Callable[..., Graph], channels_last: bool
) -> Graph:
    """The graph of a folded copy of ``model``; ``channels_last``: see :class:`Normalise`."""
    folded = fold(model, metadata.size)
    substitute_for_graph(folded)
    if metadata.size is None:
        replace_biases(folded, lambda _, bias: GraphBias(bias))
    normalise = None
    if metadata.preprocessing_in_graph:
        normalise = Normalise(metadata.mean, metadata.std, metadata.bgr_to_rgb, channels_last)
    return make_graph(folded, normalise=normalise).eval()


def example_inputs(graph: Graph, metadata: Metadata) -> dict[str, torch.Tensor]:
    """Inputs of the right shapes for an ONNX graph, by name."""
    height, width = metadata.size or TRACED_SIZE
    # Two images where any number will do: a batch of one may be broadcast by mistake.
    batch = metadata.batch or 2
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    if metadata.preprocessing_in_graph:
        image = (image * 255).permute(0, 2, 3, 1).contiguous().to(torch.uint8)
    values = {
        "image": image,
        "image_size": torch.tensor([[height, width]] * batch, dtype=torch.float32),
        "output_size": torch.tensor([height, width]),
    }
    return {name: values[name] for name in ("image", *graph.extra_inputs)}


def write_onnx(
    model: nn.Module,
    metadata: Metadata,
    path: Path,
    request: Request,
    images: list[str | Path],
    report: Callable[[str], None],
) -> Metadata:
    """Write a checked ONNX file to ``path``; returns the metadata that it holds.

    Raises:
        CheckFailed: it answers differently; ``path`` must then not be used.
    """
    import onnx

    from mmeformer import runtime

    make_graph = graph_maker(metadata, request)
    graph = build_graph(model, metadata, make_graph, channels_last=True)
    trace_to_onnx(graph, metadata, path)
    proto = onnx.load(str(path))
    foreign = {node.domain for node in proto.graph.node} - {"", "ai.onnx"}
    if foreign:
        raise check.CheckFailed(f"the graph has operators of {sorted(foreign)}")
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, metadata.to_json()
    with_raw = path.with_name("with_raw.onnx")
    onnx.save(proto, str(with_raw))
    for output in list(proto.graph.output):
        if output.name in graph.raw_names:
            proto.graph.output.remove(output)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))

    height, width = metadata.size or (160, 224)
    randoms = [check.random_image(height, width, 0), check.random_image(width, height, 1)]
    findings = check.check(
        model,
        make_graph,
        runtime.load(with_raw, torch.get_num_threads()),
        runtime.load(path, torch.get_num_threads()),
        [*randoms, *map(Path, images)],
    )
    report(f"compared with PyTorch on {len(randoms)} random and {len(images)} real images:")
    for line in findings.lines:
        report("  " + line)
    findings.raise_failures(path.name)
    return metadata


def trace_to_onnx(graph: Graph, metadata: Metadata, path: Path) -> None:
    """Write a graph to an ONNX file, unchecked and without metadata."""
    inputs = example_inputs(graph, metadata)
    names = graph.output_names + graph.raw_names
    with torch.no_grad(), warnings.catch_warnings():
        # Comparisons of sizes in the libraries' Python (assertions, special cases of empty input):
        # the check afterwards shows whether one of them mattered.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # PyTorch's newer exporter cannot express graphs whose sizes depend on data (suppression).
        warnings.simplefilter("ignore", DeprecationWarning)
        # Scatter to distinct places, which is well defined.
        warnings.filterwarnings("ignore", message=".*ONNX.*", category=UserWarning)
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(names),
            dynamic_axes=_dynamic_axes(graph, metadata, inputs),
        )


def _dynamic_axes(graph: Graph, metadata: Metadata, inputs: dict) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {}
    if metadata.size is None:
        rows, columns = (1, 2) if metadata.preprocessing_in_graph else (2, 3)
        axes["image"] = {0: "batch", rows: "height", columns: "width"}
        if "image_size" in inputs:
            axes["image_size"] = {0: "batch"}
    if metadata.task == "segmentation":
        axes["labels"] = {1: "output_height", 2: "output_width"}
        if metadata.size is None:
            axes["labels"][0] = "batch"
    elif metadata.task == "backbone":
        if metadata.size is None:
            for name, stride in zip(graph.output_names, metadata.strides, strict=True):
                axes[name] = {0: "batch", 2: f"height_{stride}", 3: f"width_{stride}"}
    else:
        axes.update({name: {0: "objects"} for name in graph.output_names})
    if metadata.size is None:
        for name in graph.raw_names:
            axes[name] = {0: "batch", 2: f"{name}_height", 3: f"{name}_width"}
    return axes


def write_coreml(
    model: nn.Module,
    metadata: Metadata,
    path: Path,
    request: Request,
    images: list[str | Path],
    report: Callable[[str], None],
) -> Metadata:
    """Write a CoreML package to ``path``; returns its metadata.

    CoreML runs on Apple's systems alone. Elsewhere the folded program that coremltools converts is
    compared with the model on random and real images, and of the converted one inputs, outputs,
    operators and weights.

    Raises:
        CheckFailed: something is missing or different.
    """
    import coremltools

    from mmeformer.deploy.coreml import check_package, compare_folded, convert

    make_graph = graph_maker(metadata, request)
    graph = build_graph(model, metadata, make_graph, channels_last=False)
    findings = check.Findings()
    reference = make_graph(copy.deepcopy(model), normalise=graph.normalise).eval()
    height, width = metadata.size
    randoms = [check.random_image(height, width, seed) for seed in range(request.batch)]
    examples = [
        _planes([prepare(as_image(image), metadata) for image in batch])
        for batch in (randoms, *([Path(image)] * request.batch for image in images))
    ]
    compare_folded(graph, reference, examples, findings)
    graph.raw_names = ()
    package = convert(graph, examples[0], metadata, request.half)
    package.save(str(path))
    check_package(path, package, graph, examples[0], request.half, findings)
    report("CoreML runs on Apple's systems alone; what was checked here:")
    for line in findings.lines:
        report("  " + line)
    report(
        f"  not checked: its answers (coremltools {coremltools.__version__} predicts on macOS only)"
    )
    findings.raise_failures(path.name)
    return metadata


def _planes(batch: list[Prepared]) -> torch.Tensor:
    """Prepared images as the (B, 3, H, W) of a graph whose channels come first."""
    data = np.stack([item.data for item in batch])
    if data.dtype == np.uint8:
        data = data.transpose(0, 3, 1, 2).astype(np.float32)
    return torch.from_numpy(data)
