# SPDX-License-Identifier: Apache-2.0
"""mmdet's random changes of colors, for flipped images too. Importing this registers them."""

from __future__ import annotations

import numpy as np
from mmdet.datasets.transforms import YOLOXHSVRandomAug as MMDetYOLOXHSVRandomAug
from mmdet.registry import TRANSFORMS


@TRANSFORMS.register_module(force=True)
class YOLOXHSVRandomAug(MMDetYOLOXHSVRandomAug):
    """mmdet's, in its place and under its name, so that configs need no change.

    It writes into the image that it gets. A flipped image is a view whose pixels lie backwards,
    into which OpenCV cannot write.
    """

    def transform(self, results: dict) -> dict:
        """Change the colors of ``img`` (H, W, 3) in BGR."""
        results["img"] = np.ascontiguousarray(results["img"])
        return super().transform(results)
