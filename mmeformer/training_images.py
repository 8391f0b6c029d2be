# SPDX-License-Identifier: Apache-2.0
"""Record of the images that a model was trained on, so that prediction can keep their scale.

Training stores it in the checkpoint, below ``meta["dataset_meta"]``, and exporting in the file's
metadata. This module imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

KEY = "training_images"
"""The entry of a checkpoint's ``dataset_meta``."""

TOLERANCE = 1.5
"""Largest ratio of two scales that counts as the same scale."""


@dataclass(frozen=True)
class TrainingImages:
    """Sizes of the images that a model was trained on.

    Args:
        sides: the smallest and the largest longer side of an image in pixels, before the training
            pipeline resized it; None if unknown.
        patch_size: side in pixels of the patches if the images are square cutouts of larger ones at
            one scale; 0 if they are whole images.
    """

    sides: tuple[int, int] | None
    patch_size: int = 0

    def to_meta(self) -> dict[str, Any]:
        """Entries of a ``dataset_meta``."""
        return {KEY: asdict(self)}

    @classmethod
    def from_meta(cls, dataset_meta: Mapping[str, Any] | None) -> TrainingImages | None:
        """The record of a ``dataset_meta``; None if it has none."""
        record = (dataset_meta or {}).get(KEY)
        if not record:
            return None
        sides = record["sides"]
        return cls(sides and (int(sides[0]), int(sides[1])), int(record["patch_size"]))

    @classmethod
    def merged(cls, parts: Iterable[TrainingImages | None]) -> TrainingImages | None:
        """The record of several data sets together; None if none of them has one."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        sides = [part.sides for part in known if part.sides is not None]
        lows, highs = zip(*sides, strict=True) if sides else ((), ())
        sizes = [part.patch_size for part in known]
        return cls((min(lows), max(highs)) if sides else None, sizes[0] if all(sizes) else 0)

    def scale_warning(self, side: int) -> str | None:
        """A sentence if objects appear at another scale than in training, or None.

        Args:
            side: longer side in pixels of an image or window that the test pipeline resizes like a
                training image.
        """
        if self.sides is None:
            return None
        low, high = self.sides
        if low <= TOLERANCE * side and side <= TOLERANCE * high:
            return None
        factor = high / side if side > high else low / side
        seen = f"{low} px" if low == high else f"{low} to {high} px"
        kind = "patches" if self.patch_size else "images"
        return (
            f"objects appear at {factor:.2g} times the scale of training: {side} px are resized "
            f"like the {kind} of {seen} that the model was trained on"
        )
