# SPDX-License-Identifier: Apache-2.0
"""mmrotate's DOTA data set with checks of its label files and images."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from mmengine.dataset import Compose
from mmengine.logging import print_log
from mmrotate.datasets import DOTADataset as MMRotateDOTADataset
from mmrotate.visualization.palette import get_palette

from mmeformer.checks.classes import class_names, require_classes, require_color_per_class
from mmeformer.checks.findings import Finding, first_of, stop_on_errors
from mmeformer.checks.images import check_images, sample_sides
from mmeformer.checks.interface import CheckedDataset
from mmeformer.registry import DATASETS
from mmeformer.rotated.checks import check_dota, image_sizes, is_thin, outside_finding
from mmeformer.rotated.dota import (
    DotaObject,
    list_images,
    list_labels,
    read_label_files,
)
from mmeformer.rotated.patches import patch_size_of
from mmeformer.rotated.scale import find_kind, pad_loaded
from mmeformer.training_images import TrainingImages


@DATASETS.register_module()
class DOTADataset(CheckedDataset, MMRotateDOTADataset):
    """mmrotate's ``DOTADataset`` for original label files, those of patches, and any classes.

    Lists the images in alphabetical order. An image without a label file, or with an empty one, has
    no objects (``filter_cfg=dict(filter_empty_gt=True)`` leaves it out of training). Header lines
    are skipped. Objects without area and objects with ``difficult > diff_thr`` are ignored in
    training and evaluation. Label files without an image, classes without an object and the like
    are logged. Files must be local.

    Args:
        diff_thr: as in mmrotate; the default ignores no difficult object.
        img_suffix: list only images with this suffix; None lists png, jpg, tif and bmp.
        patch_size: side in pixels if the images are patches, which are square cutouts of larger
            images at one scale: smaller ones are then padded to it, not enlarged. 0 for whole
            images of any size. None finds out: they are patches if all have the names that
            ``mmeformer split-dota`` gives, or if all have the same longer side. The size in a
            patch's own name counts more.
        **kwargs: as in mmrotate. ``metainfo`` may have ``dropped_classes``: names in the label
            files whose objects are left out on purpose. ``ann_file=""`` means no labels.

    Raises:
        FileNotFoundError: a folder is missing, or has no file of its kind.
        ValueError: a label line is invalid; a class name is not in ``classes``; the label files
            have no objects; classes or palette are invalid. The message names file, line and fix.
    """

    def __init__(
        self,
        diff_thr: int = 100,
        img_suffix: str | None = None,
        patch_size: int | None = None,
        **kwargs,
    ) -> None:
        self.patch_size = patch_size
        self._images = TrainingImages(None)
        super().__init__(diff_thr=diff_thr, img_suffix=img_suffix, **kwargs)

    @property
    def pipeline(self) -> Compose:
        """Pipeline of the samples, with :class:`~mmeformer.rotated.scale.PadPatch`."""
        return self._pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Compose) -> None:
        self._pipeline = pad_loaded(pipeline)

    def training_images(self) -> TrainingImages:
        """Whether the images are patches, and their sizes; see the base class."""
        self.full_init()
        return self._images

    def follow(self, images: TrainingImages) -> None:
        """See the base class."""
        self.full_init()
        if self.patch_size is None:
            self._images = images

    def get_data_info(self, idx: int) -> dict:
        """Entry of an image, with the ``patch_size`` that it is padded to (0: none)."""
        info = super().get_data_info(idx)
        if size := self._images.patch_size:
            size = patch_size_of(Path(info["img_path"]).stem) or size
        return dict(info, patch_size=size)

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        loaded = super()._load_metainfo(metainfo)
        classes = class_names(loaded.get("classes"))
        loaded["classes"] = classes
        dropped = class_names(loaded.get("dropped_classes"), "dropped_classes")
        require_classes(classes)
        if repeated := [name for name, count in Counter(classes).items() if count > 1]:
            raise ValueError(f"metainfo classes has {repeated} twice; remove one")
        if both := sorted(set(classes) & set(dropped)):
            raise ValueError(f"{both} are in metainfo classes and in dropped_classes; choose one")
        if "palette" not in (metainfo or {}):
            # Known classes keep their color; new ones get others.
            known = dict(zip(cls.METAINFO["classes"], cls.METAINFO["palette"], strict=True))
            others = get_palette("random", len(classes))
            loaded["palette"] = [
                known.get(name, tuple(map(int, other)))
                for name, other in zip(classes, others, strict=True)
            ]
        else:
            require_color_per_class(loaded["palette"], classes)
        # mmrotate mistakes a tuple of colors for a single color.
        loaded["palette"] = [tuple(color) for color in loaded["palette"]]
        return loaded

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """All problems; see :class:`~mmeformer.checks.interface.CheckedDataset`.

        Raises:
            FileNotFoundError: a folder is missing, or has no file of its kind.
            ValueError: two images differ only in their suffix.
        """
        return check_dota(
            list_images(self.data_prefix["img_path"], self.img_suffix),
            list_labels(self.ann_file) if self.ann_file else {},
            self.metainfo["classes"],
            self.metainfo.get("dropped_classes", ()),
            training=not self.test_mode,
            limit=limit,
            decode=decode,
            reading=self.reading,
        )

    def _check_images(self, paths: list[str]) -> None:
        left_out = {} if self.test_mode else {"unreadable image": len(paths)}
        stop_on_errors(check_images(paths[: self.CHECKED_FILES], reading=self.reading), left_out)

    def load_data_list(self) -> list[dict]:
        """One entry per image: ``img_id`` (file name without suffix), ``file_name``, ``img_path``
        and ``instances``, each with ``bbox`` (8 numbers: corners in pixels), ``bbox_label`` and
        ``ignore_flag``."""
        images = list_images(self.data_prefix["img_path"], self.img_suffix)
        if self.checked:
            self._check_images([str(path) for path in images.values()])
        self._images = self._find_kind(list(images.values()))
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

    def _find_kind(self, paths: list[Path]) -> TrainingImages:
        named = all(patch_size_of(path.stem) is not None for path in paths)
        sides = [] if named else sample_sides(list(map(str, paths)), self.CHECKED_FILES)
        scales = (getattr(step, "scale", None) for step in self.pipeline.transforms)
        native = next((min(scale) for scale in scales if isinstance(scale, tuple)), None)
        found = find_kind(paths, sides, native)
        return found if self.patch_size is None else replace(found, patch_size=self.patch_size)

    def _read_labels(self, images: dict[str, Path]) -> dict[str, list[DotaObject]]:
        files = list_labels(self.ann_file)
        wanted = [stem for stem in images if stem in files]
        if not wanted:
            raise ValueError(
                f"no label file in {self.ann_file} belongs to an image in "
                f"{self.data_prefix['img_path']}; correct ann_file or data_prefix.img_path"
            )
        classes = self.metainfo["classes"]
        dropped = self.metainfo.get("dropped_classes", ())
        read = read_label_files((files[stem] for stem in wanted), classes, dropped)
        objects = dict(zip(wanted, read, strict=True))
        counts = Counter(item.name for items in read for item in items)
        if not counts:
            raise ValueError(
                f"the {len(wanted)} label files of {self.ann_file} have no object of "
                f"{first_of(list(classes), 20)}; nothing could be learned or evaluated. For images "
                "without labels, set ann_file=''"
            )
        self._log_flaws(images, files, objects, counts)
        if self.checked:
            self._check_places(images, files, objects)
        return objects

    def _check_places(self, images, files, objects) -> None:
        """Stop if objects of the first images lie outside them; a few are only logged."""
        first = dict(list(objects.items())[: self.CHECKED_FILES])
        findings = [
            finding
            for stem, size in image_sizes(list(first), images).items()
            for item in first[stem]
            if (finding := outside_finding(str(files[stem]), item, size)) is not None
        ]
        stop_on_errors(findings, {"outside image": sum(map(len, first.values()))})

    def _log_flaws(self, images, files, objects, counts) -> None:
        thin = [
            f"{files[stem]} line {item.line}"
            for stem, items in objects.items()
            for item in items
            if is_thin(item)
        ]
        for flaw, places in (
            (
                "images have no label file and count as without objects",
                images.keys() - files,
            ),
            ("label files have no image", files.keys() - images),
            ("classes have no object", [n for n in self.metainfo["classes"] if n not in counts]),
            ("objects have no area and are ignored", thin),
        ):
            if places:
                example = sorted(places)[0]
                print_log(f"{self.ann_file}: {len(places)} {flaw}, such as {example}", "current")
