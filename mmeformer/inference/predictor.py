# SPDX-License-Identifier: Apache-2.0
"""What the three tasks have in common: a trained model behind OpenMMLab's inferencer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.infer import BaseInferencer
from mmengine.registry import DATASETS
from torch import nn

from mmeformer import configs, tasks
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.matching import require_match
from mmeformer.deploy.fold import fold

SCORE_THR = 0.3
SMALLEST_PICTURE, LARGEST_PICTURE = 640, 4096
"""Longer side of pictures, pixels: names do not fit into smaller ones, and matplotlib, which draws
them, takes long before it reaches its limit of 65,535."""

NAME_PIXELS = 5000
"""Pixels of a picture per name; with more objects than that names are left out, for they would
cover the picture. The colours tell the classes."""

Progress = Callable[[int, int], None]


class TrustedWeights:
    """Mixin for OpenMMLab's inferencers: the weights must be the model's, and the model is folded.

    The inferencers themselves load what happens to fit.
    """

    def _init_model(self, cfg, weights: str, device: str) -> nn.Module:
        self._weights = weights
        return fold(super()._init_model(cfg, weights, device))

    def _init_collate(self, cfg) -> Callable:
        # What mmengine comes to as well, after a warning about its search for another.
        return pseudo_collate

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict, cfg) -> None:
        require_match(model, checkpoint, self._weights)
        meta = checkpoint.setdefault("meta", {})
        if "dataset_meta" not in meta and "CLASSES" not in meta:
            # The inferencers would take the classes of COCO or Cityscapes.
            meta["dataset_meta"] = _metainfo(cfg)
        super()._load_weights_to_model(model, checkpoint, cfg)


def _metainfo(config: Config) -> dict:
    """Classes, and palette if there is one, of the config's test data."""
    dataset = config.test_dataloader.dataset
    metainfo = dataset.get("metainfo") or getattr(DATASETS.get(dataset.type), "METAINFO", {})
    if not metainfo.get("classes"):
        raise ValueError(
            "neither the checkpoint nor the config names the classes: set "
            "test_dataloader.dataset.metainfo=dict(classes=(...))"
        )
    return dict(metainfo)


