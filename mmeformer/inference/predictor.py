# SPDX-License-Identifier: Apache-2.0
"""Predictors, which turn images into results with a trained model: the base of all tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import new_class
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.infer import BaseInferencer
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from torch import nn

from mmeformer import configs, settings, tasks
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.load import use_published
from mmeformer.checkpoints.matching import require_match
from mmeformer.deploy.fold import fold
from mmeformer.images import PLAIN, TOO_THIN, Reading, is_too_thin
from mmeformer.results import SCORE_THR, category_ids, check_score_thr, chosen_labels
from mmeformer.training_images import TrainingImages
from mmeformer.windows import Progress, Window, predict_windows, windows

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
        score_thr: objects with this score or a lower one are left out of all results; None for
            results without scores.

    Attributes:
        classes: names, by label.
        category_ids: ids of the classes in the annotation file of the training, by label; from 1
            if the checkpoint does not have them.
        labels: those of the classes that results are limited to; None for all.
        remarks: what people should know before they use the results, one sentence each.
    """

    reading: Reading = PLAIN
    """How image files are read: as the test pipeline of the config does."""

    inferencer_class: type[BaseInferencer]
    """OpenMMLab's inferencer of the task."""

    large: float
    """Images whose longer side exceeds ``native_size``, and the largest image of the training, by
    this factor are cut into windows."""

    pads_windows: bool = False
    """Whether windows of images that are smaller than a window are padded to its size."""

    has_scores: bool = True
    """Whether results have scores, so that those below a threshold can be left out."""

    mask_formats: tuple[str, ...] = ()
    """Formats of mask files, the default first; none for tasks without such files."""

    writes_json: bool = True
    """Whether results go to a JSON file, as :meth:`entries` gives them."""

    columns: tuple[str, ...] = ()
    """Columns of the table that results go to as well, as :meth:`cells` gives them; none for tasks
    without a table."""

    training_images: TrainingImages = TrainingImages(None)
    """Record of the images that the model was trained on."""

    legend: list[dict] | None = None
    """Classes as ``classes.json`` lists them, for tasks whose files of results do not name them."""

    def __init__(
        self,
        inferencer: BaseInferencer,
        native_size: int | None = None,
        mask_format: str | None = None,
        score_thr: float | None = None,
    ) -> None:
        self.inferencer = inferencer
        self.native_size = native_size
        self.score_thr = score_thr
        self.mask_format = mask_format or next(iter(self.mask_formats), None)
        self.remarks: list[str] = []
        self.labels: list[int] | None = None
        dataset_meta = inferencer.model.dataset_meta
        self.classes = tuple(dataset_meta["classes"])
        self.category_ids = category_ids(dataset_meta)
        if record := TrainingImages.from_meta(dataset_meta):
            self.training_images = record

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
            score_thr = SCORE_THR if score_thr is None else score_thr
            _set_score_thr(config.model, score_thr)
        elif score_thr is not None:
            raise ValueError("a score threshold is for detection; these results have no boxes")
        if mask_format is not None and mask_format not in cls.mask_formats:
            if not cls.mask_formats:
                raise ValueError(
                    "a mask format is for segmentation; detections are written as JSON"
                )
            raise ValueError(f"mask format {mask_format!r} must be {' or '.join(cls.mask_formats)}")
        cls.set_visualizer(config.visualizer)
        # Pictures are arrays here; the backends would begin another run of a tracker.
        config.visualizer.vis_backends = None

        inferencer_class = new_class("Inferencer", (StrictInferencer, cls.inferencer_class))
        inferencer = inferencer_class(
            config, checkpoint, device=device, scope=config.default_scope, show_progress=False
        )
        return cls(inferencer, configs.native_size(config), mask_format, score_thr)

    @property
    def model(self) -> BaseModel:
        """The folded model."""
        return self.inferencer.model

    def prepare(self, image: np.ndarray) -> dict:
        """Run the test pipeline on an image.

        Raises:
            ValueError, cv2.error: the image cannot be resized to the model's input.
        """
        try:
            return self.inferencer.pipeline(image)
        except cv2.error as error:
            if is_too_thin(error):
                raise ValueError(f"the image {TOO_THIN}") from error
            raise

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
        return [self._wanted(found[index]) for index in range(len(prepared))]

    def _wanted(self, result: Any) -> Any:
        """The objects above the threshold and of the wanted classes."""
        # Not every head reads score_thr: those like DETR's report all their queries.
        if self.score_thr is not None:
            result = result.take(result.scores > self.score_thr)
        return result if self.labels is None else result.take(np.isin(result.labels, self.labels))

    def limit_to(self, classes: Sequence[str]) -> None:
        """Leave objects of other classes out of all results.

        Raises:
            ValueError: the model has no such class, there are no names, or its results are no
                objects.
        """
        if not self.has_scores:
            raise ValueError("a choice of classes is for detection; these results have no boxes")
        self.labels = chosen_labels(classes, self.classes)

    @property
    def categories(self) -> dict[int, str]:
        """Names of the classes, by category id."""
        return dict(zip(self.category_ids, self.classes, strict=True))

    @property
    def window_size(self) -> int | None:
        """Side in pixels of the windows that large images are cut into by default."""
        return self.native_size

    def window_of(self, size: tuple[int, int]) -> int | None:
        """Side of the windows that an image is cut into by default; None: it is not cut.

        Args:
            size: height and width of the image.
        """
        if self.native_size is None:
            return None
        known = self.training_images.sides or (0, 0)
        is_large = max(size) > self.large * max(self.native_size, known[1])
        return self.native_size if is_large else None

    def scale_warning(self, size: tuple[int, int], window: int | None) -> str | None:
        """A sentence if objects of an image appear at another scale than in training, or None.

        Args:
            size: height and width of the image.
            window: side of the windows it is cut into, or None.
        """
        # Objects in whole photographs have any size in pixels.
        return None if window is None else self.training_images.scale_warning(window)

    def predict_images(self, images: Sequence[np.ndarray], batch_size: int = 1) -> list[Result]:
        """Predict on images; those that are large for the model are cut into windows.

        Args:
            images: see the class; those of one size go through the model together.
            batch_size: windows per call of the model.
        """
        sides = [self.window_of(image.shape[:2]) for image in images]
        whole = [self.prepare(image) for image, side in zip(images, sides, strict=True) if not side]
        results = iter(self.predict(whole))
        return [
            self.predict_windows(image, side, side // 4, batch_size) if side else next(results)
            for image, side in zip(images, sides, strict=True)
        ]

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
            lambda crops: self.predict([self.prepare(crop) for crop in crops]),
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
        return self.annotations(result, self.classes, self.category_ids)

    @classmethod
    def annotations(
        cls, result: Result, classes: Sequence[str], category_ids: Sequence[int]
    ) -> list[dict]:
        """See :meth:`entries`; without a model, for results of exported files.

        Args:
            result: of an image.
            classes, category_ids: see the class.

        Raises:
            ValueError: the results of the task are no objects.
        """
        raise ValueError(f"{type(result).__name__} has no objects, so no COCO annotations")

    def cells(self, result: Result) -> list[str]:
        """A row of the table, one text for each of :attr:`columns`."""
        raise NotImplementedError(f"{type(self).__name__} writes no table")

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
        use_published(model, checkpoint, self._weights)
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


def _set_score_thr(model: ConfigDict, score_thr: float) -> None:
    """Set the score threshold in a detector's test settings, in place, if it has any.

    The results are the same as if low scores were dropped afterwards, since only better boxes
    suppress others; but no masks are computed for them.
    """
    if test_cfg := model.get("test_cfg"):
        test_cfg.get("rcnn", test_cfg).score_thr = score_thr


def load_predictor(
    config: Config,
    checkpoint: str,
    *,
    device: str | None = None,
    score_thr: float | None = None,
    mask_format: str | None = None,
    classes: Sequence[str] | None = None,
) -> Predictor[Any]:
    """Load a trained model of any task.

    Args:
        config: is not changed.
        checkpoint: a trained model of this config, read weights-only.
        device: such as ``cpu`` or ``cuda:1``; None takes the first GPU, if there is one.
        score_thr: detections with this score or a lower one are not reported (default 0.3).
        mask_format: of segmentation masks: ``palette`` (default) or ``ids``.
        classes: names of the classes to report; None reports all.

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
    if score_thr is not None:
        check_score_thr(score_thr)
    device = _existing_device(device)
    checkpoint = configs.existing_checkpoint(checkpoint)
    given, config = config, Config(config.copy().to_dict(), filename=config.filename)
    # The weights come from the checkpoint, and images to predict on have no annotations.
    configs.drop_pretrained(config.model)
    dataset = config.test_dataloader.dataset
    dataset.pipeline = settings.without_annotations(dataset.pipeline)
    reading = Reading.of_config(dataset.pipeline)
    for index, step in enumerate(dataset.pipeline):
        if settings.type_name(step) == "LoadImageFromFile":
            # The inferencers put one in its place that takes arrays.
            dataset.pipeline[index] = ConfigDict(type="LoadImageFromFile")
    safe_load.install()
    # mmengine's own inferencer, unlike those of mmdet and mmseg, leaves this to its caller.
    init_default_scope(config.default_scope)
    predictor: Predictor[Any] = tasks.load(task.predictor).from_config(
        config, checkpoint, device=device, score_thr=score_thr, mask_format=mask_format
    )
    # Now that the classes of the model are imported; without what the predictor has set.
    settings.check(given, ["model"])
    predictor.reading = reading
    if classes is not None:
        predictor.limit_to(classes)
    return predictor


def _existing_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(name))
    # RuntimeError: unknown or absent; AssertionError: torch was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        # The first sentence; of MPS, PyTorch goes on with all of its kernels.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"device {name} cannot be used here ({reason}); this machine has "
            f"cpu and {count} CUDA device{'s' * (count != 1)}"
        ) from error
    return name
