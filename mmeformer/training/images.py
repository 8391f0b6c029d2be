# SPDX-License-Identifier: Apache-2.0
"""Hook that records the images of a training in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner

from mmeformer.checks.interface import CheckedDataset
from mmeformer.training_images import KEY, TrainingImages


class TrainingImagesHook(Hook):
    """Record the sizes of the training images, and let validation and test data follow them.

    :mod:`mmeformer.training_images` says what the record is for.
    """

    def __init__(self) -> None:
        self.images: TrainingImages | None = None

    def before_train(self, runner: Runner) -> None:
        """Read the record of the training data."""
        data = runner.train_dataloader.dataset
        self.images = TrainingImages.merged(item.training_images() for item in checked_in(data))
        if self.images is not None and runner.val_loop is not None:
            _follow(runner.val_dataloader.dataset, self.images)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the record to the checkpoint."""
        if self.images is not None:
            meta = checkpoint["meta"]
            meta["dataset_meta"] = {**meta.get("dataset_meta", {}), **self.images.to_meta()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """In a test, let the test data follow the record of the checkpoint."""
        dataset_meta = (checkpoint.get("meta") or {}).get("dataset_meta")
        images = TrainingImages.from_meta(dataset_meta)
        if dataset_meta is None or images is None:
            return
        # On resuming, mmengine compares the rest with that of the training data.
        del dataset_meta[KEY]
        if isinstance(runner._test_loop, BaseLoop):
            _follow(runner.test_dataloader.dataset, images)


def checked_in(dataset: Any) -> Iterator[CheckedDataset]:
    """The data sets with checks inside wrappers such as ``ConcatDataset``."""
    if isinstance(dataset, CheckedDataset):
        yield dataset
        return
    inner = vars(dataset)
    for item in inner.get("datasets", [inner.get("dataset")]):
        if item is not None:
            yield from checked_in(item)


def _follow(dataset: Any, images: TrainingImages) -> None:
    for item in checked_in(dataset):
        item.follow(images)
