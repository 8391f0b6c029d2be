# SPDX-License-Identifier: Apache-2.0
"""mmrotate's DOTA data set, with the mistakes that otherwise end in a silent zero made errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import print_log
from mmrotate.datasets import DOTADataset as MMRotateDOTADataset
from mmrotate.visualization.palette import get_palette

from mmeformer.checks.findings import Finding, stop_on_errors
from mmeformer.checks.images import check_image, in_threads
from mmeformer.registry import DATASETS
from mmeformer.rotated.checks import check_dota, is_thin
from mmeformer.rotated.dota import (
    DotaObject,
    list_images,
    list_labels,
    read_label_files,
)


@DATASETS.register_module()
class DOTADataset(MMRotateDOTADataset):
    """mmrotate's ``DOTADataset`` for original and cut label files and for own classes.

    Images lead, in alphabetical order: one without a label file, or with an empty one, has no
    objects (``filter_cfg=dict(filter_empty_gt=True)`` leaves it out of training). Header lines are
    passed over. Objects without area and objects with ``difficult > diff_thr`` are ignored in
    training and evaluation. Label files without an image, classes without an object and the like
    are logged. Files must be local.

    Args:
        diff_thr: as in mmrotate; the default ignores no difficult object.
        img_suffix: only images with this suffix; None takes png, jpg, tif and bmp, mixed.
        **kwargs: as in mmrotate. ``metainfo`` may have ``dropped_classes``: names in the label
            files whose objects are left out on purpose. ``ann_file=""`` means no labels.

    Raises:
        FileNotFoundError: a folder is missing or holds no file of its kind.
        ValueError: bad label lines; class names that are not among ``classes``; not one object in
            all label files; malformed classes or palette. The message names file, line and mend.
    """

    def __init__(self, diff_thr: int = 100, img_suffix: str | None = None, **kwargs) -> None:
        super().__init__(diff_thr=diff_thr, img_suffix=img_suffix, **kwargs)

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        loaded = super()._load_metainfo(metainfo)
        classes = _names(loaded, "classes")
        loaded["classes"] = classes
        dropped = _names(loaded, "dropped_classes")
        if not classes:
            raise ValueError("the data set has no class names; set metainfo=dict(classes=(...))")
        if repeated := [name for name, count in Counter(classes).items() if count > 1]:
            raise ValueError(f"metainfo classes has {repeated} twice; remove one")
        if both := sorted(set(classes) & set(dropped)):
            raise ValueError(f"{both} are in metainfo classes and in dropped_classes; choose one")
        if "palette" not in (metainfo or {}):
            # Own classes, in part or wholly: what is known keeps its colour.
            known = dict(zip(cls.METAINFO["classes"], cls.METAINFO["palette"], strict=True))
            others = get_palette("random", len(classes))
            loaded["palette"] = [
                known.get(name, tuple(map(int, other)))
                for name, other in zip(classes, others, strict=True)
            ]
        elif len(loaded["palette"]) != len(classes):
            raise ValueError(
                f"metainfo palette has {len(loaded['palette'])} colours for {len(classes)} classes "
                f"{list(classes)}; give one (red, green, blue) for each, or none"
            )
        # mmrotate takes a tuple for one colour.
        loaded["palette"] = [tuple(colour) for colour in loaded["palette"]]
        return loaded

    CHECKED_FILES = 500
    """Images that are looked into at the start."""

    checked = True
    """Whether to look at the images at the start; ``tools/check_dataset.py`` does so itself."""

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """What is wrong with the labels and the images, of which ``limit`` (None: all) are read;
        in full with ``decode``.

        Serves a data set that is built with ``lazy_init=True``.

        Raises:
            FileNotFoundError: a folder is missing or holds no file of its kind.
            ValueError: two images differ in their suffix only.
        """
        return check_dota(
            list_images(self.data_prefix["img_path"], self.img_suffix),
            list_labels(self.ann_file) if self.ann_file else {},
            self.metainfo["classes"],
            self.metainfo.get("dropped_classes", ()),
            training=not self.test_mode,
            limit=limit,
            decode=decode,
        )

    def _check_images(self, paths: list[str]) -> None:
        found = in_threads(check_image, paths[: self.CHECKED_FILES])
        left_out = {} if self.test_mode else {"unreadable image": len(paths)}
        stop_on_errors([finding for finding in found if finding is not None], left_out)

    def load_data_list(self) -> list[dict]:
        """One item per image: ``img_id`` (file name without suffix), ``file_name``, ``img_path``
        and ``instances``, each with ``bbox`` (8 numbers: corners in pixels), ``bbox_label`` and
        ``ignore_flag``."""
        images = list_images(self.data_prefix["img_path"], self.img_suffix)
        if self.checked:
            self._check_images([str(path) for path in images.values()])
        objects = self._read_labels(images) if self.ann_file else {}
        labels = {name: label for label, name in enumerate(self.metainfo["classes"])}
        return [
            dict(
                img_id=stem,
                file_name=path.name,
                img_path=str(path),
                instances=[
                    dict(
                        bbox=item.polygon.ravel().tolist(),
                        bbox_label=labels[item.name],
                        ignore_flag=int(item.difficult > self.diff_thr or is_thin(item)),
                    )
                    for item in objects.get(stem, ())
                ],
            )
            for stem, path in images.items()
        ]

    def _read_labels(self, images: dict[str, Path]) -> dict[str, list[DotaObject]]:
        files = list_labels(self.ann_file)
        wanted = [stem for stem in images if stem in files]
        if not wanted:
            raise ValueError(
                f"no label file in {self.ann_file} has the name of an image in "
                f"{self.data_prefix['img_path']}; correct ann_file or data_prefix.img_path"
            )
        classes = self.metainfo["classes"]
        dropped = self.metainfo.get("dropped_classes", ())
        read = read_label_files((files[stem] for stem in wanted), classes, dropped)
        objects = dict(zip(wanted, read, strict=True))
        counts = Counter(item.name for items in read for item in items)
        if not counts:
            raise ValueError(
                f"the {len(wanted)} label files of {self.ann_file} have not one object of "
                f"{list(classes)}; nothing could be learned or evaluated. For images without "
                "labels, set ann_file=''"
            )
        self._log_flaws(images, files, objects, counts)
        return objects

    def _log_flaws(self, images, files, objects, counts) -> None:
        thin = [
            f"{files[stem]} line {item.line}"
            for stem, items in objects.items()
            for item in items
            if is_thin(item)
        ]
        for what, places in (
            ("images have no label file and count as without objects", images.keys() - files),
            ("label files have no image", files.keys() - images),
            ("classes have no object", [n for n in self.metainfo["classes"] if n not in counts]),
            ("objects have no area and are ignored", thin),
        ):
            if places:
                example = sorted(places)[0]
                print_log(f"{self.ann_file}: {len(places)} {what}, such as {example}", "current")


def _names(metainfo: dict, key: str) -> Sequence[str]:
    names = metainfo.get(key, ())
    if isinstance(names, str):
        raise ValueError(
            f"metainfo {key} is the text {names!r}; a single class needs a comma: "
            f"{key} = ({names!r},)"
        )
    return tuple(names)
