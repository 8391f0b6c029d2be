# SPDX-License-Identifier: Apache-2.0
"""Evaluate an exported file with the data set and the metric of its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel

from mmeformer import runtime
from mmeformer.deploy.models import TASK_OF_SCOPE
from mmeformer.registry import MODELS


@MODELS.register_module()
class OnnxModel(BaseModel):
    """An exported ONNX file in the place of a model, for mmengine's test loop.

    The whole way of the product is evaluated: each image file is read, prepared, run and brought
    back to its size by :mod:`mmeformer.runtime`. Of what the data loader hands out, only the file's
    name and the ground truth count.

    Args:
        file: the ``.onnx`` file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an exported file of ours.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        # One graph at a time: the batch of the data loader is not that of the graph.
        self.predictor = runtime.load(file, torch.get_num_threads())

    def test_step(self, data: dict) -> list:
        """The samples of a batch, with predictions as the OpenMMLab model sets them."""
        samples = list(data["data_samples"])
        for sample in samples:
            _set_prediction(sample, self.predictor.predict(sample.img_path))
        return samples

    def forward(self, inputs: torch.Tensor, data_samples=None, mode: str = "tensor"):
        """Not to be called: a file can only predict.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("an exported file can be tested, but neither trained nor called")


def _set_prediction(sample, result: runtime.Segmentation | runtime.Detections) -> None:
    if isinstance(result, runtime.Segmentation):
        from mmengine.structures import PixelData

        labels = torch.from_numpy(result.labels.astype("int64"))
        sample.set_data({"pred_sem_seg": PixelData(data=labels[None])})
        return
    from mmdet.structures.bbox import BaseBoxes
    from mmengine.structures import InstanceData

    found = InstanceData(
        bboxes=torch.from_numpy(result.boxes),
        scores=torch.from_numpy(result.scores),
        labels=torch.from_numpy(result.labels),
    )
    if isinstance(result, runtime.Detections) and result.mask_scores is not None:
        found.masks = torch.from_numpy(result.masks())
    sample.pred_instances = found
    truth = sample.get("gt_instances")
    if truth is not None and isinstance(truth.get("bboxes"), BaseBoxes):
        truth.bboxes = truth.bboxes.tensor


def use_onnx(config: Config, file: str) -> None:
    """Make a config test an exported file instead of a model, in place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is of another task or of other classes.
    """
    metadata = runtime.load(file).metadata
    task = TASK_OF_SCOPE.get(config.get("default_scope"))
    if metadata.task != task:
        raise ValueError(f"{file} is a model for {metadata.task}, but the config is for {task}")
    classes = _classes(config)
    if metadata.classes and classes and tuple(classes) != metadata.classes:
        raise ValueError(
            f"{file} was trained on the classes {list(metadata.classes)}, but the test data of the "
            f"config has {list(classes)}"
        )
    config.model = ConfigDict(type="mmeformer.OnnxModel", file=str(Path(file).resolve()))
    config.load_from = None


def _classes(config: Config) -> Sequence[str]:
    return (config.test_dataloader.dataset.get("metainfo") or {}).get("classes", ())
