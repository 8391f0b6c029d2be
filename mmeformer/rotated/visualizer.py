# SPDX-License-Identifier: Apache-2.0
"""mmrotate's visualizer, extended for crowded pictures and objects beyond the border."""

from __future__ import annotations

import numpy as np
from mmengine.structures import InstanceData
from mmrotate.visualization import RotLocalVisualizer

from mmeformer.registry import VISUALIZERS


@VISUALIZERS.register_module()
class RotatedVisualizer(RotLocalVisualizer):
    """mmrotate's ``RotLocalVisualizer`` whose pictures keep the size of their image.

    With mmrotate's own, a box that reaches beyond the border (such as that of an object cut by a
    patch) makes matplotlib zoom out: the image shrinks within a white margin.

    Args:
        name, *args, **kwargs: as in mmrotate.
        max_texts: with more boxes, class names and scores are left out, as they would cover the
            picture; the colors show the classes.
    """

    def __init__(self, name: str = "visualizer", *args, max_texts: int = 100, **kwargs) -> None:
        super().__init__(name, *args, **kwargs)
        self.max_texts = max_texts
        self._texts = True

    def set_image(self, image: np.ndarray) -> None:
        """Start a picture; later drawing does not change its limits."""
        super().set_image(image)
        self.ax_save.set_autoscale_on(False)

    def _draw_instances(self, image: np.ndarray, instances: InstanceData, *args) -> np.ndarray:
        self._texts = len(instances) <= self.max_texts
        drawn = super()._draw_instances(image, instances, *args)
        self._texts = True
        return drawn

    def draw_texts(self, *args, **kwargs) -> RotatedVisualizer:
        """As in mmengine, unless there are too many boxes for texts."""
        if self._texts:
            super().draw_texts(*args, **kwargs)
        return self
