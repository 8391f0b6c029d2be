# SPDX-License-Identifier: Apache-2.0
"""Light GFL head: mmdet's with one tower for classes and boxes."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import Scale
from mmdet.models.dense_heads import GFLHead
from mmdet.models.utils import multi_apply
from torch import Tensor, nn

from mmeformer.lite import ACTIVATION, NORM, LiteTower
from mmeformer.registry import MODELS

__all__ = ["LiteGFLHead"]


@MODELS.register_module()
class LiteGFLHead(GFLHead):
    """mmdet's ``GFLHead`` with other layers; targets, losses and predictions are mmdet's.

    One :class:`mmeformer.lite.LiteTower` and two 1x1 convolutions, shared by all levels.

    Source: PicoDet (arXiv 2111.00902) for features that classes and boxes share.

    Args:
        num_classes: number of classes, without background.
        in_channels: channels of each level of the neck.
        feat_channels: channels of the tower.
        stacked_convs: layers of the tower.
        norm_cfg, act_cfg: configs of the tower's norms and activations.
        kwargs: all others of mmdet's ``GFLHead``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stacked_convs: int = 2,
        norm_cfg: dict = NORM,
        act_cfg: dict = ACTIVATION,
        **kwargs: Any,
    ) -> None:
        self.act_cfg = act_cfg
        super().__init__(
            num_classes, in_channels, stacked_convs=stacked_convs, norm_cfg=norm_cfg, **kwargs
        )

    def _init_layers(self) -> None:
        """Build the tower, the two predictors and the factor of each level's distances."""
        if self.num_base_priors != 1:
            raise ValueError(
                f"anchor_generator must give one anchor per location, not {self.num_base_priors}"
            )
        levels = self.prior_generator.num_levels
        self.tower = LiteTower(
            self.in_channels,
            self.feat_channels,
            self.stacked_convs,
            levels,
            self.norm_cfg,
            self.act_cfg,
            self.conv_cfg,
        )
        self.gfl_cls = nn.Conv2d(self.feat_channels, self.cls_out_channels, 1)
        self.gfl_reg = nn.Conv2d(self.feat_channels, 4 * (self.reg_max + 1), 1)
        self.scales = nn.ModuleList(Scale(1.0) for _ in range(levels))

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute scores and distributions of the four distances, of all levels.

        Args:
            x: levels (B, in_channels, H_i, W_i).

        Returns:
            ``cls_scores``, list of logits (B, num_classes, H_i, W_i); ``bbox_preds``, list of
            logits (B, 4 * (reg_max + 1), H_i, W_i).
        """
        return multi_apply(self.forward_single, x, self.scales, range(len(self.scales)))

    def forward_single(self, x: Tensor, scale: Scale, level: int) -> tuple[Tensor, Tensor]:
        """Compute both maps of one level; shapes as in :meth:`forward`."""
        x = self.tower(x, level)
        return self.gfl_cls(x), scale(self.gfl_reg(x)).float()
