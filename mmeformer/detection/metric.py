# SPDX-License-Identifier: Apache-2.0
"""mmdet's COCO metric on the annotations as the data set reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from mmeformer.detection.annotations import Annotations, is_coco, read
from mmeformer.files import write_text
from mmeformer.registry import METRICS


@METRICS.register_module()
class CocoMetric(MMDetCocoMetric):
    """mmdet's ``CocoMetric`` that reads its file like :class:`mmeformer.CocoDataset`.

    Evaluates the images that were predicted, so that ``indices=100`` in the data set is a valid
    short test. (mmdet's counts the objects of all others as missed.) Arguments are those of mmdet.

    Raises:
        FileNotFoundError: the annotation file is missing.
        ValueError: it is not COCO JSON, or does not list the images that were predicted.
    """

    def __init__(self, ann_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(ann_file=None, **kwargs)
        self.ann_file = ann_file
        self._content = None
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                self._content = read(path)
            if not is_coco(self._content):
                raise ValueError(f"annotation file {ann_file} is not COCO; export it again")

    @property
    def dataset_meta(self) -> dict | None:
        """Classes and palette; the evaluator sets them before the first image."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        self._dataset_meta = dataset_meta
        if self._content is not None:
            self._coco_api = Annotations(self._content, dataset_meta["classes"])
            self._content = None

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Scores of the images in ``results``, pairs of ground truth and prediction.

        Raises:
            ValueError: the annotation file does not list one of the images.
        """
        if self.ann_file is not None:
            self.img_ids = [prediction["img_id"] for _, prediction in results]
            self._require_images(self.img_ids)
        scores = super().compute_metrics(results)
        if self.ann_file is not None and self.outfile_prefix is not None:
            self._write_ids_of_the_file()
        return scores

    def _require_images(self, ids: Sequence[int]) -> None:
        images = self._coco_api.imgs
        if unknown := sorted(set(ids) - set(images)):
            raise ValueError(
                f"{self.ann_file} does not list {len(unknown)} of the {len(ids)} images that were "
                f"predicted, the first with id {unknown[0]}; set ann_file of the evaluator to that "
                "of the data set"
            )
        if len(set(ids)) < len(images):
            print_log(
                f"evaluated on {len(set(ids))} of the {len(images)} images of {self.ann_file}",
                "current",
            )

    def _write_ids_of_the_file(self) -> None:
        """Give the written results the image and category ids of the annotation file."""
        if not self._coco_api.renumbered:
            return
        for kind in ("bbox", "segm"):
            path = Path(f"{self.outfile_prefix}.{kind}.json")
            if not path.is_file():
                continue
            entries = json.loads(path.read_text())
            for entry in entries:
                entry["image_id"] = self._coco_api.image_ids[entry["image_id"]]
                entry["category_id"] = self._coco_api.category_ids[entry["category_id"]]
            write_text(path, json.dumps(entries))
