# SPDX-License-Identifier: Apache-2.0
"""Predict the class of whole images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import Compose
from mmengine.infer import BaseInferencer
from mmengine.registry import TRANSFORMS

from mmeformer.inference.pictures import at_picture_size
from mmeformer.inference.predictor import Predictor
from mmeformer.results import BEST, Classification
from mmeformer.settings import type_name
from mmeformer.windows import Window


class ArrayInferencer(BaseInferencer):
    """mmengine's inferencer for mmpretrain's models, as far as :class:`Predictor` needs it.

    mmpretrain's own has another base class.
    """

    def _load_weights_to_model(self, model: Any, checkpoint: dict, cfg: Any) -> None:
        super()._load_weights_to_model(model, checkpoint, cfg)
        meta = checkpoint["meta"]
        model.dataset_meta = meta.get("dataset_meta") or dict(classes=meta["CLASSES"])

    def _init_pipeline(self, cfg: Any) -> Callable:
        steps = [
            TRANSFORMS.build(step)
            for step in cfg.test_dataloader.dataset.pipeline
            if not type_name(step).endswith("LoadImageFromFile")
        ]
        return Compose([_as_loaded, *steps])

    def visualize(self, inputs: list, preds: Any, **kwargs: Any) -> None:
        """Nothing: :meth:`ClassificationPredictor.draw` draws."""

    def postprocess(self, preds: Any, visualization: Any, **kwargs: Any) -> Any:
        """The predictions as they are."""
        return preds


def _as_loaded(image: np.ndarray) -> dict:
    """What ``LoadImageFromFile`` returns for a file with this image."""
    return dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])


class ClassificationPredictor(Predictor[Classification]):
    """Predicts :class:`mmeformer.results.Classification`; reports the best classes."""

    inferencer_class = ArrayInferencer
    large = float("inf")
    has_scores = False
    columns = tuple(f"{name}_{rank}" for rank in range(1, BEST + 1) for name in ("class", "score"))

    def results_of_batch(self, batch: dict) -> list[Classification]:
        """See the base class."""
        data = self.model.data_preprocessor(batch, False)
        samples = self.model.predict(data["inputs"])
        return [Classification(sample.pred_score.cpu().float().numpy()) for sample in samples]

    def merge(
        self,
        places: Sequence[Window],
        results: Iterable[Classification],
        size: tuple[int, int],
    ) -> Classification:
        """Mean of the probabilities of all windows."""
        return Classification(np.mean([result.scores for result in results], 0))

    def draw(self, image: np.ndarray, result: Classification) -> np.ndarray:
        """See the base class; the best classes in the upper left corner."""
        picture, _ = at_picture_size(image)
        picture = np.ascontiguousarray(picture)
        unit = max(picture.shape[:2]) / 640
        lines = [f"{result.scores[k]:.3f}  {self.classes[k]}" for k in result.shown(BEST)]
        height = int(26 * unit)
        depth = min(height * len(lines) + height // 2, picture.shape[0])
        picture[:depth] = (picture[:depth] * 0.4).astype(np.uint8)
        for row, line in enumerate(lines, start=1):
            # OpenCV's fonts have no other letters.
            text = line.encode("ascii", "replace").decode()
            place = (int(8 * unit), height * row)
            thickness = max(1, round(1.5 * unit))
            font = cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(picture, text, place, font, 0.65 * unit, (255,) * 3, thickness, cv2.LINE_AA)
        return picture

    @classmethod
    def annotations(
        cls, result: Classification, classes: Sequence[str], category_ids: Sequence[int]
    ) -> list[dict]:
        """One annotation per reported class, the best first: ``category_id`` and ``score``."""
        return [
            dict(category_id=category_ids[label], score=float(result.scores[label]))
            for label in result.best(BEST)
        ]

    def cells(self, result: Classification) -> list[str]:
        """Name and score of each reported class; empty beyond the number of classes."""
        cells = []
        for label in result.best(BEST):
            cells += [self.classes[label], f"{result.scores[label]:.6f}"]
        return cells + [""] * (len(self.columns) - len(cells))
