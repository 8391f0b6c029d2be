# SPDX-License-Identifier: Apache-2.0
"""Hook that records what predictions need to know of the training data in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner

from mmeformer.checks.interface import CheckedDataset
from mmeformer.results import CATEGORY_IDS
from mmeformer.training_images import KEY, TrainingImages


class TrainingDataHook(Hook):
    """Record sizes of images and category ids, and let validation and test data follow the sizes.

    :mod:`mmeformer.training_images` says what the record of the sizes is for.
    """

    def __init__(self) -> None:
        self.images: TrainingImages | None = None
        self.category_ids: list[int] | None = None

    def before_train(self, runner: Runner) -> None:
        """Read the record of the training data."""
        parts = list(checked_in(runner.train_dataloader.dataset))
        self.images = TrainingImages.merged(part.training_images() for part in parts)
        numberings = [part.category_ids() for part in parts]
        # Files that number the classes in other ways have no ids in common.
        if parts and all(numbering == numberings[0] for numbering in numberings):
            self.category_ids = numberings[0]
        if self.images is not None and runner.val_loop is not None:
            _follow(runner.val_dataloader.dataset, self.images)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the record to the checkpoint."""
        record = {} if self.images is None else self.images.to_meta()
        if self.category_ids is not None:
            record[CATEGORY_IDS] = self.category_ids
        if record:
            meta = checkpoint["meta"]
            meta["dataset_meta"] = {**meta.get("dataset_meta", {}), **record}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """In a test, let the test data follow the record of the checkpoint."""
        dataset_meta = (checkpoint.get("meta") or {}).get("dataset_meta")
        images = TrainingImages.from_meta(dataset_meta)
        # On resuming, mmengine compares the rest with that of the training data.
        for key in (KEY, CATEGORY_IDS):
            (dataset_meta or {}).pop(key, None)
        if images is not None and isinstance(runner._test_loop, BaseLoop):
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
