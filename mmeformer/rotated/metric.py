# SPDX-License-Identifier: Apache-2.0
"""DOTA's metrics for mmengine's evaluator, on patches or on whole images merged from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from mmdet.structures.bbox import get_box_tensor
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from terminaltables import AsciiTable

from mmeformer.registry import METRICS
from mmeformer.results import RotatedDetections
from mmeformer.rotated.detections import MERGE_IOU, check_rotated, from_instances, merge_patches
from mmeformer.rotated.dota import DotaObject, list_labels, read_label_files
from mmeformer.rotated.evaluation import IOU_THRS, MODES, Evaluation, GroundTruth, evaluate
from mmeformer.rotated.writers import is_task1, write_task1


@METRICS.register_module()
class DOTAMetric(BaseMetric):
    """AP50, AP75 and AP 50:95 of rotated boxes (``dota/AP50``, ``dota/AP75``, ``dota/AP``, 0 to 1),
    means over the classes that have objects, and a table of all classes in the log.

    Without ``ann_dir`` each image of the data set is evaluated with the objects that its pipeline
    loads (``LoadAnnotations`` after ``Resize``, or their boxes would be scaled). Objects are
    compared as rotated boxes, as in mmrotate; DOTA's server compares their polygons.

    Args:
        eval_mode: ``11points`` (VOC 2007; DOTA's server and mmrotate's default) or ``area``.
        merge_patches: merge predictions of patches named ``NAME__SIZE__X___Y`` into whole images.
            Needs ``ann_dir``, ``submission_dir`` or both.
        merge_iou_thr: IoU threshold of the NMS that merges patches.
        ann_dir: folder of the original label files to evaluate with, one per image.
        diff_thr: objects of ``ann_dir`` with a larger flag ``difficult`` are ignored; the default
            is what DOTA's server does. (For objects that the data set loads, its own ``diff_thr``
            decides.)
        submission_dir: folder to write a submission for DOTA's Task 1 to, see
            :func:`mmeformer.rotated.writers.write_task1`; an earlier submission in it is replaced.
            It is the only result if there are no objects to evaluate with.
        collect_device, prefix: as in mmengine.

    Raises:
        ValueError: an unknown ``eval_mode``, or ``merge_patches`` without a purpose.
        FileNotFoundError: ``ann_dir`` is missing or has no label files.
        FileExistsError: ``submission_dir`` has files that are not of a submission.
    """

    default_prefix = "dota"

    def __init__(
        self,
        eval_mode: str = "11points",
        merge_patches: bool = False,
        merge_iou_thr: float = MERGE_IOU,
        ann_dir: str | None = None,
        diff_thr: int = 0,
        submission_dir: str | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if eval_mode not in MODES:
            raise ValueError(f"eval_mode is {eval_mode!r}; choose one of {MODES}")
        if merge_patches and ann_dir is None and submission_dir is None:
            raise ValueError(
                "merge_patches needs ann_dir (label files of the whole images, to evaluate) or "
                "submission_dir (to write a submission)"
            )
        self.eval_mode = eval_mode
        self.merge_patches = merge_patches
        self.merge_iou_thr = merge_iou_thr
        self.diff_thr = diff_thr
        self.submission_dir = None if submission_dir is None else Path(submission_dir)
        # Check this now; otherwise it would fail at the end of the test.
        self.label_files = None if ann_dir is None else list_labels(ann_dir)
        if self.submission_dir is not None and not is_task1(self.submission_dir):
            raise FileExistsError(
                f"submission_dir {submission_dir} has files that are not of a submission; choose "
                "another"
            )

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Store the image's name, detections and ground truth (or None) of each sample."""
        for sample in data_samples:
            detections = from_instances(sample["pred_instances"])
            self.results.append((str(sample["img_id"]), detections, ground_truth(sample)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Merge, write and evaluate, depending on the arguments of the class.

        Raises:
            ValueError: there is nothing to evaluate with, or an image name does not fit.
            FileNotFoundError: an image has no label file in ``ann_dir``.
        """
        classes = self.dataset_meta["classes"]
        predictions = [(name, found) for name, found, _ in results]
        truths = {name: truth for name, _, truth in results if truth is not None}
        if self.merge_patches:
            images = merge_patches(predictions, self.merge_iou_thr)
        else:
            images = dict(predictions)
            if len(images) != len(predictions):
                raise ValueError("two images of the data set have the same name (img_id)")
        logger = MMLogger.get_current_instance()
        if self.submission_dir is not None:
            archive = write_task1(self.submission_dir, images, classes)
            logger.info(f"boxes of {len(images)} images for DOTA's Task 1 are in {archive}")
        if self.label_files is not None:
            truths = self._read_truths(self.label_files, images)
        elif self.merge_patches or (self.submission_dir is not None and not truths):
            return {}
        if len(truths) != len(images):
            raise ValueError(
                f"{len(images) - len(truths)} of {len(images)} images have no objects loaded: the "
                "pipeline needs LoadAnnotations. Without labels, set submission_dir"
            )
        found = evaluate(
            [(images[name], truths[name]) for name in images], len(classes), self.eval_mode
        )
        if not found.objects.any():
            raise ValueError(
                "no image has an object to find (ignored ones do not count); correct "
                "ann_file or ann_dir, or raise diff_thr"
            )
        logger.info("\n" + self._table(found))
        ap = np.nanmean(found.ap, axis=1)
        return {
            "AP": float(ap.mean()),
            "AP50": float(ap[IOU_THRS.index(0.5)]),
            "AP75": float(ap[IOU_THRS.index(0.75)]),
        }

    def _read_truths(
        self, label_files: dict[str, Path], images: dict[str, RotatedDetections]
    ) -> dict[str, GroundTruth]:
        folder = next(iter(label_files.values())).parent
        if missing := [name for name in images if name not in label_files]:
            raise FileNotFoundError(
                f"ann_dir {folder} has no label file for {len(missing)} of {len(images)} images, "
                f"such as {missing[0]}; correct ann_dir, or add an empty file for an image without "
                "objects"
            )
        if untested := label_files.keys() - images.keys():
            MMLogger.get_current_instance().warning(
                f"ann_dir {folder} has {len(untested)} images that were not tested, such as "
                f"{min(untested)}; their objects do not count"
            )
        classes = self.dataset_meta["classes"]
        files = read_label_files(
            (label_files[name] for name in images),
            classes,
            self.dataset_meta.get("dropped_classes", ()),
        )
        labels = {name: label for label, name in enumerate(classes)}
        return {
            image: GroundTruth(
                enclosing_boxes(objects),
                np.array([labels[item.name] for item in objects], np.int64),
                np.array([item.difficult > self.diff_thr for item in objects], bool),
            )
            for image, objects in zip(images, files, strict=True)
        }

    def _table(self, found: Evaluation) -> str:
        rows = [["class", "objects", "detections", "recall50", "AP50", "AP75", "AP"]]
        row50, row75 = IOU_THRS.index(0.5), IOU_THRS.index(0.75)
        scores = np.stack([found.recall[row50], found.ap[row50], found.ap[row75], found.ap.mean(0)])
        for label, name in enumerate(self.dataset_meta["classes"]):
            cells = ["-" if np.isnan(value) else f"{value:.3f}" for value in scores[:, label]]
            rows.append([name, found.objects[label], found.detections[label], *cells])
        means = [f"{value:.3f}" for value in np.nanmean(scores, axis=1)]
        rows.append(["mean", found.objects.sum(), found.detections.sum(), *means])
        table = AsciiTable(rows, title=f"AP by {self.eval_mode}")
        table.inner_footing_row_border = True
        return table.table


def enclosing_boxes(objects: Sequence[DotaObject]) -> np.ndarray:
    """Smallest rotated boxes around polygons, ``(N, 5)``, by OpenCV as in mmrotate."""
    boxes = np.zeros((len(objects), 5))
    for row, item in enumerate(objects):
        # OpenCV computes in float32: keep the numbers small.
        origin = item.polygon[0]
        (x, y), size, degrees = cv2.minAreaRect((item.polygon - origin).astype(np.float32))
        boxes[row] = [origin[0] + x, origin[1] + y, *size, np.deg2rad(degrees)]
    return boxes


def ground_truth(sample: dict) -> GroundTruth | None:
    """The objects that the pipeline loaded; None if it loads none."""
    instances = [sample.get("gt_instances", {}), sample.get("ignored_instances", {})]
    if "bboxes" not in instances[0]:
        return None
    boxes, labels, ignored = [], [], []
    for group, is_ignored in zip(instances, (False, True), strict=True):
        if "bboxes" in group:
            array = get_box_tensor(group["bboxes"]).cpu().numpy()
            check_rotated(array)
            boxes.append(array)
            labels.append(group["labels"].cpu().long().numpy())
            ignored.append(np.full(len(array), is_ignored))
    return GroundTruth(np.concatenate(boxes), np.concatenate(labels), np.concatenate(ignored))
