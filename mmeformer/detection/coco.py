# SPDX-License-Identifier: Apache-2.0
"""mmdet's COCO data set with checks of its annotation file and images."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.evaluation import CocoMetric as MMDetCocoMetric

from mmeformer.checks.classes import class_names
from mmeformer.checks.findings import ERROR, Finding, first_of, stop_on_errors
from mmeformer.checks.interface import CheckedDataset
from mmeformer.detection.annotations import Annotations, clean, is_coco, read
from mmeformer.detection.checks import LEFT_OUT, check_coco
from mmeformer.detection.metric import CocoMetric
from mmeformer.garbage import without_collection
from mmeformer.registry import DATASETS

# Images that training leaves out by itself; see mmeformer/training/data.py.
UNREADABLE_KINDS = ("missing image", "unreadable image")


@DATASETS.register_module()
class CocoDataset(CheckedDataset, MMDetCocoDataset):
    """mmdet's ``CocoDataset`` that checks its annotation file and images.

    mmdet silently drops annotations whose category is not in ``metainfo["classes"]``, and numbers
    the classes in the order of the file. With a misspelled name it trains on nothing. This class
    checks all annotations and the first :attr:`CHECKED_FILES` images
    (:mod:`mmeformer.detection.checks`), logs warnings, and numbers the classes in the order of the
    config (:mod:`mmeformer.detection.annotations`). Arguments are those of mmdet; images must be
    local.

    Raises:
        FileNotFoundError: the annotation file is missing.
        ValueError: the file is not COCO JSON; it has no images; it has no annotations (allowed with
            ``test_mode`` if the entry ``annotations`` is missing, as in a test set without labels);
            its categories are not the config's classes; or annotations or images have errors, more
            than training may leave out. The message names the file and the fix.
    """

    @without_collection()
    def load_data_list(self) -> list[dict]:
        """One entry per image; see mmdet's."""
        return super().load_data_list()

    @without_collection()
    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """All problems; see :class:`~mmeformer.checks.interface.CheckedDataset`."""
        try:
            content = read(self.ann_file)
        except ValueError as error:
            text = str(error).removeprefix(f"annotation file {self.ann_file} ")
            return [Finding(ERROR, "not COCO", self.ann_file, text)]
        return self._findings(content, self.ann_file, limit, decode)

    def _findings(self, content, path: str, limit: int | None, decode: bool) -> list[Finding]:
        findings = check_coco(
            content,
            path,
            self.data_prefix["img"],
            self.metainfo["classes"],
            training=not self.test_mode,
            masks=any(getattr(step, "with_mask", False) for step in self.pipeline.transforms),
            limit=limit,
            decode=decode,
            reading=self.reading,
        )
        return [*self._unread_masks(content, path), *findings]

    def _unread_masks(self, content: Any, path: str) -> list[Finding]:
        """An error if the pipeline reads outlines only, but masks are run lengths."""
        if not is_coco(content) or not any(
            getattr(step, "with_mask", False) and not getattr(step, "poly2mask", True)
            for step in self.pipeline.transforms
        ):
            return []
        count = sum(
            isinstance(item, dict)
            and isinstance(item.get("segmentation"), dict)
            and not item.get("iscrowd")
            for item in content.get("annotations", [])
        )
        message = (
            f"has {count} masks as run lengths, which LoadAnnotations with poly2mask=False ignores "
            "with their objects; set poly2mask=True in the pipeline"
        )
        return [Finding(ERROR, "mask as run lengths", path, message)] if count else []

    def COCOAPI(self, path: str) -> Annotations:  # noqa: N802 (overrides mmdet's attribute)
        """Open and check an annotation file; mmdet's ``load_data_list`` calls this."""
        content = read(path)
        if not is_coco(content):
            raise ValueError(f"annotation file {path} is not COCO; export it again")
        self._require_categories(content, path)
        images, annotations = (content.get(key, []) for key in ("images", "annotations"))
        if not images:
            raise ValueError(f"annotation file {path} lists no images; export it again")
        unlabeled_test_set = self.test_mode and "annotations" not in content
        if not annotations and not unlabeled_test_set:
            raise ValueError(
                f"annotation file {path} lists {len(images)} images but no annotations; "
                "export it again with its annotations"
            )
        if self.checked:
            findings = self._findings(content, path, self.CHECKED_FILES, decode=False)
            left_out = dict.fromkeys(LEFT_OUT, len(annotations))
            if not self.test_mode:
                left_out |= dict.fromkeys(UNREADABLE_KINDS, len(images))
            stop_on_errors(findings, left_out)
        index = Annotations(content, self.metainfo["classes"])
        self._file_ids = index.category_ids
        return index

    def category_ids(self) -> list[int] | None:
        """See the base class."""
        return [
            self._file_ids.get(number, number) for number in super().category_ids() or []
        ] or None

    def _require_categories(self, content: dict, path: str) -> None:
        wanted = class_names(self.metainfo.get("classes"))
        if repeated := [name for name, count in Counter(wanted).items() if count > 1]:
            raise ValueError(f"metainfo classes has {repeated} twice; remove one")
        names = [
            category.get("name")
            for category in content.get("categories", [])
            if isinstance(category, dict)
        ]
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(
                f"classes {first_of(missing)} of the config are not among the {len(names)} "
                f"categories of {path}, {first_of(names, 50)}; correct `classes` in the config"
            )

    def check_metrics(self, metrics: Sequence[Any]) -> None:
        """Check that a COCO metric reads the same annotations.

        Raises:
            ValueError: it reads another file, or reads this one in another way.
        """
        for metric in metrics:
            if isinstance(metric, CocoMetric):
                if metric.ann_file is not None and not _same(self.ann_file, metric.ann_file):
                    raise ValueError(
                        f"the evaluator reads {metric.ann_file}, but its data set "
                        f"{self.ann_file}; set ann_file of both to the same file"
                    )
            elif type(metric) is MMDetCocoMetric and metric._coco_api is not None:
                content = metric._coco_api.dataset
                ours = Annotations(clean(copy.deepcopy(content)), self.metainfo["classes"])
                if ours.dataset != content:
                    raise ValueError(
                        f"mmdet's CocoMetric would misread {self.ann_file}; set "
                        "type='mmeformer.CocoMetric' in the evaluator"
                    )


def _same(first: str, second: str) -> bool:
    """Whether two paths are one file, or copies of one."""
    left, right = Path(first), Path(second)
    if not (left.is_file() and right.is_file()):
        return first == second
    return left.samefile(right) or left.read_bytes() == right.read_bytes()
