# SPDX-License-Identifier: Apache-2.0
"""Rotated boxes as DOTA text, JSON and pictures. What exists is replaced, whole or not at all."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes, rbox2qbox

from mmeformer.images import write_image
from mmeformer.rotated.detections import Detections
from mmeformer.rotated.dota import format_label
from mmeformer.rotated.visualizer import RotatedVisualizer


def polygons(boxes: np.ndarray) -> np.ndarray:
    """Corners ``(N, 4, 2)`` in pixels of rotated boxes ``(N, 5)``."""
    return rbox2qbox(torch.from_numpy(boxes.astype(np.float64))).reshape(-1, 4, 2).numpy()


def _write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_dota_text(path: str | Path, detections: Detections, classes: Sequence[str]) -> None:
    """Write boxes as a DOTA label file (``x1 y1 ... x4 y4 class 0``), which has no scores.

    :func:`mmeformer.rotated.dota.read_labels` and label tools read it.

    Args:
        path: the file.
        detections: choose by score before.
        classes: names, by label.
    """
    lines = [
        format_label(polygon, classes[label], 0) + "\n"
        for polygon, label in zip(polygons(detections.boxes), detections.labels, strict=True)
    ]
    _write_text(path, "".join(lines))


def is_task1(folder: str | Path) -> bool:
    """Whether :func:`write_task1` would replace nothing but what it wrote itself."""
    folder = Path(folder)
    return not folder.exists() or (
        folder.is_dir()
        and all(
            path.name == "Task1.zip" or (path.name.startswith("Task1_") and path.suffix == ".txt")
            for path in folder.iterdir()
        )
    )


def write_task1(
    folder: str | Path, images: Mapping[str, Detections], classes: Sequence[str]
) -> Path:
    """Write what DOTA's evaluation server takes for Task 1 (oriented boxes).

    ``Task1_<class>.txt`` for every class, with a line ``image score x1 y1 ... x4 y4`` per box, and
    all of them in ``Task1.zip``.

    Args:
        folder: made or replaced.
        images: predictions by image name (without suffix).
        classes: names, by label.

    Returns:
        Path of the zip file.

    Raises:
        ValueError: an image name with white space, which the format does not allow.
    """
    folder = Path(folder)
    lines = [[] for _ in classes]
    for image, detections in images.items():
        if image.split() != [image]:
            raise ValueError(
                f"image name {image!r} has white space, which DOTA's format does not allow; rename "
                "the file"
            )
        corners = polygons(detections.boxes).reshape(-1, 8)
        for polygon, score, label in zip(
            corners, detections.scores, detections.labels, strict=True
        ):
            numbers = " ".join(f"{value:.2f}" for value in polygon)
            lines[label].append(f"{image} {score:.6f} {numbers}\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished, old = (folder.with_name(f".{folder.name}.{end}") for end in ("unfinished", "old"))
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    with zipfile.ZipFile(unfinished / "Task1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, found in zip(classes, lines, strict=True):
            path = unfinished / f"Task1_{name}.txt"
            path.write_text("".join(found), encoding="utf-8")
            archive.write(path, path.name)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder / "Task1.zip"


def to_json(image: str, detections: Detections, classes: Sequence[str]) -> list[dict]:
    """Boxes of one image as entries of a COCO-like list of results.

    Args:
        image: its name.
        detections: in pixels of the image.
        classes: names, by label.

    Returns:
        Per box ``image_id``, ``category_id`` (label, from 0), ``category``, ``score``, ``rbox``
        (centre x, centre y, width, height, angle in radians), ``segmentation`` (one polygon
        ``[x1, y1, ..., x4, y4]``) and ``bbox`` (the upright box around it: x, y, width, height).
    """
    entries = []
    for box, polygon, score, label in zip(
        detections.boxes,
        polygons(detections.boxes),
        detections.scores,
        detections.labels,
        strict=True,
    ):
        low, size = polygon.min(0), np.ptp(polygon, axis=0)
        entries.append(
            dict(
                image_id=image,
                category_id=int(label),
                category=classes[label],
                score=round(float(score), 6),
                bbox=_rounded([*low, *size], 2),
                segmentation=[_rounded(polygon.ravel(), 2)],
                rbox=_rounded(box[:4], 2) + _rounded(box[4:], 6),
            )
        )
    return entries


def _rounded(values, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


def write_json(path: str | Path, entries: Sequence[dict]) -> None:
    """Write entries of :func:`to_json`, of any number of images, as one JSON list."""
    _write_text(path, json.dumps(list(entries), indent=1) + "\n")


def draw_picture(
    image: np.ndarray,
    detections: Detections,
    visualizer: RotatedVisualizer,
    score_thr: float = 0.0,
    max_side: int = 4096,
) -> np.ndarray:
    """An image with boxes.

    Args:
        image: ``(H, W, 3)`` uint8, blue, green, red.
        detections: in pixels of the image.
        visualizer: with ``dataset_meta``.
        score_thr: boxes with a lower score are not drawn.
        max_side: a larger picture is shrunk to this, pixels; matplotlib cannot draw on more than
            65,535, and takes long before that.

    Returns:
        ``(H', W', 3)`` uint8, blue, green, red.
    """
    height, width = image.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    boxes = torch.from_numpy(detections.boxes * np.array([scale] * 4 + [1], np.float32))
    sample = DetDataSample(
        pred_instances=InstanceData(
            bboxes=RotatedBoxes(boxes),
            scores=torch.from_numpy(detections.scores),
            labels=torch.from_numpy(detections.labels),
        )
    )
    visualizer.add_datasample(
        "boxes",
        np.ascontiguousarray(image[..., ::-1]),
        sample,
        draw_gt=False,
        pred_score_thr=score_thr,
    )
    return visualizer.get_image()[..., ::-1]


def write_picture(
    path: str | Path,
    image: np.ndarray,
    detections: Detections,
    dataset_meta: Mapping,
    score_thr: float = 0.3,
    max_side: int = 4096,
) -> None:
    """Write an image with boxes.

    Args:
        path: the suffix gives the format.
        image, detections, score_thr, max_side: see :func:`draw_picture`.
        dataset_meta: ``classes`` and ``palette``, as a detector's ``dataset_meta``.

    Raises:
        ValueError: no image format has this suffix.
    """
    visualizer = RotatedVisualizer(line_width=2)
    visualizer.dataset_meta = dict(dataset_meta)
    write_image(path, draw_picture(image, detections, visualizer, score_thr, max_side))
