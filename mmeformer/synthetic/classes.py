# SPDX-License-Identifier: Apache-2.0
"""Generated pictures of one shape each, in one folder per class."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np

from mmeformer.synthetic.shapes import CLASSES, generate_once, outline


def write_class_dataset(
    root: str | Path, train: int = 640, val: int = 160, size: int = 64, seed: int = 0
) -> Path:
    """Write pictures of shapes: ``train/`` and ``val/``, each with one folder per class.

    Every class has the same number of pictures, up to one. Arguments, result and errors as in
    :func:`mmeformer.synthetic.shapes.write_coco_dataset`.
    """
    recipe = dict(generator="classes-1", train=train, val=val, size=size, seed=seed)

    def write(folder: Path) -> None:
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
            for index in range(count):
                label = index % len(CLASSES)
                image = draw_shape(np.random.default_rng([seed, number, index]), label, size)
                cv2.imwrite(str(folder / split / CLASSES[label] / f"{index:06d}.png"), image)

    return generate_once(Path(root), recipe, write)


def draw_shape(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """Draw one shape of any place, size, angle and color on a gradient with noise and strokes.

    Args:
        rng: source of the random numbers.
        label: index into :data:`mmeformer.synthetic.shapes.CLASSES`.
        size: side of the picture in pixels.

    Returns:
        (size, size, 3) uint8, blue, green, red.
    """
    ramp = np.linspace(0, 1, size)[:, None, None]
    first, last = rng.uniform(30, 225, (2, 1, 1, 3))
    image = np.broadcast_to(first * (1 - ramp) + last * ramp, (size, size, 3)).copy()
    if rng.random() < 0.5:
        image = image.transpose(1, 0, 2).copy()
    radius = rng.uniform(0.18, 0.4) * size
    center = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)
    points = outline(label, (center[0], center[1]), radius, rng.uniform(0, 2 * math.pi))
    drawn = np.zeros((size, size), dtype=np.uint8)
    cv2.fillPoly(drawn, [np.round(points).astype(np.int32)], 1)
    behind = image[drawn.astype(bool)].mean(axis=0)
    color = rng.uniform(0, 255, 3)
    while np.abs(color - behind).max() < 80:
        color = rng.uniform(0, 255, 3)
    image[drawn.astype(bool)] = color
    # Strokes that say nothing of the class.
    for _ in range(int(rng.integers(0, 4))):
        start, end = rng.integers(0, size, (2, 2)).tolist()
        stroke = tuple(float(value) for value in rng.uniform(0, 255, 3))
        image = cv2.line(np.ascontiguousarray(image), start, end, stroke, 1)
    image += rng.normal(0, 12, image.shape)
    return image.clip(0, 255).astype(np.uint8)
