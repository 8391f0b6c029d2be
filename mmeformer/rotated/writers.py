# SPDX-License-Identifier: Apache-2.0
"""Write rotated boxes as DOTA text, JSON and pictures; no file is left incomplete."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmeformer.files import replacing, write_text
from mmeformer.images import write_image
from mmeformer.inference.pictures import LARGEST_PICTURE, at_picture_size
from mmeformer.results import RotatedDetections, category_id
from mmeformer.rotated.detections import to_sample
from mmeformer.rotated.dota import format_label
from mmeformer.rotated.visualizer import RotatedVisualizer


def write_dota_text(
    path: str | Path, detections: RotatedDetections, classes: Sequence[str]
) -> None:
    """Write boxes as a DOTA label file (``x1 y1 ... x4 y4 class 0``), which has no scores.

    :func:`mmeformer.rotated.dota.read_labels` and label tools read it.

    Args:
        path: the file; missing folders are created.
        detections: without those whose score is too low.
        classes: names, by label.
    """
    lines = [
        format_label(polygon, classes[label], 0) + "\n"
        for polygon, label in zip(detections.corners(), detections.labels, strict=True)
    ]
    write_text(path, "".join(lines))


def is_task1(folder: str | Path) -> bool:
    """Whether :func:`write_task1` would replace only its own files."""
    folder = Path(folder)
    return not folder.exists() or (
        folder.is_dir()
        and all(
            path.name == "Task1.zip" or (path.name.startswith("Task1_") and path.suffix == ".txt")
            for path in folder.iterdir()
        )
    )


def write_task1(
    folder: str | Path, images: Mapping[str, RotatedDetections], classes: Sequence[str]
) -> Path:
    """Write a submission to Task 1 (oriented boxes) of DOTA's evaluation server.

    Writes ``Task1_<class>.txt`` for every class, with a line ``image score x1 y1 ... x4 y4`` per
    box, and all of them in ``Task1.zip``.

    Args:
        folder: created or replaced.
        images: detections by image name (without suffix).
        classes: names, by label.

    Returns:
        Path of the zip file.

    Raises:
        ValueError: an image name has white space, which the format does not allow.
    """
    lines: list[list[str]] = [[] for _ in classes]
    for image, detections in images.items():
        if image.split() != [image]:
            raise ValueError(
                f"image name {image!r} has white space, which DOTA's format does not allow; rename "
                "the file"
            )
        corners = detections.corners().reshape(-1, 8)
        for polygon, score, label in zip(
            corners, detections.scores, detections.labels, strict=True
        ):
            numbers = " ".join(f"{value:.2f}" for value in polygon)
            lines[label].append(f"{image} {score:.6f} {numbers}\n")
    with replacing(folder) as draft:
        draft.mkdir()
        with zipfile.ZipFile(draft / "Task1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, found in zip(classes, lines, strict=True):
                path = draft / f"Task1_{name}.txt"
                path.write_text("".join(found), encoding="utf-8")
                archive.write(path, path.name)
    return Path(folder) / "Task1.zip"


def to_json(image: str, detections: RotatedDetections, classes: Sequence[str]) -> list[dict]:
    """Boxes of one image as entries of a COCO-like list of results.

    Args:
        image: its name.
        detections: in pixels of the image.
        classes: names, by label.

    Returns:
        Per box ``image_id``, ``category_id`` (from 1), ``category`` (name), ``score``, ``bbox``
        (the upright box around it: x, y, width, height), ``area``, ``segmentation`` (one polygon
        ``[x1, y1, ..., x4, y4]``) and ``rbox`` (center x, center y, width, height, angle in
        radians). Boxes with a track have ``track_id``.
    """
    entries = []
    for box, polygon, score, label in zip(
        detections.boxes,
        detections.corners(),
        detections.scores,
        detections.labels,
        strict=True,
    ):
        low, size = polygon.min(0), np.ptp(polygon, axis=0)
        entries.append(
            dict(
                image_id=image,
                category_id=category_id(label),
                category=classes[label],
                score=round(float(score), 6),
                bbox=_rounded([*low, *size], 2),
                segmentation=[_rounded(polygon.ravel(), 2)],
                rbox=_rounded(box[:4], 2) + _rounded(box[4:], 6),
                area=round(float(box[2]) * float(box[3]), 2),
            )
        )
    if detections.track_ids is not None:
        for entry, number in zip(entries, detections.track_ids, strict=True):
            if number:
                entry["track_id"] = int(number)
    return entries


def _rounded(values, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


def write_json(path: str | Path, entries: Sequence[dict]) -> None:
    """Write entries of :func:`to_json`, of any number of images, as one JSON list."""
    write_text(path, json.dumps(list(entries), indent=1) + "\n")


def draw_boxes(
    image: np.ndarray,
    detections: RotatedDetections,
    visualizer: RotatedVisualizer,
    score_thr: float = 0.0,
) -> np.ndarray:
    """Draw boxes into a copy of an image.

    Args:
        image: ``(H, W, 3)`` uint8, blue, green, red.
        detections: in pixels of the image.
        visualizer: with ``dataset_meta``.
        score_thr: boxes with a lower score are not drawn.

    Returns:
        ``(H, W, 3)`` uint8, blue, green, red.
    """
    visualizer.add_datasample(
        "boxes",
        np.ascontiguousarray(image[..., ::-1]),
        to_sample(detections),
        draw_gt=False,
        pred_score_thr=score_thr,
    )
    return visualizer.get_image()[..., ::-1]


def write_picture(
    path: str | Path,
    image: np.ndarray,
    detections: RotatedDetections,
    dataset_meta: Mapping,
    score_thr: float = 0.3,
    max_side: int = LARGEST_PICTURE,
) -> None:
    """Write an image with boxes drawn into it.

    Args:
        path: its suffix determines the format.
        image: ``(H, W, 3)`` uint8, blue, green, red.
        detections: in pixels of the image.
        dataset_meta: ``classes`` and ``palette``, as a detector's ``dataset_meta``.
        score_thr: boxes with a lower score are not drawn.
        max_side: a larger picture is shrunk to this, pixels; matplotlib cannot draw on more than
            65,535, and takes long before that.

    Raises:
        ValueError: no image format has this suffix.
    """
    visualizer = RotatedVisualizer(line_width=2)
    visualizer.dataset_meta = dict(dataset_meta)
    picture, scale = at_picture_size(image, smallest=1, largest=max_side)
    write_image(path, draw_boxes(picture, detections.scaled(scale), visualizer, score_thr))
