# SPDX-License-Identifier: Apache-2.0
"""Draw label maps, even large ones."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from mmengine.structures import PixelData
from mmengine.visualization import Visualizer
from mmseg.structures import SegDataSample

NAMED_SHARE = 0.002
"""Share of a picture that a class must cover for its name to be written."""


def draw_labels(
    visualizer: Visualizer, image: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> np.ndarray:
    """Draw the classes over an image, in their colors and with their names.

    Args:
        visualizer: mmseg's ``SegLocalVisualizer`` with classes and palette.
        image: (H, W, 3) uint8, blue, green, red.
        labels: (H, W).
        classes: names.

    Returns:
        (H, W, 3) uint8, blue, green, red.
    """
    sample = SegDataSample(
        pred_sem_seg=PixelData(data=torch.from_numpy(labels[None].astype(np.int64)))
    )
    # To place names, mmseg sorts the pixels of every class, which takes minutes.
    visualizer.add_datasample(
        "labels",
        np.ascontiguousarray(image[..., ::-1]),
        sample,
        draw_gt=False,
        with_labels=False,
    )
    for label in np.unique(labels):
        region = (labels == label).astype(np.uint8)
        if region.mean() < NAMED_SHARE:
            continue
        # Padded, so that the border of the image counts as a border of the region.
        depth = cv2.distanceTransform(np.pad(region, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        place = np.unravel_index(depth.argmax(), depth.shape)[::-1]
        visualizer.draw_texts(
            classes[label],
            np.array(place),
            colors="w",
            horizontal_alignments="center",
            vertical_alignments="center",
            bboxes=dict(facecolor="black", alpha=0.6, pad=0.7, edgecolor="none"),
        )
    return visualizer.get_image()[..., ::-1]
