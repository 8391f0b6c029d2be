# SPDX-License-Identifier: Apache-2.0
"""Data sets that tolerate damaged files and draw the same random numbers after a restart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from torch.utils.data import Dataset

from mmeformer.checks.images import decode_fault, is_local, quick_fault
from mmeformer.errors import TrainingError
from mmeformer.images import TOO_THIN, is_too_thin
from mmeformer.training.randomness import SAMPLE, seed_all

FILE_KEYS = ("img_path", "seg_map_path")
"""Entries of ``get_data_info`` that are paths of files."""
INNER = ("dataset", "datasets")
"""Arguments and attributes of wrappers that are the data sets inside."""
UNREADABLE = "unreadable_files"
"""Entry of a sample's ``metainfo``: the files that it replaces, path -> reason."""


class UnreadableFileError(TrainingError):
    """A file of the data set cannot be read."""

    def __init__(self, path: str, reason: str | None = None) -> None:
        # Data workers pass on errors as a single text.
        super().__init__(path if reason is None else f"{path} {reason}")
        self.path = path
        self.reason = reason


class _Delegate(Dataset):
    """Wrapper of a data set whose other attributes are those of the data set."""

    dataset: Any

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)


class GuardedDataset(_Delegate):
    """Data set of a loader: seeds every sample, and guards the data sets that read files.

    Wrappers such as ``ConcatDataset``, ``RepeatDataset`` or ``MultiImageMixDataset`` (mosaic) stay
    as they are; every data set inside becomes a :class:`GuardedFiles`. A sample names the files
    that could not be read and were replaced, for
    :class:`mmeformer.training.hooks.UnreadableFilesHook`.

    Args:
        dataset: config of a data set.
        seed: seed of the run.
        evaluation: whether the loader is for validation or testing.
    """

    def __init__(self, dataset: Mapping, seed: int | None = None, evaluation: bool = False) -> None:
        self.dataset = MMENGINE_DATASETS.build(_guard(dataset, evaluation))
        self.seed = seed or 0

    @property
    def pipeline(self):
        """Pipeline of the data set; mmdet's ``PipelineSwitchHook`` replaces it."""
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline) -> None:
        leaf = self.dataset
        while isinstance(leaf, _Delegate):
            leaf = leaf.dataset
        leaf.pipeline = pipeline

    @property
    def file_count(self) -> int:
        """Number of samples of the data sets inside, each counted once."""
        return sum(len(leaf) for leaf in leaves(self.dataset))

    def __getitem__(self, index: int) -> dict:
        """Load a sample; a :class:`~mmeformer.training.randomness.Draw` as index sets its seed.

        Raises:
            UnreadableFileError: in validation and testing, a file cannot be read.
            TrainingError: too many samples in a row cannot be read.
        """
        if hasattr(index, "position"):
            seed_all(self.seed, SAMPLE, index.position, gpu=False)
        sample = self.dataset[int(index)]
        unreadable: dict[str, str | None] = {}
        for leaf in leaves(self.dataset):
            if isinstance(leaf, GuardedFiles):
                unreadable.update(leaf.unreadable)
                leaf.unreadable.clear()
        if unreadable:
            sample["data_samples"].set_metainfo({UNREADABLE: unreadable})
        return sample


class GuardedFiles(_Delegate):
    """Data set that replaces samples whose files cannot be read.

    In training, a sample whose file is missing, empty, truncated or cannot be decoded is replaced
    by a random other one. In validation and testing such a file is an error, since scores on
    different sets of images cannot be compared. Only local files are checked, not URLs.

    Args:
        dataset: config of a data set that is no wrapper of others.
        evaluation: whether it is for validation or testing.
    """

    ATTEMPTS = 20
    """Number of unreadable samples in a row that means that the disk or folder is gone."""

    def __init__(self, dataset: Mapping, evaluation: bool) -> None:
        self.dataset = MMENGINE_DATASETS.build(dataset)
        self.evaluation = evaluation
        self.unreadable: dict[str, str | None] = {}
        """Files replaced since :class:`GuardedDataset` last emptied this, path -> reason."""

    def __getitem__(self, index: int) -> dict:
        """Load a sample or, in training, a replacement.

        Raises:
            UnreadableFileError: in validation and testing, a file cannot be read.
            TrainingError: too many samples in a row cannot be read.
        """
        index = int(index)
        if self.evaluation:
            if (sample := self._load(index)) is None:
                raise TrainingError(
                    f"the pipeline returns nothing for {self._paths(index) or index}: in "
                    "validation and testing every sample counts; correct its transforms"
                )
            return sample
        failed = 0
        for _ in range(getattr(self.dataset, "max_refetch", 1000) + 1):
            try:
                sample = self._load(index)
            except UnreadableFileError as error:
                self.unreadable[error.path] = error.reason
                failed += 1
                if failed >= min(self.ATTEMPTS, len(self)):
                    raise TrainingError(
                        f"{failed} samples in a row could not be read, the last because {error}; "
                        "check that the disk with the data is available"
                    ) from error
            else:
                if sample is not None:
                    return sample
            index = np.random.randint(len(self))
        raise TrainingError(
            "the training pipeline returned no sample in any attempt; correct its transforms"
        )

    def _load(self, index: int) -> dict | None:
        paths = self._paths(index)
        for path in paths:
            if reason := quick_fault(path):
                raise UnreadableFileError(path, reason)
        try:
            # prepare_data returns None for a sample that the pipeline rejects, so that __getitem__
            # above replaces it. The data set's own __getitem__ would do so without the checks.
            if hasattr(self.dataset, "prepare_data"):
                return self.dataset.prepare_data(index)
            return self.dataset[index]
        except Exception as error:
            # The file is the cause only if it cannot be decoded by itself either.
            for path in paths:
                if reason := decode_fault(path):
                    raise UnreadableFileError(path, reason) from error
            if paths and is_too_thin(error):
                raise UnreadableFileError(paths[0], TOO_THIN) from error
            raise

    def _paths(self, index: int) -> list[str]:
        if not hasattr(self.dataset, "get_data_info"):
            return []
        information = self.dataset.get_data_info(index)
        paths = (information.get(key) for key in FILE_KEYS)
        return [path for path in paths if path and is_local(path)]


def _guard(settings: Any, evaluation: bool) -> Any:
    """Config of a data set or a wrapper, with every data set that reads files guarded."""
    if isinstance(settings, (list, tuple)):
        return [_guard(item, evaluation) for item in settings]
    if not isinstance(settings, Mapping):
        return settings
    for key in INNER:
        if key in settings:
            return {**settings, key: _guard(settings[key], evaluation)}
    return dict(type=GuardedFiles, dataset=settings, evaluation=evaluation)


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers; if they are guarded, as :class:`GuardedFiles`."""
    inner = None
    if not isinstance(dataset, GuardedFiles):
        inner = next((vars(dataset)[key] for key in INNER if key in vars(dataset)), None)
    if inner is None:
        yield dataset
        return
    for item in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from leaves(item)
