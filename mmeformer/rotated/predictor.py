# SPDX-License-Identifier: Apache-2.0
"""Predict rotated boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict

from mmeformer.inference.pictures import NAME_PIXELS, at_picture_size
from mmeformer.inference.predictor import Predictor
from mmeformer.results import RotatedDetections
from mmeformer.rotated.detections import from_instances
from mmeformer.rotated.inference import merge_windows
from mmeformer.rotated.writers import draw_boxes, to_json, write_dota_text
from mmeformer.windows import Window


class RotatedPredictor(Predictor[RotatedDetections]):
    """Predicts :class:`mmeformer.results.RotatedDetections`."""

    inferencer_class = DetInferencer
    # Models of aerial images are trained on patches at full resolution: larger images are cut, and
    # smaller ones are padded as patches are.
    large = 1.0
    pads_windows = True

    @classmethod
    def set_visualizer(cls, settings: ConfigDict) -> None:
        """See the base class."""
        if settings.type == "RotLocalVisualizer":
            # mmrotate's cannot handle crowded pictures and boxes beyond the border.
            settings.type = "mmeformer.RotatedVisualizer"

    def results_of_batch(self, batch: dict) -> list[RotatedDetections]:
        """See the base class."""
        samples: list[DetDataSample] = self.inferencer.forward(batch)
        return [from_instances(sample.pred_instances) for sample in samples]

    def merge(
        self,
        places: Sequence[Window],
        results: Iterable[RotatedDetections],
        size: tuple[int, int],
    ) -> RotatedDetections:
        """See the base class; by NMS within each class."""
        return merge_windows(places, results)

    def draw(self, image: np.ndarray, result: RotatedDetections) -> np.ndarray:
        """See the base class; drawn by the visualizer of the config."""
        picture, scale = at_picture_size(image)
        visualizer = self.inferencer.visualizer
        visualizer.max_texts = picture[..., 0].size // NAME_PIXELS
        return draw_boxes(picture, result.scaled(scale), visualizer)

    def entries(self, result: RotatedDetections) -> list[dict]:
        """Annotations of :func:`mmeformer.rotated.writers.to_json`."""
        entries = [dict(entry, iscrowd=0) for entry in to_json("", result, self.classes)]
        for entry in entries:
            del entry["image_id"]
        return entries

    def write_files(self, out: Path, name: str, result: RotatedDetections) -> None:
        """Write ``labels/NAME.txt`` in DOTA's label format."""
        write_dota_text(out / "labels" / f"{name}.txt", result, self.classes)
