# SPDX-License-Identifier: Apache-2.0
"""Models as graphs: tensors in, tensors out, and operators for everything that depends on data.

A graph calls the trained layers of a model and expresses the rest (anchors, selection of boxes,
NMS) so that it can be traced for any batch and size. Each task has its graphs in its own room; its
row in :mod:`mmeformer.tasks` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmeformer import tasks
from mmeformer.backbones.base import PyramidBackbone
from mmeformer.deploy import check
from mmeformer.deploy.biases import GraphBias, fix_biases
from mmeformer.deploy.fold import fold
from mmeformer.deploy.substitutes import replace_modules, substitute_for_graph
from mmeformer.images import as_image
from mmeformer.layers.attention_bias import AttentionBias
from mmeformer.runtime.images import prepare
from mmeformer.runtime.metadata import Metadata
from mmeformer.variants import STRIDES

TARGETS = {
    "onnx": "ONNX",
    "coreml": "CoreML",
    "tflite": "TensorFlow Lite",
    "executorch": "ExecuTorch",
}
"""Names of the targets, for messages."""


class Graph(nn.Module):
    """Base of all graphs; has everything that exporting needs to know of a task.

    ``forward(image, *others)`` returns the outputs named by ``output_names``, then the raw tensors
    named by ``raw_names``. The check of an export compares raw tensors number by number; the
    finished file has none (``raw_names = ()`` leaves them out).

    Subclasses take a model as their first argument and raise a ``ValueError`` for one that they
    cannot express.

    Args:
        normalize: converts the ``image`` input to the network's input; None: they are the same.
    """

    extra_inputs: tuple[str, ...] = ()
    """Inputs beside ``image``: ``image_size`` (B, 2) ``float32``, height and width of each image
    without padding, or ``output_size`` (2,) ``int64``, height and width of the outputs."""

    output_names: tuple[str, ...]
    raw_names: tuple[str, ...] = ()

    window: tuple[int, int] | None = None
    """(H, W) in pixels of the windows in which the network sees images, or whole images that are
    smaller; None: it sees all images whole."""

    any_size: bool = False
    """Whether a trace of this graph is for images of any size."""

    compare: Callable[[Sequence[tuple], check.Comparison], None]
    """Compares results of this task; see :mod:`mmeformer.deploy.check`."""

    run: Callable[..., tuple[Tensor, ...]]
    """``image`` (B, 3, H, W), normalized, and the ``extra_inputs`` -> all outputs."""

    def __init__(self, normalize: nn.Module | None = None) -> None:
        super().__init__()
        self.normalize = normalize

    @classmethod
    def for_model(cls, model: Any) -> type[Graph]:
        """The class of graph for this model: this one, unless a task has several kinds of models.

        Raises:
            ValueError: there is none for this model.
        """
        return cls

    def forward(self, image: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if self.normalize is not None:
            image = self.normalize(image)
            if "image_size" in self.extra_inputs:
                image = _blank_padding(image, *others)
        outputs = self.run(image, *others)
        return tuple(outputs[: len(self.output_names) + len(self.raw_names)])

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """Axes without a fixed length: name of an output -> axis -> name of the axis.

        Args:
            any_size: whether inputs have any size and batch.
        """
        raise NotImplementedError

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """Fields of :class:`mmeformer.runtime.Metadata` that depend on the kind of model.

        Raises:
            ValueError: the config needs something that the runtime does not have.
        """
        raise NotImplementedError

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> Any:
        """Predict with the OpenMMLab model's own ``predict``, as a reference for exported files.

        Args:
            model: as it was trained.
            image: (1, 3, H, W), normalized.
            metainfo: of the image, as OpenMMLab's test pipelines set it.

        Returns:
            The result, or None if the outputs of the graph are all there is.
        """
        raise NotImplementedError

    @staticmethod
    def set_prediction(sample: Any, result: Any) -> None:
        """Put a result of the runtime into a data sample, as the OpenMMLab model does."""
        raise NotImplementedError


def graph_class(task: str, target: str, model: Any = None, nms: bool = True) -> Any:
    """The subclass of :class:`Graph` for a task and a target.

    Args:
        task: a key of :func:`mmeformer.tasks.exports`.
        target: a key of :data:`TARGETS`.
        model: chooses between the kinds of models of a task; None takes the usual one.
        nms: whether ONNX files do the NMS, where the operators exist.

    Raises:
        ValueError: the target cannot express this task.
    """
    export = tasks.exports()[task]
    if target == "onnx" and not nms and export.candidates_graph is None:
        raise ValueError(
            f"--nms outside: exported files for {task} do no NMS that could be left out"
        )
    for_phones = export.litert_graph or export.coreml_graph
    references = {
        "onnx": export.graph if nms else export.candidates_graph,
        "coreml": export.coreml_graph,
        "tflite": for_phones,
        "executorch": for_phones,
    }
    reference = references[target]
    if reference is None:
        name = TARGETS[target]
        raise ValueError(
            f"{name} has no operators to select boxes and masks: export models for {task} to ONNX, "
            f"or their --part backbone to {name}"
        )
    graph = tasks.load(reference)
    return graph if model is None else graph.for_model(model)


def build_graph(
    graph: Callable[..., Graph], model: nn.Module, metadata: Metadata, channels_last: bool
) -> Graph:
    """The graph of a folded copy of ``model``; ``channels_last``: see :class:`Normalize`."""
    folded = fold(model)
    substitute_for_graph(folded)
    normalize = None
    if metadata.preprocessing_in_graph:
        normalize = Normalize(metadata.mean, metadata.std, metadata.bgr_to_rgb, channels_last)
    made = graph(folded, normalize).eval()
    made.any_size = metadata.size is None
    if metadata.size is None:
        replace_modules(made, AttentionBias, GraphBias)
    else:
        height, width = map(min, metadata.size, made.window or metadata.size)
        fix_biases(made, (height, width))
    return made


@torch.no_grad()
def compare_graphs(
    ours: Callable[[Tensor], Sequence[Tensor]],
    reference: Graph,
    examples: Sequence[Tensor],
    comparison: check.Comparison,
    title: str,
    tolerance: float = check.RAW_TOLERANCE,
    labels_differ: float = check.LABELS_DIFFER,
) -> None:
    """Compare outputs number by number: floating point by size, labels by those that differ.

    Args:
        ours: the converted graph.
        reference: the graph of the model as it was trained.
        examples: ``image`` inputs.
        comparison: receives the largest difference of each output of ``reference``.
        title: of ``ours``, in those lines.
        tolerance: largest difference as a share of the largest value.
        labels_differ: largest share of labels that differ.
    """
    names = reference.output_names + reference.raw_names
    largest = dict.fromkeys(names, 0.0)
    for example in examples:
        expected = reference(example)
        for name, mine, value in zip(names, ours(example), expected, strict=True):
            if value.is_floating_point():
                difference = check.relative_difference(mine.numpy(), value.numpy())
            else:
                difference = float((mine != value).float().mean())
            largest[name] = max(largest[name], difference)
    for name, value in zip(names, expected, strict=True):
        if value.is_floating_point():
            line = f"{title} differs by {largest[name]:.1e} of its largest value"
            ok = largest[name] <= tolerance
        else:
            line = f"{largest[name]:.1e} of the numbers of {title} differ"
            ok = largest[name] <= labels_differ
        comparison.add(f"{name.removeprefix('raw_')}: {line}", ok)


def examples(metadata: Metadata, images: Sequence[Path]) -> list[Tensor]:
    """Inputs of a graph of a fixed size and batch: random images, then each of ``images``."""
    assert metadata.size is not None and metadata.batch is not None
    randoms = [check.random_image(*metadata.size, seed) for seed in range(metadata.batch)]
    batches: list[list[Any]] = [randoms, *([image] * metadata.batch for image in images)]
    return [
        torch.from_numpy(
            np.stack([prepare(as_image(i, metadata.reading), metadata).data for i in batch])
        )
        for batch in batches
    ]


def compare_session(
    session: Any,
    reference: Graph,
    metadata: Metadata,
    images: Sequence[Path],
    runtime: str,
    tolerance: float = check.RAW_TOLERANCE,
    labels_differ: float = check.LABELS_DIFFER,
) -> check.Comparison:
    """Compare a file with the graph of the model as it was trained, number by number.

    Args:
        session: runs the file, which takes ``image`` as :class:`Normalize` with ``channels_last``.
        reference: see :func:`compare_graphs`; without raw tensors.
        metadata: of the file.
        images: real images to compare on, beside random ones.
        runtime: its name.
        tolerance, labels_differ: see :func:`compare_graphs`.
    """
    names = [value.name for value in session.get_outputs()]
    order = [names.index(name) for name in reference.output_names]

    def run(image: Tensor) -> list[Tensor]:
        found = session.run(None, {"image": image.numpy()})
        return [torch.from_numpy(found[index]) for index in order]

    comparison = check.Comparison(
        f"compared with PyTorch on {metadata.batch} random and {len(images)} real images "
        f"in {runtime}"
    )
    inputs = examples(metadata, images)
    compare_graphs(run, reference, inputs, comparison, "the file", tolerance, labels_differ)
    return comparison


def _blank_padding(image: Tensor, image_size: Tensor) -> Tensor:
    """Set images (B, 3, H, W) to zero beyond their ``image_size`` (B, 2): height and width."""
    rows, columns = (
        torch.arange(image.shape[axis], device=image.device) < image_size[:, axis - 2, None]
        for axis in (2, 3)
    )
    return image * (rows[:, None, :, None] & columns[:, None, None, :])


class Normalize(nn.Module):
    """Converts images as OpenCV reads them to the network's input (B, 3, H, W) ``float32``.

    Args:
        mean, std: of the channels in the network's order, on a scale of 0 to 255.
        bgr_to_rgb: whether to reverse the channels.
        channels_last: input (B, H, W, 3) of ``uint8``; else (B, 3, H, W) of floating point numbers,
            still on a scale of 0 to 255.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], bgr_to_rgb: bool, channels_last: bool
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.order: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        order = [2, 1, 0] if bgr_to_rgb else [0, 1, 2]
        self.register_buffer("order", torch.tensor(order))
        self.channels_last = channels_last

    def forward(self, image: Tensor) -> Tensor:
        if self.channels_last:
            image = image.permute(0, 3, 1, 2).float()
        return (image[:, self.order] - self.mean) / self.std


