# SPDX-License-Identifier: Apache-2.0
"""Predictors, which turn images into results with a trained model: the base of all tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import new_class
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.infer import BaseInferencer
from mmengine.model import BaseModel
from torch import nn

from mmeformer import configs, tasks
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.matching import require_match
from mmeformer.deploy.fold import fold
from mmeformer.images import PLAIN, Reading
from mmeformer.windows import Progress, Window, predict_windows, windows

SCORE_THR = 0.3
"""Default score threshold."""

Result = TypeVar("Result")


class Predictor(ABC, Generic[Result]):
    """Predicts with a model of one task: from images to results, files and pictures.

    This class builds the model, makes batches, and cuts large images into windows. A task's
    subclass defines how samples become results, and how results of windows are merged, drawn and
    written. Images are ``(H, W, 3)`` uint8, blue, green, red. Results are those of
    :mod:`mmeformer.results`.

    Args:
        inferencer: of OpenMMLab, with the folded model, the test pipeline and the visualizer.
        native_size: side in pixels of the largest square that the model sees without resizing, or
            None if the config does not tell. Windows of large images have this side.
        mask_format: one of ``mask_formats``; None takes the first.
    """

    reading: Reading = PLAIN
    """How image files are read: as the test pipeline of the config does."""

    inferencer_class: type[BaseInferencer]
    """OpenMMLab's inferencer of the task."""

    large: float
    """Images whose longer side exceeds ``native_size`` by this factor are cut into windows."""

    pads_windows: bool = False
    """Whether windows of images that are smaller than a window are padded to its size."""

    has_scores: bool = True
    """Whether results have scores, so that those below a threshold can be left out."""

    mask_formats: tuple[str, ...] = ()
    """Formats of mask files, the default first; none for tasks without such files."""

    writes_json: bool = True
    """Whether results go to a JSON file, as :meth:`entries` gives them."""

    legend: list[dict] | None = None
    """Classes as ``classes.json`` lists them, for tasks whose files of results do not name them."""

    def __init__(
        self,
        inferencer: BaseInferencer,
        native_size: int | None = None,
        mask_format: str | None = None,
    ) -> None:
        self.inferencer = inferencer
        self.native_size = native_size
        self.mask_format = mask_format or next(iter(self.mask_formats), None)
        self.classes = tuple(inferencer.model.dataset_meta["classes"])

    @classmethod
    def from_config(
        cls,
        config: Config,
        checkpoint: str,
        *,
        device: str,
        score_thr: float | None = None,
        mask_format: str | None = None,
    ) -> Predictor[Result]:
        """Build a predictor from a config that :func:`load_predictor` prepared; changes the config.

        Args:
            config, checkpoint, device, score_thr, mask_format: see :func:`load_predictor`.

        Raises:
            ValueError: the task does not have one of the options.
        """
        if cls.has_scores:
            _set_score_thr(config.model.test_cfg, SCORE_THR if score_thr is None else score_thr)
        elif score_thr is not None:
            raise ValueError("a score threshold is for detection; every pixel has a class")
        if mask_format is not None and mask_format not in cls.mask_formats:
            if not cls.mask_formats:
                raise ValueError(
                    "a mask format is for segmentation; detections are written as JSON"
                )
            raise ValueError(f"mask format {mask_format!r} must be {' or '.join(cls.mask_formats)}")
        cls.set_visualizer(config.visualizer)

        inferencer_class = new_class("Inferencer", (StrictInferencer, cls.inferencer_class))
        inferencer = inferencer_class(
            config, checkpoint, device=device, scope=config.default_scope, show_progress=False
        )
        return cls(inferencer, native_size(config), mask_format)

    @property
    def model(self) -> BaseModel:
        """The folded model."""
        return self.inferencer.model

    def prepare(self, image: np.ndarray) -> dict:
        """Run the test pipeline on an image.

        Raises:
            ValueError, cv2.error: the image cannot be resized to the model's input.
        """
        return self.inferencer.pipeline(image)

    def predict(self, prepared: Sequence[dict]) -> list[Result]:
        """Predict on prepared images.

        Images of one size go through the model together. A batch of mixed sizes would be padded,
        and the result of an image would depend on the others.
        """
        groups = defaultdict(list)
        for index, item in enumerate(prepared):
            groups[tuple(item["inputs"].shape)].append(index)
        found: dict[int, Result] = {}
        for members in groups.values():
            batch = self.inferencer.collate_fn([prepared[index] for index in members])
            with torch.no_grad():
                found.update(zip(members, self.results_of_batch(batch), strict=True))
        return [found[index] for index in range(len(prepared))]

    def predict_images(self, images: Sequence[np.ndarray]) -> list[Result]:
        """Predict on images."""
        return self.predict([self.prepare(image) for image in images])

    def predict_windows(
        self,
        image: np.ndarray,
        size: int,
        overlap: int,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> Result:
        """Predict on an image of any size, window by window.

        Beside the image and the results, only one batch of windows is in memory.

        Args:
            image: see above.
            size, overlap: of the windows, see :func:`mmeformer.windows.windows`.
            batch_size: windows per call of the model.
            progress: called with the numbers of finished and of all windows.
        """
        height, width = image.shape[:2]
        places = windows(width, height, size, overlap)
        results = predict_windows(
            image,
            places,
            self.predict_images,
            batch_size,
            size if self.pads_windows else None,
            progress,
        )
        return self.merge(places, results, (height, width))

    @classmethod
    def set_visualizer(cls, settings: ConfigDict) -> None:
        """Adapt the config's visualizer to :meth:`draw`, in place; by default nothing changes."""

    @abstractmethod
    def results_of_batch(self, batch: dict) -> list[Result]:
        """Predict on a collated batch; one result per image."""

    @abstractmethod
    def merge(
        self, places: Sequence[Window], results: Iterable[Result], size: tuple[int, int]
    ) -> Result:
        """Merge the results of windows into that of the whole image.

        Args:
            places: the windows.
            results: of each window, in its own pixels; computed as they are read.
            size: height and width of the image.
        """

    @abstractmethod
    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        """Draw a result into a picture of the size that
        :func:`mmeformer.inference.pictures.at_picture_size` gives the image."""

    def entries(self, result: Result) -> list[dict]:
        """A result as COCO annotations, without ``id`` and ``image_id``."""
        raise NotImplementedError(f"{type(self).__name__} writes no JSON")

    def write_files(self, out: Path, name: str, result: Result) -> None:
        """Write the files that the task has per image, if any.

        Args:
            out: the output folder.
            name: of the image.
            result: of the image.
        """


class StrictInferencer(BaseInferencer):
    """Mixin for OpenMMLab's inferencers that requires matching weights and folds the model.

    It must come before the inferencer among the bases of a class. The inferencers themselves load
    whichever weights happen to fit.
    """

    def _init_model(self, cfg, weights: str, device: str) -> nn.Module:
        self._weights = weights
        return fold(super()._init_model(cfg, weights, device))

    def _init_collate(self, cfg) -> Callable:
        # mmengine's own search ends with the same function, after a warning.
        return pseudo_collate

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict, cfg) -> None:
        require_match(model, checkpoint, self._weights)
        meta = checkpoint.setdefault("meta", {})
        if "dataset_meta" not in meta and "CLASSES" not in meta:
            # Otherwise the inferencers use the classes of COCO or Cityscapes.
            meta["dataset_meta"] = configs.read_test_metainfo(cfg)
            if not meta["dataset_meta"].get("classes"):
                raise ValueError(
                    "neither the checkpoint nor the config names the classes: set "
                    "test_dataloader.dataset.metainfo=dict(classes=(...))"
                )
        super()._load_weights_to_model(model, checkpoint, cfg)


