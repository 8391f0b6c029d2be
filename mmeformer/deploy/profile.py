# SPDX-License-Identifier: Apache-2.0
"""Parameters, multiply-adds, memory and latency of a model."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.deploy import onnx
from mmeformer.deploy.graphs import Graph, build_graph, find_backbone
from mmeformer.layers.blocks import LayerScale
from mmeformer.runtime.metadata import Metadata
from mmeformer.variants import Variant

NUM_CLASSES = 1000

MODES = ("eager", "channels_last", "folded", "folded_channels_last", "compile", "onnxruntime")
"""``compile``: ``torch.compile`` of the folded backbone, the rest folded."""


@dataclass(frozen=True)
class Part:
    """Number of parameters and multiply-adds of a part of a model (not in millions)."""

    name: str
    params: int
    macs: int


def count_parts(graph: Graph, inputs: Sequence[Tensor]) -> list[Part]:
    """Count stem and stages of the backbone and the other parts of the model, in order of use.

    Multiply-adds are those of convolutions and matrix products, as PyTorch counts them.
    """
    paths = _part_paths(graph)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(*inputs)
    counted = counter.get_flop_counts()
    kind = type(graph).__name__
    parts = []
    for path in paths:
        flops = sum(counted.get(f"{kind}.{path}", {}).values())
        params = sum(p.numel() for p in graph.get_submodule(path).parameters())
        parts.append(Part(path.removeprefix("model."), params, flops // 2))
    return parts


def _part_paths(graph: Graph) -> list[str]:
    """Paths of the parts that are counted one by one, in order of use."""
    backbone = find_backbone(graph)
    root = next(name for name, module in graph.named_modules() if module is backbone)
    paths = [f"{root}.stem", *(f"{root}.stages.{i}" for i in range(len(backbone.stages)))]
    if len(backbone.norms):
        paths.append(f"{root}.norms")
    # The bare backbone's graph has no model around it.
    model: Any = getattr(graph, "model", nn.Module())
    for name, child in model.named_children():
        if name == "roi_head":
            heads = [head for head in ("bbox_head", "mask_head") if hasattr(child, head)]
            paths += [f"model.roi_head.{head}" for head in heads]
        elif child is not backbone and any(True for _ in child.parameters()):
            paths.append(f"model.{name}")
    return paths


def count_classifier(variant: Variant, image_size: int = 224) -> list[Part]:
    """Count the parts of the published classifier of a variant; totals are the published figures.

    The papers do not say how they count; these rules give all 14 published figures. V1 is counted
    as trained: a batch norm costs 2 operations per element, a layer norm 5. V2 is counted as
    deployed: batch norms and layer scales are folded into the convolutions (also the norm before
    the heads), and a bilinear resize costs 4 operations per element. These are the costs in fvcore.
    """
    v1 = variant.family == "v1"
    backbone = (EfficientFormer if v1 else EfficientFormerV2)(variant.arch).eval()
    backbone.norms.clear()
    width = variant.architecture.widths[-1]
    elementwise: dict[nn.Module, int] = {}

    def note(module: Any, _, output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d) and v1:
            elementwise[module] = 2 * output.numel()
        elif isinstance(module, nn.LayerNorm):
            elementwise[module] = 5 * output.numel()
        elif getattr(module, "halve", False):
            full, half = output.shape[-2:], module.v.conv.out_channels
            elementwise[module] = 4 * half * math.prod(full)

    for module in backbone.modules():
        module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, image_size, image_size))
    counted = counter.get_flop_counts()
    parts = []
    for path in ("stem", *(f"stages.{index}" for index in range(len(backbone.stages)))):
        part = backbone.get_submodule(path)
        flops = sum(counted[f"{type(backbone).__name__}.{path}"].values())
        params = sum(p.numel() for p in part.parameters())
        if not v1:
            folded = (nn.BatchNorm2d, LayerScale)
            params -= sum(
                p.numel() for m in part.modules() if isinstance(m, folded) for p in m.parameters()
            )
        extra = sum(elementwise.get(module, 0) for module in part.modules())
        parts.append(Part(path, params, flops // 2 + extra))
    heads = 2 * (width * NUM_CLASSES + NUM_CLASSES) + (2 * width if v1 else 0)
    return [*parts, Part("classifier heads", heads, 2 * width * NUM_CLASSES)]


class _LiveStorage(TorchDispatchMode):
    """Sums the bytes of the live storages that operators create."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in map(_storage, tree_leaves((args, kwargs))) if storage}
        for value in tree_leaves(result):
            storage = _storage(value)
            if storage is None or id(storage) in self.known or id(storage) in inputs:
                continue
            self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def _storage(value) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, Tensor) else None


