# SPDX-License-Identifier: Apache-2.0
"""Our backbones run the reference's way, as the baseline of the measurements.

Weights and results are the same (up to rounding), but the computation is that of
snap-research/EfficientFormer downstream (``detection/`` and ``segmentation/``). The bias matrix is
expanded and resized by bicubic interpolation in every forward pass. The logits of all queries are
one tensor; scale, bias and talking heads (as convolutions) take a pass each. Pooling and the norms
of whole maps are PyTorch's on every device. Convolutions add their bias also before a norm. Maps
are NCHW, and nothing is folded or recomputed.
"""

from __future__ import annotations

from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn

from mmeformer.backbones import efficientformer, efficientformer_v2
from mmeformer.layers.attention import TalkingHead
from mmeformer.layers.attention_bias import AttentionBias
from mmeformer.layers.blocks import ConvNorm, LayerScale, MapNorm


def attend(
    query,
    key,
    value,
    bias,
    size,
    scale,
    query_stride=1,
    mix_logits=None,
    mix_attention=None,
    with_cp=False,
):
    """:func:`mmeformer.layers.attention.attend` for all queries at once, one pass per operation."""
    logits = (query @ key.transpose(2, 3)) * scale + bias.compute(tuple(size))
    if mix_logits is not None:
        logits = mix_logits(logits)
    attention = logits.softmax(dim=-1)
    if mix_attention is not None:
        attention = mix_attention(attention)
    return attention @ value


def average_neighbors(x):
    """:func:`mmeformer.layers.blocks.average_neighbors` by PyTorch's pooling."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def mix(head, x):
    """:meth:`mmeformer.layers.attention.TalkingHead.mix` as a convolution, without the bias."""
    return F.conv2d(x, head.weight)


def conv_norm(block, x):
    """:meth:`mmeformer.layers.blocks.ConvNorm.forward`, bias included."""
    return block.act(block.bn(block.conv(x)))


def scale_channels(scale, x):
    """:meth:`mmeformer.layers.blocks.LayerScale.forward` in the type of the factors."""
    return x * (scale.gamma[:, None, None] if scale.channel_dim == 1 else scale.gamma)


def from_heads(x, size):
    """:func:`mmeformer.backbones.efficientformer_v2.from_heads` in NCHW."""
    return x.transpose(2, 3).flatten(1, 2).unflatten(2, size)


class ReferenceWay(nn.Module):
    """Runs a backbone built with ``bias_resize="matrix"`` in the reference's way."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        biases = [module for module in backbone.modules() if isinstance(module, AttentionBias)]
        if any(bias.resize != "matrix" for bias in biases):
            raise ValueError("build the backbone with bias_resize='matrix'")
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with (
            patch.object(efficientformer, "attend", attend),
            patch.object(efficientformer_v2, "attend", attend),
            patch.object(efficientformer, "average_neighbors", average_neighbors),
            patch.object(MapNorm, "forward", nn.GroupNorm.forward),
            patch.object(ConvNorm, "forward", conv_norm),
            patch.object(LayerScale, "forward", scale_channels),
            patch.object(efficientformer_v2, "from_heads", from_heads),
            patch.object(TalkingHead, "mix", mix),
            patch.object(TalkingHead, "forward", nn.Conv2d.forward),
        ):
            return self.backbone.pyramid(x)
