# SPDX-License-Identifier: Apache-2.0
"""One row per task. Nothing else in the project names the tasks one by one.

A task is one row here, one room (``mmeformer/<name>/``) for its own code, and its configs. Rows
name functions and classes as ``"module:name"``; :func:`load` imports them at first use, so that
each task needs only its own libraries. This module imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Export:
    """How models of one kind are exported, and how their files are run.

    Args:
        graph: subclass of :class:`mmeformer.deploy.graphs.Graph` for ONNX.
        coreml_graph: the same for CoreML; None if CoreML does not have the operators.
        decoder: function from the outputs of an exported file to results; see
            :mod:`mmeformer.runtime.decoders`.
        stretches: whether an image is stretched to the size of a fixed-size export; else it keeps
            its ratio and is padded.
        litert_graph: the same for LiteRT (TensorFlow Lite) and ExecuTorch; None takes that for
            CoreML.
        candidates_graph: the same for ONNX with NMS outside the file; None if it always is, or if
            there is none.
        merger: function that merges the results of the windows of a large image; see there. None if
            no image is cut.
    """

    graph: str
    coreml_graph: str | None
    decoder: str
    stretches: bool
    litert_graph: str | None = None
    candidates_graph: str | None = None
    merger: str | None = None


@dataclass(frozen=True)
class Task:
    """Everything that the shared rooms need to know of a task.

    Args:
        name: used on command lines and in exported files.
        scope: ``default_scope`` of its configs.
        libraries: import names of the libraries it needs beyond mmengine and mmcv.
        predictor: subclass of :class:`mmeformer.inference.predictor.Predictor`.
        outputs: what prediction writes, for the help of ``mmeformer predict``.
        export: its exported files.
        quickstart: an instance of :class:`mmeformer.quickstart.Quickstart`.
        light_quickstart: another, of a light model; None if the task has none.
        datasets: data sets with the checks of ``mmeformer check``, as configs name them.
        starter: an instance of :class:`mmeformer.starter.Starter`, for ``mmeformer init``.
        labels: kinds of labels (:mod:`mmeformer.labeled`) that are for this task, if the user does
            not say.
        review: subclass of :class:`mmeformer.report.review.Review`, which compares predictions with
            labels for the report of a training.
    """

    name: str
    scope: str
    libraries: tuple[str, ...]
    predictor: str
    outputs: str
    export: Export
    quickstart: str
    datasets: tuple[str, ...]
    starter: str
    labels: tuple[str, ...]
    review: str
    light_quickstart: str | None = None


_ROWS = (
    Task(
        name="detection",
        scope="mmdet",
        libraries=("mmdet",),
        predictor="mmeformer.detection.predictor:DetectionPredictor",
        outputs="predictions.json (a COCO data set with scores; masks as RLE)",
        export=Export(
            graph="mmeformer.detection.graph:DetectionGraph",
            # Only detectors of one stage.
            coreml_graph="mmeformer.detection.dense_graph:FixedCandidatesGraph",
            decoder="mmeformer.runtime.decoders:decode_detections",
            stretches=False,
            candidates_graph="mmeformer.detection.dense_graph:DenseCandidatesGraph",
            merger="mmeformer.runtime.decoders:join_detections",
        ),
        quickstart="mmeformer.detection.quickstart:QUICKSTART",
        datasets=("mmeformer.CocoDataset",),
        starter="mmeformer.detection.starter:STARTER",
        labels=("polygons", "boxes"),
        review="mmeformer.detection.review:DetectionReview",
        light_quickstart="mmeformer.detection.quickstart:LIGHT_QUICKSTART",
    ),
    Task(
        name="segmentation",
        scope="mmseg",
        libraries=("mmseg",),
        predictor="mmeformer.segmentation.predictor:SegmentationPredictor",
        outputs="masks/NAME.png and classes.json",
        export=Export(
            graph="mmeformer.segmentation.graph:SegmentationGraph",
            coreml_graph="mmeformer.segmentation.graph:FixedSizeSegmentationGraph",
            decoder="mmeformer.runtime.decoders:decode_segmentation",
            # Attention would see padding.
            stretches=True,
            merger="mmeformer.runtime.decoders:join_segmentations",
        ),
        quickstart="mmeformer.segmentation.quickstart:QUICKSTART",
        datasets=("mmeformer.SegmentationDataset", "mmeformer.ADE20KDataset"),
        starter="mmeformer.segmentation.starter:STARTER",
        labels=("masks",),
        review="mmeformer.segmentation.review:SegmentationReview",
    ),
    Task(
        name="rotated",
        scope="mmrotate",
        libraries=("mmdet", "mmrotate", "shapely"),
        predictor="mmeformer.rotated.predictor:RotatedPredictor",
        outputs="predictions.json and labels/NAME.txt (DOTA's label format)",
        export=Export(
            graph="mmeformer.rotated.graph:RotatedGraph",
            coreml_graph="mmeformer.rotated.graph:RotatedRawGraph",
            decoder="mmeformer.runtime.decoders:decode_rotated",
            stretches=False,
            litert_graph="mmeformer.rotated.graph:RotatedCandidatesGraph",
            merger="mmeformer.runtime.decoders:join_rotated",
        ),
        quickstart="mmeformer.rotated.quickstart:QUICKSTART",
        datasets=("mmeformer.DOTADataset",),
        starter="mmeformer.rotated.starter:STARTER",
        labels=("corners",),
        review="mmeformer.rotated.review:RotatedReview",
    ),
    Task(
        name="classification",
        scope="mmpretrain",
        libraries=("mmpretrain",),
        predictor="mmeformer.classification.predictor:ClassificationPredictor",
        outputs="predictions.json and predictions.csv (the best five classes of every image)",
        export=Export(
            graph="mmeformer.classification.graph:ClassificationGraph",
            coreml_graph="mmeformer.classification.graph:ClassificationGraph",
            decoder="mmeformer.runtime.decoders:decode_classification",
            stretches=True,
        ),
        quickstart="mmeformer.classification.quickstart:QUICKSTART",
        datasets=("mmeformer.ImageFolderDataset", "mmeformer.ImageNetDataset"),
        starter="mmeformer.classification.starter:STARTER",
        labels=("folders",),
        review="mmeformer.classification.review:ClassificationReview",
    ),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
"""Every task by name."""

BACKBONE = "backbone"
"""Used in place of a task's name for exports of the bare backbone."""

