# SPDX-License-Identifier: Apache-2.0
"""Convert the outputs of an exported file to results: one function per task, named in its row.

Every function takes the prepared images of a run, the graph's outputs by name and the file's
metadata, and returns one result per image, in pixels of the image. The batch of a graph with a
fixed batch size may have been filled up, so there may be outputs for more images than given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmeformer.results import (
    Classification,
    Detections,
    Mask,
    Pyramid,
    RotatedDetections,
    Segmentation,
)
from mmeformer.runtime.images import Prepared
from mmeformer.runtime.masks import dynamic_masks, masks_of_maps
from mmeformer.runtime.metadata import Metadata

Result = Classification | Detections | Pyramid | RotatedDetections | Segmentation
Outputs = Mapping[str, NDArray[Any]]


def decode_pyramids(
    batch: Sequence[Prepared], outputs: Outputs, metadata: Metadata
) -> list[Pyramid]:
    """Levels of a backbone, in the order of the outputs."""
    return [
        Pyramid(tuple(level[index] for level in outputs.values())) for index in range(len(batch))
    ]


def decode_classification(
    batch: Sequence[Prepared], outputs: Outputs, metadata: Metadata
) -> list[Classification]:
    """``scores`` (B, C)."""
    return [Classification(outputs["scores"][index]) for index in range(len(batch))]


def decode_segmentation(
    batch: Sequence[Prepared], outputs: Outputs, metadata: Metadata
) -> list[Segmentation]:
    """``labels`` (B, H, W), resized to the image if the graph did not do that."""
    results = []
    for item, labels in zip(batch, outputs["labels"], strict=False):
        if labels.shape != item.original:
            height, width = item.original
            labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
        results.append(Segmentation(labels))
    return results


def decode_detections(
    batch: Sequence[Prepared], outputs: Outputs, metadata: Metadata
) -> list[Detections]:
    """Boxes (N, 4) and masks (N, S, S) of the whole batch, after NMS, or boxes of every level.

    Does the NMS of boxes of every level, and computes their masks.
    """
    suppressed = "boxes" in outputs
    features = outputs.get("mask_features")
    if not suppressed:
        outputs = _candidates(batch, outputs, metadata)
    results = []
    for index, (item, own) in enumerate(_by_image(batch, outputs, metadata)):
        if not suppressed:
            kept = _suppressed(own["boxes"], own["scores"], own["labels"], metadata)
            own = {name: value[kept] for name, value in own.items()}
            if features is not None:
                own["mask_logits"] = dynamic_masks(own["kernels"], features[index])
        boxes = own["boxes"] / np.array(_scale_factors(item)[::-1] * 2, np.float32)
        masks = _masks(own, boxes, item, metadata)
        results.append(Detections(boxes, own["scores"], own["labels"], item.original, masks))
    return results


def _masks(
    own: Outputs, boxes: NDArray[Any], item: Prepared, metadata: Metadata
) -> tuple[Mask, ...] | None:
    """Masks of an image's objects: from a grid over each box, or from a map of the whole input."""
    threshold = metadata.mask_threshold
    if threshold is None:
        return None
    if "masks" in own:
        return tuple(
            Mask.from_scores(scores, box, threshold, item.original)
            for scores, box in zip(own["masks"], boxes, strict=True)
        )
    rows, columns = item.data.shape[:2] if metadata.preprocessing_in_graph else item.data.shape[1:]
    full = (rows, columns)
    return masks_of_maps(own["mask_logits"], threshold, full, item.size, item.original)


def decode_rotated(
    batch: Sequence[Prepared], outputs: Outputs, metadata: Metadata
) -> list[RotatedDetections]:
    """Candidates (N, 5) of the whole batch, before NMS, or boxes of every level; does the NMS."""
    assert metadata.iou_threshold is not None, "the export of a rotated detector has one"
    if "boxes" not in outputs:
        outputs = _candidates(batch, outputs, metadata)
    results = []
    for item, own in _by_image(batch, outputs, metadata):
        boxes = _rescale_rotated(own["boxes"], *_scale_factors(item))
        found = RotatedDetections(boxes, own["scores"], own["labels"])
        kept = found.suppressed(metadata.iou_threshold)
        results.append(kept.take(slice(metadata.max_per_image)))
    return results


