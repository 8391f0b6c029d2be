# SPDX-License-Identifier: Apache-2.0
"""Interface of data sets that check themselves; the data sets of all tasks implement it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmeformer.checks.findings import Finding
from mmeformer.images import Reading


class CheckedDataset:
    """Mixin of data sets that check their labels and images before they return samples."""

    CHECKED_FILES = 500
    """Number of images that are read for the check at the start."""

    checked = True
    """Whether to check at the start. ``tools/check_dataset.py`` turns it off and calls
    :meth:`findings` itself."""

    # Of mmengine's BaseDataset, from which the data sets derive too.
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

    def check_metrics(self, metrics: Sequence[Any]) -> None:
        """Check that metrics read the labels that this data set reads; by default they do.

        Raises:
            ValueError: a metric reads others.
        """
