# SPDX-License-Identifier: Apache-2.0
"""Metadata of an export, read from its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmeformer import tasks
from mmeformer.configs import read_test_metainfo
from mmeformer.images import Reading
from mmeformer.runtime.metadata import Metadata
from mmeformer.version import __version__

_NEUTRAL_STEPS = ("Load", "Pack", "ConvertBoxType")
"""Steps of a test pipeline that leave the pixels of an image as they are."""


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
        ValueError: the test pipeline has steps that the runtime lacks.
    """
    graph = tasks.load(tasks.exports()[task].graph)
    preprocessor = config.model.data_preprocessor
    # The bare backbone can be that of a config without test data.
    dataset = config.get("test_dataloader", {}).get("dataset", {})
    reading = Reading.of_config(dataset.get("pipeline", ()))
    return Metadata(
        task=task,
        version=__version__,
        config=Path(config.filename or "config").stem,
        mean=tuple(preprocessor.mean),
        std=tuple(preprocessor.std),
        bgr_to_rgb=preprocessor.get("bgr_to_rgb", False),
        preprocessing_in_graph=preprocessing_in_graph,
        batch=batch,
        size=size,
        bands=reading.bands,
        stretch=reading.stretch,
        **graph.settings(config, model),
    )


def task_settings(config: Config, model: nn.Module) -> dict[str, Any]:
    """Metadata fields of all tasks, from test pipeline and data set.

    Raises:
        ValueError: the test pipeline has steps that the runtime lacks.
    """
    dataset_meta = getattr(model, "dataset_meta", {}) or read_test_metainfo(config)
    return dict(
        classes=tuple(dataset_meta.get("classes", ())),
        palette=tuple(tuple(color) for color in dataset_meta.get("palette") or ()),
        **_pipeline_settings(config),
    )


def detector_settings(config: Config, model: nn.Module, test_cfg: dict) -> dict[str, Any]:
    """:func:`task_settings` and the fields of detectors, from ``test_cfg`` of the last stage."""
    return dict(
        pad_divisor=config.model.data_preprocessor.get("pad_size_divisor", 1),
        score_threshold=test_cfg["score_thr"],
        iou_threshold=test_cfg["nms"]["iou_threshold"],
        max_per_image=test_cfg["max_per_img"],
        **task_settings(config, model),
    )


def _pipeline_settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for step in config.test_dataloader.dataset.pipeline:
        name = step["type"].rpartition(".")[2]
        if name.startswith(_NEUTRAL_STEPS):
            continue
        if name == "Resize" and not settings and "scale" in step:
            scale = step["scale"]
            settings["scale"] = (scale, scale) if isinstance(scale, int) else tuple(scale)
            settings["keep_ratio"] = step.get("keep_ratio", False)
        elif name == "ResizeToMultiple" and "multiple" not in settings:
            settings["multiple"] = step.get("size_divisor", 32)
        else:
            raise ValueError(
                f"the runtime does not have the step {step['type']} of the test pipeline, only one "
                "Resize with a scale, then one ResizeToMultiple"
            )
    return settings
