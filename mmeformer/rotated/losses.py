# SPDX-License-Identifier: Apache-2.0
"""Rotated IoU loss that runs on every device."""

import torch
from mmdet.models.losses.utils import weighted_loss
from torch import Tensor, nn

from mmeformer.registry import MODELS

from mmeformer.ops.iou import rotated_iou

__all__ = ["RotatedIoULoss"]

_MODES = {
    "linear": lambda iou: 1 - iou,
    "square": lambda iou: 1 - iou**2,
    "log": lambda iou: -iou.log(),
}


@weighted_loss
def _rotated_iou_loss(pred: Tensor, target: Tensor, mode: str, eps: float) -> Tensor:
    """Loss ``(N,)`` of each pair of boxes ``(N, 5)``; the decorator weights and reduces it."""
    return _MODES[mode](rotated_iou(pred, target).clamp(min=eps))


@MODELS.register_module()
class RotatedIoULoss(nn.Module):
    """IoU loss of aligned pairs of rotated boxes.

    Arguments and values as ``mmrotate.RotatedIoULoss``, whose operator has no CPU kernel and is
    known for NaN at touching and degenerate boxes. Here value and gradient are finite everywhere,
    in float32 under autocast.

    A pair with less than ``eps`` IoU has the constant loss of ``eps`` and no gradient: nothing says
    in which direction to move, and towards zero the gradient of the logarithm grows without bound.
    With ATSS the anchor's centre lies inside its box, so predictions start with an overlap.

    Source: Yu et al., "UnitBox: An Advanced Object Detection Network", ACM MM 2016 (the logarithm).

    Args:
        mode (str): ``"log"``: ``-log(IoU)``; ``"linear"``: ``1 - IoU``; ``"square"``:
            ``1 - IoU ** 2``. Defaults to ``"log"``.
        eps (float): Smallest IoU that counts. Defaults to 1e-6.
        reduction (str): ``"none"``, ``"mean"`` or ``"sum"``. Defaults to ``"mean"``.
        loss_weight (float): Factor of the loss. Defaults to 1.

    Raises:
        ValueError: If ``mode`` is unknown.
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
        """Weighted and reduced loss.

        Args:
            pred (Tensor): ``(N, 5)``: cx, cy, w, h in pixels, angle in radians. N may be 0: with an
                ``avg_factor`` the loss is then 0 and its gradient too.
            target (Tensor): ``(N, 5)``.
            weight (Tensor, optional): ``(N,)``, or ``(N, 5)`` of which each row's mean is taken.
            avg_factor (float | Tensor, optional): Divisor of the sum, in place of the mean.
            reduction_override (str, optional): In place of ``reduction``.

        Returns:
            Tensor: Scalar, or ``(N,)`` without reduction.
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
