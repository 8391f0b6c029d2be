# SPDX-License-Identifier: Apache-2.0
"""Generated scenes of overlapping shapes, and a COCO-format data set of them.

Shapes are drawn back to front and hide those behind them; a mask is the visible part of a shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmeformer.files import replacing

CLASSES = ("circle", "rectangle", "triangle", "star")
RADII = ((0.12, 0.24),)
"""Ranges of the radius of a shape, as shares of the side; every shape takes one of them."""
MIN_VISIBLE_SHARE = 0.3
"""Smallest visible share of an instance that is annotated."""


@dataclass(frozen=True)
class Instance:
    """A visible shape.

    Args:
        label: index into :data:`CLASSES`.
        mask: (H, W) bool, the visible pixels.
        visible_share: share of the shape that is visible, 0 to 1.
    """

    label: int
    mask: np.ndarray
    visible_share: float


def outline(label: int, center: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """Corners (N, 2), x and y in pixels, of a shape inscribed in a circle of ``radius``.

    Args:
        label: index into :data:`CLASSES`.
        center: x and y of the circle in pixels.
        radius: in pixels.
        angle: rotation in radians.
    """
    name = CLASSES[label]
    directions: np.ndarray
    radii: np.ndarray
    if name == "circle":
        directions = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        radii = np.full(48, radius)
    elif name == "rectangle":
        half = math.radians(32)  # of a rectangle about 1.6 times as wide as high
        directions = np.array([half, math.pi - half, math.pi + half, -half])
        radii = np.full(4, radius)
    elif name == "triangle":
        directions = np.arange(3) * 2 * math.pi / 3
        radii = np.full(3, radius)
    else:
        directions = np.arange(10) * math.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, radius, 0.45 * radius)
    directions = directions + angle
    points = np.stack([np.cos(directions), np.sin(directions)], axis=1) * radii[:, None]
    return points + np.asarray(center)


def draw_scene(
    rng: np.random.Generator,
    size: int,
    max_shapes: int = 5,
    radii: Sequence[tuple[float, float]] = RADII,
) -> tuple[np.ndarray, list[Instance]]:
    """Draw a random image (size, size, 3) uint8 BGR with instances; at least one is fully visible.

    The background is a color gradient with noise. There are 2 to ``max_shapes`` shapes in colors
    that differ from the background.

    Args:
        rng: random numbers.
        size: side in pixels.
        max_shapes: see above.
        radii: see :data:`RADII`.
    """
    ramp = np.linspace(0, 1, size)[:, None, None]
    first, last = rng.uniform(30, 225, (2, 1, 1, 3))
    image = np.broadcast_to(first * (1 - ramp) + last * ramp, (size, size, 3)).copy()
    if rng.random() < 0.5:
        image = image.transpose(1, 0, 2).copy()
    owner = np.full((size, size), -1, dtype=np.int32)
    labels, areas = [], []
    for index in range(int(rng.integers(2, max_shapes + 1))):
        label = int(rng.integers(len(CLASSES)))
        span = radii[int(rng.integers(len(radii)))] if len(radii) > 1 else radii[0]
        radius = rng.uniform(*span) * size
        center = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
        points = outline(label, tuple(center), radius, rng.uniform(0, 2 * math.pi))
        drawn = np.zeros((size, size), dtype=np.uint8)
        cv2.fillPoly(drawn, [np.round(points).astype(np.int32)], 1)
        inside = drawn.astype(bool)
        behind = image[inside].mean(axis=0)
        color = rng.uniform(0, 255, 3)
        while np.abs(color - behind).max() < 100:
            color = rng.uniform(0, 255, 3)
        image[inside] = color
        owner[inside] = index
        labels.append(label)
        areas.append(int(inside.sum()))
    image += rng.normal(0, 8, image.shape)
    instances = [
        Instance(label, owner == index, float((owner == index).sum() / area))
        for index, (label, area) in enumerate(zip(labels, areas, strict=True))
    ]
    return image.clip(0, 255).astype(np.uint8), instances


def write_coco_dataset(
    root: str | Path,
    train: int = 256,
    val: int = 64,
    size: int = 128,
    seed: int = 0,
    max_shapes: int = 5,
    radii: Sequence[tuple[float, float]] = RADII,
) -> Path:
    """Write scenes in COCO 2017 layout: ``train2017/``, ``val2017/``, ``annotations/``.

    Image ``i`` of a split depends only on ``seed``, the split and ``i``. A complete data set with
    the same arguments is kept; the folder appears only when it is complete.

    Args:
        root: folder of the data set.
        train, val: number of images.
        size: side of the square images in pixels.
        seed: seed of the random numbers.
        max_shapes, radii: see :func:`draw_scene`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and is another data set or something else.
    """
    recipe: dict[str, object] = dict(
        generator="shapes-3", train=train, val=val, size=size, seed=seed
    )
    if (max_shapes, radii) != (5, RADII):
        recipe |= dict(max_shapes=max_shapes, radii=[list(span) for span in radii])

    def write(folder: Path) -> None:
        for number, (split, count) in enumerate((("train2017", train), ("val2017", val))):
            _write_split(folder, split, count, size, (seed, number), max_shapes, radii)

    return generate_once(Path(root), recipe, write)


def generate_once(root: Path, recipe: dict, write: Callable[[Path], None]) -> Path:
    """Fill the folder ``root`` with ``write``, unless it was written with the same ``recipe``.

    The folder appears only when it is complete.

    Raises:
        FileExistsError: the folder exists and is another data set or something else.
    """
    marker = root / "recipe.json"
    if root.exists():
        if marker.is_file() and json.loads(marker.read_text()) == recipe:
            return root
        raise FileExistsError(f"{root} exists and is not the requested data set; move or remove it")
    with replacing(root) as draft:
        draft.mkdir()
        write(draft)
        (draft / marker.name).write_text(json.dumps(recipe))
    return root


def _write_split(
    root: Path,
    split: str,
    count: int,
    size: int,
    seed: tuple[int, int],
    max_shapes: int,
    radii: Sequence[tuple[float, float]],
) -> None:
    # Imported here: pycocotools comes with mmdet, and scenes without annotations do not need it.
    from pycocotools import mask as coco_mask

    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], list[dict[str, object]]()
    for index in range(count):
        rng = np.random.default_rng([*seed, index])
        image, instances = draw_scene(rng, size, max_shapes, radii)
        name = f"{index:06d}.png"
        cv2.imwrite(str(root / split / name), image)
        images.append(dict(id=index, file_name=name, width=size, height=size))
        for instance in instances:
            if instance.visible_share < MIN_VISIBLE_SHARE:
                continue
            encoded = coco_mask.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=instance.label + 1,
                    bbox=[float(value) for value in coco_mask.toBbox(encoded)],
                    area=int(coco_mask.area(encoded)),
                    segmentation=dict(size=encoded["size"], counts=encoded["counts"].decode()),
                    iscrowd=0,
                )
            )
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
