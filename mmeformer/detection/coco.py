# SPDX-License-Identifier: Apache-2.0
"""mmdet's COCO data set, with the mistakes that otherwise end in a silent zero made errors."""

from __future__ import annotations

import json
from pathlib import Path

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO

from mmeformer.checks.findings import ERROR, Finding, stop_on_errors
from mmeformer.detection.checks import LEFT_OUT, check_coco
from mmeformer.registry import DATASETS

# What training leaves out by itself; see mmeformer.training.data.
UNREADABLE_KINDS = ("missing image", "unreadable image")
# What pycocotools raises for files of another kind.
BROKEN = (json.JSONDecodeError, UnicodeDecodeError, KeyError, AssertionError, TypeError)


@DATASETS.register_module()
class CocoDataset(MMDetCocoDataset):
    """mmdet's ``CocoDataset`` that checks the annotation file against the class names.

    mmdet drops annotations whose category is not among ``metainfo["classes"]`` without a word, and
    numbers the classes in the order of the file whatever order the config has, so that a misspelt
    or shuffled list trains on nothing or shows wrong names. All annotations and the first
    :attr:`CHECKED_FILES` images are looked at, see :mod:`mmeformer.detection.checks`; warnings are
    logged. Arguments are those of mmdet; images must be local.

    Raises:
        FileNotFoundError: the annotation file is missing.
        ValueError: it is not COCO JSON, holds no images or (unless ``test_mode`` and there is no
            ``annotations`` entry, as for a test set without labels) no annotations, its
            categories are not the config's classes, or annotations or images have errors, more of
            them than training may leave out. The message names the file and the mend.
    """

    CHECKED_FILES = 500
    """Images that are looked into at the start."""

    checked = True
    """Whether to look for errors at the start; ``tools/check_dataset.py`` does so itself."""

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """What is wrong with the annotations and the images, of which ``limit`` (None: all) are
        read; in full with ``decode``.

        Serves a data set that is built with ``lazy_init=True``.

        Raises:
            FileNotFoundError: the annotation file is missing.
        """
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
        """Open an annotation file after checking it; called by mmdet's ``load_data_list``."""
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
        unlabelled_test_set = self.test_mode and "annotations" not in coco.dataset
        if not coco.anns and not unlabelled_test_set:
            raise ValueError(
                f"annotation file {path} lists {len(coco.imgs)} images but not one annotation; "
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
        classes = self.metainfo.get("classes")
        if isinstance(classes, str):
            raise ValueError(
                f"metainfo classes is the text {classes!r}; a single class needs a comma: "
                f"classes = ({classes!r},)"
            )
        in_file = [category["name"] for category in coco.dataset.get("categories", [])]
        wanted = list(classes)
        if missing := [name for name in wanted if name not in in_file]:
            raise ValueError(
                f"classes {missing} of the config are not among the categories of {path}, "
                f"which are {in_file}; correct `classes` in the config"
            )
        # mmdet's COCO files hold their categories in the order of the class list; another order
        # in the config would be ignored in training and show wrong names afterwards.
        order = [name for name in in_file if name in wanted]
        if order != wanted:
            raise ValueError(
                f"the config lists the classes as {wanted}, but {path} has them in the order "
                f"{order}; write them in that order"
            )
