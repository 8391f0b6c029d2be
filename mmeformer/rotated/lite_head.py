# SPDX-License-Identifier: Apache-2.0
"""Light GFL head for rotated boxes: with one tower for classes and boxes."""

from __future__ import annotations

from typing import Any

from mmdet.models.utils import multi_apply
from torch import Tensor

from mmeformer.lite import ACTIVATION, NORM, LiteTower
from mmeformer.registry import MODELS

from .gfl_head import RotatedGFLHead

__all__ = ["RotatedLiteGFLHead"]


@MODELS.register_module()
class RotatedLiteGFLHead(RotatedGFLHead):
    """:class:`RotatedGFLHead` with other layers; targets, losses and predictions are the same.

    One :class:`mmeformer.lite.LiteTower` and two 1x1 convolutions, shared by all levels.

    Args:
        num_classes: number of classes, without background.
        in_channels: channels of each level of the neck.
        feat_channels: channels of the tower.
        stacked_convs: layers of the tower.
        norm_cfg, act_cfg: configs of the tower's norms and activations.
        kwargs: all others of :class:`RotatedGFLHead`.
    """

    predictor_size = 1

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 96,
        stacked_convs: int = 2,
        norm_cfg: dict | None = NORM,
        act_cfg: dict = ACTIVATION,
        **kwargs: Any,
    ) -> None:
        self.act_cfg = act_cfg
        super().__init__(
            num_classes, in_channels, feat_channels, stacked_convs, norm_cfg=norm_cfg, **kwargs
        )

    def _init_towers(self) -> None:
        """Build one tower for classes and boxes."""
        self.tower = LiteTower(
            self.in_channels,
            self.feat_channels,
            self.stacked_convs,
            self.prior_generator.num_levels,
            self.norm_cfg,
            self.act_cfg,
            self.conv_cfg,
        )

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """See :meth:`RotatedGFLHead.forward`."""
        return multi_apply(self.forward_single, x, range(len(x)))

    def forward_single(  # type: ignore[override]
        self, x: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        """Compute scores and box distributions of one level."""
        x = self.tower(x, level)
        return self.gfl_cls(x), self.gfl_reg(x)