def find_backbone(model: nn.Module) -> PyramidBackbone:
    """Find the EfficientFormer backbone in a model.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PyramidBackbone):
            return module
    raise ValueError(f"{type(model).__name__} has no EfficientFormer backbone")


class BackboneGraph(Graph):
    """The pyramid of the bare backbone: outputs ``level0`` (finest) and so on."""

    compare = staticmethod(check.compare_pyramids)

    def __init__(self, model: nn.Module, normalize: nn.Module | None = None) -> None:
        super().__init__(normalize)
        self.backbone = find_backbone(model)
        self.output_names = tuple(f"level{i}" for i in range(len(self.backbone.out_indices)))

    def run(self, image: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        return self.backbone(image)

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        if not any_size:
            return {}
        return {
            name: {0: "batch", 2: f"height_{STRIDES[index]}", 3: f"width_{STRIDES[index]}"}
            for name, index in zip(self.output_names, self.backbone.out_indices, strict=True)
        }

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """See :meth:`Graph.settings`."""
        return dict(strides=tuple(STRIDES[index] for index in find_backbone(model).out_indices))

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> None:
        """Nothing: the outputs of the graph are all there is."""


def take(values: Tensor, index: Tensor) -> Tensor:
    """Take ``values`` (B, N, D) at ``index`` (B, K) of each image: (B, K, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def top_k(scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the ``limit`` best scores (B, N) along N, best first.

    Of all if N is smaller, or if ``limit`` is not positive.
    """
    count = scores.shape[1]
    if limit <= 0:
        return scores.sort(dim=1, descending=True)
    return scores.topk(smaller(count, limit), dim=1)


def smaller(size: Any, limit: Any) -> Any:
    """The smaller of two numbers that may be sizes of tensors, which are tensors in a trace."""
    if not torch.jit.is_tracing():
        return min(size, limit)
    # A number would become the constant of the traced example.
    return torch.minimum(torch.as_tensor(limit), torch.as_tensor(size))


def cell_shifts(size: tuple[int, ...], stride: tuple[int, int], like: Tensor) -> Tensor:
    """Distance in pixels of each cell of a map from the first one: (H * W, 2), x and y.

    Args:
        size: (H, W) of the map.
        stride: pixels per cell, (x, y) as in mmdet's anchor generators.
        like: gives type and device.
    """
    x = torch.arange(size[1], device=like.device).to(like.dtype) * stride[0]
    y = torch.arange(size[0], device=like.device).to(like.dtype) * stride[1]
    # Rows outside, columns inside, as a map is flattened.
    x = x[None, :].expand(y.shape[0], -1)
    y = y[:, None].expand(-1, x.shape[1])
    return torch.stack([x, y], -1).flatten(0, 1)


def require(condition: bool, otherwise: str) -> None:
    """Raise a ``ValueError`` with the message ``otherwise`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{otherwise}; `--part backbone` takes the backbone of every model")
