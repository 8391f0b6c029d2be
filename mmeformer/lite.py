# SPDX-License-Identifier: Apache-2.0
"""Neck and tower of light detectors.

Shared by detection and rotated detection; needs mmdet.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mmcv.cnn import (
    ConvModule,
    build_activation_layer,
    build_conv_layer,
    build_norm_layer,
)
from mmdet.models.necks import CSPNeXtPAFPN
from torch import Tensor, nn

from mmeformer.registry import MODELS

__all__ = ["ACTIVATION", "NORM", "LitePAFPN", "LiteTower"]

NORM = dict(type="BN")
ACTIVATION = dict(type="ReLU")
"""Part of the convolution before it in every runtime, also with integers."""


@MODELS.register_module()
class LitePAFPN(CSPNeXtPAFPN):
    """mmdet's ``CSPNeXtPAFPN`` with depthwise-separable convolutions and one width for all levels.

    A 1x1 convolution brings every level of the backbone to ``out_channels``; features then pass
    from coarse to fine and back (PAFPN), through one CSP layer per step, whose outputs are the
    levels. mmdet's neck has another convolution behind each, and takes the widths of the backbone
    in place of one width.

    Source: RTMDet (arXiv 2212.07784, section 3.2) for the neck, PicoDet (arXiv 2111.00902,
    section 3.2, CSP-PAN) for depthwise convolutions and one width.

    Args:
        in_channels: channels of each level of the backbone, finest first.
        out_channels: channels of each level inside and behind the neck.
        num_csp_blocks: blocks of every CSP layer.
        expand_ratio: hidden channels of a CSP layer as a share of ``out_channels``.
        norm_cfg: config of the norms.
        act_cfg: config of the activations.
        init_cfg: default: mmdet's.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_csp_blocks: int = 1,
        expand_ratio: float = 0.5,
        norm_cfg: dict = NORM,
        act_cfg: dict = ACTIVATION,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            [out_channels] * len(in_channels),
            out_channels,
            num_csp_blocks=num_csp_blocks,
            use_depthwise=True,
            expand_ratio=expand_ratio,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            **kwargs,
        )
        self.laterals = nn.ModuleList(
            ConvModule(channels, out_channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)
            for channels in in_channels
        )
        # The convolutions of a tower follow.
        self.out_convs = nn.ModuleList(nn.Identity() for _ in in_channels)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Levels (B, in_channels[i], H_i, W_i) -> levels (B, out_channels, H_i, W_i).

        Every level has half the rows and columns of the one before it.
        """
        return super().forward(
            tuple(layer(level) for layer, level in zip(self.laterals, inputs, strict=True))
        )


class LiteTower(nn.Module):
    """3x3 convolutions shared by all levels, with norms of each level's own.

    Levels differ in their statistics, so a batch norm that all share would be wrong in inference.
    From scratch, convolutions over all channels learn much faster than depthwise-separable ones.
    One tower for all predictions is as accurate as one per prediction (docs/light.md).

    Source: RTMDet (arXiv 2212.07784, section 3.2: shared convolutions, separate batch norms).

    Args:
        in_channels: of each level.
        channels: of the tower.
        depth: number of layers: convolution, norm, activation.
        levels: number of levels.
        norm_cfg, act_cfg, conv_cfg: configs of norms (None: none), activations and convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        levels: int,
        norm_cfg: dict | None,
        act_cfg: dict,
        conv_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * depth
        self.convs = nn.ModuleList(
            build_conv_layer(conv_cfg, before, after, 3, padding=1, bias=norm_cfg is None)
            for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(
                build_norm_layer(norm_cfg, channels)[1] if norm_cfg else nn.Identity()
                for _ in range(depth)
            )
            for _ in range(levels)
        )
        self.act = build_activation_layer(act_cfg)

    def forward(self, x: Tensor, level: int) -> Tensor:
        """(B, in_channels, H, W) of a level -> (B, channels, H, W)."""
        norms: Any = self.norms[level]
        for conv, norm in zip(self.convs, norms, strict=True):
            x = self.act(norm(conv(x)))
        return x

    def unshared(self) -> _LevelTowers:
        """The same for inference, with convolutions of each level's own to merge norms into."""
        towers = []
        norms: Any
        for norms in self.norms:
            layers: list[nn.Module] = []
            for conv, norm in zip(self.convs, norms, strict=True):
                layers += [conv, norm, self.act]
            towers.append(copy.deepcopy(nn.Sequential(*layers)))
        return _LevelTowers(towers)


class _LevelTowers(nn.ModuleList):
    """A tower for every level."""

    def forward(self, x: Tensor, level: int) -> Tensor:
        """See :meth:`LiteTower.forward`."""
        found: Tensor = self[level](x)
        return found
