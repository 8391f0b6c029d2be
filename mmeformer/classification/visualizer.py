# SPDX-License-Identifier: Apache-2.0
"""Pictures with classes written in."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmpretrain.visualization import UniversalVisualizer

from mmeformer.registry import VISUALIZERS


@VISUALIZERS.register_module()
class ClassificationVisualizer(UniversalVisualizer):
    """mmpretrain's visualizer with the method by which mmdet's and mmseg's draw samples."""

    def add_datasample(
        self,
        name: str,
        image: np.ndarray,
        data_sample: Any,
        draw_gt: bool = True,
        draw_pred: bool = True,
        out_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the classes of a sample into an image.

        Args:
            name: of the sample.
            image: (H, W, 3) uint8, red, green, blue; small ones are enlarged, so that text fits.
            data_sample: with ``gt_label``, ``pred_label`` and ``pred_score``, or some of them.
            draw_gt, draw_pred: what to write.
            out_file: picture to write, if any.
            kwargs: of mmpretrain's ``visualize_cls``.
        """
        shorter = min(image.shape[:2])
        self.visualize_cls(
            image,
            data_sample,
            draw_gt=draw_gt,
            draw_pred=draw_pred,
            resize=256 if shorter < 256 else None,
            out_file=out_file,
            name=name,
            **kwargs,
        )
