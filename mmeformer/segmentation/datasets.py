# SPDX-License-Identifier: Apache-2.0
"""mmseg's data sets of images and label masks, with checks of both."""

from __future__ import annotations

import os

import mmengine
from mmseg.datasets import ADE20KDataset as MMSegADE20KDataset
from mmseg.datasets import BaseSegDataset

from mmeformer.checks.classes import class_names, require_classes, require_color_per_class
from mmeformer.checks.findings import Finding, stop_on_errors
from mmeformer.checks.interface import CheckedDataset
from mmeformer.registry import DATASETS
from mmeformer.segmentation.checks import check_pairs, find_masks_without_image


class CheckedSegDataset(CheckedDataset, BaseSegDataset):
    """A ``BaseSegDataset`` that checks its files before it returns samples.

    Checks that every image has a mask, and checks sizes and values of the first
    :attr:`CHECKED_FILES` pairs (:func:`mmeformer.segmentation.checks.check_pairs`); this takes
    about 3 s for 500 images of 683 x 512 px. Warnings are logged. Arguments are those of mmseg;
    files must be local. ``ann_file`` may have an image and its mask in each line, with a tab
    between them, instead of names without suffix: then names and suffixes need not be alike.

    Raises:
        FileNotFoundError: a folder is missing, or has no file with the suffix.
        ValueError: the files have errors, or class names or palette are invalid. The message names
            files and fixes.
    """

    def load_data_list(self) -> list[dict]:
        """Check the files and list them as mmseg does."""
        self._check_folders()
        data_list = self._listed()
        if not data_list:
            raise FileNotFoundError(self._no_images())
        if self.checked:
            findings = self._findings(data_list, self.CHECKED_FILES)
            kinds = () if self.test_mode else ("unreadable image", "unreadable mask")
            stop_on_errors(findings, dict.fromkeys(kinds, len(data_list)))
        return data_list

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """All problems; see :class:`~mmeformer.checks.interface.CheckedDataset`.

        Masks are always read in full.
        """
        self._check_folders()
        return self._findings(self._listed(), limit, decode)

    def _listed(self) -> list[dict]:
        """Entries as mmseg makes them, or those of a list of pairs."""
        if not os.path.isfile(self.ann_file):
            return super().load_data_list()
        lines = mmengine.list_from_file(self.ann_file)
        if not lines or not all("\t" in line for line in lines):
            return super().load_data_list()
        folders = [self.data_prefix.get(key) or "" for key in ("img_path", "seg_map_path")]
        entry = dict(
            label_map=self.label_map, reduce_zero_label=self.reduce_zero_label, seg_fields=[]
        )
        pairs = (line.strip().split("\t") for line in lines)
        return [
            dict(
                entry,
                img_path=os.path.join(folders[0], image),
                seg_map_path=os.path.join(folders[1], mask),
                seg_fields=[],
            )
            for image, mask in pairs
        ]

    def _findings(
        self, data_list: list[dict], limit: int | None, decode: bool = False
    ) -> list[Finding]:
        pairs = [
            (item["img_path"], item["seg_map_path"]) for item in data_list if "seg_map_path" in item
        ]
        if not pairs:  # a test set without masks
            return []
        # If the config selects some of the known classes, the masks still have the labels of all.
        classes = self.METAINFO.get("classes") or self.metainfo["classes"]
        findings = check_pairs(
            pairs,
            classes,
            reduce_zero_label=self.reduce_zero_label,
            ignore_index=self.ignore_index,
            training=not self.test_mode,
            limit=limit,
            decode=decode,
            reading=self.reading,
        )
        # A list of files may leave out masks on purpose.
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
        found = f"; the files there end in {suffixes}" if suffixes else ""
        return f"no file in {folder} ends in {self.img_suffix!r}{found}; correct img_suffix"

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        loaded = super()._load_metainfo(metainfo)
        classes = class_names(loaded.get("classes"))
        require_classes(classes)
        if (palette := loaded.get("palette")) and not cls.METAINFO.get("classes"):
            require_color_per_class(palette, classes)
        return loaded


@DATASETS.register_module()
class SegmentationDataset(CheckedSegDataset):
    """Images and masks in two folders, with classes and palette from the config.

    A mask has the name of its image with ``seg_map_suffix``; see :class:`CheckedSegDataset`.
    Without a palette mmseg chooses colors.
    """


@DATASETS.register_module()
class ADE20KDataset(CheckedSegDataset, MMSegADE20KDataset):
    """ADE20K (150 classes); see :class:`CheckedSegDataset`."""