_BACKBONE_EXPORT = Export(
    graph="mmeformer.deploy.graphs:BackboneGraph",
    coreml_graph="mmeformer.deploy.graphs:BackboneGraph",
    decoder="mmeformer.runtime.decoders:decode_pyramids",
    # Attention would see padding.
    stretches=True,
)


def exports() -> dict[str, Export]:
    """Every kind of exported file: that of each task by its name, and the bare backbone."""
    return {BACKBONE: _BACKBONE_EXPORT, **{name: task.export for name, task in TASKS.items()}}


def load(reference: str) -> Any:
    """Import the object that a row names as ``"module:name"``."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def task_of_type(name: str) -> Task | None:
    """The task whose library has a class; None if its name does not tell.

    Args:
        name: with modules, such as ``mmdet.models.GFL`` or ``mmeformer.rotated.DOTADataset``.
    """
    package, *places = name.split(".")
    for task in TASKS.values():
        if package == task.scope or (package == "mmeformer" and places[0] == task.name):
            return task
    return None


def of_config(config: Mapping[str, Any]) -> Task:
    """The task of a config, by its ``default_scope``.

    Raises:
        ValueError: no task has this scope; the message names the known ones.
    """
    scope = config.get("default_scope")
    for task in TASKS.values():
        if task.scope == scope:
            return task
    known = ", ".join(f"{task.scope} ({task.name})" for task in TASKS.values())
    raise ValueError(
        f"config {getattr(config, 'filename', None) or ''} has default_scope {scope!r}; set it to "
        f"one of {known}"
    )
