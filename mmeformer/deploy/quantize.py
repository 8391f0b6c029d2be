# SPDX-License-Identifier: Apache-2.0
"""Quantize exported files to 8 bits, as far as the metric of the test data allows."""

from __future__ import annotations

import logging
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from mmengine.config import Config
from mmengine.runner import Runner
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from mmeformer import runtime, tasks
from mmeformer.deploy.evaluate import use_exported
from mmeformer.errors import UserError
from mmeformer.runtime.litert import SUFFIX
from mmeformer.runtime.metadata import Metadata
from mmeformer.training import engine

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that are quantized; all others compute in float32."""

MEASURED_IMAGES = 200
"""Test images that a single group of layers is evaluated on; the finished file gets all."""

ALONE = 0.25
"""A group stays in float32 if it alone costs more than this share of the allowed drop."""

CALIBRATION_IMAGES = 200
"""Of more images, every second or third is used, and so on."""

ROUNDS = 15
"""Runs that are timed."""


class MetricDropped(UserError, RuntimeError):
    """The metric of a quantized file is below that of the float32 file by more than allowed."""


@dataclass(frozen=True)
class Effect:
    """Effect of quantizing some layers.

    Args:
        name: of the layers.
        layers: their number.
        drop: of the metric, in points of a hundred.
        size: of the file in bytes.
        milliseconds: of a run on one thread, the median.
    """

    name: str
    layers: int
    drop: float
    size: int
    milliseconds: float


def quantize(
    source: Path,
    out: Path,
    config: Config,
    metadata: Metadata,
    images: Sequence[Path],
    max_drop: float,
    report: Callable[[str], None],
    method: tuple[dict[str, list[str]], Callable[..., None]] | None = None,
) -> None:
    """Quantize a checked float32 file: static, with weights per channel.

    Every group of layers is quantized alone and evaluated. Groups that cost too much stay in
    float32; all others are quantized together. If the metric of all test images then falls by more
    than allowed, the group with the largest effect of its own returns to float32, and so on.

    Args:
        source: exported ``.onnx``, ``.tflite`` or ``.pte`` file.
        out: file to write.
        config: has the test data and the metric.
        metadata: of the file.
        images: to calibrate the ranges of activations on.
        max_drop: largest drop of the metric in points of a hundred.
        report: called with each line of the table.
        method: groups of layers, and the function that writes a file with some of them in 8 bits;
            None takes those for the suffix of ``source``.

    Raises:
        MetricDropped: no quantized file keeps the metric; ``out`` is the best one.
        ValueError: there are no test data, or the file has no layers to quantize.
    """
    images = images[:: -(-len(images) // CALIBRATION_IMAGES)]
    groups: dict[str, list[str]]
    write: Callable[[Path, Path, Sequence[str], Iterator[dict[str, Any]]], None]
    if method is not None:
        groups, write = method
    elif source.suffix == SUFFIX:
        from mmeformer.deploy.litert import operator_groups, write_int8

        groups, write = operator_groups(source), write_int8
    else:
        groups, write = layer_groups(onnx.load(str(source))), _write
    if not groups:
        raise ValueError(f"{source} has no layers to quantize")
    with TemporaryDirectory() as folder:
        plain_file, trial = (Path(folder) / f"{name}{out.suffix}" for name in ("plain", "trial"))
        for file in (plain_file, trial):
            # TensorFlow Lite files have their metadata beside them.
            file.with_suffix(".json").write_text(metadata.to_json(), encoding="utf-8")
        shutil.copy(source, plain_file)
        predictor = runtime.load(plain_file)
        measure = Measure(config, images[0], Path(folder))
        few, full = measure.metrics(plain_file, MEASURED_IMAGES), measure.metrics(plain_file)

        def effect(name: str, layers: Sequence[str], whole: bool = False) -> Effect:
            feeds = (inputs for image in images for inputs in predictor.inputs(image))
            write(plain_file, trial, layers, feeds)
            before, limit = (full, None) if whole else (few, MEASURED_IMAGES)
            drop = max(before[key] - value for key, value in measure.metrics(trial, limit).items())
            size, time = trial.stat().st_size, measure.milliseconds(trial)
            return Effect(name, len(layers), drop, size, time)

        size, time = plain_file.stat().st_size, measure.milliseconds(plain_file)
        plain = Effect("float32", 0, 0.0, size, time)
        alone = [effect(name, layers) for name, layers in groups.items()]
        alone.sort(key=lambda group: group.drop)
        chosen = [group for group in alone if group.drop <= ALONE * max_drop] or alone[:1]
        while True:
            layers = [layer for group in chosen for layer in groups[group.name]]
            result = effect("all that are in 8 bits", layers, whole=True)
            if result.drop <= max_drop or len(chosen) == 1:
                break
            chosen.pop()
        shutil.copy(trial, out)
    for line in _table(plain, alone, {group.name for group in chosen}, result):
        report(line)
    if result.drop > max_drop:
        raise MetricDropped(
            f"the metric falls by {result.drop:.2f} points in 8 bits, more than --max-drop "
            f"{max_drop:g}: give more --int8 images that look like the test data, or a larger "
            "--max-drop"
        )


def layer_groups(proto: onnx.ModelProto) -> dict[str, list[str]]:
    """Names of the nodes of all layers, by group.

    The first and the last layers, talking heads and products of two activations (in attention) are
    groups of their own; so are depthwise and other layers of each part of the model.
    """
    nodes = proto.graph.node
    constants = {item.name for item in proto.graph.initializer}
    for node in nodes:
        if all(name in constants for name in node.input):
            constants.update(node.output)
    layers = [
        node
        for node in nodes
        if node.op_type in LAYERS and any(name not in constants for name in node.input)
    ]
    names = {node.name for node in layers}
    first = names - _reached(nodes, names, lambda node: (node.input, node.output))
    last = names - _reached(nodes[::-1], names, lambda node: (node.output, node.input))
    softmaxes = {
        name for node in nodes if node.op_type == "Softmax" for name in (*node.input, *node.output)
    }
    groups: dict[str, list[str]] = {}
    for node in layers:
        if node.name in first:
            group = "first layer"
        elif node.name in last:
            group = "last layers"
        elif node.op_type == "Conv" and not softmaxes.isdisjoint([node.input[0], *node.output]):
            group = "talking heads"
        elif not any(name in constants for name in node.input):
            group = "attention products"
        else:
            group = _part(node.name)
            if any(item.name == "group" and item.i > 1 for item in node.attribute):
                group += ", depthwise"
        groups.setdefault(group, []).append(node.name)
    return groups


def _reached(
    nodes: Sequence[onnx.NodeProto], layers: set[str], sides: Callable[[Any], tuple[Any, Any]]
) -> set[str]:
    """Those of ``layers`` that come after another one, in the order and direction of ``nodes``."""
    values: set[str] = set()
    found = set()
    for node in nodes:
        before, after = sides(node)
        reached = not values.isdisjoint(before)
        if reached and node.name in layers:
            found.add(node.name)
        if reached or node.name in layers:
            values.update(name for name in after if name)
    return found


def _part(name: str) -> str:
    """Part of the model that a node belongs to, by the path of its module."""
    stage = re.search(r"/backbone/(stem|stages\.(\d+))/", name)
    if stage:
        return "stem" if stage[2] is None else f"stage {int(stage[2]) + 1}"
    path = [part for part in name.split("/") if part not in ("", "model")]
    return path[0] if len(path) > 1 else "other layers"


class _Reader(CalibrationDataReader):
    """Inputs of the graph, as onnxruntime asks for them."""

    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        """Inputs by name of the next run, or None at the end."""
        return next(self._feeds, None)


def _write(source: Path, out: Path, layers: Sequence[str], feeds: Iterator[dict[str, Any]]) -> None:
    """Write a file whose ``layers`` are quantized, as QDQ nodes, with its metadata."""
    # It advises to run another program before.
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            str(source),
            str(out),
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            nodes_to_quantize=list(layers),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            # TensorRT takes no zero points.
            extra_options=dict(ActivationSymmetric=True, WeightSymmetric=True),
        )
    finally:
        logging.disable(logging.NOTSET)


class Measure:
    """Metric and speed of exported files.

    Args:
        config: has the test data and the metric.
        image: to measure the speed with.
        folder: for the logs.
    """

    def __init__(self, config: Config, image: Path, folder: Path) -> None:
        self.config, self.image, self.folder = config, image, folder
        self.goals = tasks.load(tasks.of_config(config).quickstart).goals
        self._runners: dict[int | None, Runner] = {}

    def metrics(self, file: Path, limit: int | None = None) -> dict[str, float]:
        """The metrics that count, in points of a hundred, on the first ``limit`` test images."""
        if limit not in self._runners:
            self._runners[limit] = self._runner(file, limit)
        runner = self._runners[limit]
        runner.model.load(str(file))
        found = runner.test()
        # Goals beyond 1 are percent.
        points = {
            key: found[key] * (1 if goal > 1 else 100)
            for key, goal in self.goals.items()
            if key in found
        }
        if not points:
            raise ValueError(
                f"the test_evaluator of the config gives none of {', '.join(self.goals)}, so the "
                "effect of --int8 cannot be measured"
            )
        return points

    def _runner(self, file: Path, limit: int | None) -> Runner:
        config = Config(self.config.copy().to_dict())
        config.work_dir, config.log_level = str(self.folder / f"log-{limit}"), "ERROR"
        config.experiment_name = f"{self.folder.name}-{limit}"
        if limit is not None:
            config.test_dataloader.dataset.indices = limit
        # The exported file reads the images itself.
        config.test_dataloader.update(num_workers=0, persistent_workers=False)
        use_exported(config, str(file))
        return engine.build_test_runner(config, None)

    def milliseconds(self, file: Path) -> float:
        """Median time of a run on one thread."""
        predictor = runtime.load(file, 1)
        (inputs, *_) = predictor.inputs(self.image)
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            predictor.session.run(None, inputs)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1000


def _table(
    plain: Effect, alone: Sequence[Effect], chosen: set[str], result: Effect
) -> Iterator[str]:
    yield "8 bits: effect of each group of layers alone, on the metric, size and speed"
    yield f"{'layers':34} {'number':>6} {'drop':>6} {'MB':>6} {'time':>5}"
    for effect in (*alone, result):
        kept = effect is result or effect.name in chosen
        ratio = effect.milliseconds / plain.milliseconds
        yield (
            f"{effect.name:34} {effect.layers:6} {effect.drop:6.2f} {effect.size / 1e6:6.1f} "
            f"{ratio:5.2f}{'' if kept else '  stays in float32'}"
        )
    yield (
        f"float32 has {plain.size / 1e6:.1f} MB; drop in points of a hundred, time as a share of "
        f"float32's ({plain.milliseconds:.1f} ms) on one thread"
    )
