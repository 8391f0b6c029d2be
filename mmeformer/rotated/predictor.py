# SPDX-License-Identifier: Apache-2.0
"""Predict rotated boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict

from mmeformer.inference.pictures import at_picture_size
from mmeformer.inference.predictor import Predictor
from mmeformer.results import NAME_PIXELS, RotatedDetections
from mmeformer.rotated.detections import MERGE_IOU, from_instances
from mmeformer.rotated.scale import training_images
from mmeformer.rotated.writers import draw_boxes, to_json, write_dota_text
from mmeformer.settings import type_name
from mmeformer.windows import Window, as_patch


class RotatedPredictor(Predictor[RotatedDetections]):
    """Predicts :class:`mmeformer.results.RotatedDetections`."""

    inferencer_class = DetInferencer
    large = 1.0
    pads_windows = True

    @classmethod
    def from_config(cls, config: Config, checkpoint: str, **options) -> Predictor:
        """See the base class; see :mod:`mmeformer.rotated.scale` for patches and whole images."""
        predictor = super().from_config(config, checkpoint, **options)
        predictor.training_images, remark = training_images(config, predictor.model.dataset_meta)
        predictor.remarks += [remark] if remark else []
        return predictor

    @property
    def window_size(self) -> int | None:
        """See the base class."""
        return self.training_images.patch_size or self.native_size

    def window_of(self, size: tuple[int, int]) -> int | None:
        """See the base class; of a model for whole images, none is cut."""
        patch_size = self.training_images.patch_size
        return patch_size if patch_size and max(size) > patch_size else None

    def scale_warning(self, size: tuple[int, int], window: int | None) -> str | None:
        """See the base class; whole images are compared with those of the training."""
        side = max(window or max(size), self.training_images.patch_size)
        return self.training_images.scale_warning(side)

    def prepare(self, image: np.ndarray) -> dict:
        """See the base class; what is smaller than a patch is padded to its size."""
        return super().prepare(as_patch(image, self.training_images.patch_size))

    @classmethod
    def set_visualizer(cls, settings: ConfigDict) -> None:
        """See the base class."""
        if type_name(settings) == "RotLocalVisualizer":
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
        return RotatedDetections.merged(places, results, MERGE_IOU)

    def draw(self, image: np.ndarray, result: RotatedDetections) -> np.ndarray:
        """See the base class; drawn by the visualizer of the config."""
        picture, scale = at_picture_size(image)
        visualizer = self.inferencer.visualizer
        visualizer.max_texts = picture[..., 0].size // NAME_PIXELS
        return draw_boxes(picture, result.scaled(scale), visualizer)

    @classmethod
    def annotations(
        cls, result: RotatedDetections, classes: Sequence[str], category_ids: Sequence[int]
    ) -> list[dict]:
        """Annotations of :func:`mmeformer.rotated.writers.to_json`."""
        entries = [dict(entry, iscrowd=0) for entry in to_json("", result, classes)]
        for entry, label in zip(entries, result.labels, strict=True):
            del entry["image_id"]
            entry["category_id"] = category_ids[label]
        return entries

    def write_files(self, out: Path, name: str, result: RotatedDetections) -> None:
        """Write ``labels/NAME.txt`` in DOTA's label format."""
        write_dota_text(out / "labels" / f"{name}.txt", result, self.classes)
