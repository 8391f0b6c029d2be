# SPDX-License-Identifier: Apache-2.0
"""Data sets of images in one folder per class, with checks of folders and images."""

from __future__ import annotations

import os
from pathlib import Path

from mmpretrain.datasets import CustomDataset, ImageNet

from mmeformer.checks.classes import class_names, require_classes
from mmeformer.checks.findings import (
    ERROR,
    WARNING,
    Finding,
    errors_first,
    first_of,
    stop_on_errors,
)
from mmeformer.checks.images import check_images, find_missing
from mmeformer.checks.interface import CheckedDataset
from mmeformer.registry import DATASETS


@DATASETS.register_module()
class ImageFolderDataset(CheckedDataset, CustomDataset):
    """Images in one folder per class, ``<data_prefix>/<class>/...``, or as ``ann_file`` lists them.

    Folders have the names of the classes. The labels follow ``metainfo.classes``, so those of
    training and validation agree even if a folder is missing in one of them. With ``ann_file``
    every line is a path and a label from 0: ``cat/1.jpg 0``.

    Before it returns samples, it checks the folders, the labels, and the first
    :attr:`CHECKED_FILES` images. Warnings are logged.

    Arguments are those of mmpretrain's ``CustomDataset``.

    Raises:
        FileNotFoundError: a folder or the annotation file is missing.
        ValueError: there are errors in the data. The message names files and fixes.
    """

    folder_names_are_classes = True
    """Whether the folders are named as the classes; else they have the order of the classes."""

    def load_data_list(self) -> list[dict]:
        """List and check the images."""
        data_list, findings = self._list()
        if self.checked:
            findings += self._image_findings(data_list, self.CHECKED_FILES)
            kinds = () if self.test_mode else ("unreadable image",)
            stop_on_errors(findings, dict.fromkeys(kinds, len(data_list)))
        return data_list

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """All problems; see :class:`~mmeformer.checks.interface.CheckedDataset`."""
        data_list, findings = self._list()
        return errors_first(findings + self._image_findings(data_list, limit, decode))

    def _list(self) -> tuple[list[dict], list[Finding]]:
        """Image paths with labels, and the problems of folders and labels."""
        classes = class_names(self.metainfo.get("classes"))
        require_classes(classes)
        if not os.path.isdir(self.img_prefix):
            raise FileNotFoundError(
                f"folder {self.img_prefix} does not exist; set data_root and data_prefix of the "
                "data set to where it is"
            )
        if self.ann_file:
            data_list, findings = self._from_list(classes)
        else:
            data_list, findings = self._from_folders(classes)
        seen = {item["gt_label"] for item in data_list}
        place = self.ann_file or self.img_prefix
        unused = [name for label, name in enumerate(classes) if label not in seen]
        if not data_list:
            raise ValueError(
                f"{place} has no images of {first_of(classes)} that end in "
                f"{', '.join(sorted(self.extensions))}"
            )
        if unused and not self.test_mode:
            findings.append(
                Finding(
                    WARNING,
                    "unused class",
                    place,
                    f"{first_of(unused)} have no images and cannot be learned; correct `classes` "
                    "or add images",
                )
            )
        return data_list, findings

    def _from_folders(self, classes: tuple[str, ...]) -> tuple[list[dict], list[Finding]]:
        root = Path(self.img_prefix)
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        findings = []
        if self.folder_names_are_classes:
            labels = {name: label for label, name in enumerate(classes)}
            if unknown := [name for name in folders if name not in labels]:
                findings.append(
                    Finding(
                        ERROR,
                        "unknown class",
                        str(root),
                        f"folders {first_of(unknown)} are not among the classes "
                        f"{first_of(classes)}; correct `classes` or rename the folders",
                    )
                )
        else:
            if len(folders) != len(classes):
                raise ValueError(
                    f"{root} has {len(folders)} folders, but there are {len(classes)} classes: it "
                    "needs one folder for each, in the order of their names"
                )
            labels = {name: label for label, name in enumerate(folders)}
        data_list = [
            dict(img_path=str(path), gt_label=labels[name])
            for name in folders
            if name in labels
            for path in sorted((root / name).rglob("*"))
            if self.is_valid_file(path.name)
        ]
        return data_list, findings

    def _from_list(self, classes: tuple[str, ...]) -> tuple[list[dict], list[Finding]]:
        if not os.path.isfile(self.ann_file):
            raise FileNotFoundError(
                f"annotation file {self.ann_file} does not exist; correct ann_file"
            )
        data_list, findings = [], []
        lines = Path(self.ann_file).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            name, _, label = line.strip().rpartition(" ")
            if not line.strip():
                continue
            if not (name and label.isdigit() and int(label) < len(classes)):
                findings.append(
                    Finding(
                        ERROR,
                        "invalid line",
                        f"{self.ann_file}:{number}",
                        f"{line.strip()!r} is not a path and a label from 0 to {len(classes) - 1}; "
                        "correct the line or `classes`",
                    )
                )
                continue
            path = os.path.join(self.img_prefix, name)
            data_list.append(dict(img_path=path, gt_label=int(label)))
        return data_list, findings

    def _image_findings(
        self, data_list: list[dict], limit: int | None, decode: bool = False
    ) -> list[Finding]:
        paths = [item["img_path"] for item in data_list]
        missing = find_missing(paths) if self.ann_file else []
        absent = {finding.path for finding in missing}
        if limit is not None and len(paths) > limit:
            # Spread over all classes, which follow one another.
            step = len(paths) / limit
            paths = [paths[int(index * step)] for index in range(limit)]
        readable = [path for path in paths if path not in absent]
        return missing + check_images(readable, decode=decode, reading=self.reading)


@DATASETS.register_module()
class ImageNetDataset(ImageFolderDataset):
    """ImageNet-1k: 1000 folders in the order of the classes; see :class:`ImageFolderDataset`."""

    METAINFO = ImageNet.METAINFO
    folder_names_are_classes = False