def _set_score_thr(test_cfg: ConfigDict, score_thr: float) -> None:
    """Set the score threshold of a detector's test settings, in place.

    The results are the same as if low scores were dropped afterwards, since only better boxes
    suppress others; but no masks are computed for them.
    """
    test_cfg.get("rcnn", test_cfg).score_thr = score_thr


def load_predictor(
    config: Config,
    checkpoint: str,
    *,
    device: str | None = None,
    score_thr: float | None = None,
    mask_format: str | None = None,
) -> Predictor[Any]:
    """Load a trained model of any task.

    Args:
        config: is not changed.
        checkpoint: a trained model of this config, read weights-only.
        device: such as ``cpu`` or ``cuda:1``; None takes the first GPU, if there is one.
        score_thr: detections with this score or a lower one are not reported (default 0.3).
        mask_format: of segmentation masks: ``palette`` (default) or ``ids``.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        CheckpointError: it is damaged, refused, or not of this config's model.
        ValueError: an argument is out of range or does not fit the task; the device does not exist;
            the config is of no known task, or has no model or test data.
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
    reading = Reading.of_config(dataset.pipeline)
    for index, step in enumerate(dataset.pipeline):
        if step.type.endswith("LoadImageFromFile"):
            # The inferencers put one in its place that takes arrays.
            dataset.pipeline[index] = ConfigDict(type="LoadImageFromFile")
    safe_load.install()
    predictor = tasks.load(task.predictor).from_config(
        config, checkpoint, device=device, score_thr=score_thr, mask_format=mask_format
    )
    predictor.reading = reading
    return predictor


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
    """Side in pixels of the largest square that a model of this config sees without resizing.

    This is the shorter side that the test pipeline resizes to, else the crop size of the
    segmentor's test settings or of its data preprocessor, else None.
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
