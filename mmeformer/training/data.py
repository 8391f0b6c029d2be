# SPDX-License-Identifier: Apache-2.0
"""Data sets that outlive a damaged file and draw the same random numbers after a restart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from torch.utils.data import Dataset

from mmeformer.checks.images import decode_fault, is_local, quick_fault
from mmeformer.errors import TrainingError
from mmeformer.training.randomness import SAMPLE, seed_all

FILE_KEYS = ("img_path", "seg_map_path")
"""Entries of a sample's information that name files."""
UNREADABLE = "unreadable_files"
"""Entry of a sample's meta information: what was to be read in its place, file -> reason."""


class UnreadableFileError(TrainingError):
    """A file of the data set cannot be read."""

    def __init__(self, path: str, reason: str | None = None) -> None:
        # Workers hand errors over as one text.
        super().__init__(path if reason is None else f"{path} {reason}")
        self.path = path
        self.reason = reason


class GuardedDataset(Dataset):
    """A data set whose samples have random numbers of their own, and whose files may be damaged.

    In training, a sample with a missing, empty, cut-off or undecodable file is replaced by another
    one, chosen at random, which carries the file's name to
    :class:`mmeformer.training.hooks.UnreadableFilesHook`. In validation and testing such a file is
    an error: scores of different sets of images cannot be compared. Files on this machine only;
    those behind an address are read as they are. Everything else is asked of the data set itself.

    Args:
        dataset: config of a data set.
        seed: of the run.
    """

    ATTEMPTS = 20
    """Unreadable samples in a row after which the folder itself must be gone."""

    def __init__(self, dataset: Mapping, seed: int | None) -> None:
        self.dataset = MMENGINE_DATASETS.build(dataset)
        self.seed = seed or 0

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def pipeline(self):
        """The data set's pipeline, which mmdet's ``PipelineSwitchHook`` replaces."""
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline) -> None:
        self.dataset.pipeline = pipeline

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """A sample; with a :class:`~mmeformer.training.randomness.Draw` from its own seed.

        Raises:
            UnreadableFileError: in validation and testing, a file cannot be read.
            TrainingError: one sample after the other cannot be read.
        """
        if hasattr(index, "position"):
            seed_all(self.seed, SAMPLE, index.position, gpu=False)
        index = int(index)
        if getattr(self.dataset, "test_mode", False):
            return self._load(index)
        unreadable: dict[str, str] = {}
        for _ in range(getattr(self.dataset, "max_refetch", 1000) + 1):
            try:
                sample = self._load(index)
            except UnreadableFileError as error:
                unreadable[error.path] = error.reason
                if len(unreadable) >= min(self.ATTEMPTS, len(self)):
                    raise TrainingError(
                        f"{len(unreadable)} samples in a row could not be read, the last because "
                        f"{error}; see whether the disk with the data is still there"
                    ) from error
            else:
                if sample is not None:
                    if unreadable:
                        sample["data_samples"].set_metainfo({UNREADABLE: unreadable})
                    return sample
            index = np.random.randint(len(self))
        raise TrainingError(
            "the training pipeline gave no sample at any of its attempts; correct its transforms"
        )

    def _load(self, index: int) -> dict | None:
        paths = self._paths(index)
        for path in paths:
            if reason := quick_fault(path):
                raise UnreadableFileError(path, reason)
        try:
            # A sample that the pipeline gives up is then replaced here, with the same care.
            if hasattr(self.dataset, "prepare_data"):
                return self.dataset.prepare_data(index)
            return self.dataset[index]
        except Exception as error:
            # Whatever failed is the file's fault only if the file alone cannot be decoded either.
            for path in paths:
                if reason := decode_fault(path):
                    raise UnreadableFileError(path, reason) from error
            raise

    def _paths(self, index: int) -> list[str]:
        information = self.dataset.get_data_info(index)
        paths = (information.get(key) for key in FILE_KEYS)
        return [path for path in paths if path and is_local(path)]
