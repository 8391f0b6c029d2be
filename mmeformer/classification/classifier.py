# SPDX-License-Identifier: Apache-2.0
"""The classifier: mmpretrain's, with strict weights and an optional teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import initialize
from mmpretrain.models.classifiers import ImageClassifier
from torch import Tensor

from mmeformer.backbones.base import PRETRAINED, strict_pretrained
from mmeformer.classification.distillation import Teacher
from mmeformer.registry import MODELS


@MODELS.register_module()
class Classifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` that can learn from a teacher.

    The teacher sees the same batch, after all augmentation and mixing. It is read when training
    starts, so testing and prediction do not need it.

    ``init_cfg=dict(type="Pretrained", checkpoint=...)`` takes a whole classifier in any published
    format; see :func:`mmeformer.checkpoints.load.load_pretrained`.

    Args:
        teacher: arguments of :class:`mmeformer.classification.distillation.Teacher`, such as
            ``dict(timm="regnety_160.deit_in1k")``; None or an empty dict trains without. In a
            config that others inherit from, only the empty dict can be overridden.
        args, kwargs: of mmpretrain's ``ImageClassifier``.

    Raises:
        ValueError: there is a teacher, but the head has no second classifier.
    """

    init_cfg: Any

    def __init__(self, *args: Any, teacher: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if teacher and self.head.fc_dist is None:
            raise ValueError("model.teacher needs model.head.distillation=True")
        self._teacher_settings = dict(teacher or {})
        self._teacher: Teacher | None = None

    @property
    def teacher(self) -> Teacher | None:
        """The teacher; read at first use."""
        if self._teacher_settings and self._teacher is None:
            self._teacher = Teacher(self.head.num_classes, **self._teacher_settings)
        return self._teacher

    def init_weights(self) -> None:
        """Initialize, load what ``init_cfg`` names, and read the teacher, before any data."""
        configured = self.init_cfg
        entries = strict_pretrained(configured)
        pretrained = [entry for entry in entries if entry["type"] == PRETRAINED]
        self.init_cfg = [entry for entry in entries if entry not in pretrained]
        try:
            super().init_weights()
        finally:
            self.init_cfg = configured
        # Last: mmengine would initialize backbone and head after it.
        if pretrained:
            initialize(self, pretrained)
        _ = self.teacher

    def loss(self, inputs: Tensor, data_samples: Sequence[Any]) -> dict:
        """Losses of a batch (B, 3, H, W), normalized and mixed."""
        answers = None if self.teacher is None else self.teacher(inputs)
        return self.head.loss(self.extract_feat(inputs), data_samples, answers)
