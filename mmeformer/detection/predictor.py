# SPDX-License-Identifier: Apache-2.0
"""Predict upright boxes with masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict

# Registers the visualizer.
from mmeformer.detection import visualizer
from mmeformer.detection.writers import to_json
from mmeformer.inference.predictor import Predictor
from mmeformer.merging import merge_detections
from mmeformer.results import Detections, Mask
from mmeformer.settings import type_name
from mmeformer.windows import LARGE, Window


class DetectionPredictor(Predictor[Detections]):
    """Predicts :class:`mmeformer.results.Detections`."""

    inferencer_class = DetInferencer
    large = LARGE

    @classmethod
    def set_visualizer(cls, settings: ConfigDict) -> None:
        """See the base class."""
        if type_name(settings) == "DetLocalVisualizer":
            settings.type = "mmeformer.InstanceVisualizer"

    def results_of_batch(self, batch: dict) -> list[Detections]:
        """See the base class."""
        return [from_sample(sample) for sample in self.inferencer.forward(batch)]

    def merge(
        self, places: Sequence[Window], results: Iterable[Detections], size: tuple[int, int]
    ) -> Detections:
        """See the base class and :func:`mmeformer.merging.merge_detections`."""
        return merge_detections(places, results, size)

    def draw(self, image: np.ndarray, result: Detections) -> np.ndarray:
        """See the base class; drawn by the visualizer of the config."""
        return visualizer.draw_detections(self.inferencer.visualizer, image, result)

    @classmethod
    def annotations(
        cls, result: Detections, classes: Sequence[str], category_ids: Sequence[int]
    ) -> list[dict]:
        """Annotations of :func:`mmeformer.detection.writers.to_json`."""
        return to_json(result, category_ids)


def from_sample(sample: DetDataSample) -> Detections:
    """Detections from an mmdet data sample with ``pred_instances`` and ``ori_shape``."""
    found = sample.pred_instances
    masks = None
    if "masks" in found:
        masks = tuple(Mask.from_array(pixels.cpu().numpy()) for pixels in found.masks)
    return Detections(
        found.bboxes.cpu().float().numpy(),
        found.scores.cpu().float().numpy(),
        found.labels.cpu().long().numpy(),
        tuple(sample.ori_shape[:2]),
        masks,
    )
