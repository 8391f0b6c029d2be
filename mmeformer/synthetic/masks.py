# SPDX-License-Identifier: Apache-2.0
"""Generated scenes of overlapping shapes with label masks, in ADE20K's layout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from mmeformer.synthetic.shapes import CLASSES as SHAPES
from mmeformer.synthetic.shapes import MIN_VISIBLE_SHARE, draw_scene, generate_once

CLASSES = ("background", *SHAPES)
UNLABELED = 255
"""Label of mostly hidden shapes, which training and evaluation ignore."""


def write_mask_dataset(
    root: str | Path, train: int = 512, val: int = 64, size: int = 128, seed: int = 0
) -> Path:
    """Write scenes and masks: ``images/`` and ``annotations/``, ``training/`` and ``validation/``.

    A mask has 0 for the background, 1 + label for a shape and 255 for a mostly hidden shape.
    Arguments, result and errors as in :func:`mmeformer.synthetic.shapes.write_coco_dataset`.
    """
    recipe = dict(generator="masks-3", train=train, val=val, size=size, seed=seed)

    def write(folder: Path) -> None:
        for number, (split, count) in enumerate((("training", train), ("validation", val))):
            images, masks = folder / "images" / split, folder / "annotations" / split
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for index in range(count):
                image, mask = draw_masked_scene(np.random.default_rng([seed, number, index]), size)
                cv2.imwrite(str(images / f"{index:06d}.png"), image)
                cv2.imwrite(str(masks / f"{index:06d}.png"), mask)

    return generate_once(Path(root), recipe, write)


def draw_masked_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a random image (size, size, 3) uint8 BGR and its labels (size, size) uint8."""
    image, instances = draw_scene(rng, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    for instance in instances:
        hidden = instance.visible_share < MIN_VISIBLE_SHARE
        mask[instance.mask] = UNLABELED if hidden else 1 + instance.label
    return image, mask
