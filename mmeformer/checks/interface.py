# SPDX-License-Identifier: Apache-2.0
"""Interface of data sets that check themselves; the data sets of all tasks implement it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmeformer.checks.findings import Finding
from mmeformer.checks.images import sample_sides
from mmeformer.images import Reading
from mmeformer.training_images import TrainingImages


class CheckedDataset:
    """Mixin of data sets that check their labels and images before they return samples."""

    CHECKED_FILES = 500
    """Number of images that are read for the check at the start."""

    checked = True
    """Whether to check at the start. ``mmeformer check`` turns it off and calls
    :meth:`findings` itself."""

    # Of mmengine's BaseDataset, from which the data sets derive too.
    __len__: Callable[..., int]
    get_data_info: Callable[..., dict]
    pipeline: Any

    @property
    def reading(self) -> Reading | None:
        """Settings of the loading step; None if it is not that of this project."""
        return Reading.of_built(self.pipeline.transforms)

    def findings(self, limit: int | None = None, decode: bool = False) -> list[Finding]:
        """All problems of the labels and images.

        Works on a data set that is built with ``lazy_init=True``.

        Args:
            limit: number of images to read; None reads all.
            decode: decode images in full instead of reading their headers and ends.

        Raises:
            FileNotFoundError: a folder or the annotation file is missing.
        """
        raise NotImplementedError

    def training_images(self) -> TrainingImages:
        """Sizes of the images, for the checkpoints of a training on them; from a sample."""
        step = max(1, len(self) // self.CHECKED_FILES)
        indices = range(0, len(self), step)[: self.CHECKED_FILES]
        paths = [str(self.get_data_info(index)["img_path"]) for index in indices]
        sides = sample_sides(paths, self.CHECKED_FILES)
        return TrainingImages((min(sides), max(sides)) if sides else None)

    def category_ids(self) -> list[int] | None:
        """Ids of the classes in the annotation file, by label; None if it has none."""
        # An attribute of mmdet's data sets in COCO's format.
        labels: dict[int, int] = getattr(self, "cat2label", {})
        return sorted(labels, key=labels.__getitem__) or None

    def follow(self, images: TrainingImages) -> None:
        """Treat the images like those that the model was trained on."""

    def check_metrics(self, metrics: Sequence[Any]) -> None:
        """Check that metrics read the labels that this data set reads; by default they do.

        Raises:
            ValueError: a metric reads others.
        """