def _candidates(batch: Sequence[Prepared], levels: Outputs, metadata: Metadata) -> Outputs:
    """Choose from ``scores{i}`` (B, N_i, C) and ``boxes{i}`` (B, N_i, 4 or 5) of the levels i.

    With masks, ``kernels{i}`` (B, N_i, P) are those of the boxes.

    Upright boxes are clipped to the image, and empty ones left out; of rotated boxes the center is.

    Returns:
        ``boxes``, ``scores``, ``labels`` and ``image_index``, as graphs with operators for that;
        with masks, ``kernels`` of the same boxes.
    """
    masks = "kernels0" in levels
    chosen: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("boxes", "scores", "labels", "image_index", *["kernels"] * masks)
    }
    for index, item in enumerate(batch):
        height, width = item.size
        for level in range(sum(name.startswith("scores") for name in levels)):
            scores = levels[f"scores{level}"][index]
            best = np.argsort(-scores, axis=None, kind="stable")[: metadata.candidates]
            best = best[scores.flat[best] > (metadata.score_threshold or 0)]
            boxes = levels[f"boxes{level}"][index][best // scores.shape[1]]
            if boxes.shape[1] == 5:
                boxes[:, :2] = np.clip(boxes[:, :2], 0, [width - 1, height - 1])
            else:
                boxes = np.clip(boxes, 0, [width, height] * 2)
                full = (boxes[:, 2:] > boxes[:, :2]).all(1)
                best, boxes = best[full], boxes[full]
            chosen["boxes"].append(boxes.astype(np.float32))
            chosen["scores"].append(scores.flat[best])
            chosen["labels"].append(best % scores.shape[1])
            chosen["image_index"].append(np.full(len(best), index))
            if masks:
                chosen["kernels"].append(levels[f"kernels{level}"][index][best // scores.shape[1]])
    return {name: np.concatenate(values) for name, values in chosen.items()}


def _suppressed(
    boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], metadata: Metadata
) -> NDArray[Any]:
    """Indices of the upright boxes (N, 4) that NMS within each class keeps, the best first."""
    assert metadata.iou_threshold is not None, "the export of a detector has one"
    rectangles = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    kept = cv2.dnn.NMSBoxesBatched(
        rectangles.tolist(), scores.tolist(), labels.tolist(), 0.0, metadata.iou_threshold
    )
    # Empty without boxes.
    found = np.asarray(kept, np.int64).reshape(-1)
    best: NDArray[Any] = found[np.argsort(-scores[found], kind="stable")]
    return best[: metadata.max_per_image]


def _by_image(
    batch: Sequence[Prepared], outputs: Outputs, metadata: Metadata
) -> Iterator[tuple[Prepared, dict[str, NDArray[Any]]]]:
    """Each image with its own rows of outputs that list the objects of all images.

    Rows that do not exceed the score threshold are left out, whatever the graph does.
    """
    for index, item in enumerate(batch):
        own = outputs["image_index"] == index
        if metadata.score_threshold is not None:
            own = own & (outputs["scores"] > metadata.score_threshold)
        yield item, {name: value[own] for name, value in outputs.items()}


def _scale_factors(item: Prepared) -> tuple[float, float]:
    """Pixels of the network's input per pixel of the image, vertically and horizontally."""
    return item.size[0] / item.original[0], item.size[1] / item.original[1]


def _rescale_rotated(boxes: NDArray[Any], height: float, width: float) -> NDArray[Any]:
    """Rotated boxes (N, 5) of the network's input, in pixels of the image.

    Both factors are equal up to rounding, so the boxes stay rectangles. Source: mmrotate's
    ``RotatedBoxes.rescale_``.
    """
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    return np.stack(
        [
            boxes[:, 0] / width,
            boxes[:, 1] / height,
            boxes[:, 2] * np.hypot(cos / width, sin / height),
            boxes[:, 3] * np.hypot(sin / width, cos / height),
            np.arctan2(sin / width, cos / height),
        ],
        1,
    ).astype(np.float32)
