# SPDX-License-Identifier: Apache-2.0
"""The loading step of training and test pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmcv.transforms import LoadImageFromFile as MMCVLoadImageFromFile
from mmengine import fileio

from mmeformer.images import Reading, decode_image
from mmeformer.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImageFromFile(MMCVLoadImageFromFile):
    """mmcv's ``LoadImageFromFile`` for imagery of any depth and number of bands.

    Pictures (gray or RGB images of 8 bits) are read as by mmcv. Prediction, export and checks read
    images with the settings of this step.

    Args:
        bands, stretch: see :class:`mmeformer.images.Reading`.
        **kwargs: as in mmcv; ``color_type`` and ``imdecode_backend`` have to be the default.

    Raises:
        ValueError: an argument is invalid; or, of an image, see
            :func:`mmeformer.images.read_image`.
    """

    def __init__(
        self,
        bands: Sequence[int] | None = None,
        stretch: Sequence[float] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reading = Reading(bands, stretch)
        if self.color_type != "color" or self.imdecode_backend not in ("cv2", None):
            raise ValueError(
                f"mmeformer.LoadImageFromFile reads color images with OpenCV; for color_type="
                f"{self.color_type!r} with {self.imdecode_backend} use mmcv's LoadImageFromFile"
            )

    def transform(self, results: dict) -> dict | None:
        """Load ``results["img_path"]`` as ``results["img"]``, (H, W, 3) in BGR."""
        path = results["img_path"]
        try:
            image = decode_image(
                fileio.get(path, backend_args=self.backend_args), path, self.reading
            )
        except Exception:
            if self.ignore_empty:
                return None
            raise
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results
