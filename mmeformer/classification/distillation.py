# SPDX-License-Identifier: Apache-2.0
"""Learn from a teacher: what the published classifiers were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmeformer import configs
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.safe_load import TIMM
from mmeformer.deploy import models

KINDS = ("hard", "soft")


def distillation_loss(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Loss of a student on the answers of a teacher.

    ``hard``: cross entropy with the teacher's best class. ``soft``: Kullback-Leibler divergence of
    both distributions at a temperature T, times T^2, as the mean over all numbers.

    Source: DeiT (arXiv 2012.12877, section 4); repository snap-research/EfficientFormer,
    ``util/losses.py``.

    Args:
        student: logits (B, C) of ``fc_dist``.
        teacher: logits (B, C).
        kind: one of :data:`KINDS`.
        temperature: T, of ``soft`` alone.
    """
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(1))
    divergence = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="sum",
        log_target=True,
    )
    return divergence * temperature**2 / student.numel()


class Teacher:
    """A frozen model that answers the batches of the student.

    It is not a ``Module``: its weights belong to no state dict, optimizer, moving average or DDP of
    the model that holds it.

    Args:
        timm: name of a model of timm, such as ``regnety_160.deit_in1k``.
        config: config of a classifier of this project, in place of ``timm``.
        checkpoint: file of the weights; needed for ``config``. None for ``timm`` takes those that
            timm publishes under this name.
        num_classes: of the student; the teacher must have the same.

    Raises:
        ValueError: not exactly one of ``timm`` and ``config``, or no checkpoint for ``config``.
        CheckpointError, FileNotFoundError: the weights cannot be read.
    """

    def __init__(
        self,
        num_classes: int,
        timm: str | None = None,
        config: str | None = None,
        checkpoint: str | None = None,
    ) -> None:
        if (timm is None) == (config is None):
            raise ValueError("model.teacher needs timm= (a name) or config= (a file), not both")
        if config is not None and checkpoint is None:
            raise ValueError(f"model.teacher: the teacher of {config} needs a checkpoint")
        self.title = timm or checkpoint
        self.num_classes = num_classes
        if timm is not None:
            self.model = _timm_model(timm, checkpoint, num_classes)
        elif config is not None:
            self.model = models.build_model(configs.load_config(config), checkpoint)
        self.model.eval().requires_grad_(False)
        self._checked = False

    def __deepcopy__(self, memo: dict) -> Teacher:
        """Copies of the student, such as a moving average, share its teacher."""
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalized images (B, 3, H, W).

        Raises:
            ValueError: the teacher has other classes than the student.
        """
        if next(self.model.parameters()).device != images.device:
            self.model.to(images.device)
        logits = self.model(images)
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"the teacher {self.title} has {logits.shape[1]} classes, the model "
                f"{self.num_classes}: use a teacher that was trained on the same classes"
            )
        return logits


def _timm_model(name: str, checkpoint: str | None, num_classes: int) -> nn.Module:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=num_classes)
    source = checkpoint or f"{TIMM}{name}"
    content: Mapping[str, Any] = safe_load.load(source)
    state = content.get("model", content.get("state_dict", content))
    try:
        model.load_state_dict(deepcopy(dict(state)), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the teacher's weights {source} do not fit timm's {name}: {error}"
        ) from error
    return model
