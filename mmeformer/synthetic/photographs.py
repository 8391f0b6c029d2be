# SPDX-License-Identifier: Apache-2.0
"""Crops of ten photographs, in one folder per class.

The photographs are those that scikit-image's wheel brings along. Training crops are from the left
half of each, validation crops from the right half, so no pixel is in both. They are still crops of
the same ten scenes: what a model scores on them says that training works, not how well it would
tell such things apart elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from mmeformer.errors import UserError
from mmeformer.synthetic.shapes import generate_once

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
"""Name of each class -> file in the folder ``skimage/data``."""

CLASSES = tuple(PHOTOGRAPHS)


def write_photograph_dataset(
    root: str | Path, train: int = 800, val: int = 200, size: int = 64, seed: int = 0
) -> Path:
    """Write crops of photographs: ``train/`` and ``val/``, each with one folder per class.

    Every class has the same number of pictures, up to one. Arguments, result and errors as in
    :func:`mmeformer.synthetic.shapes.write_coco_dataset`.

    Raises:
        UserError: scikit-image is not installed.
    """
    recipe = dict(generator="photographs-1", train=train, val=val, size=size, seed=seed)

    def write(folder: Path) -> None:
        images = [read_photograph(name) for name in CLASSES]
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
            for index in range(count):
                label = index % len(CLASSES)
                left, right = np.array_split(images[label], 2, axis=1)
                rng = np.random.default_rng([seed, number, index])
                crop = draw_crop(rng, left if split == "train" else right, size)
                cv2.imwrite(str(folder / split / CLASSES[label] / f"{index:06d}.png"), crop)

    return generate_once(Path(root), recipe, write)


def read_photograph(name: str) -> np.ndarray:
    """One of :data:`PHOTOGRAPHS`, (H, W, 3) uint8, blue, green, red.

    Raises:
        UserError: scikit-image is not installed, or its wheel has no such file any more.
    """
    spec = find_spec("skimage")
    folders = list((spec and spec.submodule_search_locations) or ())
    paths = [Path(folder, "data", PHOTOGRAPHS[name]) for folder in folders]
    image = cv2.imread(str(paths[0])) if paths and paths[0].is_file() else None
    if image is None:
        raise UserError(
            f"the photograph {PHOTOGRAPHS[name]} of scikit-image is missing: "
            'pip install "mmeformer[classification]"'
        )
    return image


def draw_crop(rng: np.random.Generator, image: np.ndarray, size: int) -> np.ndarray:
    """A random square of an image, with a side of one to three times ``size``, as far as it fits.

    Args:
        rng: source of the random numbers.
        image: (H, W, 3) uint8.
        size: side of the result in pixels.

    Returns:
        (size, size, 3) uint8; squares that are larger are shrunk.
    """
    height, width = image.shape[:2]
    side = int(rng.integers(size, min(3 * size, height, width) + 1))
    top = int(rng.integers(0, height - side + 1))
    left = int(rng.integers(0, width - side + 1))
    crop = image[top : top + side, left : left + side]
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
