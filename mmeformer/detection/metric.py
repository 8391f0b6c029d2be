# SPDX-License-Identifier: Apache-2.0
"""mmdet's COCO metric on the annotations as the data set reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmdet.structures.mask import encode_mask_results
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from torch import Tensor

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

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the predictions of a batch, masks as run lengths."""
        super().process(data_batch, [_with_run_lengths(sample) for sample in data_samples])

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


def _with_run_lengths(sample: dict) -> dict:
    """A data sample whose predicted masks are run lengths, as mmdet would make them.

    mmdet copies all masks of an image from the GPU at once, up to tens of megabytes. What is kept
    settles in their place, so that those of the next image get new memory: up to 30 MB per image.
    """
    predicted = sample["pred_instances"]
    if not isinstance(predicted.get("masks"), Tensor):
        return sample
    masks = [encode_mask_results([mask.cpu().numpy()])[0] for mask in predicted["masks"].detach()]
    return {**sample, "pred_instances": {**predicted, "masks": masks}}
