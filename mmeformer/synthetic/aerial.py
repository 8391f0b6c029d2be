# SPDX-License-Identifier: Apache-2.0
"""Generated aerial scenes with rotated objects, many of them elongated and densely packed.

Written as DOTA patches: ``images/`` and ``annfiles/`` with DOTA-v1.0 label files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmeformer.synthetic.shapes import generate_once

CLASSES = ("ship", "vehicle", "plane", "court")
ASPECTS = (4.0, 2.0, 1.3, 1.8)
"""Length / width of each class."""
LENGTHS = ((0.19, 0.34), (0.14, 0.2), (0.2, 0.34), (0.24, 0.4))
"""Range of the length of each class, as a share of the image side."""
EMPTY_SHARE = 0.04
"""Share of images without objects."""


@dataclass(frozen=True)
class RotatedObject:
    """An object seen from above.

    Args:
        label: index into :data:`CLASSES`.
        corners: (4, 2), x and y in pixels: front left, front right, rear right, rear left.
    """

    label: int
    corners: np.ndarray


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[RotatedObject]]:
    """Draw a random image (size, size, 3) uint8 BGR with objects that do not overlap.

    Ships and vehicles may lie side by side in a row, a few pixels apart.
    """
    image = _background(rng, size)
    taken = np.zeros((size, size), dtype=np.uint8)
    objects: list[RotatedObject] = []
    groups = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(3, 8))
    for _ in range(groups):
        label = int(rng.integers(len(CLASSES)))
        length = rng.uniform(*LENGTHS[label]) * size
        width = length / ASPECTS[label]
        count = int(rng.integers(1, 5)) if label < 2 else 1
        angle = rng.uniform(0, 2 * math.pi)
        center = rng.uniform(0.1 * size, 0.9 * size, 2)
        pitch = width + rng.uniform(1.5, 3.5)
        across = np.array([-math.sin(angle), math.cos(angle)])
        color = _other_color(rng, image, center)
        for place in range(count):
            corners = _corners(center + across * pitch * place, length, width, angle)
            if corners.min() < 1 or corners.max() > size - 2 or _covers(taken, corners):
                continue
            _draw(image, label, corners, color)
            cv2.fillPoly(taken, [np.round(corners).astype(np.int32)], 1)
            objects.append(RotatedObject(label, corners))
    noisy = image + rng.normal(0, 6, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), objects


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A blotchy background of two similar colors, (size, size, 3) uint8."""
    blotches = cv2.resize(rng.random((5, 5)), (size, size), interpolation=cv2.INTER_CUBIC)
    share = blotches.clip(0, 1)[..., None]
    base = rng.uniform(40, 170, 3)
    return (base + share * rng.uniform(-35, 35, 3)).clip(0, 255).astype(np.uint8)


def _other_color(rng: np.random.Generator, image: np.ndarray, center: np.ndarray) -> np.ndarray:
    """A random color (3,) that differs from the background at ``center``."""
    behind = image[int(center[1]), int(center[0])].astype(float)
    color = rng.uniform(20, 255, 3)
    while np.abs(color - behind).max() < 70:
        color = rng.uniform(20, 255, 3)
    return color


def _corners(center: np.ndarray, length: float, width: float, angle: float) -> np.ndarray:
    along = np.array([math.cos(angle), math.sin(angle)]) * length / 2
    across = np.array([-math.sin(angle), math.cos(angle)]) * width / 2
    return center + np.stack([along - across, along + across, across - along, -along - across])


def _covers(taken: np.ndarray, corners: np.ndarray) -> bool:
    mask = np.zeros_like(taken)
    cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
    return bool((mask & taken).any())


def _draw(image: np.ndarray, label: int, corners: np.ndarray, color: np.ndarray) -> None:
    """Draw an object so that it touches all four sides of its box."""
    origin, along, across = corners[3], corners[0] - corners[3], corners[2] - corners[3]

    def fill(points: Sequence[tuple[float, float]], shade: float) -> None:
        # Points are relative to the rear left corner, 0 to 1 along and across. OpenCV takes them
        # in units of 1/16 px.
        places = [origin + u * along + v * across for u, v in points]
        fixed = np.round(np.array(places) * 16).astype(np.int32)
        cv2.fillPoly(image, [fixed], (color * shade).clip(0, 255).tolist(), cv2.LINE_AA, shift=4)

    whole = [(0, 0), (1, 0), (1, 1), (0, 1)]
    if CLASSES[label] == "ship":
        fill([(0, 0.1), (0.1, 0), (0.7, 0), (1, 0.5), (0.7, 1), (0.1, 1), (0, 0.9)], 1.0)
        fill([(0.12, 0.25), (0.35, 0.25), (0.35, 0.75), (0.12, 0.75)], 0.55)
    elif CLASSES[label] == "vehicle":
        fill(whole, 1.0)
        fill([(0.6, 0.1), (0.78, 0.1), (0.78, 0.9), (0.6, 0.9)], 0.3)
    elif CLASSES[label] == "plane":
        fill([(0, 0.42), (0.85, 0.42), (1, 0.5), (0.85, 0.58), (0, 0.58)], 1.0)
        fill([(0.35, 0), (0.45, 0), (0.68, 0.5), (0.45, 1), (0.35, 1)], 1.0)
        fill([(0, 0.28), (0.08, 0.28), (0.18, 0.5), (0.08, 0.72), (0, 0.72)], 1.0)
    else:
        fill(whole, 1.0)
        fill([(0.06, 0.1), (0.94, 0.1), (0.94, 0.9), (0.06, 0.9)], 0.6)
        fill([(0.47, 0.1), (0.53, 0.1), (0.53, 0.9), (0.47, 0.9)], 1.0)


def write_dota_dataset(
    root: str | Path, train: int = 384, val: int = 64, size: int = 128, seed: int = 0
) -> Path:
    """Write scenes as DOTA patches: ``train/`` and ``val/``, each with images and label files.

    Arguments, result and errors as in :func:`mmeformer.synthetic.shapes.write_coco_dataset`.
    """
    recipe = dict(generator="aerial-1", train=train, val=val, size=size, seed=seed)

    def write(folder: Path) -> None:
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            images, labels = folder / split / "images", folder / split / "annfiles"
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            for index in range(count):
                image, objects = draw_scene(np.random.default_rng([seed, number, index]), size)
                cv2.imwrite(str(images / f"{index:06d}.png"), image)
                lines = [
                    " ".join(f"{value:.2f}" for value in item.corners.flatten())
                    + f" {CLASSES[item.label]} 0\n"
                    for item in objects
                ]
                (labels / f"{index:06d}.txt").write_text("".join(lines))

    return generate_once(Path(root), recipe, write)
