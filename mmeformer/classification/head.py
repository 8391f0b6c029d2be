# SPDX-License-Identifier: Apache-2.0
"""Head of the published classifiers: final norm, mean over the places, one or two classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpretrain.models.heads import ClsHead
from torch import Tensor, nn

from mmeformer.classification.distillation import KINDS, distillation_loss
from mmeformer.registry import MODELS

NORMS: dict[str, type[nn.Module]] = {"v1": nn.LayerNorm, "v2": nn.BatchNorm2d}
"""The final norm of each family: over the channels of every place, or over the batch."""


@MODELS.register_module()
class EfficientFormerHead(ClsHead):
    """Final norm, mean over the places, and linear classifiers of the last stage's output.

    The published models have two classifiers: in training ``fc`` learns the labels and ``fc_dist``
    the answers of a teacher; at test time the mean of both logits counts. Without a teacher, both
    learn the labels.

    Sources: arXiv 2206.01191 and 2212.08059; repository snap-research/EfficientFormer, ``models/``
    (``norm``, ``head``, ``dist_head``).

    Args:
        family: ``"v1"`` or ``"v2"``: that of the backbone.
        in_channels: channels of the backbone's last stage.
        num_classes: number of classes.
        distillation: whether there is a second classifier, for distillation.
        kind: ``"hard"`` or ``"soft"``; see
            :func:`mmeformer.classification.distillation.distillation_loss`.
        alpha: share of the teacher in the loss, 0 to 1.
        temperature: of ``soft``.
        kwargs: of mmpretrain's ``ClsHead``, such as ``loss``.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        family: str,
        in_channels: int,
        num_classes: int,
        distillation: bool = True,
        kind: str = "hard",
        alpha: float = 0.5,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if family not in NORMS:
            raise ValueError(f"family must be one of {', '.join(NORMS)}, but is {family!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, but is {num_classes}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, but is {kind!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be at least 0 and at most 1, but is {alpha}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, but is {temperature}")
        self.kind, self.alpha, self.temperature = kind, alpha, temperature
        self.family = family
        self.num_classes = num_classes
        self.norm = NORMS[family](in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        self.fc_dist = nn.Linear(in_channels, num_classes) if distillation else None

    def init_weights(self) -> None:
        """Initialize the classifiers as published (normal, std 0.02), then by ``init_cfg``."""
        if not self.is_init:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        super().init_weights()

    def normalize(self, feats: Sequence[Tensor]) -> Tensor:
        """Normalized last map, with the channels last: (B, C, H, W) -> (B, H, W, C)."""
        x = feats[-1]
        if self.family == "v1":
            return self.norm(x.permute(0, 2, 3, 1))
        return self.norm(x).permute(0, 2, 3, 1)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Normalized mean of the last map: (B, C, H, W) -> (B, C)."""
        return self.normalize(feats).mean((1, 2))

    def classify(self, x: Tensor) -> Tensor:
        """Logits (..., num_classes) of (..., C); with two classifiers, the mean of theirs."""
        return self.fc(x) if self.fc_dist is None else (self.fc(x) + self.fc_dist(x)) / 2

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes)."""
        return self.classify(self.pre_logits(feats))

    def activation_map(self, feats: Sequence[Tensor]) -> Tensor:
        """Logits of every place (B, num_classes, H, W), of which :meth:`forward` is the mean.

        As the classifiers are linear, this is the class activation map itself, not an estimate.
        Source: Zhou et al. (arXiv 1512.04150), section 2.
        """
        return self.classify(self.normalize(feats)).permute(0, 3, 1, 2)

    def loss(
        self,
        feats: Sequence[Tensor],
        data_samples: Sequence[Any],
        teacher: Tensor | None = None,
        **kwargs: Any,
    ) -> dict:
        """Loss on the labels, and on the answers of the teacher.

        Args:
            feats: outputs of the backbone, of which the last one counts.
            data_samples: with ``gt_label``, or ``gt_score`` of mixed images.
            teacher: logits (B, num_classes) of the teacher, or None: then both classifiers learn
                the labels, and the loss is the mean of theirs.
            kwargs: of the loss module.

        Returns:
            ``loss``, or ``loss_cls`` and ``loss_dist``; and accuracies if ``cal_acc`` is set.
        """
        x = self.pre_logits(feats)
        losses = self._get_loss(self.fc(x), data_samples, **kwargs)
        if self.fc_dist is None:
            return losses
        student = self.fc_dist(x)
        if teacher is None:
            alpha = 0.5
            second = self._get_loss(student, data_samples, **kwargs)["loss"]
        else:
            alpha = self.alpha
            second = distillation_loss(student, teacher, self.kind, self.temperature)
        losses["loss_cls"] = losses.pop("loss") * (1 - alpha)
        losses["loss_dist"] = second * alpha
        return losses