class Predictor(ABC):
    """A model of one task, from images to results, files and pictures.

    Images are ``(H, W, 3)`` uint8, blue, green, red. What a result is, is the task's own matter.

    Args:
        inferencer: of OpenMMLab, with the folded model, the test pipeline and the visualizer.
        native_size: side of the squares of pixels that the model sees at their own size, or None
            where the config does not tell. Windows of large images are that large.
    """

    LARGE: float
    """Images whose longer side exceeds ``native_size`` by this factor are cut into windows."""

    json: bool = True
    """Whether results go to a JSON file, as :meth:`entries` gives them."""

    legend: list[dict] | None = None
    """What files of results do not say themselves about the classes, for ``classes.json``."""

    def __init__(self, inferencer: BaseInferencer, native_size: int | None) -> None:
        self.inferencer = inferencer
        self.native_size = native_size
        self.classes = tuple(inferencer.model.dataset_meta["classes"])

    @property
    def model(self) -> nn.Module:
        """The folded model."""
        return self.inferencer.model

    def prepare(self, image: np.ndarray) -> dict:
        """An image through the test pipeline.

        Raises:
            ValueError, cv2.error: an image that cannot be brought to the model's size.
        """
        return self.inferencer.pipeline(image)

    def predict(self, prepared: Sequence[dict]) -> list[Any]:
        """Results of prepared images.

        Those of one size go through the model together: a batch of mixed sizes would be padded,
        and what is found in an image would depend on its neighbours.
        """
        groups = defaultdict(list)
        for index, item in enumerate(prepared):
            groups[tuple(item["inputs"].shape)].append(index)
        results: list[Any] = [None] * len(prepared)
        for members in groups.values():
            batch = self.inferencer.collate_fn([prepared[index] for index in members])
            with torch.no_grad():
                found = self._forward_batch(batch)
            for index, result in zip(members, found, strict=True):
                results[index] = result
        return results

    def predict_images(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Results of images."""
        return self.predict([self.prepare(image) for image in images])

    @abstractmethod
    def _forward_batch(self, batch: dict) -> list[Any]:
        """Results of a collated batch."""

    @abstractmethod
    def predict_windows(
        self, image: np.ndarray, size: int, overlap: int, batch_size: int, progress: Progress
    ) -> Any:
        """Result of an image of any size, window by window.

        Args:
            image: see above.
            size, overlap: of the windows, see :func:`mmeformer.windows.windows`.
            batch_size: windows per call of the model.
            progress: called with the number of finished windows and of all.
        """

    @abstractmethod
    def draw(self, image: np.ndarray, result: Any) -> np.ndarray:
        """Picture of a result, of the size that :func:`at_picture_size` gives the image."""

    def entries(self, result: Any, size: tuple[int, int]) -> list[dict]:
        """A result as COCO annotations, without ``id`` and ``image_id``.

        Args:
            result: of one image.
            size: height and width of the image.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no JSON")

    @abstractmethod
    def write_files(self, out: Path, name: str, result: Any) -> None:
        """Write a result's own files below ``out``, for tasks that have some per image.

        Args:
            out: the output folder.
            name: of the image.
            result: of the image.
        """


def load_predictor(
    config: Config,
    checkpoint: str,
    *,
    device: str | None = None,
    score_thr: float | None = None,
    mask_format: str | None = None,
) -> Predictor:
    """A predictor for a trained model.

    Args:
        config: of any of the three tasks; left as it is.
        checkpoint: a trained model of this config, read weights-only.
        device: such as ``cpu`` or ``cuda:1``; None takes the first GPU, if there is one.
        score_thr: detections with this score or a lower one are not reported (default 0.3).
        mask_format: of segmentation masks: ``palette`` (default) or ``ids``.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        CheckpointError: it is damaged, refused, or not of this config's model.
        ValueError: an argument out of range or not of this task; a device that is not there; a
            config that is none of a model of the three tasks.
    """
    task = tasks.of_config(config)
    if missing := [key for key in ("model", "test_dataloader") if key not in config]:
        raise ValueError(
            f"config {config.filename or ''} cannot be used to predict: missing "
            f"{', '.join(missing)}"
        )
    if score_thr is not None and not 0 <= score_thr < 1:
        raise ValueError(f"score threshold {score_thr} must be at least 0 and less than 1")
    device = _existing_device(device)
    checkpoint = configs.existing_checkpoint(checkpoint)
    config = Config(config.copy().to_dict(), filename=config.filename)
    # The weights come from the checkpoint, and images to predict on have no annotations.
    configs.drop_pretrained(config.model)
    dataset = config.test_dataloader.dataset
    dataset.pipeline = [
        step
        for step in dataset.pipeline
        if "Annotations" not in step.type and "ConvertBoxType" not in step.type
    ]
    safe_load.install()
    return tasks.load(task.predictor).from_config(
        config, checkpoint, device=device, score_thr=score_thr, mask_format=mask_format
    )


def _existing_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(name))
    # RuntimeError: unknown or absent; AssertionError: torch was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise ValueError(
            f"device {name} cannot be used here ({str(error).splitlines()[0]}); this machine has "
            f"cpu and {count} CUDA device{'s' * (count != 1)}"
        ) from error
    return name


def native_size(config: Config) -> int | None:
    """Side of the squares of pixels that a model of this config sees at their own size.

    That is the shorter side that the test pipeline resizes to, else the crop size of the
    segmentor's test settings or of its data preprocessor; None where there is none.
    """
    for step in config.test_dataloader.dataset.pipeline:
        if step.type.rpartition(".")[2] == "Resize" and "scale" in step:
            return _shorter_side(step.scale)
    for settings, key in (
        (config.model.get("test_cfg"), "crop_size"),
        (config.model.get("data_preprocessor"), "size"),
    ):
        if settings and settings.get(key):
            return _shorter_side(settings[key])
    return None


def _shorter_side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else min(size)


def at_picture_size(image: np.ndarray) -> tuple[np.ndarray, float]:
    """An image as it is drawn on, and its scale.

    Small images are enlarged by a whole number, so that pixels stay pixels; see
    :data:`SMALLEST_PICTURE`.
    """
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = min(max(1, SMALLEST_PICTURE // longer), LARGEST_PICTURE / longer)
    if scale == 1:
        return image, 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(image, size, interpolation=method), scale
