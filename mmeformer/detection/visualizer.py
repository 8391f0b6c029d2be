# SPDX-License-Identifier: Apache-2.0
"""Draw upright boxes and masks, even many of them in large pictures."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from mmeformer.inference.pictures import at_picture_size
from mmeformer.registry import VISUALIZERS
from mmeformer.results import NAME_PIXELS, Detections, Mask, mask_extent

DRAWN_AT_ONCE = 2**28
"""Bytes of the masks that are drawn over a picture at once."""


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
        """Blend masks into the picture, each within its own rectangle.

        mmengine blends the whole picture for every mask, which takes seconds for large ones.

        Args:
            binary_masks: (N, H, W) bool.
            colors: (red, green, blue) from 0 to 255, of each mask.
            alphas: opacity of all masks.
        """
        image = self.get_image().copy()
        for mask, color in zip(binary_masks, colors, strict=True):
            if extent := mask_extent(mask):
                left, top, right, bottom = extent
                place = slice(top, bottom), slice(left, right)
                pixels, inside = image[place], mask[place]
                blended = pixels[inside] * (1 - alphas) + np.array(color) * alphas
                pixels[inside] = np.rint(blended).astype(np.uint8)
        extent = (0, self.width, self.height, 0)
        self.ax_save.imshow(image, extent=extent, interpolation="nearest")
        return self


def draw_detections(
    visualizer: DetLocalVisualizer, image: np.ndarray, found: Detections
) -> np.ndarray:
    """Draw objects into a picture of the size that :func:`at_picture_size` gives the image.

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
    # The lowest scores first: the others are drawn over them.
    order = np.arange(len(found))[::-1]
    for start in range(0, len(order), step):
        group = found.take(order[start : start + step])
        instances = InstanceData(
            bboxes=torch.from_numpy(group.boxes * np.float32(scale)),
            scores=torch.from_numpy(group.scores),
            labels=torch.from_numpy(group.labels),
        )
        if group.instance_masks is not None:
            masks = np.zeros((len(group), *size), bool)
            for target, mask in zip(masks, group.instance_masks, strict=True):
                paste_scaled(target, mask, scale)
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


def paste_scaled(picture: np.ndarray, mask: Mask, scale: float) -> None:
    """Set a mask's pixels in ``picture`` (H, W) bool, which is ``scale`` times the image's size."""
    left, top = int(mask.x * scale), int(mask.y * scale)
    right = min(picture.shape[1], max(left + 1, round((mask.x + mask.width) * scale)))
    bottom = min(picture.shape[0], max(top + 1, round((mask.y + mask.height) * scale)))
    if mask.area and left < right and top < bottom:
        picture[top:bottom, left:right] |= cv2.resize(
            mask.array().astype(np.uint8),
            (right - left, bottom - top),
            interpolation=cv2.INTER_NEAREST,
        ).astype(bool)
