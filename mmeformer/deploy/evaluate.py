# SPDX-License-Identifier: Apache-2.0
"""Evaluate an exported file with the data set and the metric of its config."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel

from mmeformer import runtime, tasks
from mmeformer.configs import read_test_metainfo
from mmeformer.registry import MODELS


@MODELS.register_module()
class ExportedModel(BaseModel):
    """An exported file in place of a model, for mmengine's test loop.

    :mod:`mmeformer.runtime` reads, prepares and predicts each image file, as in a product, but cuts
    none: the test loop shows the checkpoint whole images too. The data loader only supplies the
    file's name and the ground truth.

    Args:
        file: that :func:`mmeformer.runtime.load` takes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file that mmeformer exported.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.load(file)

    def load(self, file: str) -> None:
        """Predict with another file from now on."""
        # One image at a time: the data loader's batch size is not that of the graph.
        self.predictor = runtime.load(file, torch.get_num_threads())
        self.graph = tasks.load(self.predictor.metadata.export.graph)

    def test_step(self, data: dict) -> list:
        """Predict a batch; return its samples with predictions as the OpenMMLab model sets them."""
        samples = list(data["data_samples"])
        for sample in samples:
            self.graph.set_prediction(sample, self.predictor.predict_whole(sample.img_path))
        return samples

    def forward(self, inputs: torch.Tensor, data_samples=None, mode: str = "tensor"):
        """Not available: a file can only predict.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("an exported file can be tested, but neither trained nor called")


def use_exported(config: Config, file: str) -> None:
    """Make a config test an exported file instead of a model, in place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is of another task or of other classes.
    """
    task = tasks.of_config(config).name
    metadata = runtime.load(file).metadata
    if metadata.task != task:
        raise ValueError(f"{file} is a model for {metadata.task}, but the config is for {task}")
    classes = read_test_metainfo(config).get("classes", ())
    if metadata.classes and classes and tuple(classes) != metadata.classes:
        raise ValueError(
            f"{file} was trained on the classes {list(metadata.classes)}, but the test data of the "
            f"config has {list(classes)}"
        )
    config.model = ConfigDict(type="mmeformer.ExportedModel", file=str(Path(file).resolve()))
