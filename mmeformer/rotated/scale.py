# SPDX-License-Identifier: Apache-2.0
"""Scale at which rotated detectors see images: patches of one size, or whole images.

Objects of aerial images have one size in pixels. A model that was trained on patches needs larger
images cut and smaller ones padded; one that was trained on whole, resized images needs the same
resizing.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import Compose

from mmeformer.configs import native_size
from mmeformer.rotated.patches import patch_size_of
from mmeformer.training_images import TrainingImages
from mmeformer.windows import as_patch


def training_images(
    config: Config, dataset_meta: Mapping[str, Any] | None
) -> tuple[TrainingImages, str | None]:
    """Images that a rotated detector was trained on.

    A ``patch_size`` of the config's test data set overrides the record of the checkpoint. Without
    either, the model counts as trained on patches of the size that the test pipeline resizes to.

    Args:
        config: of the model.
        dataset_meta: of its checkpoint.

    Returns:
        The record, and a remark for people if it is a guess.
    """
    record = TrainingImages.from_meta(dataset_meta) or TrainingImages(None)
    size = config.test_dataloader.dataset.get("patch_size")
    if size is not None:
        return replace(record, patch_size=size), None
    if record.sides is not None:
        return record, None
    size = native_size(config) or 0
    return TrainingImages(None, size), (
        "the checkpoint does not tell whether it was trained on patches or on whole images: taken "
        f"as trained on patches of {size} px; set test_dataloader.dataset.patch_size to their "
        "size, or to 0 for whole images"
    )


def find_kind(paths: Sequence[Path], sides: Sequence[int], native: int | None) -> TrainingImages:
    """Tell patches from whole images.

    Images are patches if all have the name of a patch, or if all have the same longer side, so that
    resizing keeps their scale.

    Args:
        paths: of all images.
        sides: longer sides of some of them in pixels; only needed without names of patches.
        native: side that the pipeline resizes to; of patches at several scales, the size nearest to
            it counts.
    """
    named = Counter(patch_size_of(path.stem) for path in paths)
    sizes = [size for size in named if size is not None]
    if sizes and None not in named:
        wanted = native or max(sizes, key=lambda size: named[size])
        size = min(sizes, key=lambda size: abs(math.log(size / wanted)))
        return TrainingImages((min(sizes), max(sizes)), size)
    if not sides:
        return TrainingImages(None)
    low, high = min(sides), max(sides)
    return TrainingImages((low, high), low if low == high else 0)


def pad_loaded(pipeline: Compose) -> Compose:
    """Add :class:`PadPatch` behind the first step of a pipeline that loads an image, in place."""
    for index, step in enumerate(pipeline.transforms):
        if type(step).__name__.startswith("LoadImage"):
            pipeline.transforms.insert(index + 1, PadPatch())
            break
    return pipeline


class PadPatch:
    """Step of a pipeline that pads patches that are smaller than the others, as prediction does.

    ``mmdet.Resize`` would enlarge them, so that their objects appear at another scale. The entry
    ``patch_size`` of a sample is the side to pad to, at the right and at the bottom; 0 leaves it as
    it is. Warns of an image that is far larger: it will be shrunk.
    """

    def __call__(self, results: dict) -> dict:
        """Pad ``results["img"]``."""
        size = results.get("patch_size", 0)
        if size:
            results["img"] = as_patch(results["img"], size)
            results["img_shape"] = results["img"].shape[:2]
            side = max(results["img_shape"])
            if text := TrainingImages((size, size), size).scale_warning(side):
                warnings.warn(
                    f"{results.get('img_path', 'image')}: {text}; cut it with mmeformer split-dota "
                    "or use mmeformer predict, which cuts it",
                    stacklevel=2,
                )
        return results
