# SPDX-License-Identifier: Apache-2.0
"""Build the data sets of a config for checking, and draw samples of them with their labels."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, METRICS, MODELS, VISUALIZERS, init_default_scope

from mmeformer.checks.channels import require_channels
from mmeformer.checks.classes import flat, mirrored_by_flips, require_counts
from mmeformer.checks.findings import ERROR, WARNING, Finding
from mmeformer.checks.interface import CheckedDataset
from mmeformer.configs import drop_pretrained
from mmeformer.files import write_bytes
from mmeformer.images import read_image
from mmeformer.settings import type_name
from mmeformer.tasks import of_config

SPLITS = ("train", "val", "test")
DRAWN = 16
"""Number of samples in a picture."""
TILE = 320
"""Side of one sample in pixels."""
# Transforms that load an image and its labels; all others change them.
KEPT_TRANSFORMS = ("Load", "ConvertBoxType", "Pack")


def datasets_of(config: Config, split: str) -> list[BaseDataset]:
    """Build the data sets of a split without reading them; several if the config has a wrapper.

    Raises:
        ValueError: the config has no such split.
    """
    return [_build(settings) for settings in _settings(config, split)]


def checked_datasets_of(config: Config, split: str) -> list[CheckedDataset]:
    """:func:`datasets_of`; a library's own data set becomes the one of this project with checks.

    Raises:
        ValueError: the config has no such split, or a data set that has no checks.
    """
    datasets = []
    for settings in _settings(config, split):
        dataset = _build(settings)
        if not isinstance(dataset, CheckedDataset):
            dataset = _build({**settings, "type": _with_checks(type(dataset), config)})
        datasets.append(dataset)
    return datasets


def _settings(config: Config, split: str) -> list[Mapping]:
    """Configs of the data sets of a split."""
    loader = config.get(f"{split}_dataloader")
    if loader is None:
        raise ValueError(f"{config.filename} has no {split}_dataloader; choose another --split")
    init_default_scope(config.get("default_scope", "mmengine"))
    return [settings for _, settings in flat(loader["dataset"])]


def _build(settings: Mapping) -> Any:
    """A data set that only loads images and labels."""
    settings = copy.deepcopy(settings)
    pipeline = [
        step for step in settings.get("pipeline", []) if type_name(step).startswith(KEPT_TRANSFORMS)
    ]
    dataset = DATASETS.build({**settings, "pipeline": pipeline, "lazy_init": True})
    # Samples are drawn even if the data set has errors.
    dataset.checked = False
    return dataset


def _with_checks(kind: type, config: Config) -> str:
    """Name of this project's data set that adds checks to one of a library."""
    task = of_config(config)
    import_module(f"mmeformer.{task.name}")
    for name in task.datasets:
        if kind in DATASETS.get(name).__mro__:
            return name
    raise ValueError(
        f"data set {kind.__name__} of {config.filename} cannot be checked: use "
        f"{' or '.join(task.datasets)}"
    )


def check_model(config: Config, splits: Sequence[str]) -> str | None:
    """Build the model of a config, if it has one, and compare its parts, and it with the data.

    Returns:
        A warning, see :func:`mmeformer.checks.classes.require_counts`.

    Raises:
        ValueError: numbers of channels or classes differ; the message names both settings.
    """
    if not (settings := config.get("model")):
        return None
    init_default_scope(config.get("default_scope", "mmengine"))
    settings = copy.deepcopy(settings)
    # Nothing is computed, so that no weights need to be downloaded.
    drop_pretrained(settings)
    model = MODELS.build(settings)
    require_channels(config, model)
    return require_counts(config, model, splits)


def check_flips(config: Config, split: str) -> list[Finding]:
    """A finding if images of a split are flipped into those of another class."""
    message = mirrored_by_flips(config, split)
    return [Finding(WARNING, "flips", f"{split}_dataloader", message)] if message else []


def check_evaluator(config: Config, split: str, dataset: CheckedDataset) -> list[Finding]:
    """A finding if the metrics of a split read other labels than its data set, or cannot."""
    settings = config.get(f"{split}_evaluator") or []
    try:
        metrics = [
            METRICS.build(copy.deepcopy(item))
            for item in (settings if isinstance(settings, (list, tuple)) else [settings])
        ]
        dataset.check_metrics(metrics)
    except (OSError, ValueError) as error:
        return [Finding(ERROR, "evaluator", f"{split}_evaluator", str(error))]
    return []


def location(dataset: BaseDataset) -> str:
    """Annotation file or folder of a data set, or else its image folder."""
    return str(dataset.ann_file or next(iter(dataset.data_prefix.values())))


def draw_samples(dataset: BaseDataset, config: Config, target: Path) -> int:
    """Draw up to :data:`DRAWN` samples with their labels into one PNG file.

    The samples are spread evenly over the data set; those with labels come first.

    Returns:
        The number of samples drawn; with 0 no file is written.

    Raises:
        OSError: the file cannot be written.
        Exception: any error of the data set about annotations that cannot be read.
    """
    dataset.full_init()
    order = np.linspace(0, len(dataset) - 1, min(len(dataset), 10 * DRAWN)).astype(int).tolist()
    order.sort(key=lambda index: not dataset.get_data_info(index).get("instances", True))
    visualizer = VISUALIZERS.build(
        {
            **config.visualizer,
            "name": f"samples of {location(dataset)}",
            "vis_backends": None,
            "save_dir": None,
        }
    )
    visualizer.dataset_meta = dataset.metainfo
    tiles: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in order:
            if len(tiles) == DRAWN:
                break
            try:
                sample = dataset.pipeline(dataset.get_data_info(index))
            except (OSError, AssertionError, ValueError, cv2.error):
                # The check reports these files.
                continue
            labels = sample["data_samples"]
            # mmdet's visualizer takes tensors only, not box objects.
            if "gt_instances" in labels and hasattr(labels.gt_instances.bboxes, "tensor"):
                labels.gt_instances.bboxes = labels.gt_instances.bboxes.tensor
            picture = Path(folder, "picture.png")
            image = sample["inputs"].permute(1, 2, 0).numpy()
            with warnings.catch_warnings():
                # Crops and random sizes cut objects; what is outside in the labels is a finding.
                warnings.filterwarnings("ignore", message=".* is out of bounds, the drawn ")
                visualizer.add_datasample(
                    "sample",
                    np.ascontiguousarray(image[..., ::-1]),
                    labels,
                    draw_pred=False,
                    out_file=str(picture),
                )
            tiles.append(_tile(read_image(picture)))
    if tiles:
        write_bytes(target, cv2.imencode(".png", _grid(tiles))[1].tobytes())
    return len(tiles)


def _tile(image: np.ndarray) -> np.ndarray:
    """The whole image, resized and padded to (TILE, TILE, 3)."""
    scale = TILE / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    return cv2.copyMakeBorder(
        resized, 0, TILE - height, 0, TILE - width, cv2.BORDER_CONSTANT, value=(60, 60, 60)
    )


def _grid(tiles: list[np.ndarray]) -> np.ndarray:
    columns = min(4, len(tiles))
    blank = np.full_like(tiles[0], 60)
    tiles = tiles + [blank] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])
