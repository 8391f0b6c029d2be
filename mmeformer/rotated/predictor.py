# SPDX-License-Identifier: Apache-2.0
"""Prediction of rotated boxes, by mmdet's inferencer and :func:`detect_large_image`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmdet.apis import DetInferencer
from mmengine.config import Config

from mmeformer.detection.predictor import set_score_thr
from mmeformer.inference.predictor import (
    NAME_PIXELS,
    Predictor,
    Progress,
    TrustedWeights,
    at_picture_size,
    native_size,
)
from mmeformer.rotated.detections import Detections
from mmeformer.rotated.inference import detect_large_image
from mmeformer.rotated.writers import draw_picture, to_json, write_dota_text


class _Inferencer(TrustedWeights, DetInferencer):
    pass


class RotatedPredictor(Predictor):
    """Results are :class:`mmeformer.rotated.detections.Detections`."""

    # Aerial images are learned in patches at their own size, so whatever is larger is cut.
    LARGE = 1.0

    @classmethod
    def from_config(
        cls,
        config: Config,
        checkpoint: str,
        *,
        device: str,
        score_thr: float | None,
        mask_format: str | None,
    ) -> RotatedPredictor:
        """See :func:`mmeformer.inference.predictor.load_predictor`, which calls this."""
        if mask_format is not None:
            raise ValueError("a mask format is for segmentation; boxes are written as text")
        set_score_thr(config, score_thr)
        if config.visualizer.type == "RotLocalVisualizer":
            # Crowded pictures and boxes beyond the border are more than mmrotate's can do.
            config.visualizer.type = "mmeformer.RotatedVisualizer"
        inferencer = _Inferencer(config, checkpoint, device, scope="mmrotate", show_progress=False)
        return cls(inferencer, native_size(config))

    def _forward_batch(self, batch: dict) -> list[Detections]:
        samples = self.inferencer.forward(batch)
        return [Detections.from_instances(sample.pred_instances) for sample in samples]

    def predict_windows(
        self, image: np.ndarray, size: int, overlap: int, batch_size: int, progress: Progress
    ) -> Detections:
        """See the base class and :func:`mmeformer.rotated.inference.detect_large_image`."""
        sample = detect_large_image(
            self.model,
            image,
            size=size,
            overlap=overlap,
            batch_size=batch_size,
            progress=progress,
        )
        return Detections.from_instances(sample.pred_instances)

    def draw(self, image: np.ndarray, result: Detections) -> np.ndarray:
        """See the base class; drawn by the visualizer of the config."""
        picture, scale = at_picture_size(image)
        visualizer = self.inferencer.visualizer
        visualizer.max_texts = picture[..., 0].size // NAME_PIXELS
        scaled = result._replace(boxes=result.boxes * np.array([scale] * 4 + [1], np.float32))
        return draw_picture(picture, scaled, visualizer)

    def entries(self, result: Detections, size: tuple[int, int]) -> list[dict]:
        """Annotations of :func:`mmeformer.rotated.writers.to_json` with category ids from 1."""
        entries = to_json("", result, self.classes)
        for entry, label, box in zip(entries, result.labels, result.boxes, strict=True):
            del entry["image_id"]
            area = round(float(box[2]) * float(box[3]), 2)
            entry.update(category_id=int(label) + 1, area=area, iscrowd=0)
        return entries

    def write_files(self, out: Path, name: str, result: Detections) -> None:
        """Write ``labels/NAME.txt`` in DOTA's label format."""
        path = out / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_dota_text(path, result, self.classes)
