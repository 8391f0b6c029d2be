# SPDX-License-Identifier: Apache-2.0
"""mmseg's data sets of image and mask files, checked before they are trained on."""

from __future__ import annotations

import os

from mmseg.datasets import ADE20KDataset as MMSegADE20KDataset
from mmseg.datasets import BaseSegDataset

from mmeformer.checks.findings import Finding, stop_on_errors
from mmeformer.registry import DATASETS
from mmeformer.segmentation.checks import check_pairs, find_masks_without_image


class CheckedFiles(BaseSegDataset):
    """A ``BaseSegDataset`` that looks at its files before it hands out the first one.

    That every image has a mask is checked for all files; sizes and values (see
    :func:`mmeformer.segmentation.checks.check_pairs`) for the first :attr:`CHECKED_FILES`. Warnings
    are logged. Arguments are those of mmseg; files must be local.

    Raises:
        FileNotFoundError: a folder is missing, or holds no file with the suffix.
        ValueError: the files have errors, or the class names or the palette are malformed. The
            message names files and mends.
    """

    CHECKED_FILES = 500
    """Files whose content is checked at the start: about 3 s for 500 pictures of 683 x 512 px."""

    checked = True
    """Whether to look at the files at the start; ``tools/check_dataset.py`` does so itself."""

    def load_data_list(self) -> list[dict]:
        """mmseg's list of files, after the checks."""
        self._check_folders()
        data_list = super().load_data_list()
        if not data_list:
            raise FileNotFoundError(self._no_images())
        if self.checked:
            findings = self._findings(data_list, self.CHECKED_FILES)
            kinds = () if self.test_mode else ("unreadable image", "unreadable mask")
            stop_on_errors(findings, dict.fromkeys(kinds, len(data_list)))
        return data_list

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """What is wrong with the files, of which ``limit`` (None: all) are read.

        Serves a data set that is built with ``lazy_init=True``. With ``decode`` the images are read
        in full, not only the masks.

        Raises:
            FileNotFoundError: a folder is missing.
        """
        self._check_folders()
        return self._findings(super().load_data_list(), limit, decode)

    def _findings(
        self, data_list: list[dict], limit: int | None, decode: bool = False
    ) -> list[Finding]:
        pairs = [
            (item["img_path"], item["seg_map_path"]) for item in data_list if "seg_map_path" in item
        ]
        if not pairs:  # a test set without masks
            return []
        # With a subset of known classes the masks still hold the labels of all of them.
        classes = self.METAINFO.get("classes") or self.metainfo["classes"]
        findings = check_pairs(
            pairs,
            classes,
            reduce_zero_label=self.reduce_zero_label,
            ignore_index=self.ignore_index,
            training=not self.test_mode,
            limit=limit,
            decode=decode,
        )
        # A list of names may leave out files on purpose.
        if not self.ann_file:
            findings += find_masks_without_image(
                pairs, self.data_prefix["seg_map_path"], self.seg_map_suffix
            )
        return findings

    def _check_folders(self) -> None:
        for key in ("img_path", "seg_map_path"):
            folder = self.data_prefix.get(key)
            if folder is not None and not os.path.isdir(folder):
                raise FileNotFoundError(
                    f"folder {folder} does not exist; set data_root and data_prefix.{key} of the "
                    "data set to where it is"
                )

    def _no_images(self) -> str:
        folder = self.data_prefix["img_path"]
        suffixes = sorted({os.path.splitext(name)[1] for name in os.listdir(folder)} - {""})
        there = f"; the files there end in {suffixes}" if suffixes else ""
        return f"no file in {folder} ends in {self.img_suffix!r}{there}; correct img_suffix"

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        loaded = super()._load_metainfo(metainfo)
        classes, palette = loaded.get("classes"), loaded.get("palette")
        if not classes:
            raise ValueError("the data set has no class names; set metainfo=dict(classes=(...))")
        if isinstance(classes, str):
            raise ValueError(
                f"metainfo classes is the text {classes!r}; a single class needs a comma: "
                f"classes = ({classes!r},)"
            )
        if palette and not cls.METAINFO.get("classes") and len(palette) != len(classes):
            raise ValueError(
                f"metainfo palette has {len(palette)} colours for {len(classes)} classes "
                f"{list(classes)}; give one (red, green, blue) for each, or none"
            )
        return loaded


@DATASETS.register_module()
class SegmentationDataset(CheckedFiles):
    """Images and masks in two folders, with the classes and palette of the config.

    A mask has the name of its image and ``seg_map_suffix``; see :class:`CheckedFiles`. Without a
    palette mmseg chooses colours.
    """


@DATASETS.register_module()
class ADE20KDataset(CheckedFiles, MMSegADE20KDataset):
    """ADE20K (150 classes); see :class:`CheckedFiles`."""
