# SPDX-License-Identifier: Apache-2.0
"""Prediction of upright boxes with masks, by mmdet's inferencer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmeformer.detection.instances import Instances, Mask, merge_windows
from mmeformer.inference.predictor import (
    NAME_PIXELS,
    SCORE_THR,
    Predictor,
    Progress,
    TrustedWeights,
    at_picture_size,
    native_size,
)
from mmeformer.registry import VISUALIZERS
from mmeformer.windows import predict_windows, windows

DRAWN_AT_ONCE = 2**28
"""Bytes of the masks that are laid over a picture in one go."""


@VISUALIZERS.register_module()
class InstanceVisualizer(DetLocalVisualizer):
    """mmdet's ``DetLocalVisualizer`` for many objects in large pictures; takes the same arguments.

    Attributes:
        names: whether classes and scores are written.
    """

    names = True

    def draw_texts(self, *args, **kwargs) -> InstanceVisualizer:
        """As in mmengine, if ``names``."""
        if self.names:
            super().draw_texts(*args, **kwargs)
        return self

    def draw_binary_masks(
        self, binary_masks: np.ndarray, colors: list[tuple[int, int, int]], alphas: float = 0.8
    ) -> InstanceVisualizer:
        """As in mmengine, which blends the whole picture for every mask: seconds for large ones.

        Args:
            binary_masks: (N, H, W) bool.
            colors: (red, green, blue) from 0 to 255, of each mask.
            alphas: opacity of all masks.
        """
        image = self.get_image().copy()
        for mask, color in zip(binary_masks, colors, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows):
                place = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
                pixels, inside = image[place], mask[place]
                blended = pixels[inside] * (1 - alphas) + np.array(color) * alphas
                pixels[inside] = np.rint(blended).astype(np.uint8)
        extent = (0, self.width, self.height, 0)
        self.ax_save.imshow(image, extent=extent, interpolation="nearest")
        return self


class _Inferencer(TrustedWeights, DetInferencer):
    pass


class DetectionPredictor(Predictor):
    """Results are :class:`mmeformer.detection.instances.Instances`."""

    # A photograph shows its objects at any number of pixels, and is resized as in training; only
    # what is far larger than a photograph is taken at its own size.
    LARGE = 8.0

    @classmethod
    def from_config(
        cls,
        config: Config,
        checkpoint: str,
        *,
        device: str,
        score_thr: float | None,
        mask_format: str | None,
    ) -> DetectionPredictor:
        """See :func:`mmeformer.inference.predictor.load_predictor`, which calls this."""
        if mask_format is not None:
            raise ValueError("a mask format is for segmentation; detections are written as JSON")
        set_score_thr(config, score_thr)
        if config.visualizer.type == "DetLocalVisualizer":
            config.visualizer.type = "mmeformer.InstanceVisualizer"
        inferencer = _Inferencer(config, checkpoint, device, show_progress=False)
        return cls(inferencer, native_size(config))

    def _forward_batch(self, batch: dict) -> list[Instances]:
        samples = self.inferencer.forward(batch)
        return [Instances.from_prediction(sample.pred_instances) for sample in samples]

    def predict_windows(
        self, image: np.ndarray, size: int, overlap: int, batch_size: int, progress: Progress
    ) -> Instances:
        """See the base class and :func:`detect_windows`."""
        return detect_windows(image, self.predict_images, size, overlap, batch_size, progress)

    def draw(self, image: np.ndarray, result: Instances) -> np.ndarray:
        """See the base class; drawn by the visualizer of the config."""
        return draw_instances(self.inferencer.visualizer, image, result)

    def entries(self, result: Instances, size: tuple[int, int]) -> list[dict]:
        """Annotations with ``category_id`` (from 1), ``bbox``, ``area``, ``score`` and, if the
        model has masks, ``segmentation`` (compressed run-length code)."""
        entries = []
        for index, (box, score, label) in enumerate(
            zip(result.boxes, result.scores, result.labels, strict=True)
        ):
            left, top, right, bottom = (float(edge) for edge in box)
            entry = dict(
                category_id=int(label) + 1,
                bbox=[round(value, 2) for value in (left, top, right - left, bottom - top)],
                area=round((right - left) * (bottom - top), 2),
                iscrowd=0,
                score=round(float(score), 6),
            )
            if result.masks is not None:
                mask = result.masks[index]
                entry.update(area=mask.area, segmentation=mask.coco(*size))
            entries.append(entry)
        return entries

    def write_files(self, out: Path, name: str, result: Instances) -> None:
        """Write nothing: the JSON file says all."""


def set_score_thr(config: Config, score_thr: float | None) -> None:
    """Let a detector itself leave out what is too uncertain, in place.

    That comes to the same as leaving it out afterwards, as only better boxes suppress others, and
    spares its masks.
    """
    settings = config.model.test_cfg
    settings = settings.get("rcnn", settings)
    settings.score_thr = SCORE_THR if score_thr is None else score_thr


def detect_windows(
    image: np.ndarray,
    predict: Callable[[Sequence[np.ndarray]], Sequence[Instances]],
    size: int,
    overlap: int,
    batch_size: int,
    progress: Progress,
) -> Instances:
    """Detect in an image of any size; of each window only its objects are kept.

    Args:
        image: ``(H, W, 3)``.
        predict: objects of the images of one batch, in their own pixels.
        size, overlap, batch_size, progress: see :meth:`Predictor.predict_windows`.

    Returns:
        Merged by :func:`mmeformer.detection.instances.merge_windows`.
    """
    height, width = image.shape[:2]
    places = windows(width, height, size, overlap)
    parts = []
    for part in predict_windows(image, places, predict, batch_size):
        parts.append(part)
        progress(len(parts), len(places))
    return merge_windows(parts, (height, width))


def draw_instances(
    visualizer: DetLocalVisualizer, image: np.ndarray, found: Instances
) -> np.ndarray:
    """Picture of objects, of the size that :func:`at_picture_size` gives the image.

    Args:
        visualizer: with classes and palette; :class:`InstanceVisualizer` leaves out names that
            would cover the picture.
        image: ``(H, W, 3)`` uint8, blue, green, red.
        found: in pixels of the image.

    Returns:
        ``(H', W', 3)`` uint8, blue, green, red.
    """
    picture, scale = at_picture_size(image)
    picture = np.ascontiguousarray(picture[..., ::-1])
    size = picture.shape[:2]
    visualizer.names = len(found) * NAME_PIXELS <= size[0] * size[1]
    step = max(1, DRAWN_AT_ONCE // (size[0] * size[1]))
    # The least certain first: the others are drawn over them.
    order = np.arange(len(found))[::-1]
    for start in range(0, len(order), step):
        group = found.take(order[start : start + step])
        instances = InstanceData(
            bboxes=torch.from_numpy(group.boxes * np.float32(scale)),
            scores=torch.from_numpy(group.scores),
            labels=torch.from_numpy(group.labels),
        )
        if group.masks is not None:
            masks = np.zeros((len(group), *size), bool)
            for target, mask in zip(masks, group.masks, strict=True):
                paste(target, mask, scale)
            instances.masks = torch.from_numpy(masks)
        visualizer.add_datasample(
            "objects",
            picture,
            DetDataSample(pred_instances=instances),
            draw_gt=False,
            pred_score_thr=-1.0,
        )
        picture = visualizer.get_image()
    return picture[..., ::-1]


def paste(target: np.ndarray, mask: Mask, scale: float) -> None:
    """Set in ``target`` (H, W) bool the pixels of a mask of the image that ``target`` shows."""
    if not mask.area:
        return
    height, width = mask.shape
    left, top = int(mask.x * scale), int(mask.y * scale)
    right = min(target.shape[1], max(left + 1, round((mask.x + width) * scale)))
    bottom = min(target.shape[0], max(top + 1, round((mask.y + height) * scale)))
    if left < right and top < bottom:
        crop = mask.array().astype(np.uint8)
        size = (right - left, bottom - top)
        target[top:bottom, left:right] |= cv2.resize(
            crop, size, interpolation=cv2.INTER_NEAREST
        ).astype(bool)
