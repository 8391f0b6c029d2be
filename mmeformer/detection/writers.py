# SPDX-License-Identifier: Apache-2.0
"""Write detections as annotations of a COCO data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from mmeformer.results import Detections, Mask, category_id


def to_json(detections: Detections, category_ids: Sequence[int] | None = None) -> list[dict]:
    """Objects of one image as COCO annotations, without ``id`` and ``image_id``.

    Args:
        detections: of one image.
        category_ids: by label; None counts from 1.

    Returns:
        Per object ``category_id``, ``bbox`` (x, y, width, height), ``area``, ``score``
        and, if the model has masks, ``segmentation`` (compressed run-length encoding).
        Objects with a track have ``track_id``.
    """
    entries = []
    for index, (box, score, label) in enumerate(
        zip(detections.boxes, detections.scores, detections.labels, strict=True)
    ):
        left, top, right, bottom = (float(edge) for edge in box)
        entry = dict(
            category_id=category_id(label) if category_ids is None else category_ids[label],
            bbox=[round(value, 2) for value in (left, top, right - left, bottom - top)],
            area=round((right - left) * (bottom - top), 2),
            iscrowd=0,
            score=round(float(score), 6),
        )
        if detections.track_ids is not None and detections.track_ids[index]:
            entry["track_id"] = int(detections.track_ids[index])
        if detections.instance_masks is not None:
            mask = detections.instance_masks[index]
            entry.update(area=mask.area, segmentation=run_length_code(mask, detections.image_size))
        entries.append(entry)
    return entries


def run_length_code(mask: Mask, image_size: tuple[int, int]) -> dict:
    """Encode a mask as COCO's compressed RLE, without an array of the image's size.

    Args:
        mask: within the image.
        image_size: height and width.

    Returns:
        ``size`` and ``counts`` (text), as in COCO's result files.
    """
    height, width = image_size
    # COCO's runs go down the columns: find where the runs of each column begin and end.
    columns = np.pad(mask.array().T.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(columns, axis=1)
    begins, ends = (
        (mask.x + column) * height + mask.y + row
        for column, row in (np.nonzero(steps == 1), np.nonzero(steps == -1))
    )
    # A run that reaches the bottom of a column can continue at the top of the next one.
    apart = begins[1:] != ends[:-1]
    edges = np.empty(2 * (np.count_nonzero(apart) + (len(begins) > 0)), np.int64)
    if len(begins):
        edges[0::2] = begins[np.r_[True, apart]]
        edges[1::2] = ends[np.r_[apart, True]]
    counts = np.diff(np.r_[0, edges, height * width])
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    code = coco_mask.frPyObjects(
        {"size": [height, width], "counts": counts.tolist()}, height, width
    )
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}
