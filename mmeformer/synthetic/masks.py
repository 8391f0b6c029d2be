# SPDX-License-Identifier: Apache-2.0
"""Scenes of overlapping shapes with label masks, in ADE20K's layout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from mmeformer.synthetic.shapes import CLASSES as SHAPES
from mmeformer.synthetic.shapes import MIN_VISIBLE_SHARE, draw_scene, generate_once

CLASSES = ("background", *SHAPES)
NOT_LABELLED = 255
"""Label of shapes too hidden to be named: they count neither in training nor in evaluation."""


def write_mask_dataset(
    root: str | Path, train: int = 512, val: int = 64, size: int = 128, seed: int = 0
) -> Path:
    """Write scenes and masks: ``images/`` and ``annotations/``, ``training/`` and ``validation/``.

    A mask holds 0 for the background, 1 + label for a shape and 255 for one that is mostly hidden.
    Image ``i`` of a split depends on ``seed``, the split and ``i`` alone. An existing, complete
    data set with the same arguments is left as it is; the folder appears only when it is complete.

    Args:
        root: folder of the data set.
        train, val: number of images.
        size: side of the square images in pixels.
        seed: of the random numbers.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists but holds something else.
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
    """A random image (size, size, 3) uint8 BGR and its labels (size, size) uint8."""
    image, instances = draw_scene(rng, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    for instance in instances:
        hidden = instance.visible_share < MIN_VISIBLE_SHARE
        mask[instance.mask] = NOT_LABELLED if hidden else 1 + instance.label
    return image, mask
