# SPDX-License-Identifier: Apache-2.0
"""Light RTMDet-Ins head, for boxes and masks: mmdet's with one tower for all predictions."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import DepthwiseSeparableConvModule
from mmdet.models.dense_heads import RTMDetInsHead
from mmdet.models.utils import multi_apply
from torch import Tensor, nn

from mmeformer.lite import ACTIVATION, NORM, LiteTower
from mmeformer.registry import MODELS

__all__ = ["LiteRTMDetInsHead"]


@MODELS.register_module()
class LiteRTMDetInsHead(RTMDetInsHead):
    """mmdet's ``RTMDetInsHead`` with other layers; targets, losses and predictions are mmdet's.

    A :class:`mmeformer.lite.LiteTower` and 1x1 convolutions, shared by all levels, give each
    location its scores, its distances to the four edges of a box, and the weights of three small
    1x1 convolutions. These turn features that all objects of an image share, at the finest stride,
    and the position relative to the location into the object's mask.

    Source: RTMDet (arXiv 2212.07784, section 3.4), CondInst (arXiv 2003.05664, section 3.1).

    Args:
        num_classes: number of classes, without background.
        in_channels: channels of each level of the neck.
        feat_channels: channels of the tower and of the shared features' layers.
        stacked_convs: layers of the tower.
        mask_convs: layers of the shared features.
        norm_cfg, act_cfg: configs of norms and activations.
        kwargs: all others of mmdet's ``RTMDetInsHead``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stacked_convs: int = 2,
        mask_convs: int = 4,
        norm_cfg: dict = NORM,
        act_cfg: dict = ACTIVATION,
        **kwargs: Any,
    ) -> None:
        self.mask_convs = mask_convs
        super().__init__(
            num_classes,
            in_channels,
            with_objectness=False,
            stacked_convs=stacked_convs,
            pred_kernel_size=1,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            **kwargs,
        )

    def _init_layers(self) -> None:
        """Build mmdet's layers, then replace its towers by one and its shared features' layers."""
        super()._init_layers()
        del self.cls_convs, self.reg_convs, self.kernel_convs
        self.tower = LiteTower(
            self.in_channels,
            self.feat_channels,
            self.stacked_convs,
            len(self.prior_generator.strides),
            self.norm_cfg,
            self.act_cfg,
            self.conv_cfg,
        )
        self.mask_head.stacked_convs = nn.Sequential(
            *(
                DepthwiseSeparableConvModule(
                    self.in_channels if index == 0 else self.feat_channels,
                    self.feat_channels,
                    5,
                    padding=2,
                    norm_cfg=self.norm_cfg,
                    act_cfg=self.act_cfg,
                )
                for index in range(self.mask_convs)
            )
        )

    def init_weights(self) -> None:
        """Initialize as mmdet; distances begin at one stride, as none can fall below zero."""
        super().init_weights()
        nn.init.ones_(self.rtm_reg.bias)

    def forward(
        self, x: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Compute scores, distances and weights of all levels, and the shared features.

        Args:
            x: levels (B, in_channels, H_i, W_i).

        Returns:
            ``cls_scores``, logits (B, num_classes, H_i, W_i) of each level; ``bbox_preds``,
            distances (B, 4, H_i, W_i) in pixels; ``kernel_preds`` (B, num_gen_params, H_i, W_i);
            ``mask_feat`` (B, num_prototypes, H_0, W_0).
        """
        maps = multi_apply(self.forward_single, x, range(len(x)))
        scores, distances, kernels = map(tuple, maps)
        return scores, distances, kernels, self.mask_head(x)

    def forward_single(self, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the three maps of one level; shapes as in :meth:`forward`."""
        x = self.tower(x, level)
        distances = self.scales[level](self.rtm_reg(x)).float().relu()
        distances = distances * self.prior_generator.strides[level][0]
        return self.rtm_cls(x), distances, self.rtm_kernel(x)