@torch.no_grad()
def inference_memory(call: Callable[[], object]) -> int:
    """Peak number of bytes in tensors that ``call`` creates; parameters are not counted."""
    with _LiveStorage() as live:
        call()
    return live.peak


def training_memory(backbone: nn.Module, image: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass; parameters are not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    # Outputs hold the graph until the sum is taken, so that no freed storage is used again.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        outputs = backbone(image)
    total = sum(kept.values())
    del outputs
    return total


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: ``median``, and the quartiles ``low`` and ``high``."""

    median: float
    low: float
    high: float
    runs: int


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Latency]:
    """Measure the latency of each call; calls take turns, so that a slow moment affects all.

    Every call runs twice as a warm-up.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in (*calls.values(), *calls.values()):
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                synchronize()
                started = time.perf_counter()
                call()
                synchronize()
                times[name].append(1e3 * (time.perf_counter() - started))
    results = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        results[name] = Latency(median, low, high, rounds)
    return results


def latency_calls(
    model: nn.Module,
    metadata: Metadata,
    graph_class: Callable[..., Graph],
    inputs: dict[str, Tensor],
    modes: Sequence[str],
    folder: Path,
) -> dict[str, Callable[[], object]]:
    """Make one function per mode that runs the whole graph once.

    Args:
        model: as trained, in eval mode.
        metadata, graph_class: as for an export of a fixed size.
        inputs: of the graph, by name.
        modes: some of :data:`MODES`.
        folder: for the ONNX file.

    Raises:
        ValueError: an unknown mode.
    """
    if unknown := set(modes) - set(MODES):
        raise ValueError(f"unknown modes {sorted(unknown)}; known are {', '.join(MODES)}")
    values = tuple(inputs.values())
    last = tuple(
        value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
        for value in values
    )

    def plain() -> Graph:
        return graph_class(copy.deepcopy(model)).eval()

    def folded() -> Graph:
        return build_graph(graph_class, model, metadata, channels_last=False)

    calls: dict[str, Callable[[], object]] = {}
    for mode in modes:
        if mode == "onnxruntime":
            calls[mode] = _onnx_call(folded(), metadata, inputs, folder / "profile.onnx")
            continue
        graph: Any = plain() if mode in ("eager", "channels_last") else folded()
        given = values
        if mode.endswith("channels_last"):
            graph, given = graph.to(memory_format=torch.channels_last), last
        if mode == "compile":
            find_backbone(graph).compile()
        calls[mode] = partial(graph, *given)
    return calls


def _onnx_call(
    graph: Graph, metadata: Metadata, inputs: dict[str, Tensor], path: Path
) -> Callable[[], object]:
    import onnxruntime

    graph.raw_names = ()
    onnx.trace(graph, metadata, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feed = {name: value.numpy() for name, value in inputs.items()}
    return lambda: session.run(None, feed)


@dataclass(frozen=True)
class Profile:
    """Figures of a model at one input size.

    Args:
        parts: see :func:`count_parts` and :func:`count_classifier`.
        inference_bytes: see :func:`inference_memory`; of the model as trained.
        training_bytes: see :func:`training_memory`; of the backbone alone.
        latency: one per mode.
    """

    parts: list[Part]
    inference_bytes: int
    training_bytes: int
    latency: dict[str, Latency]

    @property
    def total(self) -> Part:
        """The sum of all parts."""
        return Part(
            "total", sum(part.params for part in self.parts), sum(part.macs for part in self.parts)
        )


def profile(
    model: nn.Module,
    metadata: Metadata,
    graph_class: Callable[..., Graph],
    *,
    modes: Sequence[str] = MODES,
    rounds: int = 10,
    variant: Variant | None = None,
) -> Profile:
    """Profile a model, or a published variant.

    Args:
        model: in eval mode.
        metadata, graph_class: as for an export of a fixed size and batch.
        modes: the :data:`MODES` to measure the latency of.
        rounds: runs of each mode.
        variant: count the published classifier of this variant instead of ``model``'s parts.
    """
    graph = graph_class(copy.deepcopy(model)).eval()
    inputs = onnx.example_inputs(graph, metadata)
    values = tuple(inputs.values())
    if variant is None:
        parts = count_parts(graph, values)
    else:
        parts = count_classifier(variant, inputs["image"].shape[-1])
    backbone = find_backbone(graph)
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        calls = latency_calls(model, metadata, graph_class, inputs, modes, Path(folder))
        return Profile(
            parts,
            inference_memory(lambda: graph(*values)),
            training_memory(copy.deepcopy(backbone).train(), inputs["image"]),
            measure(calls, rounds),
        )
