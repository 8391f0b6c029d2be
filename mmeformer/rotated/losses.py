# SPDX-License-Identifier: Apache-2.0
"""Rotated IoU loss for all devices."""

import torch
from mmdet.models.losses.utils import weighted_loss
from torch import Tensor, nn

from mmeformer.ops.iou import rotated_iou
from mmeformer.registry import MODELS

__all__ = ["RotatedIoULoss"]

_MODES = {
    "linear": lambda iou: 1 - iou,
    "square": lambda iou: 1 - iou**2,
    "log": lambda iou: -iou.log(),
}


@weighted_loss
def _rotated_iou_loss(pred: Tensor, target: Tensor, mode: str, eps: float) -> Tensor:
    """Loss (N,) of pairs of boxes (N, 5); the decorator weights and reduces it."""
    return _MODES[mode](rotated_iou(pred, target).clamp(min=eps))


@MODELS.register_module()
class RotatedIoULoss(nn.Module):
    """IoU loss of aligned pairs of rotated boxes.

    Arguments and values as in ``mmrotate.RotatedIoULoss``, whose operator has no CPU kernel and can
    return NaN for touching and degenerate boxes. Here value and gradient are always finite. They
    are computed in float32, also under autocast.

    A pair with an IoU below ``eps`` has the constant loss of ``eps`` and no gradient: there is no
    direction to move in, and the gradient of the logarithm is unbounded near zero. With ATSS the
    center of the anchor is inside its box, so that predictions start with an overlap.

    Source: Yu et al., "UnitBox: An Advanced Object Detection Network", ACM MM 2016 (the logarithm).

    Args:
        mode: ``"log"``: ``-log(IoU)``; ``"linear"``: ``1 - IoU``; ``"square"``: ``1 - IoU ** 2``.
        eps: lower bound of the IoU.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        loss_weight: factor of the loss.

    Raises:
        ValueError: ``mode`` is unknown.
    """

    def __init__(
        self,
        mode: str = "log",
        eps: float = 1e-6,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {sorted(_MODES)}, got {mode!r}")
        self.mode = mode
        self.eps = eps
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compute the weighted and reduced loss.

        Args:
            pred: (N, 5): cx, cy, w, h in pixels, angle in radians. If N is 0 and ``avg_factor`` is
                given, loss and gradient are 0.
            target: (N, 5).
            weight: (N,), or (N, 5), of which the mean of each row is used.
            avg_factor: divisor of the sum, instead of the mean.
            reduction_override: replaces ``reduction``.

        Returns:
            Scalar, or (N,) without reduction.
        """
        if weight is not None and weight.dim() > 1:
            weight = weight.mean(-1)
        with torch.autocast(pred.device.type, enabled=False):
            loss = _rotated_iou_loss(
                pred,
                target,
                weight,
                reduction=reduction_override or self.reduction,
                avg_factor=avg_factor,
                mode=self.mode,
                eps=self.eps,
            )
        return self.loss_weight * loss
