# SPDX-License-Identifier: Apache-2.0
"""Metadata of an export, read from its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmeformer import tasks
from mmeformer.configs import native_size, read_test_metainfo
from mmeformer.deploy.inputs import pipeline_settings, preprocessor_settings
from mmeformer.images import Reading
from mmeformer.results import category_ids
from mmeformer.runtime.metadata import Metadata
from mmeformer.training_images import TrainingImages
from mmeformer.version import __version__
from mmeformer.windows import LARGE


def export_metadata(
    config: Config,
    model: nn.Module,
    task: str,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    preprocessing_in_graph: bool = False,
) -> Metadata:
    """Metadata of a model to export.

    Args:
        config: of the model.
        model: from :func:`mmeformer.deploy.models.build_model`.
        task: a key of :func:`mmeformer.tasks.exports`.
        size, batch, preprocessing_in_graph: see :class:`Metadata`.

    Raises:
        ValueError: the test pipeline or the data preprocessor has a setting that the runtime does
            not follow, or ``size`` is not one that the test pipeline makes.
    """
    graph = tasks.load(tasks.exports()[task].graph).for_model(model)
    # The bare backbone can be that of a config without test data.
    dataset = config.get("test_dataloader", {}).get("dataset", {})
    reading = Reading.of_config(dataset.get("pipeline", ()))
    metadata = Metadata(
        task=task,
        version=__version__,
        config=Path(config.filename or "config").stem,
        preprocessing_in_graph=preprocessing_in_graph,
        batch=batch,
        size=size,
        bands=reading.bands,
        stretch=reading.stretch,
        **preprocessor_settings(config, task),
        **graph.settings(config, model),
    )
    step = metadata.multiple
    if size is not None and any(side % step for side in size):
        lower, upper = (
            " ".join(str(max((side + more) // step * step, step)) for side in size)
            for more in (0, step - 1)
        )
        raise ValueError(
            f"--size {size[0]} {size[1]}: the test pipeline resizes to multiples of {step} "
            f"(ResizeToMultiple); give --size {lower} or {upper}"
        )
    return metadata


def task_settings(config: Config, model: nn.Module) -> dict[str, Any]:
    """Metadata fields of all tasks, from test pipeline and data set.

    Raises:
        ValueError: the test pipeline has a setting that the runtime does not follow.
    """
    return {**class_settings(config, model), **pipeline_settings(config)}


def class_settings(config: Config, model: nn.Module) -> dict[str, Any]:
    """Metadata fields of the classes."""
    dataset_meta = getattr(model, "dataset_meta", {}) or read_test_metainfo(config)
    classes = tuple(dataset_meta.get("classes", ()))
    return dict(
        classes=classes,
        category_ids=category_ids({**dataset_meta, "classes": classes}),
        palette=tuple(tuple(color) for color in dataset_meta.get("palette") or ()),
    )


def cut_settings(config: Config, model: nn.Module) -> dict[str, Any]:
    """Metadata fields of models of photographs; the rule is that of
    :meth:`mmeformer.inference.predictor.Predictor.window_of`."""
    side = native_size(config)
    if side is None:
        return {}
    record = TrainingImages.from_meta(getattr(model, "dataset_meta", None))
    _, longest = (record and record.sides) or (0, 0)
    return dict(cut_above=int(LARGE * max(side, longest)), window=side)


def detector_settings(config: Config, model: nn.Module, test_cfg: dict) -> dict[str, Any]:
    """:func:`task_settings` and the fields of detectors, from ``test_cfg`` of the last stage."""
    return dict(
        pad_divisor=config.model.data_preprocessor.get("pad_size_divisor", 1),
        score_threshold=test_cfg["score_thr"],
        iou_threshold=test_cfg["nms"]["iou_threshold"],
        # Without a limit, mmdet's multiclass_nms keeps all.
        max_per_image=test_cfg["max_per_img"] if test_cfg["max_per_img"] > 0 else None,
        **task_settings(config, model),
    )
