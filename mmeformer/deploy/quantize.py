# SPDX-License-Identifier: Apache-2.0
"""Quantize exported files to 8 bits, as far as the metric of the test data allows."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from mmengine.config import Config
from mmengine.runner import Runner
from onnxruntime.quantization import CalibrationDataReader, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator

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

ROUNDS = 30
"""Runs of each file that are timed."""


class MetricDropped(UserError, RuntimeError):
    """The metric of a quantized file is below that of the float32 file by more than allowed."""


@dataclass(frozen=True)
class Effect:
    """Effect of quantizing some layers.

    Args:
        name: of the layers.
        layers: their number.
        before: metrics of the float32 file, in points of a hundred.
        after: metrics of the quantized file.
        size: of the quantized file in bytes.
        time: of the processor for a run, as a share of the float32 file's.
    """

    name: str
    layers: int
    before: dict[str, float]
    after: dict[str, float]
    size: int
    time: float

    @property
    def drop(self) -> float:
        """Of the metric that falls most, in points of a hundred."""
        return max(self.before[key] - value for key, value in self.after.items())

    def __str__(self) -> str:
        return (
            f"{self.name:34} {self.layers:6} {self.drop:6.2f} {self.size / 1e6:6.1f} "
            f"{self.time:5.2f}"
        )


def quantize(
    source: Path,
    out: Path,
    config: Config,
    metadata: Metadata,
    images: Sequence[Path],
    max_drop: float,
    report: Callable[[str], None],
    dynamic: bool = False,
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
        report: called with each line of the table, as soon as it is measured.
        dynamic: of TensorFlow Lite files: quantize weights alone, see
            :func:`mmeformer.deploy.litert.write_dynamic`.

    Raises:
        MetricDropped: no quantized file keeps the metric; ``out`` is the best one.
        ValueError: there are no test data, or all layers are in a loop.
    """
    images = images[:: -(-len(images) // CALIBRATION_IMAGES)]
    groups: dict[str, list[str]]
    write: Callable[[Path, Path, Sequence[str], Iterator[dict[str, Any]]], None]
    if source.suffix == SUFFIX:
        from mmeformer.deploy import litert

        groups = litert.operator_groups(source, weights_only=dynamic)
        write = litert.write_dynamic if dynamic else litert.write_int8
    else:
        groups, write = layer_groups(onnx.load(str(source))), OnnxWriter()
    if not groups:
        raise ValueError(
            "all layers are in the loop over the windows of an image (model.test_cfg.mode=slide), "
            "where onnxruntime does not quantize: give --size instead of --dynamic"
        )
    with TemporaryDirectory() as folder:
        plain_file, trial = (Path(folder) / f"{name}{out.suffix}" for name in ("plain", "trial"))
        for file in (plain_file, trial):
            # TensorFlow Lite files have their metadata beside them.
            file.with_suffix(".json").write_text(metadata.to_json(), encoding="utf-8")
        shutil.copy(source, plain_file)
        predictor = runtime.load(plain_file)
        measure = Measure(config, images[0], Path(folder))
        few, full = measure.metrics(plain_file, MEASURED_IMAGES), measure.metrics(plain_file)

        def effect(name: str, layers: Sequence[str], limit: int | None = MEASURED_IMAGES) -> Effect:
            feeds = (inputs for image in images for inputs in predictor.inputs(image))
            write(plain_file, trial, layers, feeds)
            return Effect(
                name,
                len(layers),
                before=full if limit is None else few,
                after=measure.metrics(trial, limit),
                size=trial.stat().st_size,
                time=measure.time_ratio(trial, plain_file),
            )

        report("8 bits: effect of each group of layers alone, on the metric, size and speed")
        report(f"{'layers':34} {'number':>6} {'drop':>6} {'MB':>6} {'time':>5}")
        alone = []
        for name, layers in groups.items():
            alone.append(effect(name, layers))
            stays = alone[-1].drop > ALONE * max_drop
            report(f"{alone[-1]}{'  stays in float32' if stays else ''}")
        # Of two groups that cost the same, the one that saves less returns to float32 first.
        alone.sort(key=lambda group: (group.drop, group.size))
        chosen = [group for group in alone if group.drop <= ALONE * max_drop] or alone[:1]
        while True:
            layers = [layer for group in chosen for layer in groups[group.name]]
            result = effect("all that are in 8 bits", layers, limit=None)
            report(str(result))
            if result.drop <= max_drop or len(chosen) == 1:
                break
            report(f"{chosen.pop().name} returns to float32")
        shutil.copy(trial, out)
    report("drop in points of a hundred; time of the processor as a share of float32's")
    for name, metrics, size in (
        ("float32", result.before, source.stat().st_size),
        ("8 bits", result.after, result.size),
    ):
        values = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items())
        report(f"{name}: {values}, {size / 1e6:.1f} MB")
    if result.drop > max_drop:
        raise MetricDropped(
            f"the metric falls by {result.drop:.2f} points in 8 bits, more than --max-drop "
            f"{max_drop:g}: give more --int8 images that look like the test data, or a larger "
            "--max-drop"
        )


def layer_groups(proto: onnx.ModelProto) -> dict[str, list[str]]:
    """Names of the nodes of all layers, by group.

    The first and the last layers, talking heads and products of two activations (in attention and
    elsewhere) are groups of their own; so are depthwise and other layers of each part of the model.
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
            # Those of masks, with weights of each object's own, lose far more than attention.
            group = "attention products" if "/backbone/" in node.name else "other products"
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


class OnnxWriter:
    """Writes files with quantized layers, as QDQ nodes; ranges are measured once."""

    def __init__(self) -> None:
        self._ranges: TensorsData | None = None

    def __call__(
        self, source: Path, out: Path, layers: Sequence[str], feeds: Iterator[dict[str, Any]]
    ) -> None:
        """Write ``out``: ``source`` with these layers in 8 bits, and its metadata."""
        if self._ranges is None:
            with TemporaryDirectory() as folder:
                augmented = Path(folder) / "augmented.onnx"
                calibrator = create_calibrator(source, list(LAYERS), str(augmented))
                calibrator.collect_data(_Reader(feeds))
                self._ranges = calibrator.compute_data()
        quantizer = QDQQuantizer(
            onnx.load(str(source)),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            # onnxruntime computes products of int8 and int8 on a processor three times slower than
            # those of uint8 and int8, and zero points halve the error of values that are mostly
            # positive, as those after a GELU.
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=list(layers),
            nodes_to_exclude=[],
            op_types_to_quantize=list(LAYERS),
            extra_options=dict(WeightSymmetric=True),
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(out))


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
        # The COCO metric prints its table.
        with contextlib.redirect_stdout(io.StringIO()):
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

    def time_ratio(self, file: Path, other: Path) -> float:
        """Processor time of a run on one thread, as a share of the other file's.

        The files take turns, and other programs that run meanwhile do not count.
        """
        predictors = [runtime.load(path, 1) for path in (file, other)]
        (inputs, *_) = predictors[0].inputs(self.image)
        times = [0.0, 0.0]
        for turn in range(ROUNDS + 1):
            for place, predictor in enumerate(predictors):
                start = time.process_time()
                predictor.session.run(None, inputs)
                if turn:  # the first run also allocates
                    times[place] += time.process_time() - start
        return times[0] / times[1]
