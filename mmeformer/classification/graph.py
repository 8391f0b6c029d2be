# SPDX-License-Identifier: Apache-2.0
"""Classifiers as graphs."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.config import Config
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmeformer.deploy import check
from mmeformer.deploy.graphs import Graph, require
from mmeformer.deploy.inputs import crop_settings
from mmeformer.deploy.metadata import class_settings
from mmeformer.runtime import Classification


class ClassificationGraph(Graph):
    """Probability of every class: ``scores`` (B, C).

    Args:
        model: an ``ImageClassifier`` of mmpretrain with a head.
        normalize: see :class:`Graph`.

    Raises:
        ValueError: another kind of model.
    """

    output_names = ("scores",)
    compare = staticmethod(check.compare_scores)

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(normalize)
        require(
            isinstance(model, ImageClassifier) and model.with_head,
            f"{type(model).__name__} is not an ImageClassifier of mmpretrain with a head",
        )
        self.model = model

    def run(self, image: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        return (self.model.head(self.model.extract_feat(image)).softmax(1),)

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        return {"scores": {0: "batch"}} if any_size else {}

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """See :meth:`Graph.settings`."""
        return {**class_settings(config, model), **crop_settings(config)}

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> Classification:
        """See :meth:`Graph.predict`."""
        (sample,) = model.predict(image, [DataSample(metainfo=metainfo)])
        return Classification(sample.pred_score.numpy())

    @staticmethod
    def set_prediction(sample: DataSample, result: Classification) -> None:
        """See :meth:`Graph.set_prediction`."""
        scores = torch.from_numpy(result.scores)
        sample.set_pred_score(scores).set_pred_label(int(scores.argmax()))
