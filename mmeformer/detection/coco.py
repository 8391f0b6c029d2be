# SPDX-License-Identifier: Apache-2.0
"""mmdet's COCO data set with checks of its annotation file and images."""

from __future__ import annotations

import json
from pathlib import Path

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO

from mmeformer.checks.classes import class_names
from mmeformer.checks.findings import ERROR, Finding, stop_on_errors
from mmeformer.checks.interface import CheckedDataset
from mmeformer.detection.checks import LEFT_OUT, check_coco
from mmeformer.registry import DATASETS

# Images that training leaves out by itself; see mmeformer/training/data.py.
UNREADABLE_KINDS = ("missing image", "unreadable image")
# Errors of pycocotools for files that are not COCO JSON.
BROKEN = (json.JSONDecodeError, UnicodeDecodeError, KeyError, AssertionError, TypeError)


@DATASETS.register_module()
class CocoDataset(CheckedDataset, MMDetCocoDataset):
    """mmdet's ``CocoDataset`` that checks its annotation file and images.

    mmdet silently drops annotations whose category is not in ``metainfo["classes"]``, and numbers
    the classes in the order of the file, not of the config. With a misspelled or reordered list it
    trains on nothing or shows wrong names. This class checks all annotations and the first
    :attr:`CHECKED_FILES` images (:mod:`mmeformer.detection.checks`) and logs warnings. Arguments
    are those of mmdet; images must be local.

    Raises:
        FileNotFoundError: the annotation file is missing.
        ValueError: the file is not COCO JSON; it has no images; it has no annotations (allowed with
            ``test_mode`` if the entry ``annotations`` is missing, as in a test set without labels);
            its categories are not the config's classes; or annotations or images have errors, more
            than training may leave out. The message names the file and the fix.
    """

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """All problems; see :class:`~mmeformer.checks.interface.CheckedDataset`."""
        self._require_file(self.ann_file)
        try:
            content = json.loads(Path(self.ann_file).read_bytes())
        except (ValueError, RecursionError) as error:
            message = f"is not JSON ({error}); export it again"
            return [Finding(ERROR, "not COCO", self.ann_file, message)]
        return self._findings(content, self.ann_file, limit, decode)

    def _findings(self, content, path: str, limit: int | None, decode: bool) -> list[Finding]:
        return check_coco(
            content,
            path,
            self.data_prefix["img"],
            self.metainfo["classes"],
            training=not self.test_mode,
            masks=any(getattr(step, "with_mask", False) for step in self.pipeline.transforms),
            limit=limit,
            decode=decode,
        )

    @staticmethod
    def _require_file(path: str) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"annotation file {path} does not exist; set data_root and ann_file to where it is"
            )

    def COCOAPI(self, path: str) -> COCO:  # noqa: N802 (overrides mmdet's attribute)
        """Open and check an annotation file; mmdet's ``load_data_list`` calls this."""
        self._require_file(path)
        try:
            coco = COCO(path)
        except BROKEN as error:
            raise ValueError(
                f"annotation file {path} is not COCO JSON "
                f"({type(error).__name__}: {error}); export it again"
            ) from error
        self._check_categories(coco, path)
        if not coco.imgs:
            raise ValueError(f"annotation file {path} lists no images; export it again")
        unlabeled_test_set = self.test_mode and "annotations" not in coco.dataset
        if not coco.anns and not unlabeled_test_set:
            raise ValueError(
                f"annotation file {path} lists {len(coco.imgs)} images but no annotations; "
                "export it again with its annotations"
            )
        if self.checked:
            findings = self._findings(coco.dataset, path, self.CHECKED_FILES, decode=False)
            left_out = dict.fromkeys(LEFT_OUT, len(coco.anns))
            if not self.test_mode:
                left_out |= dict.fromkeys(UNREADABLE_KINDS, len(coco.imgs))
            stop_on_errors(findings, left_out)
        return coco

    def _check_categories(self, coco: COCO, path: str) -> None:
        wanted = list(class_names(self.metainfo.get("classes")))
        in_file = [category["name"] for category in coco.dataset.get("categories", [])]
        if missing := [name for name in wanted if name not in in_file]:
            raise ValueError(
                f"classes {missing} of the config are not among the categories of {path}, "
                f"which are {in_file}; correct `classes` in the config"
            )
        # mmdet uses the order of the file. Another order in the config has no effect on training,
        # but shows wrong names afterwards.
        order = [name for name in in_file if name in wanted]
        if order != wanted:
            raise ValueError(
                f"the config lists the classes as {wanted}, but {path} has them in the order "
                f"{order}; write them in that order"
            )
