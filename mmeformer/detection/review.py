# SPDX-License-Identifier: Apache-2.0
"""Compare upright boxes and masks with their labels, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmdet.structures.bbox import get_box_tensor
from mmengine.dataset import BaseDataset
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmeformer.detection.writers import to_json
from mmeformer.report.review import (
    IOU_THR,
    SCORE_THR,
    Curve,
    ObjectReview,
    Statistics,
    Summary,
    Table,
    count_instances,
)
from mmeformer.results import Detections, Mask


class DetectionReview(ObjectReview[Detections]):
    """Compares :class:`mmeformer.results.Detections`; average precision is that of COCO."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.sizes: list[tuple[int, int]] = []
        self.targets: list[dict] = []
        self.found: list[dict] = []

    def truth(self, sample: Any) -> Detections | None:
        """See the base class."""
        return None if "gt_instances" not in sample else _from_instances(sample, "gt_instances")

    def add(self, found: Detections, sample: Any) -> float | None:
        """See the base class."""
        targets = [_from_instances(sample, "gt_instances")]
        if "ignored_instances" in sample:
            targets.append(_from_instances(sample, "ignored_instances"))
        ignored = np.repeat([False, True][: len(targets)], [len(part) for part in targets])
        target = Detections.concatenate(targets, targets[0].image_size)
        entries, target_entries = to_json(found), to_json(target)
        number = len(self.sizes)
        self.sizes.append(target.image_size)
        for entry in entries:
            self.found.append(dict(entry, image_id=number))
        for entry, flag in zip(target_entries, ignored, strict=True):
            entry.update(image_id=number, iscrowd=int(flag), id=len(self.targets) + 1)
            self.targets.append(entry)
        shown = found.scores > SCORE_THR
        iou = _iou([entries[index]["bbox"] for index in np.flatnonzero(shown)], target_entries)
        return self.count(found.labels[shown], target.labels, ignored, iou)

    def summary(self) -> Summary:
        """See the base class."""
        kinds = {"box": "bbox"}
        if self.targets and all("segmentation" in entry for entry in (*self.targets, *self.found)):
            kinds["mask"] = "segm"
        precisions = {name: self._precision(kind) for name, kind in kinds.items()}
        real = [entry["category_id"] - 1 for entry in self.targets if not entry["iscrowd"]]
        objects = np.bincount(np.array(real, np.int64), minlength=len(self.classes))
        header = ["class", "objects"]
        columns: list[Sequence] = [self.classes, objects.tolist()]
        for name, precision in precisions.items():
            header += [f"{name} AP", f"{name} AP50"]
            columns += [_means(precision), _means(precision[:1])]
        box50 = precisions["box"][0]
        curves = tuple(
            Curve(self.classes[label], box50[:, label], float(box50[:, label].mean()))
            for label in np.flatnonzero(objects)
        )
        table = Table(tuple(header), tuple(zip(*columns, strict=True)))
        return Summary(self.confusion(), table, curves, f"boxes at IoU {IOU_THR}")

    def _precision(self, kind: str) -> np.ndarray:
        """Precision (10 IoU thresholds, 101 recalls, classes); -1 for classes without objects."""
        numbers = range(len(self.classes))
        if not self.targets or not self.found:
            objects = {entry["category_id"] - 1 for entry in self.targets}
            empty = np.where([number in objects for number in numbers], 0.0, -1.0)
            return np.broadcast_to(empty, (10, 101, len(empty)))
        truths = COCO()
        truths.dataset = dict(
            info={},
            images=[dict(id=i, height=h, width=w) for i, (h, w) in enumerate(self.sizes)],
            categories=[dict(id=number + 1, name=self.classes[number]) for number in numbers],
            annotations=self.targets,
        )
        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            truths.createIndex()
            # It adds entries to those that it is given.
            found = truths.loadRes([dict(entry) for entry in self.found])
            evaluation = COCOeval(truths, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
        # Thresholds, recalls, classes, objects of any area, and at most 100 per image.
        precision: np.ndarray = evaluation.eval["precision"][:, :, :, 0, -1]
        return precision

    @classmethod
    def statistics(cls, datasets: Sequence[BaseDataset]) -> Statistics:
        """See the base class."""

        def area(box: Sequence[float]) -> float:
            return (box[2] - box[0]) * (box[3] - box[1])

        return count_instances(datasets, area, datasets[0].metainfo["classes"])


def _from_instances(sample: Any, key: str) -> Detections:
    """Labels of an mmdet data sample as detections with score 1."""
    instances = sample.get(key)
    height, width = (int(side) for side in sample.ori_shape[:2])
    boxes = get_box_tensor(instances.bboxes).cpu().float().numpy().reshape(-1, 4)
    masks = None
    if "masks" in instances:
        pixels = instances.masks.to_ndarray().astype(bool)
        masks = tuple(Mask.from_array(mask) for mask in pixels)
    labels = instances.labels.cpu().long().numpy()
    return Detections(boxes, np.ones(len(boxes), np.float32), labels, (height, width), masks)


def _iou(found: Sequence[Sequence[float]], targets: Sequence[dict]) -> np.ndarray:
    """IoU (N, M) of boxes; on a crowd, the share of the detection that is inside."""
    if not found or not targets:
        return np.zeros((len(found), len(targets)))
    boxes = [entry["bbox"] for entry in targets]
    crowds = [entry["iscrowd"] for entry in targets]
    overlaps: np.ndarray = np.asarray(coco_mask.iou(list(found), boxes, crowds))
    return overlaps


def _means(precision: np.ndarray) -> list[float | None]:
    """Mean over thresholds and recalls per class; None for classes without objects."""
    return [
        None if (values < 0).all() else float(values.mean())
        for values in np.moveaxis(precision, -1, 0)
    ]
