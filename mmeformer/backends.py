# SPDX-License-Identifier: Apache-2.0
"""What a loaded model (:mod:`mmeformer.model`) predicts with: a checkpoint, or an exported file."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mmeformer.errors import UserError
from mmeformer.images import PLAIN, Reading
from mmeformer.results import SCORE_THR, category_ids, check_score_thr, chosen_labels

_DRAWING = Lock()
"""Visualizers draw every picture into the same figure, and matplotlib is for one thread."""


class Backend(ABC):
    """What a :class:`mmeformer.model.Model` predicts with.

    Copies share it. Pickled, it is the arguments it was made of (files, not weights); another
    process makes it anew at its first use.

    Attributes:
        arguments: of the class.
        classes: names, by label.
        category_ids: of COCO, by label.
        reading: how files are read.
    """

    arguments: tuple[Any, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    reading: Reading = PLAIN

    def __deepcopy__(self, memo: dict) -> Backend:
        return self

    def __reduce__(self) -> tuple:
        return _Unpickled, (type(self), self.arguments)

    @abstractmethod
    def predict(self, images: list[np.ndarray], batch_size: int) -> list[Any]:
        """Results of images (H, W, 3) in BGR, with ``batch_size`` windows of large ones at once."""

    @abstractmethod
    def draw(self, image: np.ndarray, result: Any) -> np.ndarray:
        """See :meth:`mmeformer.model.Prediction.plot`."""

    @abstractmethod
    def entries(self, result: Any) -> list[dict]:
        """A result as COCO annotations, without ``id`` and ``image_id``."""


@lru_cache(maxsize=4)
def _made(kind: type[Backend], arguments: tuple[Any, ...]) -> Backend:
    return kind(*arguments)


class _Unpickled:
    """A backend in another process than the one that made it.

    Results that come back from workers have one, and need it only to be drawn.
    """

    def __init__(self, kind: type[Backend], arguments: tuple[Any, ...]) -> None:
        self.made_of = kind, arguments

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "made_of":  # as `copy` and `pickle` ask for
            raise AttributeError(name)
        return getattr(_made(*self.made_of), name)


class Trained(Backend):
    """A checkpoint, run by PyTorch with its config."""

    def __init__(
        self,
        checkpoint: Path,
        config: str | Path,
        device: str | None,
        score_thr: float | None,
        classes: Sequence[str] | None,
    ) -> None:
        from mmeformer.configs import load_config
        from mmeformer.inference.predictor import load_predictor

        self.predictor = load_predictor(
            load_config(config),
            str(checkpoint),
            device=device,
            score_thr=score_thr,
            classes=classes,
        )
        chosen = None if classes is None else tuple(classes)
        self.arguments = checkpoint.absolute(), _absolute(config), device, score_thr, chosen
        for remark in self.predictor.remarks:
            warnings.warn(remark, stacklevel=3)
        self.classes = self.predictor.classes
        self.category_ids = tuple(self.predictor.category_ids)
        self.reading = self.predictor.reading

    def predict(self, images: list[np.ndarray], batch_size: int) -> list[Any]:
        """See the base class; warns of images unlike those of the training."""
        for height, width in {image.shape[:2] for image in images}:
            window = self.predictor.window_of((height, width))
            if text := self.predictor.scale_warning((height, width), window):
                warnings.warn(f"image of {width} x {height} px: {text}", stacklevel=4)
        return self.predictor.predict_images(images, batch_size)

    def draw(self, image: np.ndarray, result: Any) -> np.ndarray:
        """See the base class; by the visualizer of the config, for one thread at a time."""
        with _DRAWING:
            return np.ascontiguousarray(self.predictor.draw(image, result))

    def entries(self, result: Any) -> list[dict]:
        """See the base class."""
        return self.predictor.entries(result)


class Exported(Backend):
    """An exported file, run by onnxruntime."""

    def __init__(self, path: Path, score_thr: float | None, classes: Sequence[str] | None) -> None:
        try:
            from mmeformer import runtime
        except ImportError as error:
            raise UserError(f"{path} needs onnxruntime: pip install onnxruntime") from error

        self.predictor = runtime.load(path)
        metadata = self.predictor.metadata
        self.classes = tuple(metadata.classes)
        self.category_ids = category_ids(vars(metadata))
        self.reading = metadata.reading
        if score_thr is not None:
            check_score_thr(score_thr)
        lowest = metadata.score_threshold
        if lowest is None:
            if score_thr is not None or classes is not None:
                raise ValueError(
                    "a score threshold and a choice of classes are for detection; these results "
                    "have no boxes"
                )
        elif score_thr is None:
            score_thr = max(SCORE_THR, lowest)
        elif score_thr < lowest:
            raise ValueError(
                f"score_thr {score_thr} is below the threshold {lowest} that {path} was exported "
                "with; export it with a lower one"
            )
        chosen = None if classes is None else tuple(classes)
        self.arguments = path.absolute(), score_thr, chosen
        # Before the results of windows are merged, as in prediction with a checkpoint.
        self.predictor.metadata = replace(metadata, score_threshold=score_thr)
        self.labels = None if classes is None else chosen_labels(classes, self.classes)

    def predict(self, images: list[np.ndarray], batch_size: int) -> list[Any]:
        """See the base class; the runtime has its own batch of windows."""
        results: list[Any] = list(self.predictor.predict_batch(images))
        if self.labels is not None:
            results = [result.take(np.isin(result.labels, self.labels)) for result in results]
        return results

    def draw(self, image: np.ndarray, result: Any) -> np.ndarray:
        """See the base class."""
        from mmeformer.runtime.drawing import draw

        metadata = self.predictor.metadata
        return draw(image, result, self.classes, metadata.palette)

    def entries(self, result: Any) -> list[dict]:
        """See the base class; by the predictor of the file's task."""
        from mmeformer import tasks

        task = tasks.TASKS.get(self.predictor.metadata.task)
        if task is None:
            raise ValueError("a backbone finds no objects, so there are no COCO annotations")
        try:
            predictor = tasks.load(task.predictor)
        except ImportError as error:
            raise UserError(
                f"COCO annotations need {' and '.join(task.libraries)}: {error}"
            ) from error
        entries: list[dict] = predictor.annotations(result, self.classes, self.category_ids)
        return entries


def _absolute(config: str | Path) -> str | Path:
    """A path that other working directories can read; shipped configs have none."""
    return Path(config).absolute() if Path(config).exists() else config
