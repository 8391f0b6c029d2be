# SPDX-License-Identifier: Apache-2.0
"""Rotated detection in images of any size with a model of mmdet's ``init_detector``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.models import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmengine.registry import DefaultScope

from mmeformer.images import Reading, read_image
from mmeformer.results import RotatedDetections
from mmeformer.rotated.detections import MERGE_IOU, from_instances, to_sample
from mmeformer.rotated.scale import training_images
from mmeformer.settings import without_annotations
from mmeformer.windows import Progress, predict_windows, windows


def detect_large_image(
    model: BaseDetector,
    image: str | Path | np.ndarray,
    *,
    size: int | None = None,
    overlap: int | None = None,
    batch_size: int = 1,
    iou_thr: float = MERGE_IOU,
    progress: Progress | None = None,
) -> DetDataSample:
    """Detect rotated boxes in an image of any size.

    Windows are cut one batch at a time and only boxes are kept, so that memory beyond the image
    itself does not depend on the image's size.

    Args:
        model: from mmdet's ``init_detector``, so with ``cfg``.
        image: a file, or ``(H, W, 3)`` uint8, blue, green, red.
        size: side of the windows, pixels; a smaller image is padded to it. None takes that of the
            training patches, and does not cut images for a model that was trained on whole ones;
            see :func:`mmeformer.rotated.scale.training_images`.
        overlap: pixels; should exceed the largest object. None is 200, which DOTA's development kit
            and mmrotate use, or a quarter of small windows.
        batch_size: windows per call of the model.
        iou_thr: see :meth:`mmeformer.results.RotatedDetections.merged`.
        progress: called after each batch with the number of finished windows and of all windows.

    Returns:
        Sample whose ``pred_instances`` have ``bboxes`` (RotatedBoxes ``(N, 5)`` in pixels of the
        image), ``scores`` and ``labels`` on the CPU, the best first; ``img_path`` and
        ``ori_shape`` are its meta information.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged; the array is not
            ``(H, W, 3)`` uint8; ``size``, ``overlap`` or ``batch_size`` out of range.
    """
    path = None if isinstance(image, np.ndarray) else str(image)
    if isinstance(image, np.ndarray):
        pixels = image
    else:
        pixels = read_image(image, Reading.of_config(get_test_pipeline_cfg(model.cfg)))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"an image is (H, W, 3) uint8 in the order blue, green, red, not {pixels.shape} "
            f"{pixels.dtype}"
        )
    height, width = pixels.shape[:2]
    if size is None:
        images, _ = training_images(model.cfg, getattr(model, "dataset_meta", None))
        size = images.patch_size
    if overlap is None:
        overlap = min(200, size // 4)
    places = windows(width, height, size, overlap) if size else [(0, 0, width, height)]
    results = predict_windows(pixels, places, _predictor(model), batch_size, size or None, progress)
    merged = RotatedDetections.merged(places, results, iou_thr)
    return to_sample(merged, img_path=path, ori_shape=(height, width), img_shape=(height, width))


def _predictor(model: BaseDetector) -> Callable[[list[np.ndarray]], Sequence[RotatedDetections]]:
    """A function that predicts the boxes of a batch of crops, through the model's test pipeline."""
    steps = without_annotations(get_test_pipeline_cfg(model.cfg.copy()))
    steps[0] = dict(type="mmdet.LoadImageFromNDArray")
    # Another model may have been built since, with another scope.
    with DefaultScope.overwrite_default_scope(model.cfg.get("default_scope", "mmdet")):
        pipeline = Compose(steps)

    def predict(crops: list[np.ndarray]) -> list[RotatedDetections]:
        batch = [pipeline(dict(img=image, img_id=0)) for image in crops]
        data = {key: [item[key] for item in batch] for key in ("inputs", "data_samples")}
        with torch.no_grad():
            samples = model.test_step(data)
        return [from_instances(sample.pred_instances) for sample in samples]

    return predict
