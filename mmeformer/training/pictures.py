# SPDX-License-Identifier: Apache-2.0
"""Hook that draws the predictions of a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmeformer.files import relative_names, replacing
from mmeformer.images import PLAIN, read_image
from mmeformer.training.record import checked_in


class PicturesHook(Hook):
    """Draw the predictions of every test image into a file of its own, with the run's visualizer.

    Pictures have the names of their images; if images in different folders have the same name, they
    are in such folders too.

    Args:
        folder: for the pictures.
        **options: of the visualizer's ``add_datasample``.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self.folder = Path(folder)
        self.options = options
        self.names: dict[str, str] = {}
        self.reading = PLAIN

    def before_test(self, runner: Runner) -> None:
        """Choose the names; all processes of a run choose the same."""
        dataset: Any = runner.test_dataloader.dataset
        paths = [str(dataset.get_data_info(index)["img_path"]) for index in range(len(dataset))]
        names = [Path(path).name for path in paths]
        if len(set(names)) < len(set(paths)):
            names = relative_names(paths)
        self.reading = next((part.reading for part in checked_in(dataset)), None) or PLAIN
        self.names = dict(zip(paths, names, strict=True))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draw the pictures of a batch."""
        samples: Sequence[Any] = outputs
        for sample in samples:
            image = np.ascontiguousarray(read_image(sample.img_path, self.reading)[..., ::-1])
            with replacing(self.folder / self.names[str(sample.img_path)]) as draft:
                runner.visualizer.add_datasample(
                    "prediction", image, sample, show=False, out_file=str(draft), **self.options
                )
