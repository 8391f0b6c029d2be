# SPDX-License-Identifier: Apache-2.0
"""Data sets that tolerate damaged files and draw the same random numbers after a restart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from torch.utils.data import Dataset

from mmeformer.checks.images import decode_fault, is_local, quick_fault
from mmeformer.errors import TrainingError
from mmeformer.training.randomness import SAMPLE, seed_all

FILE_KEYS = ("img_path", "seg_map_path")
"""Entries of ``get_data_info`` that are paths of files."""
UNREADABLE = "unreadable_files"
"""Entry of a sample's ``metainfo``: the files that it replaces, path -> reason."""


class UnreadableFileError(TrainingError):
    """A file of the data set cannot be read."""

    def __init__(self, path: str, reason: str | None = None) -> None:
        # Data workers pass on errors as a single text.
        super().__init__(path if reason is None else f"{path} {reason}")
        self.path = path
        self.reason = reason


class GuardedDataset(Dataset):
    """Wrapper of a data set that seeds every sample and replaces samples with unreadable files.

    In training, a sample whose file is missing, empty, truncated or cannot be decoded is replaced
    by a random other one, which reports the file to
    :class:`mmeformer.training.hooks.UnreadableFilesHook`. In validation and testing such a file is
    an error, since scores on different sets of images cannot be compared. Only local files are
    checked, not URLs. All other attributes are those of the data set.

    Args:
        dataset: config of a data set.
        seed: seed of the run.
    """

    ATTEMPTS = 20
    """Number of unreadable samples in a row that means that the disk or folder is gone."""

    def __init__(self, dataset: Mapping, seed: int | None) -> None:
        self.dataset = MMENGINE_DATASETS.build(dataset)
        self.seed = seed or 0

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def pipeline(self):
        """Pipeline of the data set; mmdet's ``PipelineSwitchHook`` replaces it."""
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline) -> None:
        self.dataset.pipeline = pipeline

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict | None:
        """Load a sample; a :class:`~mmeformer.training.randomness.Draw` as index sets its seed.

        Raises:
            UnreadableFileError: in validation and testing, a file cannot be read.
            TrainingError: too many samples in a row cannot be read.
        """
        if hasattr(index, "position"):
            seed_all(self.seed, SAMPLE, index.position, gpu=False)
        index = int(index)
        if getattr(self.dataset, "test_mode", False):
            return self._load(index)
        unreadable: dict[str, str | None] = {}
        for _ in range(getattr(self.dataset, "max_refetch", 1000) + 1):
            try:
                sample = self._load(index)
            except UnreadableFileError as error:
                unreadable[error.path] = error.reason
                if len(unreadable) >= min(self.ATTEMPTS, len(self)):
                    raise TrainingError(
                        f"{len(unreadable)} samples in a row could not be read, the last because "
                        f"{error}; check that the disk with the data is available"
                    ) from error
            else:
                if sample is not None:
                    if unreadable:
                        sample["data_samples"].set_metainfo({UNREADABLE: unreadable})
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
            raise

    def _paths(self, index: int) -> list[str]:
        information = self.dataset.get_data_info(index)
        paths = (information.get(key) for key in FILE_KEYS)
        return [path for path in paths if path and is_local(path)]
