# SPDX-License-Identifier: Apache-2.0
"""Prove that an exported file answers as the model does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from mmeformer.deploy.graphs import Graph
from mmeformer.runtime import Detections, Metadata, Predictor, RotatedDetections, Segmentation
from mmeformer.runtime.images import Prepared, as_image, normalise, prepare
from mmeformer.runtime.rotated_nms import rotated_iou

RAW_TOLERANCE = 1e-4
"""Largest difference of a raw tensor, as a share of its largest value."""

MATCHED = 0.99
"""Least share of detections that have a counterpart."""

MATCH_IOU = 0.99
MATCH_SCORE = 1e-3

LABELS_DIFFER = 1e-3
"""Largest share of pixels with another class: where two classes score the same but for rounding."""


class CheckFailed(RuntimeError):
    """An exported model does not answer as the model in PyTorch does."""


@dataclass
class Findings:
    """What a check found.

    Args:
        lines: to print, one per finding.
        failures: what is beyond tolerance; empty if all is well.
    """

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, line: str, ok: bool) -> None:
        """Note a finding."""
        self.lines.append(line + ("" if ok else "  <- beyond tolerance"))
        if not ok:
            self.failures.append(line)

    def raise_failures(self, path: Path) -> None:
        """Raise :class:`CheckFailed` if anything is beyond tolerance."""
        if self.failures:
            raise CheckFailed(f"{path} was not written: " + "; ".join(self.failures))


def random_image(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W, 3) ``uint8`` with patches of random colours and fine noise."""
    random = np.random.default_rng(seed)
    patches = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
    image = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return np.clip(image + random.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def check(
    model: nn.Module,
    make_graph: Callable[[nn.Module], Graph],
    with_raw: Predictor,
    finished: Predictor,
    images: Sequence[np.ndarray | Path],
) -> Findings:
    """Compare onnxruntime with PyTorch on images.

    Args:
        model: as it was trained, unfolded.
        make_graph: from a model to the graph that was exported, without preprocessing.
        with_raw: of the file with its raw outputs still in place.
        finished: of the file as it will be used.
        images: to compare on.
    """
    findings = Findings()
    metadata = finished.metadata
    reference = make_graph(copy.deepcopy(model)).eval()
    raw = reference.raw_names or reference.output_names
    largest = dict.fromkeys(raw, 0.0)
    pairs = []
    for image in images:
        image = as_image(image)
        item = prepare(image, metadata)
        batch = _network_input(image, item, metadata)
        ours = with_raw.run([item])
        with torch.no_grad():
            expected = dict(
                zip(
                    reference.output_names + reference.raw_names,
                    reference(batch, *_extra_inputs(reference, item)),
                    strict=True,
                )
            )
        for name in raw:
            largest[name] = max(
                largest[name], relative_difference(ours[name][:1], expected[name].numpy())
            )
        if metadata.task != "backbone":
            pairs.append(
                (predict_with_model(model, batch, item, metadata), finished.predict(image))
            )
    for name, difference in largest.items():
        findings.add(
            f"{name.removeprefix('raw_')}: differs by {difference:.1e} of its largest value",
            difference <= RAW_TOLERANCE,
        )
    if metadata.task == "segmentation":
        _compare_labels(pairs, findings)
    elif pairs:
        _compare_detections(pairs, findings)
    if metadata.batch != 1 and len(images) > 1:
        # The last one is a real image, if there are any: in it there is something to find.
        _compare_batches(finished, as_image(images[-1]), findings)
    return findings


def _network_input(image: np.ndarray, item: Prepared, metadata: Metadata) -> torch.Tensor:
    """The normalised (1, 3, H, W) that PyTorch takes for a prepared image."""
    if not metadata.preprocessing_in_graph:
        return torch.from_numpy(item.data)[None]
    data = np.zeros((3, *item.data.shape[:2]), np.float32)
    height, width = item.size
    data[:, :height, :width] = normalise(item.data[:height, :width], metadata)
    return torch.from_numpy(data)[None]


def _extra_inputs(graph: Graph, item: Prepared) -> list[torch.Tensor]:
    values = {
        "image_size": torch.tensor([item.size], dtype=torch.float32),
        "output_size": torch.tensor(item.original),
    }
    return [values[name] for name in graph.extra_inputs]


def relative_difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two arrays as a share of the largest value expected; infinite where
    shapes differ or a number is not finite."""
    # What is not a number would pass for the smaller of two differences.
    if ours.shape != expected.shape or not (np.isfinite(ours) & np.isfinite(expected)).all():
        return float("inf")
    difference = np.abs(ours.astype(np.float64) - expected).max()
    return float(difference / max(np.abs(expected).max(), 1e-12))


@torch.no_grad()
def predict_with_model(
    model: nn.Module, batch: torch.Tensor, item: Prepared, metadata: Metadata
) -> tuple[Segmentation | Detections | RotatedDetections, np.ndarray | None]:
    """What the OpenMMLab model itself predicts, by its own ``predict``.

    Args:
        model: detector or segmentor in eval mode.
        batch: (1, 3, H, W), normalised.
        item: how the image was prepared.
        metadata: of the exported file.

    Returns:
        The result, and the masks (N, H, W) of a model that predicts masks.
    """
    height, width = item.size
    info = dict(
        img_shape=item.size,
        ori_shape=item.original,
        pad_shape=tuple(batch.shape[-2:]),
        batch_input_shape=tuple(batch.shape[-2:]),
        scale_factor=(width / item.original[1], height / item.original[0]),
    )
    if metadata.task == "segmentation":
        from mmseg.structures import SegDataSample

        (sample,) = model.predict(batch, [SegDataSample(metainfo=info)])
        return Segmentation(sample.pred_sem_seg.data[0].numpy()), None
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import get_box_tensor

    (sample,) = model.predict(batch, [DetDataSample(metainfo=info)], rescale=True)
    found = sample.pred_instances
    values = (get_box_tensor(found.bboxes).numpy(), found.scores.numpy(), found.labels.numpy())
    if metadata.task == "rotated":
        return RotatedDetections(*values), None
    masks = found.masks.numpy() if "masks" in found else None
    return Detections(*values, None, item.original, None), masks


def _compare_labels(pairs, findings: Findings) -> None:
    differ = sum(int((ours.labels != theirs.labels).sum()) for (theirs, _), ours in pairs)
    total = sum(ours.labels.size for _, ours in pairs)
    findings.add(f"{differ} of {total} pixels have another class", differ <= LABELS_DIFFER * total)


def _compare_detections(pairs, findings: Findings) -> None:
    matched, total = 0, 0
    box, score, mask = 0.0, 0.0, None
    for (theirs, masks), ours in pairs:
        matches = match(theirs, ours)
        matched += len(matches)
        total += max(len(theirs.boxes), len(ours.boxes))
        if not matches:
            continue
        left, right = map(list, zip(*matches, strict=True))
        box = max(box, float(np.abs(theirs.boxes[left, :4] - ours.boxes[right, :4]).max()))
        score = max(score, float(np.abs(theirs.scores[left] - ours.scores[right]).max()))
        if masks is not None:
            differ = masks[left] != ours.masks()[right]
            mask = max(mask or 0, float(differ.mean((1, 2)).max()))
    if not total:
        findings.add(
            "nothing was detected in these images, so only raw tensors were compared: "
            "give --images that show something",
            True,
        )
        return
    line = f"{matched} of {total} detections match: boxes within {box:.1e} px, scores {score:.1e}"
    if mask is not None:
        line += f", masks but for {mask:.1e} of the image"
    findings.add(line, matched >= MATCHED * total and (mask or 0) <= LABELS_DIFFER)


def match(theirs, ours) -> list[tuple[int, int]]:
    """Pairs of places of the same object in two lists of detections.

    The same class, an IoU of at least :data:`MATCH_IOU`, scores that differ by
    :data:`MATCH_SCORE` at most; each detection in one pair at most.
    """
    free = np.ones(len(ours.boxes), bool)
    pairs = []
    others = _as_rotated(ours.boxes)
    for index, box in enumerate(_as_rotated(theirs.boxes)):
        possible = np.flatnonzero(
            free
            & (ours.labels == theirs.labels[index])
            & (np.abs(ours.scores - theirs.scores[index]) <= MATCH_SCORE)
        )
        if not len(possible):
            continue
        overlap = rotated_iou(box, others[possible])
        best = int(overlap.argmax())
        if overlap[best] >= MATCH_IOU:
            free[possible[best]] = False
            pairs.append((index, int(possible[best])))
    return pairs


def _as_rotated(boxes: np.ndarray) -> np.ndarray:
    if boxes.shape[1] == 5:
        return boxes
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return np.concatenate([centre, size, np.zeros_like(centre[:, :1])], 1)


def _compare_batches(predictor: Predictor, image: np.ndarray, findings: Findings) -> None:
    """Two images together must give what each gives alone."""
    together = [image, np.ascontiguousarray(image[:, ::-1])]
    for single, joint in zip(
        map(predictor.predict, together), predictor.predict_batch(together), strict=True
    ):
        if isinstance(single, Segmentation):
            same = float((single.labels == joint.labels).mean()) >= 1 - LABELS_DIFFER
        elif hasattr(single, "levels"):
            same = all(
                relative_difference(ours, theirs) <= RAW_TOLERANCE
                for ours, theirs in zip(joint.levels, single.levels, strict=True)
            )
        else:
            count = max(len(single.boxes), len(joint.boxes))
            same = len(match(single, joint)) >= MATCHED * count
        if not same:
            findings.add("an image of a batch gives another result than alone", False)
            return
    findings.add("images of a batch give the same as alone", True)
